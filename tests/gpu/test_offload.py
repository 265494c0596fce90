"""What moves between a GPU and its host: the same bits, the memory that comes back, and copies beside computation.

Local layers in bf16 and in fp32, on one GPU. Not covered: what several GPUs of a node reach at the same time.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_fipo.policy.host_memory import reserve
from tests.distributed import run_ranks

pytestmark = pytest.mark.gpu


def test_reserved_memory_is_page_locked() -> None:
    """Or copies would neither be fast nor run beside anything."""
    reserved = reserve(100 << 20)
    assert reserved.is_pinned() and reserved[4096:].is_pinned()
    values = torch.randint(256, (reserved.numel(),), dtype=torch.uint8, device="cuda")
    reserved.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    assert torch.equal(reserved, values.cpu())


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("distributed", [True, False], ids=["distributed", "plain"])
def test_training_is_bitwise_the_same(dtype: str, distributed: bool, tmp_path: Path) -> None:
    """tests/policy/test_offload.py explains what is compared."""
    arguments: dict[str, Any] = {
        "model": {"dtype": dtype, "layers": "local"},
        "parallel": {"distributed_optimizer": distributed},
        "directory": str(tmp_path),
    }
    (found,) = run_ranks("tests.policy.offload_ranks:train", 1, arguments, timeout=300)
    assert found["leaves"] == {**found["stays"], "at the end": found["stays"]["at the end"]}
    assert found["leaves"]["saved"] == found["stays"]["at the end"]


@pytest.mark.usefixtures("triton")
def test_a_gpu_that_is_left_is_free(tmp_path: Path) -> None:
    """By the driver's count: an engine's memory comes from there, not from torch's cache."""
    (found,) = run_ranks("tests.policy.offload_ranks:free_bytes", 1, timeout=300)
    assert found["state"] > 500 << 20, "the control: there is something to free"
    # Torch's allocator rounds up, and other things are cached too, so at least what the state takes comes back.
    assert found["away"] - found["at home"] > 0.95 * found["state"]
    assert abs(found["back"] - found["at home"]) < 0.1 * found["state"]
