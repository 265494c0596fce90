"""Memory and time of one layout, and changes that make it fit, for preflight and planner."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config, with_values
from megatron_fipo.config.checks_experts import check_dispatcher, check_expert_ranks, check_experts_of_model
from megatron_fipo.config.model_places import fetch_config
from megatron_fipo.config.window import check_window
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.sizing.memory import GIB, StageMemory, longest_sequence, stage_memory
from megatron_fipo.sizing.placement import (
    check_host_memory,
    check_placement,
    check_server_memory,
    has_room_to_sample,
    host_bytes,
    on_all_nodes,
    on_one_node,
    routes_bytes,
    turns_s,
    utilisation,
)
from megatron_fipo.sizing.timing import StepTime, step_time

_TIGHT = 0.1
"""If less than this share of the usable memory is left, it is too little: the estimate is exact to a tenth."""


@dataclass
class Estimate:
    """The memory and time that a run needs under one layout."""

    world_size: int
    data_parallel_size: int
    stages: list[StageMemory]
    time: StepTime
    usable_bytes: int
    """A GPU's memory without the part that the hardware section reserves."""
    host_bytes: int
    """Memory of a node's host: for what leaves its GPUs, where trainer and engines use them in turns, and for what
    routers have chosen, where updates replay it."""
    routes_bytes: int
    """The part of it for what routers have chosen."""

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage's peak is within the usable memory."""
        return self.fullest.total <= self.usable_bytes

    @property
    def tight(self) -> bool:
        """Whether it fits, but with less memory left than the estimate's error."""
        return self.fits and self.fullest.total > (1 - _TIGHT) * self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return the estimate in a form for JSON, in bytes and seconds."""
        stages = [asdict(stage) | {"total": stage.total} for stage in self.stages]
        return (
            asdict(self)
            | {"stages": stages, "time": asdict(self.time) | {"total": self.time.total, "longest": self.time.longest}}
            | {
                "fullest_stage": self.fullest.stage,
                "fits": self.fits,
                "tight": self.tight,
            }
        )


def trainer_world_size(config: Config) -> int:
    """Return the number of trainer processes: from the layout if it has a data-parallel size, else all trainer GPUs."""
    parallel = config.parallel
    if parallel.data is not None:
        return parallel.tensor * parallel.pipeline * parallel.context * parallel.data
    return config.cluster.trainer_nodes * config.cluster.gpus_per_node


def usable_bytes(config: Config) -> int:
    """Return a GPU's memory without the part that the hardware section reserves."""
    return int((config.hardware.memory_gib - config.hardware.reserved_gib) * GIB)


def estimate(config: Config, model_config: ModelConfig) -> Estimate:
    """Estimate memory and time of a run on GPUs.

    Raises:
        ConfigError: the layout does not divide the ranks or the model, servers need more GPUs or memory than there are,
            the layers do not support the model's window, or a host's memory is too small for what leaves shared GPUs
            and for recorded choices of routers.
    """
    if config.model.layers != "local":
        check_window(config, model_config)
    parallel = config.parallel
    world_size = trainer_world_size(config)
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica:
        raise ConfigError(
            "parallel",
            f"{world_size} trainer GPUs are not a multiple of the {replica} of one replica",
            "another layout, cluster.trainer_nodes or cluster.gpus_per_node",
        )
    check_placement(config, world_size)
    check_server_memory(config, model_config)
    data = world_size // replica
    check_dispatcher(config)
    check_expert_ranks(config, data)
    check_experts_of_model(config, model_config)
    stages = stage_memory(config, model_config, data)
    away, routes = host_bytes(config, model_config, stages), routes_bytes(config, model_config, data)
    check_host_memory(config, away, routes, stages)
    return Estimate(
        world_size=world_size,
        data_parallel_size=data,
        stages=stages,
        time=replace(step_time(config, model_config, data), turns=turns_s(config, model_config, stages)),
        usable_bytes=usable_bytes(config),
        host_bytes=away + routes,
        routes_bytes=routes,
    )


def remedies(config: Config, model_config: ModelConfig) -> list[str]:
    """Return single changes with which the run fits well, fastest first, each with its peak memory and step time."""
    found = []
    for text, changed in _changes(config, model_config):
        try:
            result = estimate(changed, model_config)
        except ConfigError:
            continue
        if result.fits and not result.tight:
            peak = result.fullest.total / GIB
            found.append((result.time.total, f"{text}: peak {peak:.1f} GiB, step {result.time.total:.0f} s"))
    return [text for _, text in sorted(found)]


