"""Which servers a run has, and who starts them."""

from megatron_fipo.config import Config


def job_starts_servers(config: Config) -> bool:
    """Return whether the Slurm job starts the servers, and tells the trainer their addresses.

    It starts them on nodes of their own (cluster.rollout_nodes), or on the trainer's nodes if GPUs are shared and
    neither rollout.servers nor rollout.addresses names any.
    """
    return config.cluster.rollout_nodes > 0 or servers_on_every_node(config)


def servers_on_every_node(config: Config) -> bool:
    """Return whether the job starts servers on all GPUs of its trainer, which take turns with it."""
    rollout = config.rollout
    return rollout.shared_gpu and not rollout.servers and not rollout.addresses


def servers_per_node(config: Config) -> int:
    """Return the number of servers that the job starts on each of their nodes: as many as fit on its GPUs."""
    return config.cluster.gpus_per_node // config.rollout.tensor_parallel
