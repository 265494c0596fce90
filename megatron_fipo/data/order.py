"""The order in which training problems are drawn: epoch after epoch, and the same order after a resume."""

import random
from collections.abc import Sequence
from typing import Annotated

from msgspec import Meta, Struct

from megatron_fipo.errors import DataError


class OrderState(Struct, frozen=True, forbid_unknown_fields=True):
    """The position of a stream, and the settings that determine its order."""

    epoch: Annotated[int, Meta(ge=0, le=2**62)]
    position: Annotated[int, Meta(ge=0, le=2**62)]
    """Number of problems of this epoch that have been drawn."""
    size: Annotated[int, Meta(ge=1, le=2**62)]
    seed: Annotated[int, Meta(ge=0, le=2**62)]
    shuffle: bool
    returned: tuple[Annotated[int, Meta(ge=0, le=2**62)], ...] = ()
    """Indices that were drawn but not used. They come next."""


class PromptSampler:
    """An endless stream of indices into `size` problems, with every index once per epoch.

    The order of an epoch depends only on (seed, epoch). So the state is the position and the returned indices.
    """

    def __init__(self, size: int, seed: int, shuffle: bool):
        if size < 1:
            raise DataError("there is no training problem to draw from")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order()
        self._returned: list[int] = []

    def take(self, count: int) -> list[int]:
        """Return the next `count` indices, continuing into the next epoch if necessary."""
        taken, self._returned = self._returned[:count], self._returned[count:]
        while len(taken) < count:
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            step = self._order[self._position : self._position + count - len(taken)]
            taken += step
            self._position += len(step)
        return taken

    def put_back(self, indices: Sequence[int]) -> None:
        """Return indices that were not used. They are drawn next, in this order."""
        self._returned = [*indices, *self._returned]

    def state(self) -> OrderState:
        """Return the state of the stream."""
        return OrderState(self._epoch, self._position, self._size, self._seed, self._shuffle, tuple(self._returned))

    def load(self, state: OrderState) -> None:
        """Continue from `state`. DataError if it belongs to other data, another seed or another data.shuffle."""
        present = self.state()
        for key in ("size", "seed", "shuffle"):
            found, right = getattr(state, key), getattr(present, key)
            if found != right:
                raise DataError(
                    f"order.{key} is {found}, and this run's is {right}: prompts would be skipped or repeated; resume "
                    "with the same data, run.seed and data.shuffle"
                )
        if state.position > self._size:
            raise DataError(f"order.position is {state.position}, and should be at most order.size, {self._size}")
        if beyond := [index for index in state.returned if index >= self._size]:
            raise DataError(f"order.returned has {beyond[0]}, and should have numbers below order.size, {self._size}")
        self._epoch, self._position, self._returned = state.epoch, state.position, list(state.returned)
        self._order = self._epoch_order()

    def is_another(self, state: OrderState) -> bool:
        """Return whether `state` belongs to another seed, or to another data.shuffle."""
        return (state.seed, state.shuffle) != (self._seed, self._shuffle)

    def start_over(self, state: OrderState) -> None:
        """Begin a new epoch after that of `state`, which belongs to other data, so that its order has not been used."""
        self._epoch, self._position, self._returned = state.epoch + 1, 0, []
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(self._size))
        if self._shuffle:
            random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order
