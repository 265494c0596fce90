"""Sections of the schema: the nodes of a job, and what estimates assume of a GPU."""

from dataclasses import dataclass

from megatron_fipo.config.settings import setting


@dataclass
class ClusterConfig:
    """The nodes that a Slurm job asks for; one process a GPU. Runs on one machine do not read it."""

    gpus_per_node: int = setting(8, "GPUs of a node, and so trainer processes on it.", minimum=1)
    trainer_nodes: int = setting(1, "Nodes that train.", minimum=1)
    rollout_nodes: int = setting(
        0,
        "Nodes that run vLLM servers, as many a node as rollout.tensor_parallel allows; 0: rollout.servers.",
        minimum=0,
    )
    max_retries: int = setting(
        3, "Restarts of a Slurm job without a new checkpoint in between, before it gives up.", minimum=0
    )


@dataclass
class HardwareConfig:
    """One GPU and its connections: what preflight and planner estimate with. Training does not read it."""

    name: str = setting("H100-80GB", "What reports call it.")
    memory_gib: float = setting(79.6, "Memory of a GPU, in GiB.", above=0)
    reserved_gib: float = setting(
        5.0, "Kept free of the estimate: CUDA context, NCCL buffers, workspaces, fragmentation; in GiB.", minimum=0
    )
    bf16_tflops: float = setting(989.0, "Dense BF16 peak, in TFLOP/s.", above=0)
    fp8_tflops: float = setting(1979.0, "Dense FP8 peak, in TFLOP/s; read when model.fp8 is on.", above=0)
    memory_gb_s: float = setting(3350.0, "Memory bandwidth, in GB/s.", above=0)
    node_gb_s: float = setting(450.0, "One GPU's bandwidth to others of its node, one direction, in GB/s.", above=0)
    network_gb_s: float = setting(50.0, "One GPU's bandwidth to other nodes, one direction, in GB/s.", above=0)
    compute_efficiency: float = setting(
        0.45, "Share of the peak that whole layers reach, communication apart.", above=0, maximum=1
    )
    bandwidth_efficiency: float = setting(0.7, "Share of each bandwidth that is reached.", above=0, maximum=1)
