"""Buckets: the pieces a weight update is cut into, and their layout as one flat buffer.

Both ends use this module: the trainer packs, the engine's workers unpack by the same arithmetic, so that only names,
shapes and dtypes need to travel beside the bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_fipo.weights.bucket_layout import BucketLayout
from megatron_fipo.weights.dtypes import dtype_name, torch_dtype


@dataclass(frozen=True)
class Bucket:
    """Some named tensors of one weight update, sent together. Tensors keep their own shape, dtype and device."""

    tensors: list[tuple[str, Tensor]]

    def layout(self) -> BucketLayout:
        """Names, shapes and dtypes, in order."""
        return BucketLayout(
            names=tuple(name for name, _ in self.tensors),
            shapes=tuple(tuple(tensor.shape) for _, tensor in self.tensors),
            dtypes=tuple(dtype_name(tensor.dtype) for _, tensor in self.tensors),
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(tensor.nbytes for _, tensor in self.tensors)

    def checksums(self) -> tuple[int, ...]:
        """`checksum` of each tensor, in order."""
        return tuple(checksum(tensor) for _, tensor in self.tensors)

    def pack(self) -> Tensor:
        """All tensors in one flat uint8 tensor on their device, each at the offset that `BucketLayout.spans` gives."""
        layout = self.layout()
        buffer = torch.empty(layout.packed_bytes(), dtype=torch.uint8, device=self.tensors[0][1].device)
        for (_, tensor), (start, length) in zip(self.tensors, layout.spans(), strict=True):
            buffer[start : start + length].view(tensor.dtype).copy_(tensor.detach().reshape(-1))
        return buffer


def checksum(tensor: Tensor) -> int:
    """A number that depends on every bit of the values and on their order, alike on CPU and GPU.

    Σ (2i + 1) · (word i + 1) modulo 2^64 over words of 8 bytes, and over the single bytes of what is left. A single
    changed word always shows, since odd factors lose nothing modulo 2^64. It guards against faults, not forgery.
    """
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    whole = flat.numel() // 8 * 8
    pieces = [*flat[:whole].view(torch.int64).split(_CHECKSUM_WORDS), flat[whole:].to(torch.int64)]
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    start = 0
    for piece in pieces:
        factors = torch.arange(2 * start + 1, 2 * (start + piece.numel()) + 1, 2, device=tensor.device)
        total += (piece + 1).mul_(factors).sum()
        start += piece.numel()
    return int(total)


_CHECKSUM_WORDS = 1 << 18
"""At once: what bounds the memory that a checksum takes beside the tensor, and keeps it in a cache."""


def unpack(buffer: Tensor, layout: BucketLayout) -> Iterator[tuple[str, Tensor]]:
    """The named tensors of a packed bucket, as views of `buffer` (uint8, flat): keep it unchanged while they live."""
    for name, shape, dtype, (start, length) in zip(
        layout.names, layout.shapes, layout.dtypes, layout.spans(), strict=True
    ):
        yield name, buffer[start : start + length].view(torch_dtype(dtype)).view(shape)
