"""The address on which rank 0 listens for the other ranks. It is loopback if all ranks are on one machine."""

import ipaddress
import os
import socket

LOOPBACK = "127.0.0.1"


def several_nodes() -> bool:
    """Return whether the trainer's ranks are on more than one machine."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    return world_size > int(os.environ.get("LOCAL_WORLD_SIZE", world_size))


def unlike_elsewhere(address: str) -> bool:
    """Return whether other nodes know this host by another address, as when its hosts file maps its name to 127.0.1.1.

    Then rank 0 has to listen on all interfaces.
    """
    return several_nodes() and ipaddress.ip_address(address).is_loopback


def listen_for_ranks() -> tuple[socket.socket, str]:
    """Return a listening socket on a free port of the interface at which ranks meet, and its host:port for all ranks.

    Raises OSError if MASTER_ADDR, where the ranks meet, is not an address of this machine.
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
