"""Modes of a run, and how each may spread over the nodes: what is played, and on which engines and trainers."""

import math
from dataclasses import dataclass

from megatron_fipo.config import Config, with_values
from megatron_fipo.config.servers import servers_on_every_node
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.rollout.admission import Admission, Refill, Rounds, Window, rounds
from megatron_fipo.simulation.costs import Decoding, EngineSize, TrainerCosts, asked_for, decoding, engine_size
from megatron_fipo.simulation.engine import Engine
from megatron_fipo.simulation.fleet import Dispatch, Place
from megatron_fipo.simulation.run import Parts
from megatron_fipo.simulation.settings import Settings
from megatron_fipo.sizing.estimate import Estimate, estimate, in_turns
from megatron_fipo.sizing.placement import trainer_on
from megatron_fipo.sizing.timing import rollout_servers

_GRID = 100
"""Parts of a mean length to which ends of samples are rounded up where a step has many."""
_MANY_SAMPLES = 1000
_NO_LIMIT = 2**62
"""Of rejected groups in a step: what is played does not give up."""


@dataclass(frozen=True)
class Mode:
    """How sampling and training go together."""

    name: str
    title: str
    steps_ahead: int = 0
    """Window's k."""
    over_sampling: float | None = None
    """None: rounds at k = 0, else 1."""
    in_turns: bool = False
    """Trainer and engines on the same GPUs."""


MODES = (
    Mode("rounds", "rounds (today)"),
    Mode("refill", "refilled × 1", over_sampling=1.0),
    Mode("refill-2", "refilled × 2", over_sampling=2.0),
    Mode("k1", "window, k = 1", 1),
    Mode("k1-2", "window, k = 1, × 2", 1, over_sampling=2.0),
    Mode("k2", "window, k = 2", 2),
    Mode("k2-2", "window, k = 2, × 2", 2, over_sampling=2.0),
    Mode("k4", "window, k = 4", 4),
    Mode("colocated-rounds", "colocated, rounds", in_turns=True),
    Mode("colocated-refill-2", "colocated, refilled × 2", over_sampling=2.0, in_turns=True),
)


def own_mode(config: Config) -> Mode:
    """The mode that the configuration has, wherever it has its trainer and engines."""
    over_sampling = config.algorithm.filter_groups.over_sampling
    return Mode("own", "as configured", config.rollout.max_off_policy_steps, over_sampling)


@dataclass(frozen=True)
class Placement:
    """Nodes, or GPUs where the run has none of its own, and what is on them."""

    config: Config
    estimate: Estimate
    engines: int
    gpus: int
    """Of the whole run."""
    in_turns: bool

    @property
    def text(self) -> str:
        """Nodes that train + nodes that sample."""
        cluster = self.config.cluster
        if self.in_turns:
            return f"{cluster.trainer_nodes}, in turns" if self.config.parallel.data is None else "in turns"
        if cluster.rollout_nodes:
            return f"{cluster.trainer_nodes} + {cluster.rollout_nodes}"
        return f"{self.estimate.world_size} + {self.engines * self.config.rollout.tensor_parallel} GPUs"


def configured(config: Config, model_config: ModelConfig, mode: Mode) -> Placement:
    """Where the configuration has the mode. ConfigError if it cannot be there."""
    if mode.in_turns:
        return _all_in_turns(config, model_config)
    found, tensor = estimate(config, model_config), config.rollout.tensor_parallel
    engines = rollout_servers(config)
    if engines < 1:
        raise ConfigError(
            "rollout.tensor_parallel",
            f"a server of {tensor} GPUs is larger than a node of {config.cluster.gpus_per_node}",
            f"rollout.tensor_parallel={config.cluster.gpus_per_node} or smaller",
        )
    shared = config.rollout.shared_gpu
    return Placement(config, found, engines, found.world_size + (0 if shared else engines * tensor), shared)


def trainer_nodes(config: Config) -> list[int]:
    """How many nodes may train, of those that the run has: whole replicas, and in each stage whole sets of experts.

    None where no nodes are to be split.
    """
    cluster, parallel = config.cluster, config.parallel
    of_experts = parallel.expert * parallel.expert_tensor
    replica = parallel.pipeline * math.lcm(parallel.tensor * parallel.context, of_experts)
    nodes = range(1, cluster.trainer_nodes + cluster.rollout_nodes) if cluster.rollout_nodes else range(0)
    return [count for count in nodes if count * cluster.gpus_per_node % replica == 0]


