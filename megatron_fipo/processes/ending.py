"""How the processes of a run end together: with their parent, with their orphans, through their `finally` blocks."""

import contextlib
import ctypes
import os
import signal
import sys
from collections.abc import Iterator

import psutil

# From <sys/prctl.h>. Python's standard library does not wrap prctl.
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36

LISTENER_VARIABLE = "FIPO_STORE_FD"
"""Names the listening socket, at which a run's ranks meet, that rank 0 inherits from the launcher."""


LAUNCHER_PARENT = "FIPO_LAUNCHER_PARENT"
"""Names the process, such as a notebook's, that has started a launcher, which is not to outlive it."""


def die_with_library() -> None:
    """In a launcher: end with the process that LAUNCHER_PARENT names, if one does."""
    parent = os.environ.pop(LAUNCHER_PARENT, None)
    if parent is not None:
        die_with_parent(int(parent))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL. Outlives exec, but not fork.

    Meant for a child between fork and exec (`preexec_fn`), or at its start. `parent_pid` is who the parent was before
    the fork: a child whose parent has already gone ends at once. The kernel watches the *thread* that forked, so a
    child that must outlive a thread has to be started from another one.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def terminate_on_sigterm() -> None:
    """Turn the first SIGTERM or SIGINT into SystemExit, status 143 or 130, in the main thread; ignore later ones.

    So `finally` blocks run, no traceback hides what was asked for, and a second signal (torchrun sends SIGTERM after a
    terminal's Ctrl-C) does not cut the clean-up short: whoever stops the process for good uses SIGKILL.
    """

    def unwind(signum: int, _frame: object) -> None:
        for handled in (signal.SIGTERM, signal.SIGINT):
            signal.signal(handled, signal.SIG_IGN)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, unwind)
    # A run started in the background by a script ignores the terminal's Ctrl-C, and goes on doing so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, unwind)


@contextlib.contextmanager
def no_descendant_left(timeout_s: float = 5.0) -> Iterator[set[psutil.Process]]:
    """On leaving, kill every process that was started inside and still lives, at any depth. Yields the older children.

    Grandchildren whose own parent crashed are handed to this process (as their subreaper) instead of to init, so that
    they too are found. Children that were there on entry are left alone.
    """
    older = set(psutil.Process().children())
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield older
    finally:
        psutil.wait_procs(kill_descendants(besides=older), timeout=timeout_s)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def kill_descendants(besides: set[psutil.Process]) -> list[psutil.Process]:
    """SIGKILL this process's children, but for `besides`, with all that they started; return them, not yet reaped."""
    children = [child for child in psutil.Process().children() if child not in besides]
    doomed = list(children)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed += child.children(recursive=True)
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return doomed
