"""Check how sampling and training overlap: rollout.max_off_policy_steps, and what goes with it."""

from collections.abc import Iterator

from megatron_fipo.config import Config
from megatron_fipo.errors import ConfigError


def overlap(config: Config) -> Iterator[str]:
    """Raise ConfigError for a combination that cannot run; yield a warning for one that is probably a mistake."""
    if config.algorithm.filter_groups.over_sampling is not None:
        yield from _refill(config)
    if config.rollout.max_off_policy_steps:
        _window(config)


def _refill(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    key, value = "algorithm.filter_groups.over_sampling", algorithm.filter_groups.over_sampling
    if algorithm.generation_batch_prompts is not None:
        raise ConfigError(
            "algorithm.generation_batch_prompts",
            f"is {algorithm.generation_batch_prompts}, but {key}={value:g} samples without generation batches",
            f"algorithm.generation_batch_prompts=null, or {key}=null",
        )
    if not algorithm.filter_groups.enable:
        exactly = f"a step samples exactly its {algorithm.prompts_per_step} prompts"
        yield f"{key} is not used: without dynamic sampling {exactly}"


def _window(config: Config) -> None:
    algorithm, steps = config.algorithm, config.rollout.max_off_policy_steps
    asked = f"rollout.max_off_policy_steps={steps}"
    if algorithm.tis_cap is None:
        raise ConfigError(
            "algorithm.tis_cap",
            f"is null, but {asked} trains on tokens of older weights, whose loss has to be weighted",
            "algorithm.tis_cap=2, or rollout.max_off_policy_steps=0",
        )
    if config.rollout.shared_gpu:
        raise ConfigError(
            "rollout.max_off_policy_steps",
            f"is {steps}, but with rollout.shared_gpu trainer and servers take turns on the same GPUs",
            "rollout.max_off_policy_steps=0, or rollout.shared_gpu=false",
        )
    for key, value, right in (
        ("algorithm.generation_batch_prompts", algorithm.generation_batch_prompts, "null"),
        ("algorithm.filter_groups.surplus", algorithm.filter_groups.surplus, "carry"),
    ):
        if value not in (None, "carry"):
            raise ConfigError(
                key,
                f"is {value}, but {asked} replaces a rejected group at once: it has no generation batch and no surplus",
                f"{key}={right}, or rollout.max_off_policy_steps=0",
            )
