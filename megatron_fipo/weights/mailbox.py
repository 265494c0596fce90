"""Messages between the trainer's ranks over torch.distributed's key-value store, in a weight update.

Typed records as JSON, never pickle. Every wait polls, so that it ends at its deadline, at an abort or at Ctrl-C; a
collective in its place would wait for a rank that has failed.
"""

import asyncio
import time
from collections.abc import Iterator
from typing import TypeVar

import msgspec
from torch import distributed as dist
from torch.distributed import PrefixStore, Store

from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.deadline import Deadline

_ABORT = "abort"
_FIRST_POLL_S, _LAST_POLL_S = 0.0005, 0.02
_T = TypeVar("_T")


class UpdateAborted(Exception):
    """Rank 0 has given the update up; the verdict will say why."""


def trainer_store() -> Store:
    """The store that all ranks of the trainer share; one of its own in a process that is alone."""
    if not dist.is_initialized():
        return dist.HashStore()
    return dist.distributed_c10d._get_default_store()


class Mailbox:
    """The messages of one update. Every rank makes its own with the same name."""

    def __init__(self, store: Store, update: str):
        self._store = PrefixStore(f"megatron_fipo/{update}", store)

    def post(self, key: str, message: msgspec.Struct) -> None:
        """Leaves `message` under `key` for one or all other ranks."""
        self._store.set(key, msgspec.json.encode(message).decode())

    def peek(self, key: str, kind: type[_T]) -> _T | None:
        """The message under `key`, or None while there is none."""
        if not self._store.check([key]):
            return None
        return msgspec.json.decode(self._store.get(key), type=kind)

    def wait(self, key: str, kind: type[_T], deadline: Deadline, what: str) -> _T:
        """The message under `key`, left there for other ranks. RolloutError when the deadline passes."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key, kind)) is not None:
                return message
            time.sleep(pause)
        raise AssertionError("unreachable")

    def wait_turn(self, key: str, kind: type[_T], deadline: Deadline, what: str) -> _T:
        """Rank 0's message under `key`, removed. UpdateAborted when it gives up, RolloutError at the deadline."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key, kind)) is not None:
                self._store.delete_key(key)
                return message
            self.raise_if_aborted()
            time.sleep(pause)
        raise AssertionError("unreachable")

    def wait_for_all(self, key: str, kind: type[_T], deadline: Deadline, what: str) -> _T:
        """Rank 0's message under `key`, left there for other ranks. Raises as `wait_turn` does.

        If rank 0 gives up after it has left the message, every rank gets the message all the same.
        """
        for pause in _polls(deadline, what):
            given_up = self._store.check([_ABORT])  # before the look for the message, which came first then
            if (message := self.peek(key, kind)) is not None:
                return message
            if given_up:
                raise UpdateAborted
            time.sleep(pause)
        raise AssertionError("unreachable")

    def abort(self) -> None:
        """Rank 0 gives the update up."""
        self._store.set(_ABORT, "")

    def raise_if_aborted(self) -> None:
        """UpdateAborted when rank 0 has given the update up."""
        if self._store.check([_ABORT]):
            raise UpdateAborted

    async def take(self, key: str, kind: type[_T], deadline: Deadline, what: str) -> _T:
        """Like `wait`, for rank 0's event loop; removes the message, so that the store does not grow."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key, kind)) is not None:
                self._store.delete_key(key)
                return message
            await asyncio.sleep(pause)
        raise AssertionError("unreachable")


def _polls(deadline: Deadline, what: str) -> Iterator[float]:
    """Growing pauses in seconds, a tenth of the time waited: for a small model's speed, and a large run's store."""
    pause = _FIRST_POLL_S
    while not deadline.passed():
        yield pause
        pause = min(pause * 1.1, _LAST_POLL_S)
    raise RolloutError(f"waited {deadline.seconds:g} s for {what}")
