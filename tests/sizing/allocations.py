"""Functions that test_memory.py runs on a rank: count the bytes of a real policy, and of a rank of a larger layout."""

import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_fipo.assets import resolve_embedded
from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.policy import platform

ROWS, TOKENS = 4, 224
LAYOUT_TOKENS = 2048


def estimate_config(dtype: str) -> tuple[Config, ModelConfig]:
    """Return the embedded model on one rank, with micro-batches of exactly ROWS sequences of the greatest length."""
    config = load_config(["parallel=single", f"model.dtype={dtype}", "model.layers=local"])
    config.rollout.max_prompt_length, config.rollout.max_response_length = 64, TOKENS - 64
    config.parallel.micro_batch_tokens = ROWS * TOKENS
    return config, read_architecture(resolve_embedded("embedded:tiny"))


def allocate(dtype: str) -> dict[str, Any]:
    """Build the policy, run one forward pass as an update does, and count bytes of storages, each once."""
    platform.start_process_group(60)
    from megatron_fipo.policy.model import start_model_parallel
    from megatron_fipo.policy.update import Policy

    config, model_config = estimate_config(dtype)
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, model_config, str(resolve_embedded("embedded:tiny")), updates=1)
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
        "weights": byte_count(parameters),
        "gradients": byte_count(parameter.main_grad for parameter in parameters),
        "optimizer": optimizer_bytes(policy.optimizer, held),
        "activations": byte_count(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in held),
    }
    platform.stop_process_group()
    return found


def layout_config(overrides: list[str]) -> tuple[Config, ModelConfig]:
    """A stage of two layers of Qwen2.5-32B's proportions, an eighth as wide, in bfloat16, on some layout."""
    config = load_config(["experiment=fipo_32b", "model.layers=local", *overrides])
    config.rollout.max_prompt_length, config.rollout.max_response_length = 64, LAYOUT_TOKENS - 64
    config.parallel.micro_batch_tokens = LAYOUT_TOKENS // config.parallel.context
    model_config = dataclasses.replace(
        read_architecture(resolve_embedded("embedded:Qwen2.5-32B")),
        num_layers=2 * config.parallel.pipeline,
        hidden_size=640,
        ffn_hidden_size=3456,
        num_attention_heads=8,
        num_query_groups=2,
        head_dim=80,
        vocab_size=19008,
    )
    return config, model_config


def peaks(layouts: list[tuple[list[str], int]], fused: bool) -> list[int]:
    """`_peak` of each (overrides, stage), with or without the fused feed-forward of Transformer Engine's layers."""
    platform.install()
    return [_peak(*layout_config(overrides), stage, fused) for overrides, stage in layouts]


def _peak(config: Config, model_config: ModelConfig, stage: int, fused: bool) -> int:
    """Return the peak bytes of one rank of a stage, besides its weights, up to the end of the first backward pass.

    The other ranks are a fake process group: their data are missing, but the memory for them is allocated.
    """
    from megatron.core.transformer.module import Float16Module

    from megatron_fipo.policy.model import build_model
    from megatron_fipo.sizing.meta_ranks import fake_rank

    parallel = config.parallel
    world_size = parallel.tensor * parallel.pipeline * parallel.context
    with fake_rank(parallel, stage * world_size // parallel.pipeline, world_size):
        (model,) = build_model(config, model_config)
        model.config.bias_activation_fusion = fused
        for parameter in model.parameters():
            # As the data-parallel wrapper does, whose fp32 gradients are counted elsewhere.
            parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
        wrapped = Float16Module(model.config, model)
        with LiveBytes(model.parameters()) as live:
            outputs = [_forward(wrapped, config, model_config) for _ in range(parallel.pipeline - stage)]
            torch.autograd.backward(outputs[0], torch.zeros_like(outputs[0]))
        return live.peak


def _forward(model: torch.nn.Module, config: Config, model_config: ModelConfig) -> torch.Tensor:
    from megatron.core import parallel_state

    from megatron_fipo.policy.logprobs import log_probs_and_entropy

    parallel = config.parallel
    count = LAYOUT_TOKENS // parallel.context
    tokens, positions = torch.zeros(1, count, dtype=torch.int64), torch.arange(count)[None]
    if not parallel_state.is_pipeline_first_stage():
        received = count // parallel.tensor if parallel.sequence else count
        model.set_input_tensor(
            torch.zeros(received, 1, model_config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        )
    output = model(tokens, positions, None, fp32_output=False)
    if parallel_state.is_pipeline_last_stage():
        group = parallel_state.get_tensor_model_parallel_group()
        return log_probs_and_entropy(output, tokens, model_config.vocab_size, 1.0, group)[0]
    return output


class LiveBytes(TorchDispatchMode):
    """Follows every tensor that an operation makes to the end of its storage."""

    def __init__(self, besides: Iterable[torch.Tensor]):
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count what is new in its results."""
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return results

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


def byte_count(tensors: Iterable[torch.Tensor]) -> int:
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def optimizer_bytes(optimizer: Any, held: set[int]) -> int:
    """Return the moments, and the master copies that are not views of weights."""
    tensors = []
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            tensors += [master for master in group["params"] if master.untyped_storage().data_ptr() not in held]
        for state in part.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    return byte_count(tensors)
