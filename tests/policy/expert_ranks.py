"""What ranks of test_layouts.py run: updates of a model with experts, with a change of layout between them."""

from pathlib import Path
from typing import Any

import torch

from megatron_fipo.policy import platform

platform.install()

from megatron.core import parallel_state  # noqa: E402

from megatron_fipo.config import OptimizerConfig  # noqa: E402
from megatron_fipo.models.model_config import read_architecture  # noqa: E402
from megatron_fipo.policy import checkpoint  # noqa: E402
from megatron_fipo.policy.feed import made_alike  # noqa: E402
from megatron_fipo.policy.model import start_model_parallel  # noqa: E402
from megatron_fipo.policy.update import Policy  # noqa: E402
from tests.policy.layouts import make_config, read_batch  # noqa: E402
from tests.weights.whole import stage_tensors  # noqa: E402

OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_updates=0, clip_grad=1.0, eps=1e-3)


def resume(model_dir: str, batch: str, directory: str, moves: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """For each move between layouts: two updates without a break, and with a checkpoint and the move between them.

    Returns:
        For each move the gradient norm, the learning rate and the number of optimizers after the second update of both,
        and how far the weights are apart relative to what both updates have changed.
    """
    platform.start_process_group(60)
    found = []
    for number, (before, after) in enumerate(moves):
        policy = _policy(before, model_dir)
        first = _exported(policy)
        _update(policy, batch)
        saved = checkpoint.start_saving(
            policy, Path(directory, str(number)), 1, {}, keep=0, model_dir=Path(model_dir)
        ).finish()
        through = _update(policy, batch)
        expected = _exported(policy)
        policy = _policy(after, None, read_from=model_dir)
        checkpoint.load(policy, saved)
        resumed = _update(policy, batch)
        result = _exported(policy)
        moved = {name: (expected[name] - first[name]).norm() for name in expected}
        common = expected.keys() & result.keys()
        assert common, "some tensors are on the same rank before and after"
        worst = max(float((result[name] - expected[name]).norm() / moved[name]) for name in common)
        found.append({"through": through, "resumed": resumed, "worst": worst})
    platform.stop_process_group()
    return found


def _policy(parallel: dict[str, Any], model_dir: str | None, read_from: str | None = None) -> Policy:
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    config = make_config(parallel, OPTIMIZER, "fipo")
    start_model_parallel(config.parallel, 0)
    return Policy(config, read_architecture(model_dir or read_from or ""), model_dir, updates=3)


def _update(policy: Policy, batch: str) -> dict[str, float]:
    (mini_batch,) = made_alike(policy, *read_batch(batch))
    metrics = policy.update(mini_batch, *policy.log_probs([mini_batch]).streams)
    parts = float(len(policy.optimizer.chained_optimizers))
    return {"grad_norm": metrics["grad_norm"], "rate": metrics["learning_rate"], "optimizers": parts}


def _exported(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in stage_tensors(policy.chunks, policy.model_config).items()}
