"""Run a command and report its own CPU time and memory, independently of other processes that were started before.

The kernel's figures for children are totals over all of them, and the peak of a child begins with the memory of the
process that started it. So a small process starts the command, waits for it, and reports only on it.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_STARTER = """
import json, os, subprocess, sys
command = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(command.pid, 0)
found = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]
with open(sys.argv[1], "w") as report:
    json.dump(found, report)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended: exit status (negative for a signal), output, CPU seconds, peak resident bytes."""

    returncode: int
    stdout: str
    stderr: str
    cpu_seconds: float
    peak_bytes: int


def run_measured(command: Sequence[str | Path], timeout_s: float, **options: Any) -> Ended:
    """Run a command until it ends. `options` are those of subprocess.Popen. Children that it waits for are included.

    Raises subprocess.TimeoutExpired after `timeout_s`. The command and all its children have then been killed.
    """
    with tempfile.TemporaryDirectory(prefix="usage-") as directory:
        report = Path(directory, "report")
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _STARTER, report, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            **options,
        )
        try:
            stdout, stderr = process.communicate(timeout=timeout_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        status, cpu_seconds, peak_bytes = json.loads(report.read_text())
    return Ended(status, stdout, stderr, cpu_seconds, peak_bytes)