def split(config: Config, model_config: ModelConfig, trainer: int) -> Placement | None:
    """The run with so many nodes that train, and the others sample; None if the memory is too small."""
    placement = configured(with_values(config, trainer_on(config, trainer)), model_config, MODES[0])
    return placement if placement.estimate.fits else None


def _all_in_turns(config: Config, model_config: ModelConfig) -> Placement:
    """Trainer and engines on all GPUs. The trainer's memory is on its hosts while engines sample."""
    tensor = config.rollout.tensor_parallel
    changed = config if servers_on_every_node(config) else in_turns(config, tensor)
    found = estimate(changed, model_config)
    engines = found.world_size // tensor
    if not engines:
        raise ConfigError(
            "rollout.tensor_parallel", f"{found.world_size} GPUs have no room for a server of {tensor}", "a smaller one"
        )
    return Placement(changed, found, engines, found.world_size, True)


@dataclass(frozen=True)
class Part:
    """Which part of a run is played: large ones are alike all over."""

    prompts: int
    engines: int
    whole: float
    """Of how many such parts the run consists."""


def part_of(config: Config, engines: int, settings: Settings) -> Part:
    """So many prompts and engines that a step has `settings.samples_at_once` samples at most, at least one engine."""
    algorithm = config.algorithm
    prompts, at_once = algorithm.prompts_per_step, settings.samples_at_once
    times = prompts * algorithm.samples_per_prompt / at_once if at_once else 1.0
    if times <= 1 or engines == 1:
        return Part(prompts, engines, 1.0)
    fewer = math.ceil(engines / times)
    return Part(max(1, round(prompts * fewer / engines)), fewer, engines / fewer)


def admission(mode: Mode, config: Config, part: Part) -> Admission:
    """The mode's admission, over the part's prompts."""
    if mode.steps_ahead:
        return Window(part.prompts, mode.steps_ahead, over_sampling=mode.over_sampling or 1.0)
    if mode.over_sampling is not None:
        carries = config.algorithm.filter_groups.surplus == "carry"
        return Refill(part.prompts, mode.over_sampling, _NO_LIMIT, carries)
    whole = rounds(config.algorithm)
    batch = max(1, round(whole.batch * part.prompts / whole.prompts_per_step))
    return Rounds(part.prompts, batch, whole.most_rounds, whole.carries_surplus)


def parts(mode: Mode, placement: Placement, model_config: ModelConfig, settings: Settings) -> Parts:
    """All that a simulation of the mode needs."""
    config = placement.config
    part = part_of(config, placement.engines, settings)
    costs = TrainerCosts(config, model_config, placement.estimate.data_parallel_size, settings.measured)
    samples = config.algorithm.samples_per_prompt

    def trainer(tokens: float, sequences: int) -> tuple[float, float]:
        return costs.phases(tokens * part.whole, round(sequences * part.whole))

    size = engine_size(config, model_config, settings)
    most = asked_for(config, size, settings)
    return Parts(
        admission=admission(mode, config, part),
        engines=_engines(config, decoding(config, model_config, settings), size, settings, part),
        places=min(size.places, most),
        samples=samples,
        trainer=trainer,
        weights_s=costs.weights_s() + placement.estimate.time.turns,
        recompute=config.rollout.kv_on_update == "recompute",
        stream_tokens=config.rollout.stream_tokens,
        dispatch=Dispatch(Place.SAMPLES, most, longest_first=not mode.steps_ahead),
    )


def _engines(config: Config, costs: Decoding, size: EngineSize, settings: Settings, part: Part) -> list[Engine]:
    troubles, samples = settings.troubles, config.algorithm.samples_per_prompt
    many = part.prompts * samples > _MANY_SAMPLES
    quantum = max(1, round(settings.lengths.mean / _GRID)) if many else 1
    slow = math.ceil(troubles.slow_share * part.engines)
    return [
        Engine(costs, size, settings.prompt, 1 / samples, quantum, troubles.slow_factor if index < slow else 1.0)
        for index in range(part.engines)
    ]
