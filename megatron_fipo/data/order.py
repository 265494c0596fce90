"""The order in which training problems are drawn: epoch after epoch, and the same again after a resume."""

import random
from typing import Any

from megatron_fipo.errors import DataError


class ProblemOrder:
    """An endless stream of indices into `size` problems, every index once an epoch.

    Each epoch's order is a function of (seed, epoch) alone, so that the position is the whole state.
    """

    def __init__(self, size: int, seed: int, shuffle: bool):
        if size < 1:
            raise DataError("there is no training problem to draw from")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._epoch, self._position = 0, 0
        self._order = self._epoch_order()

    def take(self, count: int) -> list[int]:
        """The next `count` indices; goes on into the next epoch where one ends."""
        taken: list[int] = []
        while len(taken) < count:
            if self._position == self._size:
                self._epoch, self._position = self._epoch + 1, 0
                self._order = self._epoch_order()
            step = self._order[self._position : self._position + count - len(taken)]
            taken += step
            self._position += len(step)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready: where the stream stands, and what it was made from."""
        made_from = {"size": self._size, "seed": self._seed, "shuffle": self._shuffle}
        return {"epoch": self._epoch, "position": self._position, **made_from}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state` stood. DataError if it belongs to other data, another seed or another shuffle."""
        expected = self.state_dict()
        if not isinstance(state, dict) or state.keys() != expected.keys():
            raise DataError(f"the checkpoint's problem order cannot be read: {state!r}")
        for key in ("size", "seed", "shuffle"):
            if state[key] != expected[key]:
                raise DataError(
                    f"the checkpoint's problem order has {key}={state[key]}, this run has {expected[key]}: prompts "
                    "would be skipped or repeated; resume with the same data, run.seed and data.shuffle"
                )
        epoch, position = state["epoch"], state["position"]
        if not (isinstance(epoch, int) and isinstance(position, int) and epoch >= 0 and 0 <= position <= self._size):
            raise DataError(f"the checkpoint's problem order stands at {position!r} of {self._size} problems")
        self._epoch, self._position = epoch, position
        self._order = self._epoch_order()

    def start_over(self, state: dict[str, Any]) -> None:
        """Begins the epoch after the one that `state`, of other data, stood in: an order that has not been used."""
        epoch = state.get("epoch") if isinstance(state, dict) else None
        if not isinstance(epoch, int) or epoch < 0:
            raise DataError(f"the checkpoint's problem order cannot be read: {state!r}")
        self._epoch, self._position = epoch + 1, 0
        self._order = self._epoch_order()

    def _epoch_order(self) -> list[int]:
        order = list(range(self._size))
        if self._shuffle:
            random.Random(f"{self._seed}:{self._epoch}").shuffle(order)
        return order
