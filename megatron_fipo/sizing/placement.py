"""The placement of trainer and servers on a job's nodes: descriptions, checks, and a whole run on one node."""

import math
from collections.abc import Iterator
from typing import Any

from megatron_fipo.config import Config, with_values
from megatron_fipo.config.servers import servers_on_every_node, servers_per_node
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.records.routes import route_format
from megatron_fipo.sizing.memory import GIB, StageMemory, layers_of_stage, longest_sequence, server_weights
from megatron_fipo.sizing.timing import rollout_servers, step_time

_UTILISATION_STEP = 0.05
_LONGEST_AT_ONCE = 8
"""Number of longest sequences that must fit into a server's cache at once, so that it can sample them in parallel."""


def servers_text(config: Config) -> str:
    """Describe how many servers the run has, and where."""
    count, rollout = rollout_servers(config), config.rollout
    servers = f"{count} rollout server{'s' if count > 1 else ''}"
    if config.cluster.rollout_nodes:
        nodes = config.cluster.rollout_nodes
        return f"{servers} on {nodes} node{'s' if nodes > 1 else ''} of their own"
    if rollout.addresses:
        return f"{servers} that already run{'' if count > 1 else 's'}"
    if servers_on_every_node(config):
        return (
            f"{servers} on {'the node' if config.cluster.trainer_nodes == 1 else 'all nodes'} of the trainer, in turns"
        )
    if rollout.shared_gpu:
        gpus = rollout.servers * rollout.tensor_parallel
        return f"{servers} on {gpus} of the trainer's GPUs, in turns"
    return f"{servers} beside the trainer"


def check_placement(config: Config, world_size: int) -> None:
    """Raise ConfigError if servers that share GPUs need more GPUs than the trainer has on the first node."""
    rollout = config.rollout
    here = min(world_size, config.cluster.gpus_per_node)
    needed = rollout.servers * rollout.tensor_parallel
    if rollout.shared_gpu and needed > here:
        raise ConfigError(
            "rollout.servers",
            f"{rollout.servers} × rollout.tensor_parallel={rollout.tensor_parallel} needs {needed} GPUs, but the "
            f"trainer has {here} on the first node",
            f"rollout.servers={max(1, here // rollout.tensor_parallel)} or fewer"
            if rollout.tensor_parallel <= here
            else f"rollout.tensor_parallel={here} or smaller",
        )


def check_server_memory(config: Config, model_config: ModelConfig) -> None:
    """Raise ConfigError if a server's share of its GPUs does not hold the model's weights, without any cache."""
    rollout, hardware = config.rollout, config.hardware
    share = rollout.gpu_memory_utilization * hardware.memory_gib * GIB
    weights = server_weights(config, model_config)
    if rollout.addresses or weights < share:
        return  # servers that already run are on hardware of their own
    enough = 2 ** math.ceil(math.log2(weights * rollout.tensor_parallel / share + 1e-9))
    raise ConfigError(
        "rollout.tensor_parallel",
        f"{rollout.tensor_parallel} leaves {weights / GIB:.1f} GiB of weights on each GPU of "
        f"a server, and rollout.gpu_memory_utilization={rollout.gpu_memory_utilization:g} of "
        f"{hardware.memory_gib:g} GiB does not hold them",
        f"rollout.tensor_parallel={enough} or more, or a larger share",
    )


def host_bytes(config: Config, model_config: ModelConfig, stages: list[StageMemory]) -> int:
    """Return the host memory of a node for what leaves its GPUs in turns; 0 unless they are shared.

    The state of the trainer's ranks is there while engines sample. The weights of sleeping servers are there while the
    trainer updates, and their memory is kept.
    """
    if not config.rollout.shared_gpu:
        return 0
    gpus, rollout = config.cluster.gpus_per_node, config.rollout
    servers = servers_per_node(config) if servers_on_every_node(config) else rollout.servers
    trainer = gpus * max(stage.host for stage in stages)
    return trainer + servers * rollout.tensor_parallel * server_weights(config, model_config)


