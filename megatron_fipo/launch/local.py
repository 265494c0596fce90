"""Starts a run's processes on one machine and watches them: all of them end, and the terminal says why.

Each rank leads a session of its own, so that a Ctrl-C in the terminal reaches only the launcher, which passes it on
once, and rank 0 can close its vLLM servers in peace. Signals are blocked and waited for (sigtimedwait): no handler can
run between two lines. Imports no torch: the launcher stays small while the ranks work.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from megatron_fipo.errors import FipoError
from megatron_fipo.launch.slurm import distributed_environment, under_srun
from megatron_fipo.processes import LISTENER_VARIABLE, die_with_parent, kill_descendants, no_descendant_left

STOPPED = 75
"""Exit status of a run that was asked to stop and goes on when it is started again: EX_TEMPFAIL of <sysexits.h>."""
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_TAIL_LINES = 30
_KILL_TIMEOUT_S = 10.0
_SAME_CTRL_C_S = 0.5
_LOOPBACK = "127.0.0.1"


def already_launched() -> bool:
    """Whether torchrun, srun or this launcher started this process as one of a run's ranks."""
    return {"RANK", "WORLD_SIZE"} <= os.environ.keys() or under_srun(os.environ)


def adopt_environment() -> None:
    """Set torch.distributed's variables from Slurm's, where srun started this rank and nothing has set them."""
    if "RANK" not in os.environ and under_srun(os.environ):
        os.environ.update(distributed_environment(os.environ))


def launch(
    world_size: int, run_directory: str | Path, command: Sequence[str] | None = None, grace_s: float = 30.0
) -> int:
    """Run `world_size` ranks of a run on this machine to their end, and return the exit status for the shell.

    `command` defaults to the current command line with run.directory fixed, so that all ranks use one directory. Rank 0
    writes to the terminal, rank N to logs/rank-N.log of the run. When one fails, the others get SIGTERM and, `grace_s`
    seconds later, SIGKILL; the status is that of the rank that failed first (128 + n for signal n). SIGINT, SIGTERM and
    SIGHUP are passed on in the same way, and the status is then 128 + n; a second Ctrl-C kills at once. STOPPED means
    that the ranks saved the run and ended because they were asked to.
    """
    directory = Path(run_directory).resolve()
    watched = {s for s in _STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN} | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    try:
        with no_descendant_left() as older_children:
            ranks = _start(world_size, directory, list(command or train_command(directory)), mask)
            return _Watch(ranks, directory, watched, older_children, grace_s).run()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def train_command(run_directory: Path) -> list[str]:
    """The current command line of the trainer with run.directory set to `run_directory`, quoted for Hydra."""
    quoted = str(run_directory).replace("'", "\\'")
    return [sys.executable, "-m", "megatron_fipo.train", *sys.argv[1:], f"run.directory='{quoted}'"]


@dataclass
class _Rank:
    """One process of the run."""

    number: int
    process: subprocess.Popen
    log: Path | None
    """Where its output goes; None is the terminal."""
    log_start: int
    """Size of the log before this start, in bytes: a resumed run goes on in the same file."""


