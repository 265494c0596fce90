"""What sampling says on rank 0, on every rank: how the others wait while rank 0 samples, for hours if that takes them.

A collective would run into its deadline. Sampling has deadlines of its own, and the store that is asked here ends with
rank 0. Events travel as JSON, never as a pickle.
"""

import time
from collections.abc import Callable

import msgspec
from torch.distributed import PrefixStore, Store

from megatron_fipo.errors import FipoError, RefusedOnRank0
from megatron_fipo.rollout.events import Event, Failed
from megatron_fipo.weights.deadline import Deadline

_FIRST_POLL_S, _LAST_POLL_S = 0.0005, 0.2
_LONGEST_LEAVE_S = 5.0
_HEARD = "failure-heard"


class SamplingEvents:
    """Every rank makes one, and the calls of `next` match."""

    def __init__(self, store: Store, rank: int, world_size: int):
        """`store` is the one that all ranks share."""
        self._store = PrefixStore("megatron_fipo/sampling", store)
        self._is_first, self._others = rank == 0, world_size - 1
        self._calls = 0

    def next(self, wait: Callable[[], Event]) -> Event:
        """What `wait` returns on rank 0, where alone it is called.

        Raises:
            FipoError: what `wait` raised; RefusedOnRank0 on the other ranks.
        """
        key = str(self._calls)
        self._calls += 1
        return self._tell(key, wait) if self._is_first else self._hear(key)

    def _tell(self, key: str, wait: Callable[[], Event]) -> Event:
        try:
            event = wait()
        except FipoError as error:
            self._store.set(key, msgspec.json.encode(Failed(str(error), error.exit_code)).decode())
            # Rank 0 stays until all have heard it: one that has not would tell of a lost connection.
            leave = Deadline(_LONGEST_LEAVE_S)
            while self._store.add(_HEARD, 0) < self._others and not leave.passed():
                time.sleep(_FIRST_POLL_S)
            raise
        self._store.set(key, msgspec.json.encode(event).decode())
        return event

    def _hear(self, key: str) -> Event:
        pause = _FIRST_POLL_S
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(pause * 1.3, _LAST_POLL_S)
        event: Event = msgspec.json.decode(self._store.get(key), type=Event)
        if isinstance(event, Failed):
            self._store.add(_HEARD, 1)
            raise RefusedOnRank0(event.message, event.exit_code)
        return event
