"""One layout's memory and time, and what to change where it does not fit: what preflight and planner print."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.config.model_places import fetch_config
from megatron_fipo.config.window import check_window
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.sizing.memory import GIB, StageMemory, longest_sequence, stage_memory
from megatron_fipo.sizing.placement import check_placement, has_room_to_sample, on_one_node, utilisation
from megatron_fipo.sizing.timing import StepTime, step_time

_TIGHT = 0.1
"""Share of the usable memory below which too little is left: the tests hold the estimate to within a tenth."""


@dataclass
class Estimate:
    """What a run under one layout needs."""

    world_size: int
    data_parallel_size: int
    stages: list[StageMemory]
    time: StepTime
    usable_bytes: int
    """A GPU's memory without what the hardware section reserves."""

    @property
    def fullest(self) -> StageMemory:
        """The stage that decides whether the run fits."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        """Whether every stage's peak is within the usable memory."""
        return self.fullest.total <= self.usable_bytes

    @property
    def tight(self) -> bool:
        """Whether it fits with less to spare than the estimate may be wrong by."""
        return self.fits and self.fullest.total > (1 - _TIGHT) * self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form. Bytes and seconds."""
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
    """Trainer processes: by the layout where it has a data-parallel size, else a GPU each of the trainer nodes."""
    parallel = config.parallel
    if parallel.data is not None:
        return parallel.tensor * parallel.pipeline * parallel.context * parallel.data
    return config.cluster.trainer_nodes * config.cluster.gpus_per_node


def estimate(config: Config, model_config: ModelConfig) -> Estimate:
    """Memory and time of a run on GPUs.

    Raises:
        ConfigError: the layout does not divide the ranks or the model, servers need GPUs that are not there, or the
            layers cannot have the model's window.
    """
    if config.model.layers != "local":
        check_window(config, model_config)
    parallel = config.parallel
    world_size = trainer_world_size(config)
    replica = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % replica:
        raise ConfigError(
            "parallel",
            f"{world_size} trainer GPUs do not divide by the {replica} of one replica",
            "another layout, cluster.trainer_nodes or cluster.gpus_per_node",
        )
    check_placement(config, world_size)
    data = world_size // replica
    hardware = config.hardware
    return Estimate(
        world_size=world_size,
        data_parallel_size=data,
        stages=stage_memory(config, model_config, data),
        time=step_time(config, model_config, data),
        usable_bytes=int((hardware.memory_gib - hardware.reserved_gib) * GIB),
    )


def remedies(config: Config, model_config: ModelConfig) -> list[str]:
    """Changes, each alone, after which the run fits with room to spare; fastest first, with peak and step time."""
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
    """Overrides by which the run fits on one node whose GPUs trainer and servers share, the fastest such; or None."""
    found: list[tuple[str, Estimate]] = []
    for width in (1, 2, 4, 8):
        if config.cluster.gpus_per_node % width:
            continue
        changed = on_one_node(config, width)
        try:
            changed.rollout.gpu_memory_utilization = _largest_share(changed, model_config)
            result = estimate(changed, model_config)
        except ConfigError:
            continue
        if result.fits and not result.tight and has_room_to_sample(changed, model_config):
            found.append((_one_node_overrides(config, changed), result))
    return min(found, key=lambda pair: pair[1].time.total, default=None)


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
    """Of a GPU for a shared server, with room to spare; 0 where the trainer leaves none."""
    current = estimate(config, model_config)
    return round(max(0.0, utilisation(config, current.stages, (1 - _TIGHT) * current.usable_bytes)), 2)


def _changes(config: Config, model_config: ModelConfig) -> Iterator[tuple[str, Config]]:
    parallel, longest = config.parallel, longest_sequence(config)
    part = -(-longest // (2 * parallel.context))
    options: list[dict[str, Any]] = [
        {"model.recompute": "full"},
        # A micro-batch is counted in tokens of one rank, which then has a smaller part of the longest sequence.
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
        changed = copy.deepcopy(config)
        for key, value in option.items():
            section, name = key.split(".")
            setattr(getattr(changed, section), name, value)
        yield " ".join(f"{key}={str(value).lower()}" for key, value in option.items()), changed


def _within_a_node(config: Config) -> list[dict[str, Any]]:
    """Layouts as large as one whose tensor parallelism leaves its node, but within it; with less memory too."""
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
    """Where to read the model's config.json, and whether it is this package's copy, since the model is not here."""
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
