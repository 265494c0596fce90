"""What travels of a bucket beside its bytes; read and written without torch by whoever passes it on."""

import math

import msgspec

ALIGNMENT = 256
"""Bytes that every tensor of a packed bucket starts at a multiple of: enough for a view of any dtype, and for a GPU."""


class BucketLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a bucket holds, in order. The three tuples have one entry per tensor."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    def __post_init__(self) -> None:
        """ValueError unless the three belong together."""
        if not len(self.names) == len(self.shapes) == len(self.dtypes):
            raise ValueError(
                f"a bucket of {len(self.names)} names has {len(self.shapes)} shapes and {len(self.dtypes)} dtypes"
            )

    def spans(self) -> list[tuple[int, int]]:
        """(start, length) in bytes of each tensor in the packed buffer."""
        # Here: a process that only samples never imports torch.
        from megatron_fipo.weights.dtypes import torch_dtype

        spans, offset = [], 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            length = math.prod(shape) * torch_dtype(dtype).itemsize
            spans.append((offset, length))
            offset += _aligned(length)
        return spans

    def packed_bytes(self) -> int:
        """Size of the packed buffer in bytes, padding after the last tensor included."""
        spans = self.spans()
        return spans[-1][0] + _aligned(spans[-1][1]) if spans else 0


def _aligned(length: int) -> int:
    return -(-length // ALIGNMENT) * ALIGNMENT
