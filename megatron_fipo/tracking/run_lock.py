"""Allow only one run per directory, by a lease that a running run keeps renewing. This works on NFS and Lustre too.

filelock's lease is a file that is created with O_EXCL, which every shared file system supports. A thread renews it. On
the same machine a dead holder is recognised at once by its process. On another machine, its lease has to expire. A file
beside the lease says who holds it.
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
"""How long a run on another machine may be silent before it counts as dead, in s. It renews three times as often."""

_NAMELESS_S = 5.0
"""How long to wait for a lock file that names no holder, in s. Either another run has just created it, or a crash cut
it short. It is replaced if it has not changed for 2 s."""

_CLOCKS_S = 5.0
"""How much the times of a file and of a process may differ, in s."""

_LOCK_FILE, _OWNER_FILE = "run.lock", "run.lock.json"


class RunLock:
    """Holds a run's directory while the context is entered. Used on rank 0 only."""

    def __init__(self, directory: Path, note: Callable[[str], None], lease_s: float = LEASE_S):
        """`note` is called with a line when a wait for another machine's run begins and when a dead run is replaced."""
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
            # A live process on this machine is certain. For another machine, only a long silence shows that a run is
            # dead.
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
        """Raise FipoError if a live run on this machine holds the directory. This takes no lease and does not wait.

        A launcher calls it before it starts anything. Only `__enter__` can decide about runs on other machines.
        """
        owner = self._lease.owner
        if owner is None or owner.hostname != platform.node():
            return
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            renewed = (self._directory / _LOCK_FILE).stat().st_mtime
            holder = psutil.Process(owner.pid)
            # A zombie is dead. A process that is younger than the lock is another one that has the same number.
            if holder.status() != psutil.STATUS_ZOMBIE and holder.create_time() < renewed + _CLOCKS_S:
                raise self._taken()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lease.compromise is None:
            (self._directory / _OWNER_FILE).unlink(missing_ok=True)
        self._lease.release()

    def check(self) -> None:
        """Raise FipoError if another run has taken the directory meanwhile, for example after a long suspension."""
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
        except filelock.LeaseSettingsMismatch as error:  # a live run of another version of this package
            raise self._taken() from error

    def _taken(self) -> FipoError:
        lock = self._directory / _LOCK_FILE
        if self._lease.owner is None and lock.exists():  # empty: it could be from another version
            return FipoError(f"{lock} does not say whose it is: remove it if no run writes to {self._directory}")
        return FipoError(
            f"{self._directory} is in use by {self._holder()}: give this run another run.directory, or end that one"
        )

    def _holder(self) -> str:
        """Return who holds the directory, or held it last."""
        path = self._directory / _OWNER_FILE
        try:
            owner = json.loads(path.read_text()) if path.is_file() else {}
            job = f", Slurm job {owner['job']}" if "job" in owner else ""
            holder = f"the run with process {owner['pid']} on {owner['host']}{job}"
            return holder if holder.isprintable() else "another run"
        except (OSError, ValueError, TypeError, KeyError, RecursionError):  # not yet written, or just removed
            return "another run"
