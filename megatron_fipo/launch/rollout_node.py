"""The vLLM servers of one node of a Slurm job: `srun python -m megatron_fipo.launch.rollout_node OVERRIDES`.

This starts as many servers as fit on the node's GPUs, on the node's own address, protected by the token in the
environment. When they answer, their addresses are written to FIPO_ADDRESSES/<node>. A server that dies is started again
on the same address, where the trainer finds it. If this happens too often, the command ends and shows the server's log.

On GPUs that the trainer uses in turns (rollout.shared_gpu) a server that dies stays away until the job starts again: it
would take its memory while the trainer has its turn. The command ends when the last one has died.
"""

import dataclasses
import ipaddress
import os
import socket
import sys
import time
from pathlib import Path

import psutil

from megatron_fipo.config import Config
from megatron_fipo.config.checks_here import ROLLOUT_TOKEN_VARIABLE
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.config.model_places import fetch_model
from megatron_fipo.config.servers import servers_per_node
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import RolloutError
from megatron_fipo.files import write_atomically
from megatron_fipo.processes.ending import terminate_on_sigterm
from megatron_fipo.processes.leftovers import remove_outside, say_removed

_SETTING = "FIPO_NETWORK_INTERFACE"
_LOOK_EVERY_S = 1.0
_STEADY_S = 3600.0
"""After this time without a death, earlier restarts no longer count. A node does not know the run's steps."""


def main(config: Config) -> None:
    """Run the node's servers until SIGTERM, or until one dies more than rollout.max_restarts times (RolloutError)."""
    if not os.environ.get(ROLLOUT_TOKEN_VARIABLE):
        raise RolloutError(f"{ROLLOUT_TOKEN_VARIABLE} is not set: the trainer would not know the servers' token")
    terminate_on_sigterm()
    node = os.environ["SLURMD_NODENAME"]
    shared = config.rollout.shared_gpu
    # Without shared_gpu the trainer uses none of the node's GPUs.
    os.environ["LOCAL_WORLD_SIZE"] = str(config.cluster.gpus_per_node if shared else 0)
    settings = dataclasses.replace(
        config.rollout,
        addresses=[],
        servers=servers_per_node(config),
        max_restarts=0 if shared else config.rollout.max_restarts,
        host=own_address(node, os.environ.get("GLOO_SOCKET_IFNAME"), int(os.environ["SLURM_JOB_NUM_NODES"])),
    )
    place = Path(config.run.directory) / "rollout" / node
    say_removed(place, remove_outside(place))
    pool = EnginePool(
        settings,
        fetch_model(config.model.path),
        place,
        config.run.seed,
        config.model.max_position_embeddings,
        returns_routes=config.algorithm.router_replay == "rollout",
    )
    with pool:
        pool.start()
        pool.wait_ready()
        write_atomically(Path(os.environ["FIPO_ADDRESSES"]) / node, ",".join(s.url for s in pool.servers))
        restarted: dict[str, float] = {}
        while True:
            for server in pool.servers:
                if time.monotonic() - restarted.get(server.url, 0.0) > _STEADY_S:
                    pool.prove(server)
                if (failure := server.failure()) is not None:
                    if pool.lose(server, failure):
                        _repair(pool, shared=shared)
                    restarted[server.url] = time.monotonic()
            time.sleep(_LOOK_EVERY_S)


def _repair(pool: EnginePool, *, shared: bool) -> None:
    """Start a lost server again; with shared GPUs go on without it. RolloutError if that cannot be."""
    try:
        pool.repair()
    except RolloutError as error:
        if not (shared and pool.in_service):
            raise
        print(f"a server is left out until the job starts again: {error}", file=sys.stderr, flush=True)


def own_address(node: str, interfaces: str | None, nodes: int) -> str:
    """Return the IPv4 address at which the other nodes of the job reach this node's servers.

    Args:
        node: this node's name, which is looked up if no interface is named.
        interfaces: names separated by commas, as for gloo. The first one that exists here and has an address is used.
        nodes: the number of nodes of the job. With one node, the loopback address is enough.

    Raises:
        RolloutError: there is no such address, or only this node itself can reach it.
    """
    if interfaces:
        here = psutil.net_if_addrs()
        found = [
            address.address
            for name in interfaces.split(",")
            for address in here.get(name, [])
            if address.family == socket.AF_INET
        ]
        if not found:
            raise RolloutError(
                f"{node}: no interface {interfaces} with an IPv4 address here, but {', '.join(sorted(here))}; "
                f"{_SETTING} names one that all nodes have"
            )
        host = found[0]
    else:
        try:
            host = str(socket.getaddrinfo(node, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
        except socket.gaierror as error:
            raise RolloutError(f"{node}: its own name has no IPv4 address here ({error}); set {_SETTING}") from error
    if nodes > 1 and ipaddress.ip_address(host).is_loopback:
        raise RolloutError(
            f"{node}: its servers would have the address {host}, which the job's other nodes cannot reach; "
            f"set {_SETTING} to the interface between the nodes"
        )
    return host


if __name__ == "__main__":
    run_with_config(main, local=False)