def turns_s(config: Config, model_config: ModelConfig, stages: list[StageMemory]) -> float:
    """Return the seconds per step in which GPUs that are used in turns copy to and from their hosts; 0 if none are.

    Weights and optimizer state leave a GPU once (policy/offload.py). Weights come back twice: for the weight update,
    and for training. Optimizer state comes back beside the first forward passes, and gradients are only freed. An
    engine's weights leave and come back once.
    """
    if not config.rollout.shared_gpu:
        return 0.0
    moved = max(3 * stage.weights + stage.optimizer for stage in stages) + 2 * server_weights(config, model_config)
    return moved / (config.hardware.host_gb_s * 1e9 * config.hardware.bandwidth_efficiency)


def routes_bytes(config: Config, model_config: ModelConfig, data_parallel_size: int) -> int:
    """Return the host memory of a node for the choices of routers that updates replay; 0 without replay.

    Each rank has those of its tokens and layers, 2 bytes each, if all responses are as long as they may be. Where they
    come from the engine, the readers of each replica have what came, and the rollout process, which is on the first
    node, has all of the steps that are under way.
    """
    algorithm, parallel, experts = config.algorithm, config.parallel, model_config.experts
    if algorithm.router_replay == "none" or experts is None:
        return 0
    tokens = algorithm.prompts_per_step * algorithm.samples_per_prompt * longest_sequence(config)
    ranks = data_parallel_size * parallel.context * parallel.tensor
    layers = max(
        sum(experts.layers[layer] for layer in layers_of_stage(config, model_config, stage))
        for stage in range(parallel.pipeline)
    )
    on_node = min(config.cluster.gpus_per_node, ranks * parallel.pipeline)
    recorded = on_node * math.ceil(tokens / ranks) * layers * experts.per_token * 2
    routes = route_format(experts)
    if algorithm.router_replay != "rollout" or routes is None:
        return recorded
    readers = math.ceil(on_node / parallel.tensor)
    read = readers * math.ceil(tokens / (data_parallel_size * parallel.context)) * layers * routes.layer_bytes
    return recorded + read + (1 + config.rollout.max_off_policy_steps) * tokens * routes.width


def check_host_memory(config: Config, needed: int, routes: int, stages: list[StageMemory]) -> None:
    """Raise ConfigError if `host_bytes` and `routes_bytes` do not fit into the memory of a node's host."""
    limit = config.hardware.host_memory_gib
    if limit is not None and needed <= limit * GIB < needed + routes:
        raise ConfigError(
            "algorithm.router_replay",
            f"a node's host has to hold {routes / GIB:.0f} GiB of choices of routers"
            + (f" and {needed / GIB:.0f} GiB of what leaves its GPUs in turns" if needed else "")
            + f", and has {limit:g}",
            "algorithm.router_replay=none, fewer samples in a step, more nodes, or the right hardware.host_memory_gib",
        )
    if limit is not None and needed > limit * GIB:
        state = config.cluster.gpus_per_node * max(stage.host for stage in stages)
        raise ConfigError(
            "rollout.shared_gpu",
            f"a node's host has to hold {needed / GIB:.0f} GiB of what leaves its GPUs in turns ({state / GIB:.0f} of "
            f"the trainer, {(needed - state) / GIB:.0f} of its servers), and has {limit:g}",
            "more nodes, fewer servers with a larger rollout.tensor_parallel, or the right hardware.host_memory_gib",
        )


def notes(config: Config, model_config: ModelConfig, world_size: int, data_parallel_size: int) -> Iterator[str]:
    """Yield notes about hidden costs, each with the cost or with a better setting."""
    cluster, rollout, parallel, hardware = config.cluster, config.rollout, config.parallel, config.hardware
    if parallel.tensor > cluster.gpus_per_node:
        yield _tensor_across_nodes(config, model_config, data_parallel_size)
    if hardware.gpus_per_node is not None and cluster.gpus_per_node > hardware.gpus_per_node:
        yield (
            f"cluster.gpus_per_node: nodes of {hardware.name} have {hardware.gpus_per_node} GPUs as a rule, not "
            f"{cluster.gpus_per_node}; cluster.gpus_per_node={hardware.gpus_per_node}, and more nodes"
        )
    if cluster.rollout_nodes or rollout.addresses:
        return
    if servers_on_every_node(config):
        if idle := cluster.gpus_per_node % rollout.tensor_parallel:
            yield (
                f"rollout.tensor_parallel: {idle} of a node's {cluster.gpus_per_node} GPUs do not sample, since no "
                f"server of {rollout.tensor_parallel} fits on them"
            )
        return
    here, used = min(world_size, cluster.gpus_per_node), rollout.servers * rollout.tensor_parallel
    if rollout.shared_gpu and used < world_size:
        most = here // rollout.tensor_parallel
        mend = f"; rollout.servers={most} samples on {most * rollout.tensor_parallel}" if most > rollout.servers else ""
        elsewhere = " (rollout.servers=0 has the job start servers on every node)" if world_size > here else ""
        yield (
            f"rollout.servers: {used} of {world_size} trainer GPUs sample, the others wait meanwhile{elsewhere}{mend}"
        )
    if not rollout.shared_gpu and rollout.dtype == "bfloat16" and here + used > cluster.gpus_per_node:
        yield (
            f"rollout.servers: {used} GPUs are needed beside the trainer's {here}, but a node has "
            f"{cluster.gpus_per_node}; rollout=shared_gpu, cluster.rollout_nodes=1, or fewer trainer processes"
        )


