"""Cutting Hugging Face tensors into one tensor-parallel rank's parameter, and back: pure functions on tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.models.parameters import Parameter


def cut(parameter: Parameter, tensors: Sequence[Any], rank: int, tensor_parallel_size: int) -> Tensor:
    """One rank's shard of a Megatron parameter.

    `tensors` are the full Hugging Face tensors of `parameter.names`, or safetensors slices of them: only this rank's
    part is read. The result has `parameter.local_shape(tensor_parallel_size)`.
    """
    pieces = [
        _piece(tensor, shape, parameter, rank, tensor_parallel_size)
        for tensor, shape in zip(tensors, parameter.shapes, strict=True)
    ]
    if len(pieces) == 1:
        return pieces[0]
    groups = _local_groups(parameter, tensor_parallel_size)
    return torch.cat([piece.unflatten(0, (groups, -1)) for piece in pieces], dim=1).flatten(0, 1)


def merge(parameter: Parameter, shards: Sequence[Tensor]) -> list[Tensor]:
    """The full Hugging Face tensors of a parameter from its shards on every tensor-parallel rank: the inverse of `cut`.

    With one shard, or a parameter that is not cut, the results may be views of it.
    """
    if parameter.cut is None:
        shards = shards[:1]
    split = [_split(parameter, shard, len(shards)) for shard in shards]
    if len(split) == 1:
        whole = split[0]
    else:
        assert parameter.cut is not None
        whole = [torch.cat(pieces, dim=parameter.cut) for pieces in zip(*split, strict=True)]
    if parameter.padded:
        whole = [tensor[: shape[0]] for tensor, shape in zip(whole, parameter.shapes, strict=True)]
    return whole


def _piece(tensor: Any, shape: tuple[int, ...], parameter: Parameter, rank: int, tensor_parallel_size: int) -> Tensor:
    if parameter.cut is None:
        return tensor[:]
    size = shape[parameter.cut]
    length = -(-size // tensor_parallel_size)
    start = min(rank * length, size)
    stop = min(start + length, size)
    piece = tensor[start:stop] if parameter.cut == 0 else tensor[:, start:stop]
    if stop - start < length:
        piece = torch.cat([piece, piece.new_zeros(length - (stop - start), *shape[1:])])
    return piece


def _split(parameter: Parameter, shard: Tensor, tensor_parallel_size: int) -> list[Tensor]:
    if len(parameter.names) == 1:
        return [shard]
    groups = _local_groups(parameter, tensor_parallel_size)
    lengths = [shape[0] // tensor_parallel_size // groups for shape in parameter.shapes]
    pieces = shard.unflatten(0, (groups, sum(lengths))).split(lengths, dim=1)
    return [piece.flatten(0, 1) for piece in pieces]


def _local_groups(parameter: Parameter, tensor_parallel_size: int) -> int:
    """Blocks that the parts alternate in on a rank: its key-value groups, or one if they lie one after the other."""
    return max(parameter.head_groups // tensor_parallel_size, 1)
