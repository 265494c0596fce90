"""Messages between the trainer's ranks over torch.distributed's key-value store, in a weight update.

JSON, never pickle. Every wait polls, so that it ends at its deadline, at an abort or at Ctrl-C; a collective in its
place would wait for a rank that has failed.
"""

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

from torch import distributed as dist
from torch.distributed import PrefixStore, Store

from megatron_fipo.errors import RolloutError
from megatron_fipo.weights.deadline import Deadline

ABORT = "abort"
_FIRST_POLL_S, _LAST_POLL_S = 0.0005, 0.02


class SessionAborted(Exception):
    """Rank 0 has given the session up; the verdict will say why."""


def trainer_store() -> Store:
    """The store that all ranks of the trainer share; one of its own in a process that is alone."""
    if not dist.is_initialized():
        return dist.HashStore()
    return dist.distributed_c10d._get_default_store()


class Mailbox:
    """The messages of one session. Every rank makes its own with the same name."""

    def __init__(self, store: Store, session: str):
        self._store = PrefixStore(f"megatron_fipo/{session}", store)

    def post(self, key: str, message: dict[str, Any]) -> None:
        """Leaves `message` under `key` for one or all other ranks."""
        self._store.set(key, json.dumps(message))

    def peek(self, key: str) -> dict[str, Any] | None:
        """The message under `key`, or None while there is none."""
        if not self._store.check([key]):
            return None
        return json.loads(self._store.get(key))

    def wait(self, key: str, deadline: Deadline, what: str) -> dict[str, Any]:
        """The message under `key`, left there for other ranks. RolloutError when the deadline passes."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key)) is not None:
                return message
            time.sleep(pause)
        raise AssertionError("unreachable")

    def wait_turn(self, key: str, deadline: Deadline, what: str) -> dict[str, Any]:
        """Rank 0's message under `key`, removed. SessionAborted when it gives up, RolloutError at the deadline."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key)) is not None:
                self._store.delete_key(key)
                return message
            self.raise_if_aborted()
            time.sleep(pause)
        raise AssertionError("unreachable")

    def raise_if_aborted(self) -> None:
        """SessionAborted when rank 0 has given the session up."""
        if self.peek(ABORT) is not None:
            raise SessionAborted

    async def take(self, key: str, deadline: Deadline, what: str) -> dict[str, Any]:
        """Like `wait`, for rank 0's event loop; removes the message, so that the store does not grow."""
        for pause in _polls(deadline, what):
            if (message := self.peek(key)) is not None:
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
