"""What test_memory.py runs on a rank: a real policy, its bytes counted tensor by tensor."""

from collections.abc import Iterable
from typing import Any

import torch

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.policy import platform
from megatron_fipo.weights.architectures import Geometry, read_architecture

ROWS, TOKENS = 4, 224


def estimate_config(dtype: str) -> tuple[Config, Geometry]:
    """The embedded model on one rank, with micro-batches of just ROWS sequences of the greatest length."""
    config = load_config(["parallel=single", f"model.dtype={dtype}", "model.layers=local"])
    config.rollout.max_prompt_length, config.rollout.max_response_length = 64, TOKENS - 64
    config.parallel.micro_batch_tokens = ROWS * TOKENS
    return config, read_architecture(resolve_embedded("embedded:tiny"))


def allocate(dtype: str) -> dict[str, Any]:
    """Build the policy, run one forward pass as an update does, and count bytes of storages, each once."""
    platform.start_process_group(60)
    from megatron_fipo.policy.model import start_model_parallel
    from megatron_fipo.policy.update import Policy

    config, geometry = estimate_config(dtype)
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, geometry, str(resolve_embedded("embedded:tiny")), updates=1)
    parameters = [parameter for chunk in policy.chunks for parameter in chunk.parameters()]
    held = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    tokens = torch.zeros(ROWS, TOKENS, dtype=torch.int64)
    positions = torch.arange(TOKENS).expand(ROWS, TOKENS).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        policy.chunks[0](tokens, positions, None)
    found = {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": _bytes(parameters),
        "gradients": _bytes(parameter.main_grad for parameter in parameters),
        "optimizer": _optimizer_bytes(policy.optimizer, held),
        "activations": _bytes(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in held),
    }
    platform.stop_process_group()
    return found


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _optimizer_bytes(optimizer: Any, held: set[int]) -> int:
    """Moments, and the master copies that are no view of a weight."""
    tensors = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [master for master in group["params"] if master.untyped_storage().data_ptr() not in held]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return _bytes(tensors)
