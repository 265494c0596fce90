"""Rank 0's batch on every rank: its rows, that is. Tokens go to those that read them (feed.py)."""

import torch
import torch.distributed

from megatron_fipo.records.rows import TrainBatch


def share(offered: bytes | None) -> TrainBatch:
    """Hand rank 0's batch to every rank.

    Args:
        offered: the batch's frame on rank 0, None elsewhere.
    """
    frame = torch.frombuffer(bytearray(offered), dtype=torch.uint8) if offered is not None else None
    length = torch.tensor([frame.numel() if frame is not None else 0])
    torch.distributed.broadcast(length, src=0)
    if frame is None:
        frame = torch.empty(int(length), dtype=torch.uint8)
    torch.distributed.broadcast(frame, src=0)
    return TrainBatch.from_bytes(frame.numpy().tobytes())
