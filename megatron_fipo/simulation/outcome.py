"""What a simulated run comes to, per step, after its first ones."""

import functools
import math
from dataclasses import dataclass
from statistics import fmean

from megatron_fipo.config import Config
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.simulation.run import Played, Simulation
from megatron_fipo.simulation.scenarios import Mode, Placement, part_of, parts, split, trainer_nodes
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.timing import rollout_process_s

_FIRST_SPLITS = 5
"""How many splits are tried before the search narrows."""


@dataclass(frozen=True)
class Outcome:
    """One line of the table."""

    mode: Mode
    placement: Placement
    step_s: float
    tokens_per_gpu_s: float
    """Of prompts and responses that were trained on, for each GPU of the run."""
    trainer_idle: float
    """Share of the time in which the trainer's GPUs do nothing."""
    engines_idle: float
    """Likewise, of the engines'."""
    places_used: float
    """Share of the engines' places that had a sequence."""
    lag_mean: float
    lag_max: int
    prefilled_again: float
    """Tokens that were prefilled a second time, for each that was sampled."""
    rollout_process_busy: float
    """Share of the time in which the rollout process, beside rank 0, receives samples. Near 1, it is too slow."""
    played: Played


def simulate(mode: Mode, placement: Placement, model_config: ModelConfig, settings: Settings) -> Outcome:
    """Play the mode there."""
    made = parts(mode, placement, model_config, settings)
    played = Simulation(made, settings).play()
    part = part_of(placement.config, placement.engines, settings)
    steps = played.steps[settings.warm_up :]
    before = played.steps[settings.warm_up - 1]
    seconds = steps[-1].end - before.end
    first, last = before.engines, steps[-1].engines
    sampling = (last.busy_s - first.busy_s) / (seconds * part.engines)
    training = sum(step.trainer_s + step.weights_s for step in steps) / seconds
    both = 1 - sampling - training
    lags = [lag for step in steps for lag in step.lags]
    tokens = part.whole * sum(step.tokens for step in steps)
    sampled = last.tokens - first.tokens
    received = part.whole * rollout_process_s(sampled / settings.lengths.mean, sampled)
    return Outcome(
        mode=mode,
        placement=placement,
        step_s=seconds / len(steps),
        tokens_per_gpu_s=tokens / seconds / placement.gpus,
        trainer_idle=both if placement.in_turns else 1 - training,
        engines_idle=both if placement.in_turns else 1 - sampling,
        places_used=(last.place_s - first.place_s) / (seconds * part.engines * made.places),
        lag_mean=fmean(lags) if lags else 0.0,
        lag_max=max(lags, default=0),
        prefilled_again=(last.again - first.again) / max(1.0, sampled),
        rollout_process_busy=received / seconds,
        played=played,
    )


def best_split(mode: Mode, config: Config, model_config: ModelConfig, settings: Settings) -> Outcome | None:
    """The mode with the split of nodes that is fastest: of some all over the range, then closer to the best of them."""
    counts = trainer_nodes(config)

    @functools.cache
    def at(place: int) -> Outcome | None:
        placement = split(config, model_config, counts[place])
        return None if placement is None else simulate(mode, placement, model_config, settings)

    def seconds(place: int) -> float:
        outcome = at(place)
        return math.inf if outcome is None else outcome.step_s

    distance = max(1, len(counts) // _FIRST_SPLITS)
    best = min(range(distance // 2, len(counts), distance), key=seconds, default=None)
    if best is None:
        return None
    while distance > 1:
        distance = -(-distance // 2)
        best = min((p for p in (best, best - distance, best + distance) if 0 <= p < len(counts)), key=seconds)
    return at(best)
