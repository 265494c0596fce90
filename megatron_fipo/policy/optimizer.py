"""Megatron-Core's optimizer and learning-rate schedule by the configuration."""

from collections.abc import Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fipo.config import Config
from megatron_fipo.policy.optimizer_blocks import SHARDING
from megatron_fipo.policy.precision import optimizer_settings


def build_optimizer(config: Config, chunks: list[DistributedDataParallel]) -> Any:
    """The optimizer of this rank's chunks."""
    settings = config.optimizer
    optimizer = get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=chunks[0].config.bf16,
            params_dtype=chunks[0].config.params_dtype,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
            **optimizer_settings(config.model),
        ),
        chunks,
    )
    for part in optimizer.chained_optimizers:
        # Moments from the start: a run whose first steps found nothing to train on can be saved too.
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)
    return optimizer


def of_this_layout(optimizer: Any, loaded: dict[Any, Any]) -> dict[Any, Any]:
    """The optimizer's state of a checkpoint, with this run's parts, groups and settings.

    Experts that lie over ranks have an optimizer of their own, so that another layout has another number of parts, each
    with groups of its own. What is particular to the checkpoint are tensors, which `loaded` has by this layout's parts,
    and the number of Adam's steps, which all groups have in common. Rates are what the configuration says now.

    Args:
        loaded: what Megatron-Core makes of a checkpoint and of this layout; it is changed.
    """
    steps = [group["step"] for group in _groups(loaded) if "step" in group]
    parts = optimizer.chained_optimizers
    single = len(parts) == 1
    states = {0: loaded} if single else {number: loaded.setdefault(number, {}) for number in range(len(parts))}
    for part, state in zip(parts, states.values(), strict=True):
        own = part.state_dict()
        place = state
        if "optimizer" in own:
            own, place = own["optimizer"], state.setdefault("optimizer", {})
        place["param_groups"] = [group | ({"step": steps[0]} if steps else {}) for group in own["param_groups"]]
        if "param_state" in state:
            state["param_state_sharding_type"] = SHARDING
    if single:
        return {key: value for key, value in loaded.items() if not isinstance(key, int)}
    return states


def _groups(state: Any) -> Iterator[dict[str, Any]]:
    """The parameter groups, wherever they lie in the state."""
    if isinstance(state, dict):
        yield from state.get("param_groups", [])
        for value in state.values():
            yield from _groups(value)


def build_scheduler(config: Config, optimizer: Any, updates: int) -> OptimizerParamScheduler:
    """The schedule of a run of so many updates."""
    settings = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=min(settings.warmup_updates, max(updates - 1, 0)),
        lr_decay_steps=max(updates, 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        # A resumed run keeps its place in the schedule, and takes the schedule from its configuration.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
