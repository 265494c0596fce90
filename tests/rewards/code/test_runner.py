"""Why: a right program of a data set's usual style must not be wrong because this is not the judge it was written for.

The programs are our own, so most of this needs no sandbox; each control shows that a wrong one still is wrong.
"""

import fcntl
import os
import sys
import time
from typing import Any

import psutil
import pytest

from megatron_fipo.config.code import CodeConfig
from megatron_fipo.rewards.code.runner import _watch
from megatron_fipo.rewards.code.sandbox import Result, Sandbox, SandboxError, _command, find_sandbox


def sandbox(**changes: Any) -> Sandbox:
    defaults: dict[str, Any] = {"sandbox": "none", "cpu_s": 4.0, "total_s": 60.0}
    settings = CodeConfig(**defaults | changes)
    return Sandbox(_command("none", settings), settings)


def run(program: str, *inputs: Any, function: str | None = None, **changes: Any) -> list[Result]:
    return list(sandbox(**changes).run(program, function, inputs))


def test_a_call_does_not_run_the_main_block() -> None:
    """As in LiveCodeBench: the block reads an input that a call does not have. Dataclasses look for their module."""
    program = (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field\n"
        "@dataclass\nclass Pair:\n    a: int\n    b: list[int] = field(default_factory=list)\n"
        "def f(x): return Pair(x).a\nif __name__ == '__main__':\n    print(f(int(input())))\n"
    )
    assert run(program, [3], function="f") == [Result("exit 0", "3")]
    assert run(program, "4") == [Result("exit 0", "4\n")], "a whole program runs it"


def test_starter_code_needs_no_imports() -> None:
    call = (
        "class Solution:\n    def f(self, a: List[int]) -> Optional[int]:\n        return heappop(a) + math.gcd(4, 6)\n"
    )
    assert run(call, [[1, 2]], function="f") == [Result("exit 0", "3")]
    whole = "from __future__ import annotations\nd = defaultdict(int)\nprint(d[0], inf, pow(2, 3, 5), re.I > 0)"
    assert run(whole, "") == [Result("exit 0", "0 inf 3 True\n")]
    deep = "def f(n): return n and 1 + f(n - 1)\nprint(f(20_000))"
    assert run(deep, "") == [Result("exit 0", "20000\n")]
    assert run("print(unknown)", "")[0].end == "exit 1", "the control"


@pytest.mark.skipif((3, 12) <= sys.version_info < (3, 14), reason="Python's own limit of calls in C is lower")
def test_deep_recursion_has_stack_enough() -> None:
    """Why: a cache's calls take stack, so a right program for a long input ended by signal 11 at 8 MiB of it."""
    deep = "sys.setrecursionlimit(1 << 20)\n@functools.cache\ndef f(n): return n and 1 + f(n - 1)\nprint(f(40_000))"
    assert run(deep, "") == [Result("exit 0", "40000\n")]
    small = sandbox()
    *start, text = small.command
    (result,) = Sandbox((*start, text.replace("RLIMIT_STACK, (stack,", "RLIMIT_STACK, (8 << 20,")), small.limits).run(
        deep, None, ("",)
    )
    assert result.end == "signal 11", "the control"


def test_what_a_program_starts_has_threads() -> None:
    """Why: the C library gives each thread as much address space as the limit of the stack, which was all of it."""
    inner = "import threading; threading.Thread(target=print, args=[5]).start()"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    assert run(program, "") == [Result("exit 0", "5\n")]
    small = sandbox()
    *start, text = small.command
    whole = text.replace('max(request["memory_bytes"] // 4, 8 << 20)', 'request["memory_bytes"]')
    (result,) = Sandbox((*start, whole), small.limits).run(program, None, ("",))
    assert result.end == "exit 1", "the control"


@pytest.mark.parametrize(
    "program",
    [
        "import atexit, io, sys\nout = io.StringIO()\nsys.stdout = out\n"
        "atexit.register(lambda: sys.__stdout__.write(out.getvalue()))\nprint('x')",
        "out = open(1, 'w')\nout.write('x\\n')",
        "import os, io, sys\nsys.stdout = io.TextIOWrapper(open(1, 'wb'))\nprint('x')\nsys.exit(0)",
        "import sys\nsys.__stdout__.write('x\\n')",
    ],
    ids=["atexit", "file", "wrapper", "original"],
)
def test_output_in_buffers_counts(program: str) -> None:
    """Programs of contests write like this for speed, and Python writes their buffers out as it ends."""
    assert run(program, "") == [Result("exit 0", "x\n")]


def test_output_that_goes_on_has_no_more_time() -> None:
    """The deadline was looked at only while nothing could be read."""
    reads, writes = os.pipe()
    fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 1 << 20)
    os.write(writes, b"x" * (1 << 18))
    watched = os.pidfd_open(os.getpid())
    try:
        assert _watch(reads, watched, time.monotonic() - 1, 100_000) == (b"", "time")
        assert _watch(reads, watched, time.monotonic() + 60, 100_000)[1] == "output", "the control"
    finally:
        for descriptor in (reads, writes, watched):
            os.close(descriptor)


def test_a_program_does_not_see_the_other_tests() -> None:
    look = (
        "import sys\nframe, seen = sys._getframe(), []\nwhile frame:\n"
        "    seen += frame.f_locals.get('request', {}).get('inputs', [])\n    frame = frame.f_back\nprint(seen)"
    )
    assert run(look, "a", "b") == [Result("exit 0", "[]\n")] * 2


def test_large_inputs_are_handed_over_in_linear_time() -> None:
    reader = Sandbox(("sh", "-c", "cat > /dev/null; echo '{\"ready\": true}'"), CodeConfig(total_s=60.0))
    given = "x" * (64 << 20)
    before = time.process_time()
    with pytest.raises(SandboxError, match="ended before"):
        list(reader.run("", None, (given,)))
    assert time.process_time() - before < 8, "it copied what was left for every piece"


def test_a_program_ends_with_its_runner() -> None:
    """Without a sandbox there is no namespace that would end it, and it has a session of its own."""
    program = "import time\nif input():\n    time.sleep(60)"
    results = sandbox(cpu_s=100.0, total_s=300.0).run(program, None, ("\n", "sleep\n"))
    assert next(results) == Result("exit 0", "")
    runner = psutil.Process().children()[-1]
    deadline = time.monotonic() + 20
    while not (inside := runner.children()) or time.monotonic() < deadline - 19:
        assert time.monotonic() < deadline, "the program did not start"
        time.sleep(0.05)
    results.close()
    _, alive = psutil.wait_procs(inside, timeout=5)
    for left in alive:
        left.kill()
    assert not alive


def test_the_trial_at_the_start_has_more_time_than_programs() -> None:
    """Why: a run that started on a busy machine was refused, as if it had no sandbox."""
    found = find_sandbox(CodeConfig(sandbox="none", total_s=0.001))
    assert next(found.run("print(1)", None, ("",))).end in ("time", "total time"), "the control: programs have theirs"
