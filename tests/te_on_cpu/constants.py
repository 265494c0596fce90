"""The names of `transformer_engine_torch` that are not functions."""

import itertools
from typing import Any

import torch


class Constants(type):
    """A class whose attributes come into being when they are asked for, each another number."""

    def __new__(cls, name: str, *values: str) -> Any:
        """`values`: names whose numbers count from 0, because they are indices."""
        namespace: dict[str, Any] = {value: number for number, value in enumerate(values)}
        return super().__new__(cls, name, (), namespace | {"numbers": itertools.count(1000)})

    def __init__(self, name: str, *_: str):
        super().__init__(name, (), {})

    def __getattr__(cls, name: str) -> int:
        if name.startswith("_"):
            raise AttributeError(name)
        number = next(vars(cls)["numbers"])
        setattr(cls, name, number)
        return number


DType = Constants("DType")
_PRODUCTS = (1, 2, 3)  # of a module's matrices
FP8FwdTensors = Constants(
    "FP8FwdTensors", *(f"GEMM{n}_{kind}" for n in _PRODUCTS for kind in ("INPUT", "WEIGHT", "OUTPUT"))
)
FP8BwdTensors = Constants("FP8BwdTensors", *(f"GRAD_{kind}{n}" for n in _PRODUCTS for kind in ("OUTPUT", "INPUT")))
NVTE_QKV_Format = Constants("NVTE_QKV_Format")
NVTE_Mask_Type = Constants("NVTE_Mask_Type")
NVTE_Fused_Attn_Backend = Constants("NVTE_Fused_Attn_Backend")

_TORCH = {
    DType.kByte: torch.uint8,
    DType.kInt32: torch.int32,
    DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16,
    DType.kBFloat16: torch.bfloat16,
    DType.kFloat8E4M3: torch.float8_e4m3fn,
    DType.kFloat8E5M2: torch.float8_e5m2,
}


def torch_dtype(number: int) -> torch.dtype:
    """torch's type for one of DType's numbers."""
    return _TORCH[number]
