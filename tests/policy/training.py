"""The embedded model through several updates: what the ranks of test_layouts.py and of tests/gpu run."""

from pathlib import Path
from typing import Any

import torch

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config, OptimizerConfig, ParallelConfig, PolicySection
from megatron_fipo.policy import platform
from megatron_fipo.policy.micro_batch import MicroBatch
from megatron_fipo.rollout.plain_batch import Made, plain_batch

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy import checkpoint  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.update import Policy, gather_parameters  # noqa: E402
from tests.policy.layouts import ALGORITHMS  # noqa: E402
from tests.weights.whole import stage_tensors  # noqa: E402

SEQUENCES, PROMPT, LENGTH = 16, 4, 65
MODEL = resolve_embedded("embedded:tiny")


def losses(model: dict[str, Any], parallel: dict[str, Any], updates: int) -> list[float]:
    """Mean −log π over the same random sequences at each of so many updates of the embedded model that lower it."""
    platform.start_process_group(60)
    policy = _policy(model, parallel, updates, lr=3e-5)
    (mini_batch,) = made_alike(policy, *_batch(policy.model_config.vocab_size))

    def nll(
        micro_batch: MicroBatch, logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        log_probs, _ = policy.label_log_probs(micro_batch, logits)
        loss = -torch.where(micro_batch.response_mask, log_probs, 0.0).sum()
        tokens = micro_batch.response_mask.sum()
        return loss, tokens, {"count/tokens": tokens, "count/normaliser": tokens, "count/loss": loss.detach()}

    found = [policy.update(mini_batch, loss=nll)["loss"] for _ in range(updates)]
    platform.stop_process_group()
    return found


def first_ratios(model: dict[str, Any], parallel: dict[str, Any]) -> dict[str, float]:
    """Metrics of the first update after old log-probs were taken over the same micro-batches."""
    platform.start_process_group(60)
    policy = _policy(model, parallel, updates=1)
    (mini_batch,) = made_alike(policy, *_batch(policy.model_config.vocab_size))
    (old,) = policy.log_probs([mini_batch]).streams
    metrics = policy.update(mini_batch, old)
    platform.stop_process_group()
    return metrics


def resume(model: dict[str, Any], parallel: dict[str, Any], directory: str) -> dict[str, Any]:
    """Gradient norm and weights after two updates: without a break, and with a checkpoint between them."""
    platform.start_process_group(60)
    policy = _policy(model, parallel, updates=2)
    batch = _batch(policy.model_config.vocab_size)
    saved = None
    found: dict[str, Any] = {}
    for name in ("through", "resumed"):
        if saved is not None:
            policy = _policy(model, parallel, updates=2)
            checkpoint.load(policy, saved)
        (mini_batch,) = made_alike(policy, *batch)
        if saved is None:
            policy.update(mini_batch, *policy.log_probs([mini_batch]).streams)
            gather_parameters(policy.chunks)
            saved = checkpoint.start_saving(policy, Path(directory), 1, {}, keep=0, model_dir=MODEL).finish()
        metrics = policy.update(mini_batch, *policy.log_probs([mini_batch]).streams)
        gather_parameters(policy.chunks)
        tensors = stage_tensors(policy.chunks, policy.model_config).values()
        weights = torch.cat([tensor.float().flatten() for tensor in tensors])
        found[name] = {"grad_norm": metrics["grad_norm"], "weights": weights.norm().item()}
    platform.stop_process_group()
    return found


def reload(
    model: dict[str, Any], parallel: dict[str, Any], directory: str, dequantised: bool = True
) -> dict[str, float]:
    """How far each weight of a loaded checkpoint is from the one that was saved, relative to its norm.

    Args:
        dequantised: whether FP8 weights are made ones of `model.dtype` before they are filled.
    """
    platform.start_process_group(60)
    policy = _policy(model, parallel, updates=1)
    expected = _exported(policy)
    saved = checkpoint.start_saving(policy, Path(directory), 1, {}, keep=0, model_dir=MODEL).finish()
    policy = _policy(model, parallel, updates=1, start=None)
    if not dequantised:
        checkpoint.megatron_versions.dequantise = lambda state: None  # type: ignore[assignment]
    checkpoint.load(policy, saved)
    found = _exported(policy)
    platform.stop_process_group()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in expected.items()}


def _exported(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.float().clone() for name, tensor in stage_tensors(policy.chunks, policy.model_config).items()}


def _policy(
    model: dict[str, Any],
    parallel: dict[str, Any],
    updates: int,
    lr: float = 1e-4,
    start: Path | None = MODEL,
    architecture: Path = MODEL,
) -> Policy:
    config = Config(
        model=PolicySection(**model),
        parallel=ParallelConfig(**({"micro_batch_tokens": 512} | parallel)),
        algorithm=ALGORITHMS["fipo"],
        optimizer=OptimizerConfig(lr=lr, warmup_updates=0),
    )
    if not parallel_state.model_parallel_is_initialized():
        start_model_parallel(config.parallel, 0)
    return Policy(config, read_architecture(architecture), str(start) if start else None, updates)


def _batch(vocabulary: int) -> Made:
    generator = torch.Generator().manual_seed(0)
    lengths = [LENGTH - index for index in range(SEQUENCES)]
    return plain_batch(
        streams={
            "token_ids": [torch.randint(0, vocabulary, (length,), generator=generator) for length in lengths],
            "rollout_log_probs": [-torch.rand(length, generator=generator) for length in lengths],
        },
        prompt_lengths=[PROMPT] * SEQUENCES,
        advantages=torch.randn(SEQUENCES, generator=generator).tolist(),
    )
