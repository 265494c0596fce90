"""Where rank 0 listens for the other ranks: on one address, and on loopback where all of them are on one machine."""

import ipaddress
import os
import socket

LOOPBACK = "127.0.0.1"


def several_nodes() -> bool:
    """Whether the trainer's ranks are on more than one machine."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def unlike_elsewhere(address: str) -> bool:
    """Whether other nodes know the host by another address: some name themselves as 127.0.1.1 in their own hosts file.

    Then only all interfaces will do.
    """
    return several_nodes() and ipaddress.ip_address(address).is_loopback


def listen_for_ranks() -> tuple[socket.socket, str]:
    """A listening socket on a free port of the interface at which the ranks meet, and its host:port for all of them.

    OSError: MASTER_ADDR, where they meet, is not an address of this machine.
    """
    if not several_nodes():
        listener = socket.create_server((LOOPBACK, 0), backlog=1024)
        return listener, f"{LOOPBACK}:{listener.getsockname()[1]}"
    host = os.environ["MASTER_ADDR"]
    family, _, _, _, found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    address = str(found[0])
    everywhere = unlike_elsewhere(address)
    listener = socket.create_server(("" if everywhere else address, 0), family=family, backlog=1024)
    reached_at = host if everywhere else address
    return listener, f"{f'[{reached_at}]' if ':' in reached_at else reached_at}:{listener.getsockname()[1]}"
