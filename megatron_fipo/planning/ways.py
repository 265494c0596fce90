"""Ways to spread a run over the nodes that it has, as configurations, and the overrides that choose one."""

from collections.abc import Iterator
from typing import Any

from megatron_fipo.config import Config, every_setting, with_values
from megatron_fipo.sizing.estimate import in_turns
from megatron_fipo.sizing.placement import servers_of, trainer_on

SYNCHRONOUS, COLOCATED, ASYNCHRONOUS = "synchronous split", "colocated", "asynchronous, k = 1"
WAYS = (SYNCHRONOUS, COLOCATED, ASYNCHRONOUS)
_TIS_CAP = 2.0
"""For a run that has none; docs/overlap.md."""
_SHARE_ALONE = 0.9
"""Of a GPU, for a server that had to share it: as rollout=cluster has it."""


def variants(way: str, config: Config, rejected: float) -> Iterator[Config]:
    """The configuration that way: with generation batches, or with a window, and with rejected groups replaced early.

    Nodes, layout and servers are not chosen yet. `rejected` is the share of groups that dynamic sampling rejects.
    """
    values: dict[str, Any] = {
        "rollout.max_off_policy_steps": 1 if way == ASYNCHRONOUS else 0,
        "algorithm.filter_groups.over_sampling": None,
    }
    if way != COLOCATED and config.rollout.shared_gpu:
        values |= {"rollout.shared_gpu": False, "rollout.weight_transfer": "process_group"}
        values["rollout.gpu_memory_utilization"] = _SHARE_ALONE
    if way == ASYNCHRONOUS:
        values["algorithm.tis_cap"] = config.algorithm.tis_cap or _TIS_CAP
        values |= {"algorithm.generation_batch_prompts": None, "algorithm.filter_groups.surplus": "carry"}
    yield with_values(config, values)
    if config.algorithm.filter_groups.enable and rejected:
        values["algorithm.generation_batch_prompts"] = None
        values["algorithm.filter_groups.over_sampling"] = round(1 / (1 - rejected), 1)
        yield with_values(config, values)


def placed(config: Config, way: str, trainer_nodes: int, tensor_parallel: int) -> Config:
    """The configuration on its nodes that way, with servers of so many GPUs.

    Colocated, all nodes train.
    """
    if way == COLOCATED:
        return in_turns(config, tensor_parallel)
    values = {"rollout.servers": 0, "rollout.addresses": [], **servers_of(config, tensor_parallel)}
    return with_values(config, values | trainer_on(config, trainer_nodes))


def overrides(before: Config, after: Config) -> str:
    """What to add to the command line of `before` to have `after`; empty if they are the same."""
    pairs = ((key, _value(before, key), _value(after, key)) for key, _ in every_setting())
    return " ".join(f"{key}={_written(new)}" for key, old, new in pairs if old != new)


def _value(config: Config, key: str) -> Any:
    """A key's value; None below a section that is null."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name, None)
    return value


def _written(value: Any) -> str:
    """As Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
