"""What the ranks of test_layers.py run: the functions that tests/gpu runs, on Transformer Engine over the stand-ins."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from tests.te_on_cpu.install import install

install()

from tests.policy.checkpoints import exchange_layers  # noqa: E402
from tests.policy.layouts import one_update  # noqa: E402
from tests.policy.training import first_ratios, losses, resume  # noqa: E402

from megatron.core.distributed import param_and_grad_buffer  # noqa: E402  isort: skip

__all__ = ["exchange_layers", "first_ratios", "losses", "one_update", "resume"]

_coalesced = param_and_grad_buffer._coalescing_manager


def _one_by_one(group: Any, async_ops: bool = False) -> AbstractContextManager[Any]:
    """gloo puts collectives that are issued together into one tensor: bytes of FP8 weights among bf16 ones."""
    return _coalesced(group, async_ops=True) if async_ops else nullcontext()


param_and_grad_buffer._coalescing_manager = _one_by_one
