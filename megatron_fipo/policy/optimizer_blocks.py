"""The distributed optimizer's state for a checkpoint, as each rank holds it: nothing is gathered and nothing copied.

A data-parallel rank holds a stretch of a flattened parameter. Megatron-Core gathers the stretches of all ranks on every
rank before it saves them as whole tensors, which takes longer than writing them. A stretch is also a few boxes of the
whole tensor: the end of a row, whole rows, the start of a row. Saved as those, it is the same tensor in the checkpoint,
which any layout loads.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

SHARDING = "fully_reshardable"
"""Megatron-Core's name for state that is saved by parameter and not by rank, so that any layout loads it."""
_PREFIX = "optimizer.state"


@contextlib.contextmanager
def in_blocks() -> Iterator[None]:
    """Within it, a distributed optimizer's sharded state is what is to be saved, and made here."""
    original = DistributedOptimizer.sharded_state_dict

    def made_here(self: Any, model_sharded_state_dict: Any, *_: Any, **__: Any) -> dict[str, Any]:
        parameters = {"param_state": _state(self, model_sharded_state_dict), "param_state_sharding_type": SHARDING}
        return self.state_dict() | parameters

    DistributedOptimizer.sharded_state_dict = made_here
    try:
        yield
    finally:
        DistributedOptimizer.sharded_state_dict = original


def boxes(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Offsets and sizes of the boxes that make up elements `start` to `end` of a flattened tensor, in their order."""
    if start >= end:
        return
    if start == 0 and end == math.prod(shape):
        yield (0,) * len(shape), tuple(shape)
        return
    if len(shape) == 1:
        yield (start,), (end - start,)
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row
    if first > last:  # within one row
        first = last = end // row
        start_of_row = first * row
        yield from _in_row(shape, first, start - start_of_row, end - start_of_row)
        return
    if start % row:
        yield from _in_row(shape, first - 1, start % row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if end % row:
        yield from _in_row(shape, last, 0, end % row)


def _in_row(shape: Sequence[int], row: int, start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offsets, sizes in boxes(shape[1:], start, end):
        yield (row, *offsets), (1, *sizes)


@dataclass(frozen=True)
class _Part:
    """A sharded tensor of the model and where it begins in its flattened parameter."""

    whole: ShardedTensor
    start: int


def _state(optimizer: Any, model_state: Any) -> dict[int, Any]:
    """What this rank holds, by the index that Megatron-Core counts parameters by."""
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    described = {entry.data: entry for entry in nested_values(sharded)}
    state: dict[int, Any] = {}
    index = 0
    for buffer, ranges in zip(optimizer.buffers, optimizer.gbuf_ranges, strict=True):
        (by_bucket,) = ranges.values()
        held = {parameter: found for bucket in by_bucket for parameter, found in bucket["param_map"].items()}
        for parameter in buffer.param_index_map:
            if parameter in held:
                span = held[parameter]["param"]
                tensors = optimizer._get_main_param_and_optimizer_states(parameter)
                state[index] = _blocks(described[parameter], tensors, span.start, span.end)
            index += 1
    return state


def _blocks(described: Any, tensors: dict[str, Tensor], start: int, end: int) -> dict[str, list[ShardedTensor]]:
    """By the state's name, the boxes of elements `start` to `end` of the parameter; each of `tensors` holds those."""
    parts = _parts(described)
    blocks: dict[str, list[ShardedTensor]] = {}
    for name, tensor in tensors.items():
        if name == "step":
            continue
        flat = tensor.detach().flatten()
        blocks[name] = [
            _block(part.whole, name, flat, part.start - start + at, offsets, sizes)
            for part in parts
            for at, offsets, sizes in _placed(part, start, end)
        ]
    return blocks


def _placed(part: _Part, start: int, end: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Where in the flattened part a box begins, its offsets and its sizes, for what is within `start` to `end`."""
    shape = part.whole.local_shape
    at = max(start - part.start, 0)
    for offsets, sizes in boxes(shape, at, min(end - part.start, math.prod(shape))):
        yield at, offsets, sizes
        at += math.prod(sizes)


def _parts(described: Any) -> list[_Part]:
    """The sharded tensors that a parameter is saved as: one, or those that a factory cuts it into."""
    if isinstance(described, ShardedTensor):
        return [_Part(described, 0)]
    assert isinstance(described, ShardedTensorFactory)
    # Without its data, whose type may be one of FP8 that has no views.
    whole = torch.empty(described.data.shape, device="meta")
    built = described.build_fn(described.key, whole, described.replica_id, described.flattened_range)
    parts = [_Part(part, part.data.storage_offset()) for part in nested_values(built)]
    if not all(part.whole.data.is_contiguous() for part in parts):
        raise RuntimeError(f"{described.key} is cut across its rows, which cannot be saved in stretches")
    return parts


def _block(
    whole: ShardedTensor, name: str, flat: Tensor, at: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> ShardedTensor:
    """One box as a sharded tensor: `flat` holds it from element `at` on."""
    leading = whole.prepend_axis_num
    inner = whole.global_offset[leading:]
    shape = (*(1,) * leading, *sizes)
    place = (*whole.global_offset[:leading], *(a + b for a, b in zip(inner, offsets, strict=True)))
    data = flat[at : at + math.prod(sizes)].view(shape)
    # The last of a replica's numbers is the data-parallel rank, and each of those has a stretch of its own.
    replica = (*whole.replica_id[:-1], 0) if isinstance(whole.replica_id, tuple) else 0
    return replace(
        whole,
        key=f"{_PREFIX}.{name}.{whole.key}",
        data=data,
        dtype=data.dtype,
        local_shape=shape,
        global_offset=place,
        axis_fragmentations=None,
        prepend_axis_num=0,
        replica_id=replica,
    )
