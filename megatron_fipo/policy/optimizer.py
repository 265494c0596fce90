"""Megatron-Core's optimizer and learning-rate schedule by the configuration."""

from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_fipo.config import Config
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