def _tensor_across_nodes(config: Config, model_config: ModelConfig, data_parallel_size: int) -> str:
    inside = with_values(config, {"hardware.network_gb_s": config.hardware.node_gb_s})
    here, there = (step_time(c, model_config, data_parallel_size).log_probs for c in (inside, config))
    tensor, gpus = config.parallel.tensor, config.cluster.gpus_per_node
    return (
        f"parallel.tensor: {tensor} ranks are on {math.ceil(tensor / gpus)} nodes of {gpus} GPUs, and each layer "
        f"goes over the network: log-probs take {there:,.0f} s, within a node {here:,.0f} s"
    )


def utilisation(config: Config, stages: list[StageMemory], usable: float) -> float:
    """Return the largest share of a GPU that is left for a shared server, given `usable` bytes, in steps of 5 %."""
    free = usable - max((0 if stage.host else stage.always for stage in stages), default=0)
    return math.floor(free / (config.hardware.memory_gib * GIB) / _UTILISATION_STEP) * _UTILISATION_STEP


def on_one_node(config: Config, tensor_parallel: int) -> Config:
    """Return the run with trainer and servers in turns on all GPUs of one node. The servers' share is not yet set."""
    values: dict[str, Any] = {
        "cluster.trainer_nodes": 1,
        "cluster.rollout_nodes": 0,
        "parallel.data": None,
        "rollout.shared_gpu": True,
        "rollout.weight_transfer": "shared_memory",
        "rollout.addresses": [],
        "rollout.servers": config.cluster.gpus_per_node // tensor_parallel,
    }
    return with_values(config, values | servers_of(config, tensor_parallel))


def on_all_nodes(config: Config, tensor_parallel: int) -> Config:
    """Return the run with trainer and servers in turns on all of its nodes. The servers' share is not yet set."""
    values: dict[str, Any] = {
        "rollout.shared_gpu": True,
        "rollout.weight_transfer": "cuda_ipc",
        "rollout.servers": 0,
        "rollout.addresses": [],
    }
    cluster = config.cluster
    if cluster.rollout_nodes:
        values |= trainer_on(config, cluster.trainer_nodes + cluster.rollout_nodes)
    return with_values(config, values | servers_of(config, tensor_parallel))


def trainer_on(config: Config, nodes: int) -> dict[str, Any]:
    """Return the values of a run with so many of its nodes for the trainer, and the others for servers."""
    others = config.cluster.trainer_nodes + config.cluster.rollout_nodes - nodes
    return {"cluster.trainer_nodes": nodes, "cluster.rollout_nodes": others, "parallel.data": None}


def servers_of(config: Config, tensor_parallel: int) -> dict[str, Any]:
    """Return the values of servers of so many GPUs. Several deal experts where that is configured."""
    deals_experts = config.rollout.expert_parallel and tensor_parallel > 1
    return {"rollout.tensor_parallel": tensor_parallel, "rollout.expert_parallel": deals_experts}


def has_room_to_sample(config: Config, model_config: ModelConfig) -> bool:
    """Return whether a server's weights and the cache of some of the longest sequences fit into its share."""
    rollout = config.rollout
    width = 2 if rollout.dtype == "bfloat16" else 4
    token = 2 * model_config.num_layers * model_config.dimension("key_value") * width / rollout.tensor_parallel
    needed = server_weights(config, model_config) + _LONGEST_AT_ONCE * longest_sequence(config) * token
    return needed <= rollout.gpu_memory_utilization * config.hardware.memory_gib * GIB
