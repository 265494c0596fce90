"""Shows the part of a step in which all is sampled and some is judged."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron_fipo.rollout.listener import Listener, Stage


class JudgingPhase:
    """Counts groups that are sampled and judged. While there are only such that are judged, that is a phase."""

    def __init__(self, listener: Listener | None):
        """None: nobody hears of it."""
        self._listener = listener
        self._sampling = self._judging = self._begun_with = 0
        self._open = ExitStack()
        self._stage: Stage | None = None
        """That phase, while it goes on."""

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """A group is sampled."""
        self._sampling += 1
        self._look()
        try:
            yield
        finally:
            self._sampling -= 1

    @contextmanager
    def judging(self) -> Iterator[None]:
        """A group is judged."""
        self._judging += 1
        self._look()
        try:
            yield
        finally:
            self._judging -= 1
            self._look()

    def _look(self) -> None:
        if self._listener is None:
            return
        only_judged = self._judging > 0 and self._sampling == 0
        if only_judged and self._stage is None:
            self._begun_with = self._judging
            self._stage = self._open.enter_context(self._listener.phase("verify"))
        elif only_judged and self._stage is not None:
            self._stage.progress(self._begun_with - self._judging, self._begun_with, "groups")
        elif self._stage is not None:
            self._open.close()
            self._stage = None
