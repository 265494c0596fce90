"""What Megatron-Core's mixture-of-experts layers ask of CUDA, Transformer Engine and NCCL, for the CPU and gloo.

Only `platform.install` calls this, where there is no CUDA. It holds no logic of training.
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class IdleStream:
    """A stream or an event where there is no CUDA: nothing runs on it, so whatever it is told to wait for is done.

    Megatron-Core 0.19 asks for it whenever gradients are reduced, Transformer Engine around its own streams, and the
    experts' dispatcher to copy token counts.
    """

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any): ...

    def synchronize(self) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def record_event(self, event: Any = None) -> Any:
        return event or IdleStream()


def install_streams() -> None:
    """Have torch.cuda give streams and events that do nothing."""
    torch.cuda.current_stream = lambda *args, **kwargs: IdleStream()  # type: ignore[assignment,return-value]
    torch.cuda.Stream = torch.cuda.Event = IdleStream  # type: ignore[misc,assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]


def install_dispatch() -> None:
    """Stand in for what the dispatcher takes for granted on a GPU.

    Raises:
        RuntimeError: a name is gone, which means another Megatron-Core than the pinned one.
    """
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    places = ((token_dispatcher, "maybe_move_tensor_to_cpu"), (mappings, "_gather_along_first_dim"))
    for module, name in (*places, (mappings, "_reduce_scatter_along_first_dim")):
        if not hasattr(module, name):
            raise RuntimeError(f"cannot run on the CPU with these versions, {module.__name__}.{name} is not found")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None  # 0.16.1 reads the name even where Transformer Engine is not installed
    _give_splits_as_numbers(token_dispatcher)
    _allow_uneven_parts(mappings)


def _give_splits_as_numbers(token_dispatcher: Any) -> None:
    """all_to_all_single wants numbers. Megatron-Core turns its splits into them only where they come from a GPU."""
    moved = token_dispatcher.maybe_move_tensor_to_cpu

    def as_numbers(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        found = moved(tensor, as_numpy, record_stream)
        return found.numpy() if as_numpy and isinstance(found, Tensor) else found

    token_dispatcher.maybe_move_tensor_to_cpu = as_numbers


def _allow_uneven_parts(mappings: Any) -> None:
    """gloo gathers and scatters equal parts only, and expert tensor parallelism has unequal ones."""
    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_parts(tensor: Tensor, group: Any, splits: Sequence[int] | None = None, buffer: bool = False) -> Tensor:
        if splits is None or group.size() == 1:
            return gather(tensor, group, splits, buffer)
        parts = [tensor.new_empty(int(length), *tensor.shape[1:]) for length in splits]
        parts[group.rank()].copy_(tensor)
        for source, part in enumerate(parts):
            dist.broadcast(part, group=group, group_src=source)
        return torch.cat(parts)

    def scatter_parts(tensor: Tensor, group: Any, splits: Sequence[int] | None = None, buffer: bool = False) -> Tensor:
        if splits is None or group.size() == 1:
            return scatter(tensor, group, splits, buffer)
        whole = tensor.clone()
        dist.all_reduce(whole, group=group)
        return whole.split([int(length) for length in splits])[group.rank()].clone()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather_parts, scatter_parts
