"""One run a directory: a lease on it that a living run keeps renewing, also on NFS and Lustre.

filelock's lease is a file made with O_EXCL, which every shared file system has, and renewed by a thread. On one machine
a dead holder is known at once by its process; on another its lease has to run out. Beside it lies who holds it.
"""

import contextlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

import filelock
import psutil

from megatron_fipo.errors import FipoError
from megatron_fipo.files import write_json_atomically

LEASE_S = 60.0
"""How long another machine's run may be silent before it counts as dead, in s; it renews three times as often."""

_NAMELESS_S = 5.0
"""Wait for a lock that names nobody, in s: another run has just made it, or a crash cut it short, and it is replaced
when it has not changed for two of them."""

_CLOCKS_S = 5.0
"""How far a file's time and a process's may be apart, in s."""

_LOCK_FILE, _OWNER_FILE = "run.lock", "run.lock.json"


class RunLock:
    """Holds a run's directory while it is entered. On rank 0 alone."""

    def __init__(self, directory: Path, note: Callable[[str], None], lease_s: float = LEASE_S):
        """`note` gets a line where the wait for another machine's run begins, and where a dead run is succeeded."""
        self._directory, self._note, self._lease_s = directory, note, lease_s
        self._lease = filelock.SoftFileLease(directory / _LOCK_FILE, lease_duration=lease_s)

    def __enter__(self) -> Self:
        """Take the directory, which has to exist.

        Raises:
            FipoError: another run has it.
        """
        try:
            self._acquire(0)
        except filelock.Timeout:
            # A run that is alive here is alive; of another machine's only silence can tell.
            owner = self._lease.owner
            if owner is not None and owner.hostname == platform.node():
                raise self._taken() from None
            wait_s = _NAMELESS_S if owner is None else 1.5 * self._lease_s
            self._note(f"waiting up to {wait_s:.0f} s to see whether {self._holder()} is still alive")
            try:
                self._acquire(wait_s)
            except filelock.Timeout:
                raise self._taken() from None
        if (self._directory / _OWNER_FILE).exists():
            self._note(f"{self._holder()} has ended without leaving {self._directory}; this run takes its place")
        job = os.environ.get("SLURM_JOB_ID")
        owner_now = {"host": platform.node(), "pid": os.getpid()} | ({"job": job} if job else {})
        try:
            write_json_atomically(self._directory / _OWNER_FILE, owner_now)
        except OSError as error:
            self._lease.release()
            raise FipoError(f"{self._directory / _OWNER_FILE} cannot be written: {error}") from error
        return self

    def refuse_if_taken(self) -> None:
        """Raise FipoError if a run that lives on this machine has the directory; takes nothing, and waits for nothing.

        For a launcher, before it starts anything. What other machines' runs do only `__enter__` can tell.
        """
        owner = self._lease.owner
        if owner is None or owner.hostname != platform.node():
            return
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            renewed = (self._directory / _LOCK_FILE).stat().st_mtime
            holder = psutil.Process(owner.pid)
            # A zombie is dead, and a process that is younger than the lock has a number that is used again.
            if holder.status() != psutil.STATUS_ZOMBIE and holder.create_time() < renewed + _CLOCKS_S:
                raise self._taken()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lease.compromise is None:
            (self._directory / _OWNER_FILE).unlink(missing_ok=True)
        self._lease.release()

    def check(self) -> None:
        """Raise FipoError if another run has taken the directory meanwhile, as after a long suspension."""
        if self._lease.compromise is not None:
            raise FipoError(
                f"{self._directory}: its lease was lost ({self._lease.compromise.reason}), and {self._holder()} may be "
                "writing there now; start this run again to go on from its newest checkpoint"
            )

    def _acquire(self, timeout_s: float) -> None:
        try:
            self._lease.acquire(timeout=timeout_s, poll_interval=min(0.5, self._lease_s / 10))
        except filelock.Timeout:
            raise
        except OSError as error:
            raise FipoError(f"{self._directory / _LOCK_FILE} cannot be written: {error}") from error
        except filelock.LeaseSettingsMismatch as error:  # of another version of this package, and alive
            raise self._taken() from error

    def _taken(self) -> FipoError:
        lock = self._directory / _LOCK_FILE
        if self._lease.owner is None and lock.exists():  # empty, which could be another version's
            return FipoError(f"{lock} does not say whose it is: remove it if no run writes to {self._directory}")
        return FipoError(
            f"{self._directory} is in use by {self._holder()}: give this run another run.directory, or end that one"
        )

    def _holder(self) -> str:
        """Who holds the directory, or held it last."""
        path = self._directory / _OWNER_FILE
        try:
            owner = json.loads(path.read_text()) if path.is_file() else {}
            job = f", Slurm job {owner['job']}" if "job" in owner else ""
            holder = f"the run with process {owner['pid']} on {owner['host']}{job}"
            return holder if holder.isprintable() else "another run"
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not written yet, or removed just now
            return "another run"
