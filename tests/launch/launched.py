"""The one-machine launcher in a process of its own, with a small script as its ranks."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil

LAUNCHER = """
import json, sys
from megatron_fipo.config.configure import refusals_in_one_line
from megatron_fipo.launch.local import launch
world_size, directory, script, grace_s = json.loads(sys.argv[1])
with refusals_in_one_line():
    status = launch(world_size, directory, command=[sys.executable, "-c", script], grace_s=grace_s)
    assert "torch" not in sys.modules
    sys.exit(status)
"""

PREAMBLE = """
import os, signal, subprocess, sys, time
from pathlib import Path
rank, directory = int(os.environ["RANK"]), Path(os.environ["TEST_DIRECTORY"])
def started():
    (directory / f".pid-{rank}").write_text(str(os.getpid()))
    (directory / f".pid-{rank}").rename(directory / f"pid-{rank}")
"""


class Launched:
    """A launcher process and the ranks that it starts."""

    def __init__(self, directory: Path, world_size: int, script: str, grace_s: float):
        self.directory, self.world_size = directory, world_size
        arguments = json.dumps([world_size, str(directory), PREAMBLE + script, grace_s])
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, arguments],
            env={**os.environ, "TEST_DIRECTORY": str(directory)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_until_started(self) -> None:
        """Wait until every rank has called started()."""
        files = [self.directory / f"pid-{rank}" for rank in range(self.world_size)]
        self.wait_for(lambda: all(file.exists() and file.read_text() for file in files))

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline, "waited 10 s in vain"
            time.sleep(0.01)

    def finish(self) -> tuple[int, str, str]:
        """Return exit status, standard output and standard error. All started ranks have ended by then."""
        output, errors = self.process.communicate(timeout=20)
        return self.process.returncode, output, errors

    def pids(self) -> list[int]:
        return [int(file.read_text()) for file in self.directory.glob("pid-*")]

    def alive(self) -> list[int]:
        return [pid for pid in self.pids() if is_running(pid)]


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
