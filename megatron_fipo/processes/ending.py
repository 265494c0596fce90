"""End the processes of a run together: with their parent, including orphans, and through their `finally` blocks."""

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
"""Variable with the descriptor of the listening socket that rank 0 inherits, at which the ranks meet."""


LAUNCHER_PARENT = "FIPO_LAUNCHER_PARENT"
"""Variable with the id of the process, such as a notebook, that started the launcher. The launcher ends with it."""


def die_with_library() -> None:
    """In a launcher: end with the process that LAUNCHER_PARENT names, if it is set."""
    parent = os.environ.pop(LAUNCHER_PARENT, None)
    if parent is not None:
        die_with_parent(int(parent))


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}, {value}): {os.strerror(code)}")


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL. This survives exec, but not fork.

    It is called in a child between fork and exec (`preexec_fn`), or at its start. `parent_pid` is the parent before the
    fork: if that has already ended, the child ends at once. The kernel watches the *thread* that forked. So a child
    that must outlive a thread has to be started from another thread.
    """
    expected = os.getppid() if parent_pid is None else parent_pid
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != expected:
        os.kill(os.getpid(), signal.SIGKILL)


def terminate_on_sigterm() -> None:
    """Turn the first SIGTERM or SIGINT into SystemExit, status 143 or 130, in the main thread; ignore later ones.

    So `finally` blocks run, and there is no traceback. A second signal does not interrupt the clean-up: torchrun sends
    SIGTERM after a terminal's Ctrl-C. SIGKILL still ends the process at once.
    """

    def unwind(signum: int, _frame: object) -> None:
        for handled in (signal.SIGTERM, signal.SIGINT):
            signal.signal(handled, signal.SIG_IGN)
        sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, unwind)
    # A run that a script started in the background ignores the terminal's Ctrl-C. Keep it so.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, unwind)


@contextlib.contextmanager
def no_descendant_left(timeout_s: float = 5.0) -> Iterator[set[psutil.Process]]:
    """At exit, kill every process that was started inside the block and is still alive, at any depth.

    Yields the children that existed before; they are not killed. If the parent of a grandchild crashes, this process
    becomes the new parent (as subreaper) instead of init, so that the grandchild is found too.
    """
    older = set(psutil.Process().children())
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    try:
        yield older
    finally:
        psutil.wait_procs(kill_descendants(besides=older), timeout=timeout_s)
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)


def kill_descendants(besides: set[psutil.Process]) -> list[psutil.Process]:
    """SIGKILL this process's children, except for `besides`, and all their descendants. Return them, not yet reaped."""
    children = [child for child in psutil.Process().children() if child not in besides]
    doomed = list(children)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            doomed += child.children(recursive=True)
    for process in doomed:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    return doomed
