"""What is played: the assumptions of a simulated run that its configuration does not have."""

from dataclasses import dataclass

from megatron_fipo.simulation.lengths import Lengths


@dataclass(frozen=True)
class Measured:
    """Seconds that were measured, in place of the planner's. None: the planner's."""

    decode: tuple[float, float] | None = None
    """Of a decoding step, and for each sequence in it."""
    log_probs: tuple[float, float] | None = None
    """Of a step, and for each token that it trains on."""
    update: tuple[float, float] | None = None
    """Of an optimizer update, and for each token that it trains on."""
    weights: float | None = None
    """Of a weight update."""
    other: float = 0.0
    """Of what else a step does while nothing is sampled."""


@dataclass(frozen=True)
class Troubles:
    """What goes wrong."""

    slow_share: float = 0.0
    """Share of engines that are slow."""
    slow_factor: float = 1.0
    """How many times longer these take."""
    hours_between_failures: float | None = None
    """Of one engine, on average. None: none fails."""
    restart_s: float = 300.0


@dataclass(frozen=True)
class Settings:
    """Everything that a simulation takes beside the configuration."""

    lengths: Lengths
    prompt: float
    """Tokens of a prompt."""
    rejected: float
    """Share of groups that dynamic sampling rejects."""
    steps: int
    warm_up: int
    """Steps before those that are measured."""
    seed: int
    samples_at_once: int | None
    """A step with more samples is played by a part of engines and prompts; None: never."""
    measured: Measured = Measured()
    troubles: Troubles = Troubles()
