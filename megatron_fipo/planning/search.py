"""Find the best of each way to spread a run: by arithmetic over all splits of its nodes, then by simulating some."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_fipo.config import Config, with_values
from megatron_fipo.config.checks import check
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.planning.ways import COLOCATED, WAYS, placed, variants
from megatron_fipo.simulation.costs import TrainerCosts, asked_for, decoding, engine_size
from megatron_fipo.simulation.outcome import Outcome, simulate
from megatron_fipo.simulation.scenarios import Placement, configured, own_mode
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.layouts import Layout, layouts
from megatron_fipo.sizing.placement import has_room_to_sample
from megatron_fipo.sizing.timing import rollout_servers

_SPLITS = 16
"""About how many splits of the nodes are compared by arithmetic."""
_WIDTHS = 2
"""How many sizes of an engine are simulated: the best by arithmetic."""
_FINER = 4
"""The search ends at a part of the first distance between splits."""
_EVERY = 3
"""Of the splits, where a search may begin beside the best by arithmetic, which knows nothing of waits."""
_STEPS, _SAMPLES_AT_ONCE = 4, 512
"""Of simulations that only choose; what is chosen is simulated as it was asked for."""


@dataclass(frozen=True)
class Proposal:
    """The best of a way."""

    way: str
    outcome: Outcome

    @property
    def config(self) -> Config:
        """The run's configuration that way."""
        return self.outcome.placement.config


@dataclass(frozen=True)
class Plan:
    """The best of each way that is possible, fastest first, and why others are not."""

    proposals: list[Proposal]
    refused: dict[str, str]


def as_configured(config: Config, model_config: ModelConfig, settings: Settings) -> Outcome:
    """The run simulated as it is configured. ConfigError if that cannot be."""
    mode = own_mode(config)
    return simulate(mode, configured(config, model_config, mode), model_config, settings)


def plan_ways(config: Config, model_config: ModelConfig, settings: Settings) -> Plan:
    """Search every way."""
    trainers = _Trainers(model_config, settings)
    found, refused = [], {}
    for way in WAYS:
        try:
            outcomes = [
                outcome
                for variant in variants(way, config, settings.rejected)
                if (outcome := _Search(way, variant, model_config, settings, trainers).best())
            ]
        except ConfigError as error:
            refused[way] = str(error)
            continue
        if outcomes:
            found.append(Proposal(way, min(outcomes, key=_seconds)))
        else:
            nodes = config.cluster.trainer_nodes + config.cluster.rollout_nodes
            cannot = nodes == 1 and way != COLOCATED
            refused[way] = "one node cannot be split" if cannot else "no layout of these nodes fits"
    return Plan(sorted(found, key=lambda proposal: _seconds(proposal.outcome)), refused)


class _Trainers:
    """The fastest layout that fits, for each configuration of nodes and servers."""

    def __init__(self, model_config: ModelConfig, settings: Settings):
        self._model_config, self._settings = model_config, settings
        self._known: dict[tuple[int, bool, int], Layout | None] = {}

    def lay_out(self, config: Config) -> Config | None:
        """The configuration in that layout; None if none fits. Servers count where they are on the same GPUs."""
        rollout = config.rollout
        key = (config.cluster.trainer_nodes, rollout.shared_gpu, rollout.shared_gpu and rollout.tensor_parallel)
        if key not in self._known:
            fitting = [each for each in layouts(config, self._model_config) if each.estimate.fits]
            roomy = [each for each in fitting if not each.estimate.tight]
            self._known[key] = min(roomy or fitting, key=self._trainer_s, default=None)
        if (layout := self._known[key]) is None:
            return None
        chosen = layout.config
        return with_values(config, {"parallel": chosen.parallel, "model.recompute": chosen.model.recompute})

    def _trainer_s(self, layout: Layout) -> float:
        return sum(
            trainer_phases(layout.config, self._model_config, layout.estimate.data_parallel_size, self._settings)
        )


