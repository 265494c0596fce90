"""Start a run's processes on one machine and watch them. In the end all of them have ended, and the terminal says why.

Each rank leads its own session. So a Ctrl-C in the terminal reaches only the launcher, which passes it on once, and
rank 0 has time to close its vLLM servers. Signals are blocked and waited for (sigtimedwait), so that no handler can run
between two lines. This module does not import torch: the launcher stays small while the ranks work.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence, Set
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from megatron_fipo.command_line.commands import environment, going_on, typed_command
from megatron_fipo.config import Config, resolved, with_values
from megatron_fipo.config.configure import RESOLVED
from megatron_fipo.errors import FipoError, RunFailed
from megatron_fipo.launch.slurm import distributed_environment, under_srun
from megatron_fipo.processes.ending import LISTENER_VARIABLE, die_with_parent, kill_descendants, no_descendant_left
from megatron_fipo.processes.reasons import Listener, Reason
from megatron_fipo.runs.directory import directory_refused, look

STOPPED = 75
"""Exit status of a run that was asked to stop and resumes when it is started again: EX_TEMPFAIL of <sysexits.h>."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 30
_KILL_TIMEOUT_S = 10.0
_SAME_CTRL_C_S = 0.5
_LOOPBACK = "127.0.0.1"


def already_launched() -> bool:
    """Return whether torchrun, srun or this launcher started this process as one of a run's ranks."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys() or under_srun(os.environ)


def adopt_environment() -> None:
    """Set torch.distributed's variables from Slurm's, if srun started this rank and they are not set."""
    if "RANK" not in os.environ and under_srun(os.environ):
        os.environ.update(distributed_environment(os.environ))


def launch(
    world_size: int,
    run_directory: str | Path,
    command: Sequence[str],
    grace_s: float = 30.0,
    save_s: float = 3600.0,
) -> int:
    """Run `world_size` ranks on this machine until they end, and return the exit status for the shell.

    Rank 0 writes to the terminal, and rank N to the run's logs/rank-N.log. If a rank fails, the others receive SIGTERM
    and, `grace_s` seconds later, SIGKILL. The status is then that of the rank that failed first (128 + n for signal n).
    SIGTERM and SIGHUP are passed on in the same way, with the status 128 + n. A Ctrl-C (SIGINT) is sent to rank 0,
    which has `save_s` seconds to save the run and end. A second Ctrl-C kills all ranks at once. The status STOPPED
    means that the ranks were asked to stop, saved the run and ended.

    Raises:
        RunFailed: a rank failed, and has reported why.
    """
    directory = Path(run_directory).resolve()
    watched = {s for s in _STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        with ExitStack() as stack:
            listeners = [stack.enter_context(Listener()) for _ in range(world_size)]
            older_children = stack.enter_context(no_descendant_left())
            ranks = _start(listeners, directory, list(command), mask)
            return _Watch(ranks, directory, watched, older_children, grace_s, save_s).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def launch_training(world_size: int, config: Config) -> int:
    """Launch ranks that train with exactly this configuration, which they read from a file in the run's directory.

    Raises:
        FipoError: the directory cannot be used, or a rank failed and has reported why.
    """
    directory = Path(config.run.directory).resolve()
    config = with_values(config, {"run.directory": str(directory)})
    look(config)
    file = directory / "logs" / f"configuration-{os.getpid()}.yaml"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        resolved.write(file, config)
    except OSError as error:
        raise directory_refused(directory, error) from error
    print(f"run directory: {directory}", flush=True)
    command = [sys.executable, "-m", "megatron_fipo.train", RESOLVED, str(file)]
    try:
        return launch(world_size, directory, command, save_s=config.run.collective_timeout_s)
    finally:
        file.unlink(missing_ok=True)


@dataclass
class _Rank:
    """One process of the run."""

    number: int
    process: subprocess.Popen
    log: Path | None
    """The file for its output; None for the terminal."""
    log_start: int
    """Size of the log before this start, in bytes. A resumed run appends to the same file."""
    listener: Listener
    """The socket on which it reports why it failed."""


def _start(listeners: list[Listener], directory: Path, command: list[str], mask: Set[int]) -> list[_Rank]:
    """Start one rank for each listener."""
    try:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise directory_refused(directory, error) from error
    # Rank 0 inherits the socket at which the ranks meet. It is bound to loopback, and no other process can take its
    # port any more.
    with socket.create_server((_LOOPBACK, 0), backlog=4096) as meeting:
        ranks = []
        for number, listener in enumerate(listeners):
            variables = _rank_environment(number, len(listeners), meeting.getsockname()[1])
            variables |= listener.environment() | environment(typed_command())
            passed = [listener.descriptor]
            if number == 0:
                variables[LISTENER_VARIABLE] = str(meeting.fileno())
                passed.append(meeting.fileno())
            process, log, log_start = _start_rank(number, directory, command, mask, variables, passed)
            ranks.append(_Rank(number, process, log, log_start, listener))
        return ranks


def _start_rank(
    number: int, directory: Path, command: list[str], mask: Set[int], variables: dict[str, str], passed: list[int]
) -> tuple[subprocess.Popen, Path | None, int]:
    """Start a rank. Return the process, its log, and the log's size before the start."""
    launcher = os.getpid()

    def before_exec() -> None:
        die_with_parent(launcher)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def spawn(output: IO[bytes] | None) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            env=variables,
            pass_fds=passed,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=before_exec,
        )

    if number == 0:
        return spawn(None), None, 0
    path = directory / "logs" / f"rank-{number}.log"
    with path.open("ab") as output:
        return spawn(output), path, output.tell()


