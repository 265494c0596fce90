"""One engine: sequences that decode together, a token each for every decoding step, as fast as their number allows.

Between two events the step's seconds are those in the middle: exact where they are linear in what the cache holds.
"""

import heapq
import math
from collections.abc import Container
from dataclasses import dataclass

from megatron_fipo.rollout.ledger import Ticket
from megatron_fipo.simulation.costs import Decoding, EngineSize

_MARGIN = 0.01
"""Share of the cache that has to be free for a sequence to start, vLLM's own."""
_ROUNDING = 1e-6


@dataclass(eq=False, slots=True)
class Sequence:
    """A sample on its way. The one record here that changes: how far it has come."""

    ticket: Ticket
    length: int
    done: float = 0.0
    """Tokens that it has."""
    expected: float = 0.0
    """Its length, as far as it can be known before."""


@dataclass
class Work:
    """What an engine has done so far."""

    busy_s: float = 0.0
    place_s: float = 0.0
    """Seconds times sequences."""
    tokens: float = 0.0
    again: float = 0.0
    """Tokens that were prefilled a second time: the contexts of sequences that were put back or went on elsewhere."""


class Engine:
    """Runs up to `size.places` sequences. All methods take the present time, which never goes back."""

    def __init__(
        self, costs: Decoding, size: EngineSize, prompt: float, prompt_share: float, quantum: int, slow: float
    ):
        """`prompt_share` of a prompt is prefilled for each sample; ends are seen on a grid of `quantum` tokens."""
        self.work = Work()
        self.plan = 0
        """Number of the newest plan; events of older ones are void."""
        self.up = True
        self._paused = False
        self._costs, self._size, self._prompt, self._prompt_share = costs, size, prompt, prompt_share
        self._quantum, self._slow = quantum, slow
        self._since = 0.0
        self._position = 0.0
        self._held = 0.0
        self._debt_s = 0.0
        self._step_s = 1.0
        self._target = 0.0
        self._ends: list[tuple[float, int, Sequence]] = []
        self._running: dict[Sequence, float] = {}
        self._count = 0

    def __len__(self) -> int:
        """Sequences that run."""
        return len(self._running)

    @property
    def running(self) -> list[Sequence]:
        """What runs."""
        return list(self._running)

    @property
    def is_working(self) -> bool:
        """Whether it decodes."""
        return bool(self._running) and not self._paused

    def has_room(self, sequence: Sequence) -> bool:
        """Whether it can start now. An engine that runs nothing takes every sequence."""
        if not self.up or len(self._running) >= self._size.places:
            return False
        needed = self._held + self._prompt + sequence.done + _MARGIN * self._size.cache_tokens
        return not self._running or needed <= self._size.cache_tokens

    def start(self, now: float, sequence: Sequence) -> None:
        """Run it from here; what it has so far is prefilled."""
        self.advance(now)
        context = self._prompt + sequence.done
        if sequence.done:
            self._prefill_again(context)
        else:
            self._debt_s += self._slow * self._costs.prefill_s(self._prompt_share * self._prompt)
        end = self._position + sequence.length - sequence.done
        self._running[sequence] = end
        self._count += 1
        heapq.heappush(self._ends, (end, self._count, sequence))
        self._held += context

    def advance(self, now: float) -> None:
        """Decode up to `now`, at the speed that was planned."""
        elapsed, self._since = now - self._since, now
        if not self._running or self._paused:
            return
        batch = len(self._running)
        self.work.busy_s += elapsed
        self.work.place_s += elapsed * batch
        prefilling = min(self._debt_s, elapsed)
        self._debt_s -= prefilling
        self._decode((elapsed - prefilling) / self._step_s, batch)

    def next_event_s(self) -> float | None:
        """Seconds until something ends or the cache is full, from the last `advance`; None while nothing runs."""
        self.plan += 1
        if not self._running or self._paused:
            return None
        while self._running.get(self._ends[0][2]) != self._ends[0][0]:
            heapq.heappop(self._ends)
        batch, first = len(self._running), self._ends[0][0]
        target = first if self._quantum == 1 else math.ceil(first / self._quantum) * self._quantum
        steps = target - self._position
        if batch > 1:
            steps = min(steps, (self._size.cache_tokens - self._held) / batch)
        steps = max(0.0, steps)
        self._step_s = self._slow * self._costs.decode_s(batch, self._held + batch * steps / 2)
        self._target = self._position + steps
        return self._debt_s + steps * self._step_s

    def reach(self, now: float) -> tuple[list[Sequence], list[Sequence]]:
        """The planned event is there: sequences that have ended, and those that the full cache puts back."""
        self.advance(now)
        self._decode(self._target - self._position, len(self._running))  # what floating point has left
        ended = []
        while self._ends and self._ends[0][0] <= self._position + _ROUNDING:
            end, _, sequence = heapq.heappop(self._ends)
            if self._running.get(sequence) == end:
                self._remove(sequence)
                ended.append(sequence)
        put_back = []
        while len(self._running) > 1 and self._held >= self._size.cache_tokens - _ROUNDING:
            youngest = next(reversed(self._running))
            self._remove(youngest)
            put_back.append(youngest)
        return ended, put_back

    def pause(self, now: float) -> None:
        """Decode nothing until `resume`."""
        self.advance(now)
        self._paused = True

    def resume(self, now: float, *, recompute: bool) -> None:
        """Go on; with `recompute`, after a prefill of all that runs."""
        self.advance(now)
        self._paused = False
        if recompute and self._running:
            self._prefill_again(self._held)

    def fail(self, now: float) -> list[Sequence]:
        """Lose all that runs, which is returned with the tokens that it had."""
        self.advance(now)
        self.up, lost = False, list(self._running)
        for sequence in lost:
            self._remove(sequence)
        self._ends, self._debt_s = [], 0.0
        return lost

    def stop(self, now: float, tickets: Container[int]) -> None:
        """Take off what runs for these tickets, by number."""
        self.advance(now)
        for sequence in [each for each in self._running if each.ticket.number in tickets]:
            self._remove(sequence)

    def _prefill_again(self, tokens: float) -> None:
        self._debt_s += self._slow * self._costs.prefill_s(tokens)
        self.work.again += tokens

    def _decode(self, steps: float, batch: int) -> None:
        self._position += steps
        self._held += steps * batch

    def _remove(self, sequence: Sequence) -> None:
        """Take it off. On the grid it may have run past its end, which counts as waiting."""
        end = self._running.pop(sequence)
        left = end - self._position
        self._held -= self._prompt + sequence.length - left
        reached = sequence.length - max(0.0, left)
        self.work.tokens += reached - sequence.done
        sequence.done = reached
        if not self._running:
            self._held = 0.0
