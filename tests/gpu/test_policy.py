"""One FIPO update on a GPU against plain transformers in fp32, as tests/policy/test_layouts.py does on the CPU.

Tolerances: fp32 1e-4 relative a tensor (TF32 off), bf16 0.1, FP8 0.3. Not covered: more than one GPU.
"""

from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.policy.test_layouts import case  # noqa: F401  the fixture

pytestmark = pytest.mark.gpu


def worst_error(case: dict[str, Any], **layout: Any) -> float:  # noqa: F811
    folder = case["folder"]
    (rank,) = run_ranks(
        "tests.policy.layouts:one_update",
        1,
        {
            "model_dir": str(folder / "model"),
            "batch": str(folder / "batch.safetensors"),
            "folder": str(folder),
            "layouts": [layout],
        },
        timeout=300,
    )
    assert rank[0]["metrics"]["updates_skipped"] == 0
    return rank[0]["worst"]


def test_local_layers_in_float32(case: dict[str, Any]) -> None:  # noqa: F811
    assert worst_error(case, model={"layers": "local"}) < 1e-4


def test_local_layers_in_bfloat16(case: dict[str, Any]) -> None:  # noqa: F811
    assert worst_error(case, model={"layers": "local", "dtype": "bfloat16"}) < 0.1


@pytest.mark.usefixtures("transformer_engine")
@pytest.mark.parametrize("fp8", ["off", "delayed", "tensorwise", "blockwise"])
def test_transformer_engine_layers(case: dict[str, Any], fp8: str) -> None:  # noqa: F811
    if fp8 != "off" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip(f"FP8 needs compute capability 8.9, this GPU has {torch.cuda.get_device_capability()}")
    error = worst_error(case, model={"layers": "transformer_engine", "dtype": "bfloat16", "fp8": fp8})
    assert error < (0.1 if fp8 == "off" else 0.3)
