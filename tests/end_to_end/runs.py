"""Starts training runs as a user does, and reads what they wrote."""

import contextlib
import getpass
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from megatron_fipo.engines.pool import EnginePool

ROOT = Path(__file__).resolve().parents[2]

SMALL = (
    "algorithm.prompts_per_step=8",
    "algorithm.samples_per_prompt=4",
    "algorithm.mini_batch_prompts=4",
    "algorithm.filter_groups.enable=false",
    "run.steps=2",
    "optimizer.schedule=constant",
    "validation.every=0",
    "checkpoint.every=0",
    "tracking.samples_per_step=64",
)
"""The default with small batches, and a rate that more steps do not change.

Without dynamic sampling every prompt is trained on, whatever its samples are.
"""


def on(server: EnginePool) -> tuple[str, ...]:
    """The overrides of a run that samples on this server, whose token it needs."""
    address = f"rollout.addresses=[{server.servers[0].url}]"
    return ("rollout.servers=0", address, "rollout.weight_transfer=process_group")


def start(
    directory: Path,
    *overrides: str,
    token: str = "",
    module: str = "megatron_fipo.train",
    environment: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """`python -m megatron_fipo.train` with the overrides, in its own session, output to directory/output.txt.

    `token` is that of the servers in rollout.addresses, if there are any; `environment` adds variables.
    """
    directory.mkdir(parents=True, exist_ok=True)
    trains = module.endswith(".train")  # of the package, or over the stand-ins of te_on_cpu
    command = [sys.executable, "-m", module, *([f"run.directory={directory}"] if trains else []), *overrides]
    with (directory / "output.txt").open("a") as output:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "FIPO_ROLLOUT_TOKEN": token} | (environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


@contextlib.contextmanager
def started(directory: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A run that is killed at the end if it is still there, so that a failed test leaves nothing running."""
    process = start(directory, *overrides)
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)


def finish(process: subprocess.Popen[str], directory: Path, timeout_s: float = 300, exit_code: int = 0) -> str:
    """Wait for a run that has to succeed, or to end with `exit_code`; its output."""
    try:
        code = process.wait(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        end(process)
        raise AssertionError(f"not done after {timeout_s} s:\n{output(directory)[-4000:]}") from None
    assert code == exit_code, f"exit code {code}:\n{crashed(directory)}{output(directory)[-6000:]}"
    return output(directory)


def crashed(directory: Path) -> str:
    """What the thread was doing in which a process crashed, in a few lines; "" if none did."""
    found = output(directory).partition("Current thread")
    return f"{''.join(found[1:])[:1500]}\n...\n" if found[1] else ""


def run(
    directory: Path,
    *overrides: str,
    token: str = "",
    timeout_s: float = 300,
    environment: dict[str, str] | None = None,
) -> str:
    """A whole run that has to succeed; its output."""
    return finish(start(directory, *overrides, token=token, environment=environment), directory, timeout_s)


def end(process: subprocess.Popen[str]) -> None:
    """SIGKILL a run's launcher; what it started has to go by itself."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_all(process: subprocess.Popen[str], directory: Path) -> set[Path]:
    """SIGKILL a run's launcher and all that it started, at once; their shared memory and sockets outside `directory`.

    Those that are still there, now that nobody is left to remove them.
    """
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    places = (Path("/dev/shm"), Path(tempfile.gettempdir()))
    used: set[Path] = set()
    for member in tree:
        with contextlib.suppress(psutil.Error):
            used.update(Path(mapping.path) for mapping in member.memory_maps())
            used.update(Path(str(socket.laddr)) for socket in member.net_connections("unix"))
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.suspend()
    for member in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    shared = Path(tempfile.gettempdir(), f"torchinductor_{getpass.getuser()}")  # compiled kernels, for every run
    outside = {path for path in used if path.exists() and not {directory, shared} & {*path.parents}}
    return {path for path in outside if any(path.is_relative_to(place) for place in places)}


def output(directory: Path) -> str:
    return (directory / "output.txt").read_text(errors="replace")


def rows(directory: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """The rows of a metrics file so far."""
    path = directory / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(directory: Path) -> dict[str, Any]:
    """What the run's report shows."""
    text = (directory / "report-data.js").read_text()
    shown: dict[str, Any] = json.loads(text.removeprefix("report.show(").removesuffix(");\n"))
    return shown


def prompts(directory: Path, step: int) -> list[str]:
    """The problems whose samples a step kept."""
    path = directory / "samples" / f"step-{step:06d}.jsonl"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


def wait_until(condition: Callable[[], Any], what: str, timeout_s: float) -> None:
    """Poll a condition, with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s} s"
        time.sleep(0.1)


def kill_servers_of(directory: Path, log: str = "") -> None:
    """SIGKILL to every vLLM process of the run, or those that write to `log`; one's end may end others before."""
    for process in processes_of(directory):
        with contextlib.suppress(psutil.NoSuchProcess):  # a zombie, which has no command line, is one of these
            logs = any(opened.path.endswith(log) for opened in process.open_files())
            if logs and "megatron_fipo.engines.server" in " ".join(process.cmdline()):
                process.kill()


def processes_of(directory: Path) -> list[psutil.Process]:
    """Processes, at any depth, that belong to the run in `directory`: its ranks name it, its servers log to it."""
    found = []
    for process in psutil.process_iter():
        try:
            files = [opened.path for opened in process.open_files()]
            named = any(str(directory) in argument for argument in process.cmdline())
        except psutil.Error:
            continue
        if process.pid != os.getpid() and (named or any(path.startswith(str(directory)) for path in files)):
            found.append(process)
    return found
