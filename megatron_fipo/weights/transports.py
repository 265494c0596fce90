"""Weight transports: how the bytes of a bucket get from a trainer rank to all engine workers.

A new transport is a class here, one in `megatron_fipo/engines/` that is listed in `engines/vllm_plugin.py`, and their
records in `transport_records.py`. CUDA IPC has files of its own. Each sender (`transfer_plan.py`) has one transport.
"""

import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from safetensors.torch import save_file

from megatron_fipo.config import RolloutConfig
from megatron_fipo.errors import RolloutError
from megatron_fipo.processes.leftovers import SHARED_MEMORY, prefix
from megatron_fipo.weights.buckets import Bucket
from megatron_fipo.weights.cuda_ipc import CudaIpcTransport
from megatron_fipo.weights.deadline import Deadline
from megatron_fipo.weights.process_group import TransferGroup, host_store, is_loopback, listen, local_address
from megatron_fipo.weights.transport_records import (
    BUCKET_FILE,
    BroadcastBucket,
    BucketFile,
    BucketHeader,
    ProcessGroupAddress,
    SharedMemoryAddress,
    TransportAddress,
)

CPU = torch.device("cpu")


class WeightTransport(Protocol):
    """The sender's half of a transport. Rank 0 hands what it returns to the engines."""

    def open(self, workers: int) -> TransportAddress:
        """Gets ready for `workers` engine workers in all; returns what an engine needs to know to join.

        Called again when servers have come or gone, after a `close` too.
        """

    def join(self) -> None:
        """Blocks until all workers have joined; called in a thread while rank 0 asks the engines to join."""

    def send(self, bucket: Bucket) -> BucketHeader:
        """Starts sending; returns at once what engines need to receive it. `bucket` may be freed afterwards."""

    def sent(self) -> None:
        """Called when all engines have the last bucket: frees it, and raises if sending failed on this side."""

    def close(self) -> None:
        """Releases everything without waiting for the engines; may be called twice."""


class ProcessGroupTransport:
    """Broadcast over a process group of this sender (rank 0) and all engine workers: NCCL, or gloo on CPU."""

    def __init__(self, rollout: RolloutConfig, sender: int):
        self._sender, self._timeout_s = sender, rollout.update_timeout_s
        self._backend: Literal["gloo", "nccl"] = "nccl" if torch.cuda.is_available() else "gloo"
        # Now: `join` runs in a thread of its own, to which the current device is GPU 0.
        self._device = torch.device("cuda", torch.cuda.current_device()) if self._backend == "nccl" else CPU
        self._address = local_address(_farthest_peer(rollout))
        self._world_size = 0
        self._listener: socket.socket | None = None
        self._group: TransferGroup | None = None
        self._in_flight: Any = None

    def open(self, workers: int) -> ProcessGroupAddress:
        """Names the meeting point of the group, which is listening from here on."""
        self.close()
        self._world_size = workers + 1
        self._listener = listen(self._address)
        address, port = self._listener.getsockname()
        return ProcessGroupAddress(self._sender, address, port, self._world_size, self._backend, self._timeout_s)

    def join(self) -> None:
        """Makes the group; blocks until all workers are in it."""
        listener = self._listener
        assert listener is not None
        store = host_store(listener, self._world_size, self._timeout_s)
        group = TransferGroup(store, self._address, 0, self._world_size, self._backend, self._timeout_s, self._device)
        if self._listener is listener:
            self._group = group
        else:
            # Closed meanwhile, and perhaps open again for others.
            group.abort()

    def send(self, bucket: Bucket) -> BucketHeader:
        """Packs the bucket and starts its broadcast."""
        assert self._group is not None
        buffer = bucket.pack()
        # The buffer must live until the broadcast is over, which only `sent` knows.
        self._in_flight = (self._group.broadcast(buffer), buffer)
        return BucketHeader(bucket.layout(), BroadcastBucket(self._sender))

    def sent(self) -> None:
        """Ends the broadcast: at once, since every worker has what it sent. RolloutError if it does not end."""
        work, _ = self._in_flight
        # NCCL's wait is only for the stream, and would never return for a peer that is gone.
        deadline = Deadline(self._timeout_s)
        while not work.is_completed():
            if deadline.passed():
                raise RolloutError(f"a weight bucket was still on its way after {self._timeout_s:g} s")
            time.sleep(0.001)
        work.wait()
        self._in_flight = None

    def close(self) -> None:
        """Aborts the group; workers still waiting in a broadcast get an error."""
        if self._listener is not None:
            self._listener.close()
        if self._group is not None:
            self._group.abort()
        self._listener = self._group = self._in_flight = None


class SharedMemoryTransport:
    """safetensors files in a private directory under /dev/shm, for trainer and engines on one machine."""

    def __init__(self, sender: int, run_dir: Path):
        self._sender, self._directory = f"{run_dir}:{sender}", SHARED_MEMORY / f"{prefix(run_dir)}sender{sender}"
        self._file = self._directory / BUCKET_FILE

    def _make_directory(self) -> None:
        """A fresh directory for this user only; another process of this number may have left one of the same name."""
        try:
            if self._directory.is_symlink() or self._directory.exists():
                shutil.rmtree(self._directory)
            self._directory.mkdir(mode=0o700)
        except OSError as error:
            raise RolloutError(
                f"cannot make {self._directory} for rollout.weight_transfer=shared_memory: {error}"
            ) from error

    def open(self, workers: int) -> SharedMemoryAddress:
        """Names the directory; an engine that cannot see it is on another machine, and says so."""
        self._make_directory()
        return SharedMemoryAddress(self._sender, str(self._directory))

    def join(self) -> None:
        """Nothing to wait for: files need no peer."""

    def send(self, bucket: Bucket) -> BucketHeader:
        """Writes the bucket's file, complete when this returns."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in bucket.tensors}
        try:
            # A new file: engines may still map what was written under this name before.
            self._file.unlink(missing_ok=True)
            save_file(tensors, self._file)
        except Exception as error:
            raise RolloutError(f"cannot write a weight bucket to {self._file}: {error}") from error
        return BucketHeader(bucket.layout(), BucketFile(self._sender))

    def sent(self) -> None:
        """Deletes the file; engines that still map it keep its pages."""
        self._file.unlink()

    def close(self) -> None:
        """Removes the directory and whatever is in it."""
        shutil.rmtree(self._directory, ignore_errors=True)


def make_transport(rollout: RolloutConfig, sender: int, run_dir: Path) -> WeightTransport:
    """The transport that `rollout.weight_transfer` names, for this sender, by its number in the plan."""
    if rollout.weight_transfer == "shared_memory":
        return SharedMemoryTransport(sender, run_dir)
    if rollout.weight_transfer == "cuda_ipc":
        return CudaIpcTransport()
    return ProcessGroupTransport(rollout, sender)


def _farthest_peer(rollout: RolloutConfig) -> str:
    """A host whose route shows the address that all engines can reach this rank at.

    Servers elsewhere are named in the configuration; servers of our own are on rank 0's machine, which torchrun and
    srun name in MASTER_ADDR.
    """
    hosts = [address.split("://", 1)[-1].rsplit(":", 1)[0] for address in rollout.addresses]
    candidates = hosts or [os.environ.get("MASTER_ADDR", "")]
    return next((host for host in candidates if not is_loopback(host)), "")
