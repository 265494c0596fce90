"""File descriptors of this process: each connection to a server takes one, and `ulimit -n` sets how many there may be.

A connection that cannot be opened for lack of them says nothing of the server that it was meant for.
"""

import errno
import os
import resource

from megatron_fipo.errors import RolloutError

RESERVE = 128
"""Descriptors for what is opened meanwhile: logs, checkpoints, verifiers' pipes."""


class NoDescriptors(RolloutError):
    """This process may open no more files and connections. No server is to blame."""

    def __init__(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        super().__init__(
            f"this process has all {soft} files and connections open that ulimit -n allows (the hard limit is {hard}); "
            "start it under a higher limit"
        )


def provide(connections: int, what: str) -> None:
    """See that this process may open so many connections beside what it has open now, and RESERVE others.

    The soft limit is raised as far as needed. `what` tells what the connections are for.

    Raises:
        RolloutError: the hard limit is lower.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(os.listdir("/proc/self/fd")) + connections + RESERVE
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise RolloutError(
            f"{what} need {needed} open files and connections, but the hard limit of ulimit -n is {hard}: raise it, "
            "use fewer servers, or lower rollout.max_num_seqs"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def raise_if_exhausted(error: BaseException) -> None:
    """NoDescriptors if that is what is behind `error`."""
    if _is_exhausted(error):
        raise NoDescriptors from error


def _is_exhausted(error: BaseException | None) -> bool:
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    inner = error.exceptions if isinstance(error, BaseExceptionGroup) else ()
    return any(map(_is_exhausted, (error.__cause__ or error.__context__, *inner)))
