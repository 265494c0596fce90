"""The plane for a GPU that the trainer and its engines share: a bucket stays where it is, and a handle to it travels.

The handle is CUDA's own, as torch.multiprocessing makes it, but in JSON and never a pickle. Processes number their GPUs
each in its own way, so that they compare the GPU's UUID.
"""

import base64
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_fipo.errors import ConfigError
from megatron_fipo.weights.buckets import Bucket


class CudaIpcPlane:
    """Buckets in the trainer's memory, each until all engine workers have copied it."""

    def __init__(self) -> None:
        """ConfigError where there is no CUDA."""
        if not torch.cuda.is_available():
            raise ConfigError(
                "rollout.weight_transfer",
                "cuda_ipc needs CUDA, which this torch has not",
                "rollout.weight_transfer=shared_memory or process_group",
            )
        self._workers = 0
        self._in_flight: Tensor | None = None

    def open(self, workers: int) -> dict[str, Any]:
        """Names the GPU; an engine that runs on another one says so."""
        self._workers = workers
        return {"device_uuid": device_uuid(torch.device("cuda", torch.cuda.current_device()))}

    def join(self) -> None:
        """Nothing to wait for: a handle needs no peer."""

    def send(self, bucket: Bucket) -> dict[str, Any]:
        """Packs the bucket; `handles` has one for each worker, since each gives its own back."""
        self._in_flight = bucket.pack()
        torch.cuda.current_stream().synchronize()
        storage = self._in_flight.untyped_storage()
        return {"handles": [share(storage) for _ in range(self._workers)], **bucket.layout().to_dict()}

    def sent(self) -> None:
        """Frees the bucket: every worker has a copy."""
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


def share(storage: torch.UntypedStorage) -> list[Any]:
    """A JSON-ready handle to memory on a GPU, for one other process to open once. `storage` has to outlive its use."""
    _, *parts = storage._share_cuda_()
    return encode_handle(parts)


def open_shared(handle: Sequence[Any], device: torch.device) -> Tensor:
    """The memory behind a handle of another process, as a flat uint8 tensor; `device` is that GPU in this process.

    Raises:
        ValueError: it is no handle.
        RuntimeError: CUDA cannot open it.
    """
    parts = decode_handle(handle)
    torch.cuda.init()  # before which the next call crashes the process
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *parts)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def encode_handle(parts: Sequence[Any]) -> list[Any]:
    """JSON-ready form of what `_share_cuda_` returns: bytes as base64 text, numbers as they are."""
    return [base64.b64encode(part).decode() if isinstance(part, bytes) else part for part in parts]


def decode_handle(handle: Sequence[Any]) -> list[Any]:
    """The inverse of `encode_handle`. ValueError for anything that torch would not have made."""
    kinds = [str if kind is bytes else kind for kind in _HANDLE]
    if [type(part) for part in handle] != kinds:
        raise ValueError("a CUDA IPC handle has other parts")
    return [base64.b64decode(part, validate=True) if type(part) is str else part for part in handle]


_HANDLE = (bytes, int, int, bytes, int, bytes, bool)
"""memory handle, bytes of the storage, its offset in the allocation, file and slot of torch's reference count, event
handle, whether to wait for the event."""
