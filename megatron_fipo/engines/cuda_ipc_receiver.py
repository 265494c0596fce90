"""The engine's half of the transport for a GPU shared with the trainer; `weights/cuda_ipc.py` is the other half."""

from typing import Any

import torch

from megatron_fipo.engines.receivers import CheckpointEngine, expected
from megatron_fipo.errors import WeightsRefused
from megatron_fipo.weights.buckets import unpack
from megatron_fipo.weights.cuda_ipc import device_uuid, open_shared
from megatron_fipo.weights.transport_records import BucketHeader, BucketMemory, CudaIpcAddress, JoinRequest


class CudaIpcEngine(CheckpointEngine):
    """Copies buckets out of the memory of the trainer's rank on the same GPU."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._gpu = device_uuid(self.device) if self.device.type == "cuda" else "none"

    def init_transfer_engine(self, init_info: JoinRequest) -> None:
        """Makes sure that a rank of the trainer is on this worker's GPU."""
        trainer = expected(CudaIpcAddress, init_info.address).device_uuids
        if self._gpu not in trainer:
            raise WeightsRefused(
                "rollout.weight_transfer=cuda_ipc needs a rank of the trainer on the GPU of each engine worker, but "
                f"the trainer's are {', '.join(trainer)} and this worker's is {self._gpu}; shared_memory works for "
                "other GPUs of the machine, process_group for any"
            )

    def receive_weights(self, update_info: BucketHeader) -> None:
        """Copies one bucket, since layers that wait for more tensors keep theirs longer than the trainer does."""
        layout = update_info.layout
        handles = expected(BucketMemory, update_info.place).handles
        if self._gpu not in handles:
            raise WeightsRefused(f"a bucket came without a handle to memory of this worker's GPU, {self._gpu}")
        shared = open_shared(handles[self._gpu], self.device)
        if shared.numel() != layout.packed_bytes():
            raise WeightsRefused(f"a bucket of {layout.packed_bytes()} bytes came with a handle to {shared.numel()}")
        buffer = shared.clone()
        torch.cuda.current_stream(self.device).synchronize()
        del shared
        self._load(list(unpack(buffer, layout)), update_info)