def _start(world_size: int, directory: Path, command: list[str], mask: Set[int]) -> list[_Rank]:
    try:
        (directory / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FipoError(f"run.directory={directory} cannot be made: {error}") from error
    # Rank 0 inherits the socket at which the ranks meet: it is bound to this machine alone, and its port is nobody
    # else's from here on.
    with socket.create_server((_LOOPBACK, 0), backlog=4096) as listener:
        return [_start_rank(number, world_size, listener, directory, command, mask) for number in range(world_size)]


def _start_rank(
    number: int, world_size: int, listener: socket.socket, directory: Path, command: list[str], mask: Set[int]
) -> _Rank:
    launcher = os.getpid()
    environment = _rank_environment(number, world_size, listener.getsockname()[1])
    if number == 0:
        environment[LISTENER_VARIABLE] = str(listener.fileno())

    def before_exec() -> None:
        die_with_parent(launcher)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def spawn(output: IO[bytes] | None) -> subprocess.Popen:
        return subprocess.Popen(
            command,
            env=environment,
            pass_fds=[listener.fileno()] if number == 0 else [],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=before_exec,
        )

    if number == 0:
        return _Rank(number, spawn(None), log=None, log_start=0)
    path = directory / "logs" / f"rank-{number}.log"
    with path.open("ab") as output:
        return _Rank(number, spawn(output), path, log_start=output.tell())


def _rank_environment(number: int, world_size: int, port: int) -> dict[str, str]:
    # One compute thread a rank, as torchrun has it: more of them would fight over the machine's cores. A segmentation
    # fault prints its Python stack, and a log lacks nothing when its rank is killed.
    defaults = {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1"}
    # gloo takes any connection, and would listen on the interface of this machine's name.
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
    """Waits for the ranks' ends; stops all of them when one fails or a signal asks for it."""

    def __init__(
        self,
        ranks: list[_Rank],
        directory: Path,
        watched: Set[int],
        older_children: set[psutil.Process],
        grace_s: float,
    ) -> None:
        self.ranks, self.directory = ranks, directory
        self.watched, self.older_children, self.grace_s = watched, older_children, grace_s
        self.first_failure: _Rank | None = None
        self.stop_signal: int | None = None
        self.stopping_since: float | None = None

    def run(self) -> int:
        while self._living():
            # The kernel merges the SIGCHLDs of ranks that end together, so look at least once a second.
            event = signal.sigtimedwait(self.watched, min(1.0, self._grace_left()))
            self._note_failures(event.si_pid if event is not None and event.si_signo == signal.SIGCHLD else None)
            self._reap_orphans()
            if event is not None and event.si_signo != signal.SIGCHLD:
                self._on_stop_signal(event.si_signo)
            if self._living() and self._grace_left() <= 0:
                self._kill(f"still running {self.grace_s:g} s after it was asked to stop")
        self._note_failures(None)
        return self._report()

    def _living(self) -> list[_Rank]:
        return [rank for rank in self.ranks if rank.process.poll() is None]

    def _reap_orphans(self) -> None:
        """Take leave of ended grandchildren whose parent ended first; whoever waits for them would see zombies."""
        ours = {rank.process.pid for rank in self.ranks}
        for child in psutil.Process().children():
            if child.pid not in ours and child not in self.older_children:
                with contextlib.suppress(psutil.Error, ChildProcessError):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        os.waitpid(child.pid, os.WNOHANG)

    def _grace_left(self) -> float:
        """Seconds until the ranks are killed; infinite while nobody asked them to stop."""
        if self.stopping_since is None:
            return float("inf")
        return max(0.0, self.stopping_since + self.grace_s - time.monotonic())

    def _note_failures(self, ended_pid: int | None) -> None:
        """Remember who failed first, and stop the others. `ended_pid` is the first child to end since the last look."""
        failed = [rank for rank in self.ranks if rank.process.poll() not in (None, 0, STOPPED)]
        if not failed or self.stopping_since is not None:
            return
        if ended_pid is None and (event := signal.sigtimedwait({signal.SIGCHLD}, 0)) is not None:
            # They ended between the wait and this look; the signal that is kept is the first one's.
            ended_pid = event.si_pid
        self.first_failure = next((rank for rank in failed if rank.process.pid == ended_pid), failed[0])
        self._ask_to_stop(signal.SIGTERM)

    def _on_stop_signal(self, signum: int) -> None:
        if self.stopping_since is None:
            self.stop_signal = signum
            _say(f"stopping on {signal.Signals(signum).name}; a second Ctrl-C kills at once")
            self._ask_to_stop(signum)
        elif signum == signal.SIGINT and time.monotonic() - self.stopping_since > _SAME_CTRL_C_S:
            self._kill("killed on a second Ctrl-C")

    def _ask_to_stop(self, signum: int) -> None:
        self.stopping_since = time.monotonic()
        # Ranks unwind on SIGINT and SIGTERM; a hang-up of the terminal is the latter to them.
        passed_on = signal.SIGINT if signum == signal.SIGINT else signal.SIGTERM
        for rank in self._living():
            rank.process.send_signal(passed_on)

    def _kill(self, reason: str) -> None:
        _say(f"{_names(self._living())}: {reason}")
        kill_descendants(besides=self.older_children)
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        while self._living() and time.monotonic() < deadline:
            signal.sigtimedwait({signal.SIGCHLD}, 0.1)
        if self._living():
            raise FipoError(f"{_names(self._living())} outlived SIGKILL by {_KILL_TIMEOUT_S:.0f} s")

    def _report(self) -> int:
        failure = self.first_failure
        if failure is None and self.stop_signal is None:
            if all(rank.process.returncode == 0 for rank in self.ranks):
                return 0
            _say(f"stopped and saved; the same command with run.directory={self.directory} goes on from there")
            return STOPPED
        if sys.stderr.isatty():
            # A rank that was killed could not take its progress bar down: show the cursor again.
            _write("\033[?25h")
        if self.stop_signal is not None:
            return 128 + self.stop_signal
        assert failure is not None
        code = failure.process.returncode
        reason = f"exit status {code}" if code > 0 else f"killed by {signal.Signals(-code).name}"
        _say(f"rank {failure.number} of {len(self.ranks)} failed first ({reason}){_tail(failure)}")
        return code if code > 0 else 128 - code


def _tail(rank: _Rank) -> str:
    """The last lines that the rank wrote since this start."""
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
    # After a hang-up the terminal is gone; the ranks must be stopped all the same.
    with contextlib.suppress(OSError):
        sys.stderr.write(text)
        sys.stderr.flush()
