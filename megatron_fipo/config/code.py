"""Section of the schema: how programs that the model writes are judged, with reward.rule=code."""

from dataclasses import dataclass

from megatron_fipo.config.settings import setting

PROGRAM = "{program}"
"""The placeholder of the program in `reward.code.template`."""

SANDBOX_START_S = 10.0
"""Time for a sandbox to start and to end, which reward.timeout_s has to leave beside reward.code.total_s."""


@dataclass
class CodeConfig:
    """Tests of a program in a sandbox without network and files. docs/rewards.md has the format of tests."""

    sandbox: str = setting(
        "auto",
        "auto: bubblewrap if it is installed, else namespaces; bubblewrap: bwrap; namespaces: unshare, of util-linux; "
        "none: limits of time and memory only. With none, what the model writes can read and change every file that "
        "the run can, and reach the network.",
        choices=("auto", "bubblewrap", "namespaces", "none"),
    )
    tests: str = setting(
        "input_output",
        "Column of the tests: an object, or its JSON text, with the lists inputs and outputs, and fn_name if the tests "
        "call a function. A dot selects a field of a nested column.",
    )
    pattern: str | None = setting(
        None,
        "A regular expression with one group, which finds the program in a response; the last match counts. null: the "
        "last block of code in ``` fences, or else the whole response.",
    )
    template: str = setting(
        PROGRAM, f"The Python that is run; the program replaces {PROGRAM}. Useful if the model writes only a part."
    )
    partial_credit: bool = setting(
        False,
        "true: the accuracy is the share of tests that the program passes; false: a program is right if it passes "
        "all, and its first failed test is its last.",
    )
    cpu_s: float = setting(
        4.0,
        "CPU time of one test, in seconds. A test may also take twice as long plus one second by the clock.",
        above=0,
        maximum=600,
    )
    total_s: float = setting(
        20.0,
        "Longest time for all tests of a response, in seconds by the clock. The tests that are left count as failed.",
        above=0,
        maximum=3000,
    )
    memory_mib: int = setting(512, "Address space of each process of a program, in MiB.", minimum=32, maximum=4096)
    processes: int = setting(
        8,
        "Largest number of processes and threads of a program. sandbox=none does not limit it.",
        minimum=1,
        maximum=256,
    )
    output_kib: int = setting(
        1024, "Largest output of one test, in KiB. A program that writes more is ended.", minimum=1, maximum=64 * 1024
    )
    scratch_mib: int = setting(
        16, "Size of /tmp, the only place where a program can write, and of one file, in MiB.", minimum=1, maximum=1024
    )
