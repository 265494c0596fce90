"""What trainer and engines say to each other about a weight transport: typed records, which travel as JSON.

The trainer's half of a transport (`transports.py`, `cuda_ipc.py`) makes them, the engine's (`engines/`) reads them.
"""

from typing import Any, Literal, TypeVar

import msgspec

from megatron_fipo.weights.bucket_layout import BucketLayout

BUCKET_FILE = "bucket.safetensors"
"""Name of the file that a bucket is in, in its sender's directory."""

_T = TypeVar("_T")


class ProcessGroupAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="process_group"):
    """Where one sender waits for all engine workers to join its process group."""

    sender: int
    address: str
    port: int
    world_size: int
    backend: Literal["gloo", "nccl"]
    timeout_s: float


class SharedMemoryAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shared_memory"):
    """The directory in which one sender writes its files."""

    sender: str
    """What its buckets call it: the run and a number. Senders of the same buckets on several machines have one name."""
    directory: str


class CudaIpcAddress(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cuda_ipc"):
    """The GPUs that the trainer's buckets are on, each for the engine worker on the same GPU."""

    device_uuids: tuple[str, ...]


TransportAddress = ProcessGroupAddress | SharedMemoryAddress | CudaIpcAddress


class JoinRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one server is told to join a sender's transport."""

    address: TransportAddress
    first_rank: int
    """The rank of the server's first worker among all workers, counted from 1: the sender is 0."""


class WorkerPlace(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where an engine worker or a rank of the trainer runs."""

    machine: str
    """The machine's own name."""
    gpu: str | None = None
    """UUID of its GPU; None on a CPU."""


class BroadcastBucket(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="process_group"):
    """A packed bucket that `sender` broadcasts."""

    sender: int


class BucketFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="shared_memory"):
    """A bucket in the one safetensors file that is in a sender's directory."""

    sender: str


class CudaHandle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """CUDA's handle to memory of another process, in the parts and the order of torch's `_share_cuda_`."""

    memory: bytes
    size: int
    offset: int
    """Of the storage in its allocation, in bytes."""
    counter_file: bytes
    counter_slot: int
    """File and slot of torch's reference count."""
    event: bytes
    waits_for_event: bool


class BucketMemory(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cuda_ipc"):
    """A packed bucket in the memory of several GPUs: a handle for the engine worker on each, by the GPU's UUID."""

    handles: dict[str, CudaHandle]


BucketPlace = BroadcastBucket | BucketFile | BucketMemory


class BucketHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One bucket on its way to the engines: what is in it, and where it is."""

    layout: BucketLayout
    place: BucketPlace
    checksums: tuple[int, ...] | None = None
    """Of each tensor, in the layout's order; None: not to be compared."""


def to_wire(record: JoinRequest | BucketHeader) -> dict[str, Any]:
    """JSON-ready form."""
    return msgspec.to_builtins(record)


def from_wire(kind: type[_T], data: Any) -> _T:
    """The inverse of `to_wire`. ValueError for anything that `to_wire` would not have made."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise ValueError(f"no {kind.__name__}: {error}") from None