def _rank_environment(number: int, world_size: int, port: int) -> dict[str, str]:
    # One compute thread per rank, as with torchrun: more would compete for the machine's cores. A segmentation fault
    # prints its Python stack, and output is not buffered, so that a log is complete even if its rank is killed.
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    # gloo accepts any connection, and would otherwise listen on the interface that has this machine's name.
    loopback = [name for name, found in psutil.net_if_addrs().items() if any(a.address == _LOOPBACK for a in found)]
    if loopback:
        defaults["GLOO_SOCKET_IFNAME"] = loopback[0]
    return {
        **defaults,
        **os.environ,
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": _LOOPBACK,
        "MASTER_PORT": str(port),
    }


class _Watch:
    """Wait for the ranks to end. Stop all of them if one fails or a signal requests it."""

    def __init__(
        self,
        ranks: list[_Rank],
        directory: Path,
        watched: Set[int],
        older_children: set[psutil.Process],
        grace_s: float,
        save_s: float,
    ) -> None:
        self.ranks, self.directory = ranks, directory
        self.watched, self.older_children = watched, older_children
        self.grace_s, self.save_s = grace_s, save_s
        self.first_failure: _Rank | None = None
        self.told_before: list[Reason] = []
        """Reasons reported before the first rank failed: it may have failed because another rank had given up."""
        self.stop_signal: int | None = None
        self.saving_since: float | None = None
        """When the Ctrl-C was passed on to rank 0."""
        self.stopping_since: float | None = None
        """When all ranks were told to end."""

    def run(self) -> int:
        while self._living():
            # The kernel merges the SIGCHLDs of ranks that end at the same time, so check at least once per second.
            event = _signal_within(self.watched, min(1.0, self._grace_left()))
            self._note_failures(event.si_pid if event is not None and event.si_signo == signal.SIGCHLD else None)
            self._reap_orphans()
            if event is not None and event.si_signo != signal.SIGCHLD:
                self._on_stop_signal(event.si_signo)
            if self._living() and self._grace_left() <= 0:
                allowed_s = self.grace_s if self.stopping_since is not None else self.save_s
                self._kill(f"still running {allowed_s:g} s after it was asked to stop")
        self._note_failures(None)
        return self._report()

    def _living(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.process.poll() is None]

    def _reap_orphans(self) -> None:
        """Reap ended grandchildren whose parent ended first. Otherwise they would stay as zombies."""
        ours = {rank.process.pid for rank in self.ranks}
        for child in psutil.Process().children():
            if child.pid not in ours and child not in self.older_children:
                with contextlib.suppress(psutil.Error, ChildProcessError):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)

    def _grace_left(self) -> float:
        """Return the seconds until the ranks are killed; infinite unless they have been asked to stop."""
        if self.stopping_since is not None:
            return max(0.0, self.stopping_since + self.grace_s - time.monotonic())
        if self.saving_since is not None:
            return max(0.0, self.saving_since + self.save_s - time.monotonic())
        return float("inf")

    def _note_failures(self, ended_pid: int | None) -> None:
        """Remember which rank failed first, and stop the others. `ended_pid` is the first child that ended since."""
        failed = [rank for rank in self.ranks if rank.process.poll() not in (None, 0, STOPPED)]
        if not failed or self.stopping_since is not None:
            return
        if ended_pid is None and (event := _signal_within({signal.SIGCHLD}, 0)) is not None:
            # Several ended since the wait. The signal describes the first of them.
            ended_pid = event.si_pid
        self.first_failure = next((rank for rank in failed if rank.process.pid == ended_pid), failed[0])
        self.told_before = self._reasons()
        self._ask_to_stop()

    def _on_stop_signal(self, signum: int) -> None:
        since = self.stopping_since or self.saving_since
        if signum == signal.SIGINT and since is not None:
            if time.monotonic() - since > _SAME_CTRL_C_S:
                self._kill("killed on a second Ctrl-C")
        elif signum == signal.SIGINT:
            self.stop_signal, self.saving_since = signum, time.monotonic()
            _say("stopping on SIGINT: saves the run as it was after its last whole step; a second Ctrl-C kills at once")
            self.ranks[0].process.send_signal(signum)  # rank 0 tells the others
        elif self.stopping_since is None:
            self.stop_signal = signum
            _say(f"stopping on {signal.Signals(signum).name}; a Ctrl-C kills at once")
            self._ask_to_stop()

    def _ask_to_stop(self) -> None:
        self.stopping_since = time.monotonic()
        for rank in self._living():
            rank.process.send_signal(signal.SIGTERM)  # also after SIGHUP, which ranks do not handle

    def _kill(self, reason: str) -> None:
        _say(f"{_names(self._living())}: {reason}")
        self.stopping_since = self.stopping_since or time.monotonic()
        kill_descendants(besides=self.older_children)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while self._living() and time.monotonic() < deadline:
            _signal_within({signal.SIGCHLD}, 0.1)
        if self._living():
            raise FipoError(f"{_names(self._living())} outlived SIGKILL by {_KILL_TIMEOUT_S:.0f} s")

    def _report(self) -> int:
        failure, signum = self.first_failure, self.stop_signal
        if failure is not None and signum is not None and failure.process.returncode in (-signum, 128 + signum):
            failure = None  # it ended as requested
        if all(rank.process.returncode == 0 for rank in self.ranks):  # a Ctrl-C may come when everything is done
            return 0
        if failure is None:
            if signum in (None, signal.SIGINT):
                _say(f"stopped; this command resumes the run:\n  {going_on(self.directory)}")
            return STOPPED if signum is None else 128 + signum
        if sys.stderr.isatty():
            # A rank that was killed could not remove its progress bar: show the cursor again.
            _write("\033[?25h")
        code = failure.process.returncode
        how = f"exit status {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        explained = failure.listener.heard() or next(iter(self.told_before), None)
        if code < 0 or explained is None:
            _say(f"rank {failure.number} of {len(self.ranks)} failed first ({how}){_tail(failure)}")
        if told := explained or next(iter(self._reasons()), None):
            raise RunFailed(told.text, told.exit_code)
        return code if code > 0 else 128 - code

    def _reasons(self) -> list[Reason]:
        """Return the reasons that ranks have reported so far."""
        return [reason for rank in self.ranks if (reason := rank.listener.heard())]


def _signal_within(watched: Set[int], seconds: float) -> signal.struct_siginfo | None:
    """Wait for a blocked signal; None if none comes."""
    event = signal.sigtimedwait(watched, seconds)
    # Python 3.11 to 3.13 return memory that nobody has set if the time is over when this process is continued.
    return event if event is not None and event.si_signo in watched else None


def _tail(rank: _Rank) -> str:
    """Return the last lines that the rank has written since this start."""
    if rank.log is None:
        return "; its output is above"
    with rank.log.open("rb") as log:
        log.seek(max(rank.log_start, rank.log.stat().st_size - 64 * 1024))
        lines = log.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]
    if not lines:
        return f"; {rank.log} is empty"
    return "; the end of " + "\n  ".join([f"{rank.log}:", *lines])


def _names(ranks: list[_Rank]) -> str:
    return "rank " + ", ".join(str(rank.number) for rank in ranks)


def _say(text: str) -> None:
    _write(f"launch: {text}\n")


def _write(text: str) -> None:
    # After SIGHUP the terminal is gone, but the ranks must still be stopped.
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
