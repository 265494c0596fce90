"""Where the trainer's ranks meet: torch.distributed's key-value store, listening on one address and not on all.

The store asks nobody for a password, and whoever writes to it can change what ranks tell each other. torch's own
rendezvous has it listen on every interface of rank 0's machine.
"""

import ipaddress
import os
import socket
from datetime import timedelta

from torch.distributed import Store, TCPStore

from megatron_fipo.errors import FipoError
from megatron_fipo.processes.addresses import unlike_elsewhere
from megatron_fipo.processes.ending import LISTENER_VARIABLE


def meeting_point(timeout_s: float) -> Store | None:
    """The store of the run that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    None under torchrun, whose agent hosts it already.

    Raises:
        FipoError: rank 0 cannot listen there, or its host is not known.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return None
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=timeout_s)
    if rank > 0:
        return TCPStore(host, port, world_size, is_master=False, timeout=wait, wait_for_workers=False)
    listener = _listener(host, port)
    address, port = listener.getsockname()[:2]
    reached_at = host if ipaddress.ip_address(address).is_unspecified else address
    return TCPStore(
        reached_at,
        port,
        world_size,
        is_master=True,
        timeout=wait,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def _listener(host: str, port: int) -> socket.socket:
    inherited = os.environ.pop(LISTENER_VARIABLE, None)
    if inherited is not None:
        listener = socket.socket(fileno=int(inherited))
        listener.set_inheritable(False)
        return listener
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", port) if unlike_elsewhere(str(address[0])) else address)
        listener.listen(4096)
    except OSError as error:
        raise FipoError(
            f"the trainer's ranks cannot meet at {host}:{port}: {error}; set MASTER_ADDR and MASTER_PORT to an address "
            "of the first node and a free port"
        ) from error
    return listener
