"""A process group between one trainer rank and all engine workers, beside the trainer's and the engines' own groups.

Members are not in one torch.distributed world, so the group is made of its backend class alone: gloo for tensors in
main memory, NCCL for tensors on GPUs. Both ends use this module; rank 0 is the trainer's rank.
"""

import socket
import threading
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

LOOPBACK = "127.0.0.1"
ABORT_TIMEOUT_S = 5.0


def is_loopback(host: str) -> bool:
    """Whether `host` names this machine's loopback interface."""
    return host in ("localhost", "::1", "") or host.startswith("127.")


def local_address(peer: str) -> str:
    """The IPv4 address under which this machine talks to `peer` (a name or an address): loopback for loopback."""
    if is_loopback(peer):
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        # Connecting a datagram socket sends nothing: it only asks the routing table.
        probe.connect((peer, 1))
        return str(probe.getsockname()[0])


def listen(address: str) -> socket.socket:
    """A listening socket on `address` and a free port, for `host_store`: bound before its port is told to anyone."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((address, 0))
    listener.listen(1024)
    return listener


def host_store(listener: socket.socket, world_size: int, timeout_s: float) -> TCPStore:
    """The group's meeting point, on `listener` (which it takes over): reachable through that address only."""
    address, port = listener.getsockname()
    return TCPStore(
        address,
        port,
        world_size,
        is_master=True,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def visit_store(address: str, port: int, world_size: int, timeout_s: float) -> TCPStore:
    """The meeting point that rank 0 hosts at (address, port), as another member sees it."""
    return TCPStore(
        address,
        port,
        world_size,
        is_master=False,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
    )


class TransferGroup:
    """One member's end of the group. The constructor blocks until all members came, `timeout_s` at most."""

    def __init__(
        self,
        store: TCPStore,
        address: str,
        rank: int,
        world_size: int,
        backend: str,
        timeout_s: float,
        device: torch.device,
    ):
        """`address` is this member's for gloo, `device` its GPU for NCCL."""
        timeout = timedelta(seconds=timeout_s)
        self._store = store
        scoped = PrefixStore("megatron_fipo", store)
        self._group: Any
        if backend == "gloo":
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [ProcessGroupGloo.create_device(hostname=address)]
            options._timeout = timeout
            self._group = ProcessGroupGloo(scoped, rank, world_size, options)
        elif backend == "nccl":
            # Absent from CPU builds of torch.
            from torch.distributed import ProcessGroupNCCL

            nccl_options = ProcessGroupNCCL.Options()
            nccl_options._timeout = timeout
            self._group = ProcessGroupNCCL(scoped, rank, world_size, nccl_options)
            # NCCL meets at the first collective, where the trainer would wait for engines that hear of a bucket only
            # when it is on its way.
            with torch.cuda.device(device):
                self.broadcast(torch.zeros(1, dtype=torch.uint8, device=device)).wait()
                torch.cuda.synchronize(device)
        else:
            raise ValueError(f"backend {backend!r} is neither gloo nor nccl")

    def broadcast(self, buffer: Tensor) -> Any:
        """Starts sending rank 0's `buffer` (flat, same size everywhere) to all; returns torch's Work object."""
        options = BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        return self._group.broadcast([buffer], options)

    def abort(self) -> None:
        """Ends the group without waiting for its members: what is still under way fails on all of them."""
        # Ending a gloo group joins its threads: at once as a rule, but for a stopped peer they wait until the group's
        # own timeout. A process that exits while they run is aborted by the C++ runtime, so they get some seconds.
        ending = threading.Thread(target=self._group.abort, name="end-transfer-group", daemon=True)
        ending.start()
        ending.join(ABORT_TIMEOUT_S)
