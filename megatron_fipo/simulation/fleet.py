"""All engines: sequences wait in one line, and each goes to the engine that runs the fewest."""

import heapq
from collections import deque
from collections.abc import Callable, Container, Iterable
from collections.abc import Sequence as Row
from dataclasses import fields
from functools import partial

import numpy as np

from megatron_fipo.simulation.engine import Engine, Sequence, Work
from megatron_fipo.simulation.events import Clock, Span
from megatron_fipo.simulation.settings import Troubles


class Fleet:
    """Runs sequences, and says when each ends."""

    def __init__(
        self,
        clock: Clock,
        engines: Row[Engine],
        on_end: Callable[[float, Sequence], None],
        stream_tokens: int,
        troubles: Troubles,
        random: np.random.Generator,
    ):
        """`stream_tokens`: a failing engine's samples keep whole parts of so many."""
        self.spans: list[Span] = []
        self._clock, self._engines, self._on_end = clock, engines, on_end
        self._stream_tokens, self._troubles, self._random = stream_tokens, troubles, random
        self._waiting: deque[Sequence] = deque()
        self._busy_since: dict[int, float] = {}
        if troubles.hours_between_failures is not None:
            for index in range(len(engines)):
                self._clock.at(self._failure_after(0.0), partial(self._fail, index))

    def submit(self, now: float, sequences: Iterable[Sequence]) -> None:
        """Sample these, after those that wait."""
        self._waiting.extend(sequences)
        self._dispatch(now)

    def stop(self, now: float, tickets: Container[int]) -> None:
        """Sample no further for these tickets, by number."""
        self._waiting = deque(each for each in self._waiting if each.ticket.number not in tickets)
        for index, engine in enumerate(self._engines):
            engine.stop(now, tickets)
            self._plan(now, index)

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

    def _line_of(self, index: int) -> deque[Sequence]:
        """What the engine starts next."""
        return self._waiting

    def _dispatch(self, now: float) -> None:
        if not self._waiting:
            return
        loads = [(len(engine), index) for index, engine in enumerate(self._engines) if engine.up]
        heapq.heapify(loads)
        changed = set()
        while self._waiting and loads:
            _, index = heapq.heappop(loads)
            engine = self._engines[index]
            if engine.has_room(self._waiting[0]):
                engine.start(now, self._waiting.popleft())
                heapq.heappush(loads, (len(engine), index))
                changed.add(index)
        for index in sorted(changed):
            self._plan(now, index)

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
        line = self._line_of(index)
        line.extendleft(put_back)
        if not put_back:
            while line and engine.has_room(line[0]):
                engine.start(now, line.popleft())
        self._plan(now, index)
        for sequence in ended:
            self._on_end(now, sequence)

    def _fail(self, index: int, now: float) -> None:
        lost = self._engines[index].fail(now)
        self._plan(now, index)
        for sequence in lost:
            sequence.done = sequence.done // self._stream_tokens * self._stream_tokens
        self._waiting.extendleft(reversed(lost))
        self._dispatch(now)
        self._clock.at(now + self._troubles.restart_s, partial(self._return, index))

    def _return(self, index: int, now: float) -> None:
        self._engines[index].up = True
        self._clock.at(self._failure_after(now), partial(self._fail, index))
        self._dispatch(now)

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
