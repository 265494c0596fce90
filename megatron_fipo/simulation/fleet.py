"""All engines, asked for whole groups as the generator asks servers, in its way or in another to compare it with."""

import enum
import itertools
from collections import deque
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Row
from dataclasses import dataclass, fields
from functools import partial

import numpy as np

from megatron_fipo.simulation.engine import Engine, Sequence, Work
from megatron_fipo.simulation.events import Clock, Span
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


class Fleet:
    """Deals groups, runs their sequences, and says when each ends. What an engine cannot run yet waits there."""

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
        """`stream_tokens`: a failing engine's samples keep whole parts of so many."""
        self.spans: list[Span] = []
        self._clock, self._engines, self._on_end = clock, engines, on_end
        self._stream_tokens, self._troubles, self._random = stream_tokens, troubles, random
        self._how = dispatch
        self._waiting: deque[list[Sequence]] = deque()
        """Groups, or what is left of them, that no engine has been asked for."""
        self._lines: list[deque[Sequence]] = [deque() for _ in engines]
        """What each engine has been asked for and does not run."""
        self._with_line: set[int] = set()
        """The engines of which that is not empty. There may be thousands, and this is asked at every sample's end."""
        self._samples, self._tokens = [0] * len(engines), [0.0] * len(engines)
        self._engine_of: dict[Sequence, int] = {}
        self._turns = itertools.count()
        self._busy_since: dict[int, float] = {}
        if troubles.hours_between_failures is not None:
            for index in range(len(engines)):
                self._clock.at(self._failure_after(0.0), partial(self._fail, index))

    def submit(self, now: float, sequences: Iterable[Sequence]) -> None:
        """Sample these groups, after those that wait or in the order of expected lengths."""
        new = _groups(sequences)
        if self._how.foresight:
            for group in new:
                for sequence in group:
                    sequence.expected = sum(each.length for each in group) / len(group)
        self._waiting.extend(new)
        if self._how.longest_first:
            self._waiting = deque(sorted(self._waiting, key=lambda group: (-group[0].expected, _number(group[0]))))
        self._deal(now)

    def stop(self, now: float, tickets: Container[int]) -> None:
        """Sample no further for these tickets, by number."""
        self._waiting = deque(group for group in self._waiting if _number(group[0]) not in tickets)
        self._lines = [deque(each for each in line if _number(each) not in tickets) for line in self._lines]
        self._with_line = {index for index, line in enumerate(self._lines) if line}
        for sequence in [each for each in self._engine_of if _number(each) in tickets]:
            self._forget(sequence)
        for index, engine in enumerate(self._engines):
            engine.stop(now, tickets)
            self._plan(now, index)
        self._deal(now)

    def pause(self, now: float) -> None:
        """No engine decodes until `resume`."""
        for index, engine in enumerate(self._engines):
            engine.pause(now)
            self._note(now, index)

    def resume(self, now: float, *, recompute: bool) -> None:
        """Go on; with `recompute`, each after a prefill of what it runs."""
        for index, engine in enumerate(self._engines):
            engine.resume(now, recompute=recompute)
            self._plan(now, index)

    def work(self, now: float) -> Work:
        """What all engines have done up to now."""
        for index, engine in enumerate(self._engines):
            engine.advance(now)
            self._plan(now, index)
        each = [engine.work for engine in self._engines]
        return Work(*(sum(getattr(work, field.name) for work in each) for field in fields(Work)))

    def end(self, now: float) -> None:
        """Close the spans that are open."""
        for index in list(self._busy_since):
            self._close(now, index)

    def _deal(self, now: float) -> None:
        """Give waiting groups to engines that have room for them, and start what these can run."""
        while self._waiting and (index := self._with_room(len(self._waiting[0]))) is not None:
            group = self._waiting.popleft()
            self._lines[index].extend(group)
            self._samples[index] += len(group)
            for sequence in group:
                self._engine_of[sequence] = index
                self._tokens[index] += sequence.expected
            self._with_line.add(index)
        for index in sorted(self._with_line):
            if self._fill(now, index):
                self._plan(now, index)

    def _with_room(self, samples: int) -> int | None:
        up = [index for index, engine in enumerate(self._engines) if engine.up]
        if self._how.place is Place.TURNS:
            return up[next(self._turns) % len(up)] if up else None
        room = [index for index in up if self._samples[index] + samples <= self._how.most_samples]
        load: Row[float] = self._samples if self._how.place is Place.SAMPLES else self._tokens
        return min(room, key=lambda index: load[index], default=None)

    def _fill(self, now: float, index: int) -> bool:
        """Start what waits at the engine and has room; whether something did."""
        engine, line, started = self._engines[index], self._lines[index], False
        while line and engine.has_room(line[0]):
            engine.start(now, line.popleft())
            started = True
        if not line:
            self._with_line.discard(index)
        return started

    def _plan(self, now: float, index: int) -> None:
        self._note(now, index)
        engine = self._engines[index]
        seconds = engine.next_event_s()
        if seconds is not None:
            self._clock.at(now + seconds, partial(self._reach, index, engine.plan))

    def _reach(self, index: int, plan: int, now: float) -> None:
        engine = self._engines[index]
        if engine.plan != plan:
            return
        ended, put_back = engine.reach(now)
        if put_back:
            self._lines[index].extendleft(put_back)
            self._with_line.add(index)
        else:
            self._fill(now, index)
        self._plan(now, index)
        for sequence in ended:
            self._forget(sequence)
            self._on_end(now, sequence)
        if ended:
            self._deal(now)

    def _forget(self, sequence: Sequence) -> None:
        # One that was stopped in the moment of its end is forgotten already.
        if (index := self._engine_of.pop(sequence, None)) is not None:
            self._samples[index] -= 1
            self._tokens[index] -= sequence.expected

    def _fail(self, index: int, now: float) -> None:
        line, self._lines[index] = self._lines[index], deque()
        self._with_line.discard(index)
        lost = self._engines[index].fail(now)
        self._plan(now, index)
        for sequence in (*lost, *line):
            self._forget(sequence)
        for sequence in lost:
            sequence.done = sequence.done // self._stream_tokens * self._stream_tokens
        self._waiting.extendleft(reversed(_groups((*lost, *line))))
        self._deal(now)
        self._clock.at(now + self._troubles.restart_s, partial(self._return, index))

    def _return(self, index: int, now: float) -> None:
        self._engines[index].up = True
        self._clock.at(self._failure_after(now), partial(self._fail, index))
        self._deal(now)

    def _failure_after(self, now: float) -> float:
        hours = self._troubles.hours_between_failures or 0.0
        return now + 3600 * hours * self._random.exponential()

    def _note(self, now: float, index: int) -> None:
        """Open or close the engine's span where it has begun or ended to work."""
        if self._engines[index].is_working:
            self._busy_since.setdefault(index, now)
        elif index in self._busy_since:
            self._close(now, index)

    def _close(self, now: float, index: int) -> None:
        start = self._busy_since.pop(index)
        if now > start:
            self.spans.append(Span(f"engine {index}", "sampling", start, now))


def _number(sequence: Sequence) -> int:
    return sequence.ticket.number


def _groups(sequences: Iterable[Sequence]) -> list[list[Sequence]]:
    """Neighbours that are of one ticket, together."""
    return [list(group) for _, group in itertools.groupby(sequences, key=_number)]
