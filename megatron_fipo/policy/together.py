"""Work that every rank does while the others wait, and that fails on all of them if it fails on one."""

import contextlib
import gc
import json
from collections.abc import Callable, Iterator
from typing import TypeVar, cast

from torch.distributed.checkpoint.api import CheckpointException

from megatron_fipo.errors import CheckpointError, FipoError, one_line
from megatron_fipo.policy import platform
from megatron_fipo.weights.reshard import gather_texts

_T = TypeVar("_T")


def together(what: str, work: Callable[[], _T]) -> _T:
    """What `work` returns on this rank; every rank calls this together.

    Raises:
        CheckpointError: on every rank if `work` fails on any, whatever it raises: `what`, and the first rank's reason.
    """
    result: _T | None = None
    failure: BaseException | None = None
    try:
        result = work()
    except (Exception, CheckpointException) as error:
        failure = error
    said = [json.loads(text) for text in gather_texts(json.dumps(_reason(failure)), platform.device())]
    if reasons := [reason for reason in said if reason]:
        raise CheckpointError(f"{what}: {reasons[0]}") from failure
    return cast(_T, result)


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For work that makes many objects while others wait: a collection takes a quarter of a second in a trainer."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _reason(failure: BaseException | None) -> str:
    """One line of a failure; of torch's CheckpointException the first of those that it has gathered."""
    if isinstance(failure, CheckpointException) and failure.failures:
        failure = next(iter(failure.failures.values()))[0]
    if isinstance(failure, FipoError):
        return str(failure)
    return one_line(failure) if failure is not None else ""
