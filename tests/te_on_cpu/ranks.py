"""What the ranks of test_layers.py run: the functions that tests/gpu runs, on Transformer Engine over the stand-ins."""

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch.distributed

from tests.te_on_cpu.install import install

engine = install()

from tests.policy.checkpoints import exchange_layers  # noqa: E402
from tests.policy.layouts import one_update  # noqa: E402
from tests.policy.training import first_ratios, losses, reload, resume  # noqa: E402

from megatron.core.distributed import param_and_grad_buffer  # noqa: E402  isort: skip
from megatron_fipo.policy import model  # noqa: E402

__all__ = ["exchange_layers", "first_ratios", "losses", "one_update", "reload", "resume"]

context_parallel = engine.attention.dot_product_attention.context_parallel
_communicate = context_parallel.flash_attn_p2p_communicate
_coalesced = param_and_grad_buffer._coalescing_manager
_experts = model._expert_settings


def _communicate_at_once(*arguments: Any) -> list[Any]:
    """Under gloo a backward pass hangs when it waits for these later, after its matrix products."""
    for request in _communicate(*arguments):
        request.wait()
    return []


def _one_by_one(group: Any, async_ops: bool = False) -> AbstractContextManager[Any]:
    """gloo puts collectives that are issued together into one tensor: bytes of FP8 weights among bf16 ones."""
    return _coalesced(group, async_ops=True) if async_ops else nullcontext()


def _done_when_issued(**_: Any) -> AbstractContextManager[Any]:
    """gloo issues none of several kinds together, and Transformer Engine's in here are synchronous."""
    return nullcontext(SimpleNamespace(wait=lambda: None))


def _experts_without_triton(*arguments: Any) -> dict[str, Any]:
    """Tokens are dealt to experts by a kernel in Triton; without it Megatron-Core's own operations deal them."""
    found = _experts(*arguments)
    return found | {"moe_permute_fusion": False} if found else found


model._expert_settings = _experts_without_triton
context_parallel.flash_attn_p2p_communicate = _communicate_at_once
param_and_grad_buffer._coalescing_manager = _one_by_one
torch.distributed._coalescing_manager = _done_when_issued
