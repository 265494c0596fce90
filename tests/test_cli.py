"""Why: the command is what a new user types first, and doctor what they are told to run when nothing works.

Not covered: doctor beside a GPU, and what its mends are worth.
"""

import re
import resource
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

from megatron_fipo import doctor
from megatron_fipo.cli import COMMANDS
from megatron_fipo.doctor import Finding


def run(*arguments: str, directory: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_fipo", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def by_name(findings: list[Finding], what: str) -> Finding:
    return next(finding for finding in findings if finding.what.startswith(what))


def test_help_lists_every_command_and_imports_none() -> None:
    shown = run("--help")
    assert shown.returncode == 0 and all(f"  {name} " in shown.stdout for name in COMMANDS)
    check = "import sys; from megatron_fipo.cli import main; main(); print('torch' in sys.modules)"
    quick = subprocess.run(
        [sys.executable, "-c", check, "--help"], capture_output=True, text=True, timeout=60, check=True
    )
    assert quick.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_is_its_own(command: str) -> None:
    """On standard output, with status 0, and with nothing set up. Not that it says all that there is to say."""
    shown = run(command, "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"megatron-fipo {command}" in shown.stdout.partition("example")[0]


def test_help_of_a_section_is_there_whichever_command_is_asked() -> None:
    for command in ("preflight", "evaluate"):
        assert run(command, "--help", "cluster.trainer_nodes").stdout.startswith("  cluster.trainer_nodes=")


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        (["inspect", "runs/mine", "--heldout"], "did you mean --held-out?"),
        (["inspect"], "required: RUN"),
        (["compare", "runs/mine", "--baselin-of", "x"], "did you mean --baseline?"),
        (["export", "--help-me", "runs/mine"], "--help-me: no such option; there are step=…"),
        (["doctor", "--fix"], "doctor takes no --fix"),
        (["inspect", "nowhere"], "nowhere: no such directory"),
    ],
)
def test_a_wrong_argument_is_one_line(typed: list[str], answer: str, tmp_path: Path) -> None:
    refused = run(*typed, directory=tmp_path)
    assert refused.returncode in (1, 2) and refused.stdout == ""
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    assert answer in refused.stderr


def test_version() -> None:
    assert run("--version").stdout == f"megatron-fipo {version('megatron_fipo')}\n"


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("trian", "did you mean train?"),
        ("--vresion", "did you mean --version?"),
        ("xyzzy", "there are train, evaluate"),
    ],
)
def test_an_unknown_command_is_one_line(typed: str, answer: str) -> None:
    refused = run(typed, "experiment=tiny")
    assert refused.returncode == 2 and refused.stdout == ""
    assert refused.stderr.startswith(f"error: megatron-fipo {typed}: no such command; {answer}")
    assert refused.stderr.count("\n") == 1


def test_a_command_gets_the_other_arguments() -> None:
    refused = run("train", "run.stepz=3")
    assert refused.returncode == 2 and "run.stepz" in refused.stderr and "run.steps" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_doctor_finds_this_environment_sound(tmp_path: Path) -> None:
    """The one that the tests run in, which is what `make env` makes. A long path must not break a command in two."""
    directory = tmp_path / ("long" * 40)
    directory.mkdir()
    shown = run("doctor", directory=directory)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert re.search(r"ok .*packages .*all of setup.py's", shown.stdout) and "-e '.[cuda]'" in shown.stdout


def test_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"hydra-core": None, "torch": "1.0"}.get(name, real(name)))
    found = by_name(list(doctor.packages()), "packages")
    assert "hydra-core>=1.3 (missing)" in found.found and "torch==2.13.0 (1.0)" in found.found
    assert found.mend and found.is_needed


def test_doctor_says_when_room_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LEAST_DISK", "LEAST_SHARED", "LEAST_MEMORY"):
        monkeypatch.setattr(doctor, name, 0)
    assert not any(finding.mend for finding in doctor.memory(tmp_path, tmp_path)), "the control"
    for name in ("LEAST_DISK", "LEAST_SHARED"):
        monkeypatch.setattr(doctor, name, 1 << 60)
    monkeypatch.setattr(doctor, "LEAST_MEMORY", psutil.virtual_memory().total + 1)
    assert all(finding.mend for finding in doctor.memory(tmp_path, tmp_path))
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 256))
    assert f"ulimit -n {doctor.LEAST_FILES}" in by_name(list(doctor.limits()), "open files").mend


def test_doctor_says_when_the_hub_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(doctor, "HUB", listener.getsockname())
        assert by_name(list(doctor.network()), "model hub").mend == ""
    assert "cannot be reached" in by_name(list(doctor.network()), "model hub").found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "HF_HUB_OFFLINE" in by_name(list(doctor.network()), "model hub").found
