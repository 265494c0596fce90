"""The transport for a GPU that the trainer and its engines share: a bucket stays where it is, and a handle travels.

The handle is CUDA's own, as torch.multiprocessing makes it, but in JSON and never a pickle. Processes number their GPUs
each in its own way, so that they compare the GPU's UUID.
"""

import msgspec
import torch
from torch import Tensor

from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.transport_records import BucketHeader, BucketMemory, CudaHandle, CudaIpcAddress


class CudaIpcTransport:
    """Buckets in the trainer's memory, each until the engine worker on the same GPU has copied it."""

    def __init__(self) -> None:
        """ConfigError where there is no CUDA."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "rollout.weight_transfer",
                "cuda_ipc needs CUDA, which this torch has not",
                "rollout.weight_transfer=shared_memory or process_group",
            )
        self._device_uuid = device_uuid(torch.device("cuda", torch.cuda.current_device()))
        self._in_flight: Tensor | None = None

    def open(self, workers: int) -> CudaIpcAddress:
        """Names the GPU; an engine worker that runs on another one says so."""
        return CudaIpcAddress((self._device_uuid,))

    def join(self) -> None:
        """Nothing to wait for: a handle needs no peer."""

    def send(self, bucket: Bucket) -> BucketHeader:
        """Packs the bucket. The worker on this GPU gives its handle back, so that one has to be there."""
        self._in_flight = bucket.pack()
        torch.cuda.current_stream().synchronize()
        handle = share(self._in_flight.untyped_storage())
        return BucketHeader(bucket.layout(), BucketMemory({self._device_uuid: handle}))

    def sent(self) -> None:
        """Frees the bucket: the worker has a copy."""
        self._release()

    def close(self) -> None:
        """Frees what an engine that failed has not taken."""
        self._release()

    def _release(self) -> None:
        self._in_flight = None
        torch.cuda.ipc_collect()


def device_uuid(device: torch.device) -> str:
    """What a GPU is called in every process, whatever CUDA_VISIBLE_DEVICES says there."""
    return str(torch.cuda.get_device_properties(device).uuid)


def share(storage: torch.UntypedStorage) -> CudaHandle:
    """A handle to memory on a GPU, for one other process to open once. `storage` has to outlive its use."""
    _, *parts = storage._share_cuda_()
    return CudaHandle(*parts)


def open_shared(handle: CudaHandle, device: torch.device) -> Tensor:
    """The memory behind a handle of another process, as a flat uint8 tensor; `device` is that GPU in this process.

    RuntimeError: CUDA cannot open it.
    """
    torch.cuda.init()  # before which the next call crashes the process
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *msgspec.structs.astuple(handle))
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
