"""Print what a Slurm job needs to know about its run, as lines name=value.

Call it as `python -m megatron_fipo.launch.job experiment=…`. It checks the configuration as the trainer does, so that a
mistake ends the job before a node is used.
"""

import os
import sys
from pathlib import Path

from megatron_fipo.config import Config, with_values
from megatron_fipo.config.checks import check
from megatron_fipo.config.checks_here import ROLLOUT_TOKEN_VARIABLE
from megatron_fipo.config.configure import run_with_config
from megatron_fipo.config.servers import job_starts_servers, servers_on_every_node
from megatron_fipo.sizing.placement import check_placement

_LATER = "http://rollout-node:8000"


def main(config: Config) -> None:
    """Check the configuration and print the job's numbers."""
    cluster = config.cluster
    complete = config
    if job_starts_servers(config):
        # Stand-ins for the addresses and the token that the job sets later.
        complete = with_values(config, {"rollout.servers": 0, "rollout.addresses": [_LATER]})
        os.environ.setdefault(ROLLOUT_TOKEN_VARIABLE, "later")
    world_size = cluster.trainer_nodes * cluster.gpus_per_node
    for warning in check(complete, world_size=world_size, on_login_node=True):
        print(f"warning: {warning}", file=sys.stderr)
    check_placement(complete, world_size)
    facts = {
        "trainer_nodes": cluster.trainer_nodes,
        "rollout_nodes": cluster.rollout_nodes,
        "shared_nodes": cluster.trainer_nodes if servers_on_every_node(config) else 0,
        "gpus_per_node": cluster.gpus_per_node,
        "max_retries": cluster.max_retries,
        "start_timeout_s": int(config.rollout.start_timeout_s),
        "run_directory": Path(config.run.directory).resolve(),
    }
    for name, value in facts.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    run_with_config(main, local=False)
