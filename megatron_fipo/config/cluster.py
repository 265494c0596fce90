"""Sections of the schema: the nodes of a job, and the GPU that estimates assume."""

from dataclasses import dataclass

from megatron_fipo.config.settings import setting


@dataclass
class ClusterConfig:
    """The nodes that a Slurm job requests, with one process per GPU. Runs on one machine do not read this section."""

    gpus_per_node: int = setting(
        8, "GPUs per node, which is also the number of trainer processes per node.", minimum=1, maximum=128
    )
    trainer_nodes: int = setting(1, "Nodes that train.", minimum=1, maximum=10**5)
    rollout_nodes: int = setting(
        0,
        "Nodes that run vLLM servers. Each node runs as many servers as fit on its GPUs. 0: use rollout.servers.",
        minimum=0,
        maximum=10**5,
    )
    max_retries: int = setting(
        3,
        "Number of restarts in a row without a new checkpoint, after which a Slurm job gives up.",
        minimum=0,
        maximum=10**6,
    )


@dataclass
class HardwareConfig:
    """One GPU and its connections, for preflight's and planner's estimates. Training does not read this section."""

    name: str = setting("H100-80GB", "Name in reports.")
    memory_gib: float = setting(79.6, "Memory per GPU, in GiB.", minimum=0.001, maximum=10**6)
    reserved_gib: float = setting(
        5.0,
        "Memory that the estimate leaves free for CUDA's context, NCCL's buffers, workspaces and fragmentation, in "
        "GiB.",
        minimum=0,
        maximum=10**6,
    )
    host_memory_gib: float | None = setting(
        1800.0,
        "Memory of one node's host, in GiB. With rollout.shared_gpu the trainer's state is there while engines sample, "
        "and the engines' weights while the trainer updates. null: not known, and not checked.",
        minimum=0.001,
        maximum=10**6,
    )
    bf16_tflops: float = setting(989.0, "Dense BF16 peak, in TFLOP/s.", minimum=0.001, maximum=10**9)
    fp8_tflops: float | None = setting(
        1979.0,
        "Dense FP8 peak, in TFLOP/s; used if model.fp8 is on. null: the GPU has no FP8.",
        minimum=0.001,
        maximum=10**9,
    )
    memory_gb_s: float = setting(3350.0, "Memory bandwidth, in GB/s.", minimum=0.001, maximum=10**9)
    node_gb_s: float = setting(
        450.0, "Bandwidth of one GPU to others on its node, one direction, in GB/s.", minimum=0.001, maximum=10**9
    )
    network_gb_s: float = setting(
        50.0, "Bandwidth of one GPU to other nodes, one direction, in GB/s.", minimum=0.001, maximum=10**9
    )
    host_gb_s: float = setting(
        64.0,
        "Bandwidth of one GPU to its host's memory, one direction, in GB/s. With rollout.shared_gpu the trainer's "
        "state and the engines' weights go that way.",
        minimum=0.001,
        maximum=10**9,
    )
    gpus_per_node: int | None = setting(
        8,
        "GPUs per node in the product as sold; a larger cluster.gpus_per_node causes a warning.",
        minimum=1,
        maximum=128,
    )
    compute_efficiency: float = setting(
        0.69, "Share of the peak that matrix products reach, as measured (docs/gpu.md).", maximum=1, minimum=0.001
    )
    bandwidth_efficiency: float = setting(0.7, "Share of each bandwidth that is reached.", maximum=1, minimum=0.001)
