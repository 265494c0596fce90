"""What the ranks of test_expert_memory.py run: count the bytes of a real policy with experts under some layout."""

from typing import Any

import torch

from megatron_fipo.config import Config
from megatron_fipo.config.configure import load_config
from megatron_fipo.models.model_config import read_architecture
from megatron_fipo.policy import platform
from tests.sizing.allocations import ROWS, TOKENS, LiveBytes, byte_count, optimizer_bytes


def expert_config(model_dir: str, overrides: list[str]) -> Config:
    """The model over two ranks, with micro-batches of exactly ROWS sequences of the greatest length."""
    config = load_config(["parallel=single", f"model.path={model_dir}", "model.layers=local", *overrides])
    config.rollout.max_prompt_length, config.rollout.max_response_length = 64, TOKENS - 64
    config.parallel.micro_batch_tokens = ROWS * TOKENS
    return config


def allocate(model_dir: str, layouts: list[list[str]]) -> list[dict[str, Any]]:
    """For each layout build the policy, run one forward and backward pass, and count bytes of storages, each once.

    Also `received`: how many copies of tokens this rank's experts worked on, on average over layers.
    """
    platform.start_process_group(60)
    found = [_allocate(expert_config(model_dir, overrides), model_dir) for overrides in layouts]
    platform.stop_process_group()
    return found


def _allocate(config: Config, model_dir: str) -> dict[str, Any]:
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_fipo.policy.model import start_model_parallel
    from megatron_fipo.policy.update import Policy

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    start_model_parallel(config.parallel, 0)
    policy = Policy(config, read_architecture(model_dir), model_dir, updates=1)
    (chunk,) = policy.chunks
    parameters = list(chunk.parameters())
    held = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    received: list[int] = []
    for module in chunk.modules():
        if isinstance(module, SequentialMLP):
            module.register_forward_hook(lambda module, inputs, output: received.append(len(inputs[0])))
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    torch.manual_seed(1)  # other tokens, and so other experts, in other places
    tokens = torch.randint(0, policy.model_config.vocab_size, (ROWS, TOKENS))
    positions = torch.arange(TOKENS).expand(ROWS, TOKENS).contiguous()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk(tokens, positions, None)
    activations = byte_count(tensor for tensor in saved if tensor.untyped_storage().data_ptr() not in held)
    saved.clear()
    with LiveBytes([*parameters, *(parameter.main_grad for parameter in parameters)]) as live:
        output = chunk(tokens, positions, None)
        output.backward(torch.zeros_like(output))
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "weights": byte_count(parameters),
        "gradients": byte_count(parameter.main_grad for parameter in parameters),
        "optimizer": optimizer_bytes(policy.optimizer, held),
        "activations": activations,
        "peak": live.peak,
        "received": sum(received) / len(received),
    }
