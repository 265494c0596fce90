"""The vLLM servers of one rollout node of a Slurm job: `srun python -m megatron_fipo.launch.rollout_node OVERRIDES`.

Starts as many servers as the node's GPUs allow, on the node's own address, guarded by the token in the environment.
When they answer, their addresses appear in FIPO_ADDRESSES/<node>. One that dies is started again on its address, where
the trainer finds it; this ends with its log when that has happened too often.
"""

import dataclasses
import ipaddress
import os
import socket
import time
from pathlib import Path

import psutil

from megatron_fipo.config import Config
from megatron_fipo.config.checks_here import ROLLOUT_TOKEN_VARIABLE
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.config.model_places import fetch_model
from megatron_fipo.engines.pool import EnginePool
from megatron_fipo.errors import RolloutError
from megatron_fipo.files import write_atomically
from megatron_fipo.processes.ending import terminate_on_sigterm
from megatron_fipo.processes.leftovers import remove_outside, say_removed

_SETTING = "FIPO_NETWORK_INTERFACE"
_LOOK_EVERY_S = 1.0
_STEADY_S = 3600.0
"""How long after a restart earlier ones no longer count against a server: a node knows of no steps."""


def main(config: Config) -> None:
    """Run the node's servers until SIGTERM, or until one dies more than rollout.max_restarts times (RolloutError)."""
    if not os.environ.get(ROLLOUT_TOKEN_VARIABLE):
        raise RolloutError(f"{ROLLOUT_TOKEN_VARIABLE} is not set: the trainer would not know the servers' token")
    terminate_on_sigterm()
    node = os.environ["SLURMD_NODENAME"]
    # The whole node is theirs: no GPU is a trainer's.
    os.environ["LOCAL_WORLD_SIZE"] = "0"
    settings = dataclasses.replace(
        config.rollout,
        addresses=[],
        servers=config.cluster.gpus_per_node // config.rollout.tensor_parallel,
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
                    pool.lose(server, failure)
                    pool.repair()
                    restarted[server.url] = time.monotonic()
            time.sleep(_LOOK_EVERY_S)


def own_address(node: str, interfaces: str | None, nodes: int) -> str:
    """The IPv4 address at which the other nodes of the job find this one's servers.

    Args:
        node: this node's name, looked up where no interface is named.
        interfaces: names separated by commas, as gloo takes them; the first that is here and has an address is used.
        nodes: how many the job has. Of one, the loopback address will do.

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