class _Search:
    """One variant of a way. Points are (nodes that train, GPUs of an engine)."""

    def __init__(self, way: str, variant: Config, model_config: ModelConfig, settings: Settings, trainers: _Trainers):
        """ConfigError if the variant cannot run."""
        self._way, self._variant, self._model_config, self._settings = way, variant, model_config, settings
        self._quick = replace(settings, steps=min(_STEPS, settings.steps), samples_at_once=_SAMPLES_AT_ONCE)
        self._trainers = trainers
        self._nodes = variant.cluster.trainer_nodes + variant.cluster.rollout_nodes
        self._unit = 1
        while self._nodes > _SPLITS * self._unit:
            self._unit *= 2
        for trainer in [*self._trainer_nodes()][:1]:
            check(placed(variant, way, trainer, 1), local=False)
        self._simulated_s = functools.cache(self._quickly_simulated_s)

    def best(self) -> Outcome | None:
        """The fastest, or None if nothing fits."""
        firsts: dict[int, tuple[float, int]] = {}
        for trainer in self._trainer_nodes():
            for width in self._widths():
                if (placement := self._placement(trainer, width)) is not None:
                    seconds = arithmetic_s(placement, self._model_config, self._settings)
                    firsts[width] = min(firsts.get(width, (seconds, trainer)), (seconds, trainer))
        chosen = sorted(firsts, key=firsts.__getitem__)[:_WIDTHS]
        if not chosen:
            return None
        width = min(chosen, key=lambda each: self._simulated_s(firsts[each][1], each))
        starts = [firsts[width][1], *[*self._trainer_nodes()][1::_EVERY]]
        start = min(starts, key=lambda each: self._simulated_s(each, width))
        outcomes = (self._simulated(each, width, self._settings) for each in self._near(self._closer(start, width), 1))
        return min((outcome for outcome in outcomes if outcome), key=_seconds, default=None)

    def _trainer_nodes(self) -> Iterator[int]:
        """Multiples of a power of two, which many layouts divide."""
        if self._way == COLOCATED:
            yield self._nodes
        else:
            yield from range(self._unit, self._nodes, self._unit)

    def _widths(self) -> Iterator[int]:
        gpus, heads = self._variant.cluster.gpus_per_node, self._model_config.num_attention_heads
        return (width for width in (1, 2, 4, 8, 16) if gpus % width == 0 and heads % width == 0)

    def _closer(self, trainer: int, width: int) -> int:
        """Go to the faster neighbour until there is none, at finer and finer distances."""
        distance = self._unit
        while True:
            best = min(self._near(trainer, distance), key=lambda each: self._simulated_s(each, width))
            if best == trainer and distance <= max(1, self._unit // _FINER):
                return trainer
            trainer, distance = best, distance // 2 if best == trainer else distance

    def _near(self, trainer: int, distance: int) -> list[int]:
        """This split and its neighbours; colocated, all nodes train."""
        if self._way == COLOCATED:
            return [trainer]
        return [each for each in (trainer, trainer - distance, trainer + distance) if 0 < each < self._nodes]

    def _quickly_simulated_s(self, trainer: int, width: int) -> float:
        outcome = self._simulated(trainer, width, self._quick)
        return math.inf if outcome is None else outcome.step_s

    def _simulated(self, trainer: int, width: int, settings: Settings) -> Outcome | None:
        """None if it does not fit."""
        if (placement := self._placement(trainer, width)) is None:
            return None
        return simulate(own_mode(placement.config), placement, self._model_config, settings)

    def _placement(self, trainer: int, width: int) -> Placement | None:
        """None if it does not fit."""
        try:
            config = placed(self._variant, self._way, trainer, width)
            if not has_room_to_sample(config, self._model_config):
                return None
            config_of_layout = self._trainers.lay_out(config)
            if config_of_layout is None:
                return None
            found = configured(config_of_layout, self._model_config, own_mode(config_of_layout))
        except ConfigError:
            return None
        return found if found.estimate.fits else None


def trainer_phases(
    config: Config, model_config: ModelConfig, data_parallel_size: int, settings: Settings
) -> tuple[float, float]:
    """Seconds of log-probs and of updates, for responses of mean length."""
    sequences = config.algorithm.prompts_per_step * config.algorithm.samples_per_prompt
    costs = TrainerCosts(config, model_config, data_parallel_size, settings.measured)
    return costs.phases(sequences * (settings.prompt + settings.lengths.mean), sequences)


def arithmetic_s(placement: Placement, model_config: ModelConfig, settings: Settings) -> float:
    """Seconds of a step without its waits: close enough to choose what is simulated."""
    config, lengths = placement.config, settings.lengths
    costs, size = decoding(config, model_config, settings), engine_size(config, model_config, settings)
    prompts = config.algorithm.prompts_per_step / (1 - settings.rejected)
    sequences = prompts * config.algorithm.samples_per_prompt / rollout_servers(config)
    at_once = max(1.0, min(size.places, asked_for(config, size, settings), sequences))
    held = settings.prompt + lengths.mean / 2
    sampling = sequences * lengths.mean / at_once * costs.decode_s(at_once, at_once * held)
    training = sum(trainer_phases(config, model_config, placement.estimate.data_parallel_size, settings))
    publishing = placement.estimate.time.weights + placement.estimate.time.turns
    if config.rollout.max_off_policy_steps:
        return max(sampling, training) + publishing
    alone = max(1.0, at_once / 16)
    return sampling + (lengths.longest - lengths.mean) * costs.decode_s(alone, alone * held) + training + publishing


def _seconds(outcome: Outcome) -> float:
    return outcome.step_s
