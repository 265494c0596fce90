"""Train from Python: `run(load_config(["algorithm=dapo", "run.steps=2"]))` in a script, a notebook or a thread.

The run is the same as from the command line, with the same launcher, in its own process. So it does not affect the
caller's signals, threads and event loops, and several runs can follow one another. Imports no torch.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from megatron_fipo.command_line import commands
from megatron_fipo.config import Config, resolved
from megatron_fipo.config.checks import check
from megatron_fipo.config.configure import RESOLVED
from megatron_fipo.config.configure import load_config as compose
from megatron_fipo.errors import FipoError, RunFailed
from megatron_fipo.launch.local import STOPPED
from megatron_fipo.processes.ending import LAUNCHER_PARENT
from megatron_fipo.processes.reasons import Listener
from megatron_fipo.runs.result import RunResult, read_run

_SAME_CTRL_C_S = 0.5
_NOT_OF_A_RUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def load_config(overrides: Sequence[str] = ()) -> Config:
    """Return the configuration for overrides such as ["algorithm=dapo", "run.steps=2"]. You may then change its fields.

    Files on this machine, such as the model and the problems, are checked later, by `run`.

    Raises:
        ConfigError: a key, a value or a combination that cannot run.
    """
    config = compose(overrides)
    check(config, local=False)
    return config


def run(config: Config, *, echo: Callable[[str], object] | None = print) -> RunResult:
    """Train with this configuration, and wait for the end. A run in the same run.directory resumes from its checkpoint.

    `echo` is called with each line that the run prints; with None nothing is printed. If the call is interrupted
    (Ctrl-C, or a notebook's button), the run saves a checkpoint, and then KeyboardInterrupt is raised. A second
    interrupt kills the run at once.

    Raises:
        FipoError: the configuration cannot run, or the run failed; with the reason.
    """
    config = resolved.typed(asdict(config))
    check(config, local=True)
    directory = Path(config.run.directory).resolve()
    status, reason = run_in_process(config, echo or (lambda line: None), [commands.FROM_PYTHON])
    if status not in (0, STOPPED):
        raise RunFailed(reason or f"the run in {directory} ended with status {status}; its last lines say why", status)
    return read_run(directory)


def run_in_process(config: Config, echo: Callable[[str], object], command: Sequence[str]) -> tuple[int, str]:
    """Run in a separate process. Return the exit status, and the reason of a failure if it was reported.

    `command` is shown in place of the command that a user would type.

    Raises:
        KeyboardInterrupt: after the run has ended, saved or killed.
    """
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="megatron_fipo-configuration-")))
        resolved.write(place / "config.yaml", config)
        listener = stack.enter_context(Listener())
        variables = {name: value for name, value in os.environ.items() if name not in _NOT_OF_A_RUN}
        variables |= listener.environment() | commands.environment(command)
        variables |= {LAUNCHER_PARENT: str(os.getpid()), "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_fipo.train", RESOLVED, str(place / "config.yaml")],
            env=variables,
            pass_fds=[listener.descriptor],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that only this process passes a terminal's Ctrl-C on to it
        )
        stack.enter_context(process)
        stack.callback(_end, process)
        status = _follow(process, echo)
        heard = listener.heard()
    return status, heard.text if heard else ""


def _follow(process: subprocess.Popen[str], echo: Callable[[str], object]) -> int:
    assert process.stdout is not None
    interrupted_at: float | None = None
    while True:
        try:
            for line in process.stdout:
                echo(line.rstrip("\n"))
            status = process.wait()
            break
        except KeyboardInterrupt:
            if interrupted_at is None:
                process.send_signal(signal.SIGINT)
                interrupted_at = time.monotonic()
            elif time.monotonic() - interrupted_at > _SAME_CTRL_C_S:
                raise  # `_end` then kills the remaining processes
    if interrupted_at is not None:
        raise KeyboardInterrupt
    return status


def _end(process: subprocess.Popen[str]) -> None:
    """Kill the launcher if it is still running. The kernel then kills the processes that it has started."""
    if process.poll() is None:
        process.kill()


__all__ = ["Config", "FipoError", "RunResult", "load_config", "read_run", "run"]
