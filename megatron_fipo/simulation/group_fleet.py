"""All engines, asked for whole groups as the generator asks servers, in its way or in another to compare it with."""

import enum
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np

from megatron_fipo.simulation.engine import Engine, Sequence
from megatron_fipo.simulation.events import Clock
from megatron_fipo.simulation.fleet import Fleet
from megatron_fipo.simulation.settings import Troubles


class Place(enum.Enum):
    """Which engine gets the next group."""

    TURNS = "each in turn, however much waits there"
    SAMPLES = "the one with the fewest samples"
    TOKENS = "the one with the fewest expected tokens"


@dataclass(frozen=True)
class Dispatch:
    """Which group is next, who gets it, and how much an engine is asked for at a time."""

    place: Place
    most_samples: int
    """That an engine has at a time, running or waiting. A group goes to an engine with room for all of it."""
    longest_first: bool = False
    """The group with the longest expected responses comes first, else the oldest."""
    foresight: bool = False
    """Expect of each group what its samples will have: the most that any estimate can give."""


class GroupFleet(Fleet):
    """Deals groups; the samples that an engine cannot run yet wait there."""

    def __init__(
        self,
        clock: Clock,
        engines: Row[Engine],
        on_end: Callable[[float, Sequence], None],
        stream_tokens: int,
        troubles: Troubles,
        random: np.random.Generator,
        dispatch: Dispatch,
    ):
        """See Fleet."""
        super().__init__(clock, engines, self._ended, stream_tokens, troubles, random)
        self._then, self._how = on_end, dispatch
        self._lines: list[deque[Sequence]] = [deque() for _ in engines]
        self._samples, self._tokens = [0] * len(engines), [0.0] * len(engines)
        self._engine_of: dict[Sequence, int] = {}
        self._turns = itertools.count()

    def submit(self, now: float, sequences: Iterable[Sequence]) -> None:
        """Sample these groups, after those that wait or in the order of expected lengths."""
        new = list(sequences)
        if self._how.foresight:
            for _, samples in itertools.groupby(new, key=_number):
                group = list(samples)
                for sequence in group:
                    sequence.expected = sum(each.length for each in group) / len(group)
        self._waiting.extend(new)
        if self._how.longest_first:
            self._waiting = deque(sorted(self._waiting, key=lambda each: (-each.expected, each.ticket.number)))
        self._dispatch(now)

    def stop(self, now: float, tickets: Container[int]) -> None:
        """Sample no further for these tickets, by number."""
        self._lines = [deque(each for each in line if each.ticket.number not in tickets) for line in self._lines]
        for sequence in [each for each in self._engine_of if each.ticket.number in tickets]:
            self._forget(sequence)
        super().stop(now, tickets)
        self._dispatch(now)

    def _line_of(self, index: int) -> deque[Sequence]:
        return self._lines[index]

    def _dispatch(self, now: float) -> None:
        changed = {index for index, line in enumerate(self._lines) if line}
        while self._waiting:
            group = list(next(itertools.groupby(self._waiting, key=_number))[1])
            if (index := self._with_room(len(group))) is None:
                break
            for sequence in group:
                self._waiting.popleft()
                self._lines[index].append(sequence)
                self._engine_of[sequence] = index
                self._samples[index] += 1
                self._tokens[index] += sequence.expected
            changed.add(index)
        for index in sorted(changed):
            self._fill(now, index)

    def _with_room(self, samples: int) -> int | None:
        up = [index for index, engine in enumerate(self._engines) if engine.up]
        if self._how.place is Place.TURNS:
            return up[next(self._turns) % len(up)] if up else None
        room = [index for index in up if self._samples[index] + samples <= self._how.most_samples]
        load: Row[float] = self._samples if self._how.place is Place.SAMPLES else self._tokens
        return min(room, key=lambda index: load[index], default=None)

    def _fill(self, now: float, index: int) -> None:
        engine, line, started = self._engines[index], self._lines[index], False
        while line and engine.has_room(line[0]):
            engine.start(now, line.popleft())
            started = True
        if started:
            self._plan(now, index)

    def _ended(self, now: float, sequence: Sequence) -> None:
        self._forget(sequence)
        self._then(now, sequence)
        self._dispatch(now)

    def _forget(self, sequence: Sequence) -> None:
        # One that was stopped in the moment of its end is forgotten already.
        if (index := self._engine_of.pop(sequence, None)) is not None:
            self._samples[index] -= 1
            self._tokens[index] -= sequence.expected

    def _fail(self, index: int, now: float) -> None:
        line, self._lines[index] = self._lines[index], deque()
        for sequence in (*self._engines[index].running, *line):
            self._forget(sequence)
        self._waiting.extendleft(reversed(line))
        super()._fail(index, now)


def _number(sequence: Sequence) -> int:
    return sequence.ticket.number
