"""A run in made-up time: the real admission and ledger, and engines and a trainer of whom only seconds are known."""

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass

import numpy as np

from megatron_fipo.rollout.admission import Admission, Rounds
from megatron_fipo.rollout.ledger import SURPLUS, Ledger, Ticket
from megatron_fipo.simulation.engine import Engine, Sequence, Work
from megatron_fipo.simulation.events import Clock, Span
from megatron_fipo.simulation.fleet import Dispatch, Fleet
from megatron_fipo.simulation.settings import Settings

REJECTED = "rejected"
TRAINER = "trainer"


@dataclass(frozen=True)
class Step:
    """One step's end, and what it trained on."""

    end: float
    numbers: tuple[int, ...]
    """Of its tickets."""
    lags: tuple[int, ...]
    """Versions between a ticket's opening and its training."""
    tokens: float
    """Prompts and responses."""
    trainer_s: float
    """Log-probs, updates, and whatever else only the trainer does."""
    weights_s: float
    engines: Work
    """All that the engines have done up to its end."""


@dataclass(frozen=True)
class Played:
    """A simulated run."""

    steps: list[Step]
    spans: list[Span]


@dataclass(frozen=True)
class Parts:
    """What a run is made of."""

    admission: Admission
    engines: list[Engine]
    places: int
    """Of one engine: samples that it runs at a time, where their memory is the average."""
    samples: int
    """Of one prompt."""
    trainer: Callable[[float, int], tuple[float, float]]
    """Seconds of log-probs and updates, by tokens and sequences."""
    weights_s: float
    recompute: bool
    """Whether what runs during a weight update is prefilled again."""
    stream_tokens: int
    dispatch: Dispatch
    """How groups go to engines."""


@dataclass
class _Group:
    """A ticket's samples."""

    left: int
    rejected: bool
    """What dynamic sampling will say of it."""
    tokens: float = 0.0


@dataclass
class _Taken:
    """The batch that the trainer has."""

    tickets: list[Ticket]
    tokens: float
    lags: tuple[int, ...]
    seconds: float


class Simulation:
    """Plays `settings.warm_up + settings.steps` steps."""

    def __init__(self, parts: Parts, settings: Settings):
        self._parts, self._settings = parts, settings
        # Drawn in the order of tickets: their samples are the same whatever samples them, and modes can be compared.
        self._lengths, self._verdicts, failures, self._problems = np.random.default_rng(settings.seed).spawn(4)
        self._clock, self._ledger = Clock(), Ledger()
        about = self._clock, parts.engines, self._sample_ended, parts.stream_tokens, settings.troubles, failures
        self._fleet = Fleet(*about, parts.dispatch)
        self._groups: dict[int, _Group] = {}
        self._sampling = self._ready = 0
        self._taken: _Taken | None = None
        self._steps: list[Step] = []
        self._spans: list[Span] = []

    def play(self) -> Played:
        """Play all steps."""
        self._go_on(0.0)
        wanted = self._settings.warm_up + self._settings.steps
        while len(self._steps) < wanted and self._clock.next():
            pass
        end = self._steps[-1].end
        self._fleet.end(end)
        return Played(self._steps, [*self._spans, *self._fleet.spans])

    def _go_on(self, now: float) -> None:
        """Open what admission wants, and begin a step if it has a batch."""
        # Rounds opens and takes nothing before all that is sampled is judged; asking its ledger each time takes long.
        if isinstance(self._parts.admission, Rounds) and self._sampling:
            return
        if count := self._parts.admission.admit(self._ledger):
            self._open(now, count)
        if self._taken is None:
            self._take(now)

    def _open(self, now: float, count: int) -> None:
        tickets = self._ledger.open([""] * count, lambda number: number)
        samples = self._parts.samples
        lengths, expected = self._settings.lengths.draw_groups(count, samples, self._lengths, self._problems)
        rejected = self._verdicts.random(count) < self._settings.rejected
        for ticket, is_rejected in zip(tickets, rejected, strict=True):
            self._ledger.start(ticket)
            self._groups[ticket.number] = _Group(samples, bool(is_rejected))
        self._sampling += count
        groups = zip(tickets, lengths, expected, strict=True)
        drawn = [Sequence(ticket, int(n), expected=float(mean)) for ticket, row, mean in groups for n in row]
        self._fleet.submit(now, drawn)

    def _sample_ended(self, now: float, sequence: Sequence) -> None:
        if (group := self._groups.get(sequence.ticket.number)) is None:
            return  # it was stopped as it ended
        group.left -= 1
        group.tokens += self._settings.prompt + sequence.length
        if group.left:
            return
        self._ledger.scored(sequence.ticket, REJECTED if group.rejected else None)
        self._sampling -= 1
        if group.rejected:
            del self._groups[sequence.ticket.number]
        else:
            self._ready += 1
        self._go_on(now)

    def _take(self, now: float) -> None:
        admission = self._parts.admission
        # As above: without rounds, a batch is full of READY tickets.
        if not isinstance(admission, Rounds) and self._ready < admission.prompts_per_step:
            return
        if (take := admission.take(self._ledger)) is None:
            return
        self._ledger.take(take.tickets)
        for ticket in take.surplus:
            self._ledger.reject(ticket, SURPLUS)
            del self._groups[ticket.number]
        self._stop(now, take.stopped)
        self._ready -= len(take.tickets) + len(take.surplus)
        tokens = sum(self._groups[ticket.number].tokens for ticket in take.tickets)
        lags = tuple(self._ledger.version - ticket.start_version for ticket in take.tickets)
        log_probs, update = self._parts.trainer(tokens, len(take.tickets) * self._parts.samples)
        end = self._trainer_spans(now, log_probs, update)
        self._taken = _Taken(list(take.tickets), tokens, lags, end - now)
        self._clock.at(end, self._publish)

    def _stop(self, now: float, tickets: Row[Ticket]) -> None:
        """They are not needed."""
        if tickets:
            self._fleet.stop(now, {ticket.number for ticket in tickets})
        for ticket in tickets:
            self._ledger.stop(ticket)
            del self._groups[ticket.number]
        self._sampling -= len(tickets)

    def _trainer_spans(self, now: float, log_probs: float, update: float) -> float:
        """Note what the trainer does from now on; when it is done."""
        start = now
        for what, seconds in (("log-probs", log_probs), ("updates", update), ("other", self._settings.measured.other)):
            if seconds:
                self._spans.append(Span(TRAINER, what, start, start + seconds))
            start += seconds
        return start

    def _publish(self, now: float) -> None:
        self._fleet.pause(now)
        end = now + self._parts.weights_s
        self._spans.append(Span(TRAINER, "weights", now, end))
        self._clock.at(end, self._settle)

    def _settle(self, now: float) -> None:
        taken = self._taken
        assert taken is not None
        self._fleet.resume(now, recompute=self._parts.recompute)
        trained = self._ledger.settle(self._ledger.version + 1)
        for ticket in trained:
            del self._groups[ticket.number]
        self._steps.append(
            Step(
                end=now,
                numbers=tuple(ticket.number for ticket in trained),
                lags=taken.lags,
                tokens=taken.tokens,
                trainer_s=taken.seconds,
                weights_s=self._parts.weights_s,
                engines=self._fleet.work(now),
            )
        )
        self._taken = None
        self._go_on(now)