def one_node(config: Config, model_config: ModelConfig) -> tuple[str, Estimate] | None:
    """Return the fastest overrides with which the run fits on one node with shared GPUs, or None."""
    found: list[tuple[str, Estimate]] = []
    for width in (1, 2, 4, 8):
        if config.cluster.gpus_per_node % width:
            continue
        changed = on_one_node(config, width)
        try:
            share = _largest_share(changed, model_config)
            changed = with_values(changed, {"rollout.gpu_memory_utilization": share})
            result = estimate(changed, model_config)
        except ConfigError:
            continue
        if result.fits and not result.tight and has_room_to_sample(changed, model_config):
            found.append((_one_node_overrides(config, changed), result))
    return min(found, key=lambda pair: pair[1].time.total, default=None)


def in_turns(config: Config, tensor_parallel: int) -> Config:
    """Return the run with trainer and servers in turns on all of its nodes, with a margin beside the servers' share."""
    changed = on_all_nodes(config, tensor_parallel)
    # Nothing of the trainer is beside a server, whatever its layout.
    share = round(utilisation(changed, [], (1 - _TIGHT) * usable_bytes(config)), 2)
    return with_values(changed, {"rollout.gpu_memory_utilization": share})


def _one_node_overrides(before: Config, after: Config) -> str:
    rollout = after.rollout
    texts = [
        "cluster.trainer_nodes=1 cluster.rollout_nodes=0",
        "parallel.data=null" if before.parallel.data is not None else "",
        "rollout.addresses=[]" if before.rollout.addresses else "",
        f"rollout.shared_gpu=true rollout.weight_transfer={rollout.weight_transfer}",
        f"rollout.servers={rollout.servers} rollout.tensor_parallel={rollout.tensor_parallel}",
        f"rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g}",
    ]
    return " ".join(text for text in texts if text)


def _largest_share(config: Config, model_config: ModelConfig) -> float:
    """Return the largest share of a GPU for a shared server, with a margin; 0 if the trainer leaves no space."""
    current = estimate(config, model_config)
    return round(max(0.0, utilisation(config, current.stages, (1 - _TIGHT) * current.usable_bytes)), 2)


def _changes(config: Config, model_config: ModelConfig) -> Iterator[tuple[str, Config]]:
    parallel, longest = config.parallel, longest_sequence(config)
    part = -(-longest // (2 * parallel.context))
    options: list[dict[str, Any]] = [
        {"model.recompute": "full"},
        # The tokens of a micro-batch are those of one rank, which then has a smaller part of the longest sequence.
        {
            "parallel.context": parallel.context * 2,
            "parallel.micro_batch_tokens": min(parallel.micro_batch_tokens, part),
        },
        {"parallel.pipeline": parallel.pipeline * 2},
        {"parallel.tensor": parallel.tensor * 2, "parallel.sequence": True},
        {"cluster.trainer_nodes": config.cluster.trainer_nodes * 2},
    ]
    if config.rollout.shared_gpu:
        share = _largest_share(config, model_config)
        if 0 < share < config.rollout.gpu_memory_utilization:
            options.append({"rollout.gpu_memory_utilization": share})
    options += _within_a_node(config)
    if longest < parallel.micro_batch_tokens:
        options.append({"parallel.micro_batch_tokens": longest})
    for option in options:
        written = " ".join(f"{key}={str(value).lower()}" for key, value in option.items())
        yield written, with_values(config, option)


def _within_a_node(config: Config) -> list[dict[str, Any]]:
    """Return layouts of the same size whose tensor parallelism stays within a node, also with less memory."""
    parallel, gpus = config.parallel, config.cluster.gpus_per_node
    if parallel.tensor <= gpus:
        return []
    across = -(-parallel.tensor // gpus)
    deeper = {"parallel.tensor": gpus, "parallel.sequence": gpus > 1, "parallel.pipeline": parallel.pipeline * across}
    context = parallel.context * across
    part = -(-longest_sequence(config) // context)
    wider = {
        "parallel.tensor": gpus,
        "parallel.sequence": gpus > 1,
        "parallel.context": context,
        "parallel.micro_batch_tokens": min(parallel.micro_batch_tokens, part),
    }
    return [layout | more for layout in (deeper, wider) for more in ({}, {"model.recompute": "full"})]


def model_directory(model_path: str) -> tuple[Path, bool]:
    """Return the directory of the model's config.json, and whether it is this package's copy: the model is not here."""
    shipped = resolve_embedded(f"embedded:{Path(model_path).name}")
    has_copy = (shipped / "config.json").is_file()
    try:
        directory = fetch_config(model_path)
    except ConfigError:
        if not has_copy:
            raise
        return shipped, True
    if not (directory / "config.json").is_file() and has_copy:
        return shipped, True
    return directory, False
