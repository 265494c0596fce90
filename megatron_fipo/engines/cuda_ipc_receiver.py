"""The engine's half of the plane for a GPU shared with the trainer; `weights/cuda_ipc.py` is the other half."""

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo

from megatron_fipo.engines.receivers import CheckpointEngine
from megatron_fipo.errors import WeightsRefused
from megatron_fipo.weights.buckets import BucketLayout, unpack
from megatron_fipo.weights.cuda_ipc import device_uuid, open_shared


@dataclass
class CudaIpcInit(WeightTransferInitInfo):
    """The GPU that the trainer's buckets are on, and the rank of this server's first worker, counted from 1."""

    device_uuid: str
    first_rank: int


@dataclass
class CudaIpcUpdate(WeightTransferUpdateInfo):
    """One bucket, packed: a handle for each worker of all servers."""

    handles: list[list[Any]]
    names: list[str]
    shapes: list[list[int]]
    dtypes: list[str]
    checksums: dict[str, int] | None = None


class CudaIpcEngine(CheckpointEngine):
    """Copies buckets out of the trainer's memory."""

    init_info_cls = CudaIpcInit
    update_info_cls = CudaIpcUpdate

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._worker = 0

    def init_transfer_engine(self, init_info: CudaIpcInit) -> None:
        """Makes sure that this worker is on the trainer's GPU."""
        mine = device_uuid(self.device) if self.device.type == "cuda" else "none"
        if mine != init_info.device_uuid:
            raise WeightsRefused(
                f"rollout.weight_transfer=cuda_ipc needs the trainer and its servers on one GPU, but the trainer's is "
                f"{init_info.device_uuid} and this engine's is {mine}; shared_memory works for several GPUs of one "
                "machine, process_group for any"
            )
        self._worker = init_info.first_rank - 1 + self.parallel_config.rank

    def receive_weights(self, update_info: CudaIpcUpdate) -> None:
        """Copies one bucket, since layers that wait for more tensors keep theirs longer than the trainer does."""
        layout = BucketLayout(update_info.names, update_info.shapes, update_info.dtypes)
        shared = open_shared(update_info.handles[self._worker], self.device)
        if shared.numel() != layout.packed_bytes():
            raise WeightsRefused(f"a bucket of {layout.packed_bytes()} bytes came with a handle to {shared.numel()}")
        buffer = shared.clone()
        torch.cuda.current_stream(self.device).synchronize()
        del shared
        self._load(list(unpack(buffer, layout)), update_info.checksums)
