"""The names of `transformer_engine_torch` that are not functions."""

import enum
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


class DType(enum.IntEnum):
    """Transformer Engine checks that it knows each of these, and no others."""

    kByte = 0
    kInt32 = 2
    kFloat32 = 4
    kFloat16 = 5
    kBFloat16 = 6
    kFloat8E4M3 = 7
    kFloat8E5M2 = 8
    kFloat4E2M1 = 10


class NVTE_Fused_Attn_Backend(enum.IntEnum):
    """Here too newer versions check that they know all; older ones know one more."""

    NVTE_No_Backend = -1
    NVTE_F16_arbitrary_seqlen = 1
    NVTE_FP8 = 2
    NVTE_F16_max512_seqlen = enum.nonmember(0)


_PRODUCTS = (1, 2, 3)  # of a module's matrices
FP8FwdTensors = Constants(
    "FP8FwdTensors", *(f"GEMM{n}_{kind}" for n in _PRODUCTS for kind in ("INPUT", "WEIGHT", "OUTPUT"))
)
FP8BwdTensors = Constants("FP8BwdTensors", *(f"GRAD_{kind}{n}" for n in _PRODUCTS for kind in ("OUTPUT", "INPUT")))
NVTE_QKV_Format = Constants("NVTE_QKV_Format")
NVTE_Mask_Type = Constants("NVTE_Mask_Type")

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
