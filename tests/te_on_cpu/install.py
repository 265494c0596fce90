"""Puts Transformer Engine's Python code, with the stand-ins under it, where Megatron-Core looks for it.

For processes that do nothing else: Transformer Engine alone is made to believe in a GPU.
"""

import importlib
import importlib.util
import os
import sys
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
import torch._dynamo  # before names that it looks for are stand-ins

from tests.te_on_cpu import attention, constants, fp8, kernels

ENGINE = Path(sys.prefix) / "transformer-engine"
"""Where `make env` puts the wheel of the Python code alone: on no path, or Megatron-Core would stumble over it."""

CAPABILITY = "TE_ON_CPU_CAPABILITY"
"""Environment variable: the compute capability to pretend; MXFP8 is for 10.0."""

UNUSED = ("triton", "triton.language", "triton.language.standard", "onnxscript", "onnx")
CONSTANTS = ("DType", "FP8FwdTensors", "FP8BwdTensors", "NVTE_QKV_Format", "NVTE_Mask_Type", "NVTE_Fused_Attn_Backend")


def is_there() -> bool:
    """Whether the Python code is there."""
    return (ENGINE / "transformer_engine").is_dir()


def functions() -> dict[str, Any]:
    """The stand-ins for the version that is there: 2.11, which Megatron-Core 0.16.1 was released with, or 2.20."""
    (version,) = (found.version for found in metadata.distributions(path=[str(ENGINE)]))
    of_attention = attention.FUNCTIONS_OF_2_11 if version.startswith("2.11.") else attention.FUNCTIONS
    return kernels.FUNCTIONS | of_attention | fp8.FUNCTIONS


class Extension(ModuleType):
    """What stands in for the compiled module: functions here, constants made when asked for, and no other functions."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value: Any = constants.Constants(name)
        if not name[0].isupper():

            def value(*_: Any, **__: Any) -> Any:
                raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in in tests/te_on_cpu")

        setattr(self, name, value)
        return value


def install() -> Any:
    """Import Transformer Engine over the stand-ins, before Megatron-Core is. Returns its module for PyTorch."""
    extension = Extension("transformer_engine_torch")
    for name in CONSTANTS:
        setattr(extension, name, getattr(constants, name))
    stand_ins = functions()
    for name, function in stand_ins.items():
        setattr(extension, name, function)
    # Transformer Engine takes all names from it at once; these two stand in a table beside the norm that is used.
    extension.__all__ = [*stand_ins, "layernorm_fwd", "layernorm_bwd", *CONSTANTS]
    sys.modules[extension.__name__] = extension
    _pretend_a_gpu()
    sys.path.insert(0, str(ENGINE))
    # Imported for kernels and exports that nothing here uses.
    unused = [name for name in UNUSED if not _is_installed(name)]
    sys.modules |= {name: MagicMock(__version__="0") for name in unused}
    engine = _import_without_libraries()
    # Nothing here draws at random.
    engine.pytorch.distributed._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    engine.pytorch.distributed._set_cuda_rng_state = lambda *_, **__: None
    for name in unused:
        del sys.modules[name]
    return engine.pytorch


def _is_installed(name: str) -> bool:
    return importlib.util.find_spec(name.partition(".")[0]) is not None


def _import_without_libraries() -> Any:
    """Import the package; its first module, which loads compiled libraries, before the rest and without them."""
    package = ModuleType("transformer_engine")
    package.__path__ = [str(ENGINE / "transformer_engine")]
    sys.modules["transformer_engine"] = package
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # by which its own build imports it
    common = importlib.import_module("transformer_engine.common")
    common.load_framework_extension = lambda framework: None
    del os.environ["NVTE_PROJECT_BUILDING"], sys.modules["transformer_engine"]
    engine: Any = importlib.import_module("transformer_engine")
    engine.common = common
    return engine


def _asked_by_transformer_engine(*_: Any) -> bool:
    return str(sys._getframe(1).f_globals.get("__name__")).startswith("transformer_engine")


def _pretend_a_gpu() -> None:
    """A Hopper, or what the environment says, whose memory is the host's."""
    major, minor = map(int, os.environ.get(CAPABILITY, "9.0").split("."))
    gpu = SimpleNamespace(major=major, minor=minor, multi_processor_count=132, name="no GPU", total_memory=0)
    torch.cuda.get_device_properties = lambda *_: gpu  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (major, minor)
    torch.cuda.get_device_name = lambda *_: "no GPU"
    torch.version.cuda = "13.0"
    torch.cuda.is_available = _asked_by_transformer_engine
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment,return-value]
    torch.cuda.is_current_stream_capturing = lambda: False
    # Whatever they are told to wait for has been done.
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = MagicMock  # type: ignore[misc, assignment]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment,return-value]
    torch.Tensor.is_cuda = property(_asked_by_transformer_engine)  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.to = _on_cpu(torch.Tensor.to)  # type: ignore[method-assign]
    for name in ("zeros", "ones", "empty", "full", "tensor", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _on_cpu(function: Any) -> Any:
    """The function with "cuda", or a device's number, read as the CPU."""

    def is_cuda(place: Any) -> bool:
        return isinstance(place, str | torch.device) and str(place).startswith("cuda")

    def on_cpu(*arguments: Any, **options: Any) -> Any:
        if is_cuda(options.get("device")) or isinstance(options.get("device"), int):
            options["device"] = "cpu"
        return function(*("cpu" if is_cuda(value) else value for value in arguments), **options)

    return on_cpu
