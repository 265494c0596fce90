"""The engine's half of the transport for a GPU shared with the trainer; `weights/cuda_ipc.py` is the other half."""

from typing import Any

import torch

from megatron_fipo.engines.receivers import CheckpointEngine, expected
from megatron_fipo.errors import WeightsRefused
from megatron_fipo.weights.buckets import unpack
from megatron_fipo.weights.cuda_ipc import device_uuid, open_shared
from megatron_fipo.weights.transport_records import BucketHeader, BucketMemory, CudaIpcAddress, JoinRequest


class CudaIpcEngine(CheckpointEngine):
    """Copies buckets out of the trainer's memory."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._worker = 0

    def init_transfer_engine(self, init_info: JoinRequest) -> None:
        """Makes sure that this worker is on the trainer's GPU."""
        trainer = expected(CudaIpcAddress, init_info.address).device_uuid
        mine = device_uuid(self.device) if self.device.type == "cuda" else "none"
        if mine != trainer:
            raise WeightsRefused(
                f"rollout.weight_transfer=cuda_ipc needs the trainer and its servers on one GPU, but the trainer's is "
                f"{trainer} and this engine's is {mine}; shared_memory works for several GPUs of one "
                "machine, process_group for any"
            )
        self._worker = init_info.first_rank - 1 + self.parallel_config.rank

    def receive_weights(self, update_info: BucketHeader) -> None:
        """Copies one bucket, since layers that wait for more tensors keep theirs longer than the trainer does."""
        layout = update_info.layout
        shared = open_shared(expected(BucketMemory, update_info.place).handles[self._worker], self.device)
        if shared.numel() != layout.packed_bytes():
            raise WeightsRefused(f"a bucket of {layout.packed_bytes()} bytes came with a handle to {shared.numel()}")
        buffer = shared.clone()
        torch.cuda.current_stream(self.device).synchronize()
        del shared
        self._load(list(unpack(buffer, layout)), update_info)
