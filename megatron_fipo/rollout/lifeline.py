"""No orphans: a process that ends when its parent does, however the parent ends (SIGKILL included). Linux only."""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int | None = None) -> None:
    """Asks the kernel to kill this process when the thread that started it ends.

    `parent` is the process id of whoever should still be there: a parent that ended before this call would never
    trigger the signal, so the process then exits at once. Children do not inherit this; see `bind_descendants`.
    """
    if sys.platform != "linux":
        raise OSError("megatron_fipo's rollout servers need Linux: nothing else ties them to the trainer's life")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if parent is not None and os.getppid() != parent:
        sys.exit(f"process {parent}, which started this one, has ended")


def bind_descendants() -> None:
    """Makes every process forked from this one, and from those, die with its parent."""
    os.register_at_fork(after_in_child=die_with_parent)
