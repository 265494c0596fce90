"""The schema of a run: documented, validated dataclasses. Imports neither torch nor megatron.

Every key of `conf/` is a field here, and every field says what it means, its unit and its range; `setting` keeps that
beside the default, so that validation (`config_checks.py`), `--help` and docs/configuration.md all read one source.
"""

from collections.abc import Iterator
from dataclasses import Field, dataclass, fields, is_dataclass
from typing import Any, get_args

from megatron_fipo.settings import section, setting


@dataclass
class RunConfig:
    """What a run is called, where its files go and how long it lasts."""

    name: str = setting("run", "Short name of the run, used in its directory and its logs.")
    directory: str = setting(
        "runs/${run.name}/${now:%Y%m%d-%H%M%S}", "Directory of all the run's files. Give a fixed one to resume from it."
    )
    seed: int = setting(0, "Seed of data order, sampling and initialisation.", minimum=0)
    steps: int = setting(1, "Training steps in all, counting those before a resume.", minimum=0)
    resume: str = setting(
        "auto",
        "auto: continue from the newest complete checkpoint in run.directory if there is one. "
        "never: refuse a directory that already holds a run.",
        choices=("auto", "never"),
    )
    collective_timeout_s: float = setting(3600.0, "Longest wait for other ranks, rollouts included, in s.", above=0)


@dataclass
class ModelConfig:
    """The policy's architecture comes from a Hugging Face directory; these say how to build and run it."""

    path: str = setting(
        "",
        "Hugging Face model directory (config.json, safetensors, tokenizer), or embedded:tiny, which ships with this.",
    )
    dtype: str = setting("bfloat16", "Type of the policy's weights and activations.", choices=("float32", "bfloat16"))
    layers: str = setting(
        "auto",
        "Megatron-Core layer specification. auto: transformer_engine with CUDA, local without.",
        choices=("auto", "local", "transformer_engine"),
    )
    fp8: str = setting(
        "off",
        "FP8 recipe of the Transformer Engine layers (Hopper: delayed, tensorwise, blockwise; Blackwell: also mxfp8).",
        choices=("off", "delayed", "tensorwise", "blockwise", "mxfp8"),
    )
    recompute: str = setting(
        "none",
        "Activation recomputation. selective: attention only; full: every layer.",
        choices=("none", "selective", "full"),
    )
    max_position_embeddings: int | None = setting(
        None, "Context length in tokens; null keeps the model's own. The 7B recipe raises it to 32768.", minimum=1
    )


@dataclass
class ParallelConfig:
    """How the policy is laid out over processes, one a GPU."""

    tensor: int = setting(1, "Tensor-parallel size; divides attention heads and key-value groups.", minimum=1)
    pipeline: int = setting(1, "Pipeline-parallel size: number of stages.", minimum=1)
    virtual_pipeline: int | None = setting(
        None, "Model chunks a pipeline stage (interleaved schedule); null is the plain 1F1B schedule.", minimum=2
    )
    context: int = setting(1, "Context-parallel size: a sequence is cut over this many ranks.", minimum=1)
    data: int | None = setting(
        None,
        "Data-parallel size. null: whatever the processes started give; 1 when the run starts them itself.",
        minimum=1,
    )
    sequence: bool = setting(False, "Sequence parallelism inside the tensor-parallel group.")
    distributed_optimizer: bool = setting(True, "Shard the optimizer state over the data-parallel ranks.")
    micro_batch_tokens: int = setting(
        16384,
        "Most tokens of one micro-batch, padding included; a longer sequence is a micro-batch of its own.",
        minimum=1,
    )


@dataclass
class FutureKLConfig:
    """The influence weight f_t of FIPO (paper, equations 6 to 9; docs/algorithm.md)."""

    decay_rate: float = setting(32.0, "Half-life τ of the discount in tokens: γ = 2^(−1/τ).", above=0)
    band_low: float = setting(
        1.0, "Lower bound of the influence weight (1.0 in the 32B run, 0.8 in the 7B run).", minimum=0
    )
    band_high: float = setting(1.2, "Upper bound of the influence weight.", minimum=0)
    safety_thresh: float = setting(
        10.0, "With a negative advantage, a token ratio above this holds the weight down.", above=0
    )
    safety_rule: str = setting(
        "clamp",
        "What holding down means. clamp: into [0.8, 1.0], as in the released code; one: exactly 1, as in the paper.",
        choices=("clamp", "one"),
    )
    participation_mask: bool = setting(
        True, "Leave tokens with ratio above clip_ratio_c out of the sum (false: ablation)."
    )
    drop_dual_clipped: bool = setting(
        True, "Leave out a response with more than one dual-clipped token, as the released code does."
    )


@dataclass
class FilterGroupsConfig:
    """Dynamic sampling: train only on prompts whose samples differ in accuracy."""

    enable: bool = setting(True, "Drop groups whose samples are all right or all wrong, and sample more prompts.")
    max_num_gen_batches: int = setting(
        10, "Generation batches a step at most; then the step trains on what it has, with a warning.", minimum=1
    )
    surplus: str = setting(
        "carry",
        "Groups beyond the batch: carry them to the next step, or drop them, as the released code does. Both count.",
        choices=("carry", "drop"),
    )


LOSS_SETTINGS: dict[str, tuple[str, ...]] = {
    "future_kl": ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c", "future_kl"),
    "vanilla": ("clip_ratio_low", "clip_ratio_high", "clip_ratio_c"),
    "gspo": ("clip_ratio_low", "clip_ratio_high"),
    "cispo": ("clip_ratio_low", "clip_ratio_high"),
    "sapo": ("tau_pos", "tau_neg"),
}
"""Each loss_mode and the settings that it alone decides about: those it reads have to be set, the others null."""


@dataclass
class AlgorithmConfig:
    """Loss, advantage and batch geometry."""

    name: str = setting("fipo", "Name for logs and plots.")
    loss_mode: str = setting(
        "future_kl",
        "The policy loss, a function of megatron_fipo/algorithm/losses.py. vanilla: GRPO, Dr. GRPO and DAPO.",
        choices=tuple(LOSS_SETTINGS),
    )
    loss_agg_mode: str = setting(
        "token-mean",
        "How token losses become one number over the mini-batch. seq-mean-token-sum-norm (Dr. GRPO): the mean over "
        "responses of their sums, each divided by loss_scale_factor.",
        choices=("token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"),
    )
    loss_scale_factor: float | None = setting(
        None, "The constant length of seq-mean-token-sum-norm, in tokens; null with the other modes.", above=0
    )
    clip_ratio_low: float | None = setting(
        0.2, "ε_low: the ratio is clipped below at 1 − ε_low. null where the loss does not clip.", minimum=0, maximum=1
    )
    clip_ratio_high: float | None = setting(
        0.28, "ε_high: the ratio is clipped above at 1 + ε_high. null where the loss does not clip.", minimum=0
    )
    clip_ratio_c: float | None = setting(
        10.0, "Dual-clip constant c for negative advantages. null where the loss has no dual clip.", above=1
    )
    tau_pos: float | None = setting(
        None, "Temperature of SAPO's gate with a positive advantage; null for the other losses.", above=0
    )
    tau_neg: float | None = setting(
        None, "Temperature of SAPO's gate with a negative or no advantage; null for the other losses.", above=0
    )
    future_kl: FutureKLConfig | None = setting(None, "Settings of loss_mode=future_kl; null for the other losses.")
    norm_adv_by_std: bool = setting(True, "Divide the group advantage by the group's standard deviation.")
    prompts_per_step: int = setting(512, "Prompts whose groups one step trains on.", minimum=1)
    samples_per_prompt: int = setting(16, "Responses sampled a prompt: the group.", minimum=2)
    mini_batch_prompts: int = setting(64, "Prompts an optimizer update; divides prompts_per_step.", minimum=1)
    generation_batch_prompts: int | None = setting(
        None, "Prompts that dynamic sampling samples at once; null means prompts_per_step.", minimum=1
    )
    filter_groups: FilterGroupsConfig = section(FilterGroupsConfig)
    importance_sampling_cap: float | None = setting(
        None,
        "Truncated importance sampling: weigh each token by min(π_trainer_old / π_engine, cap). null is off.",
        above=0,
    )


@dataclass
class OptimizerConfig:
    """Adam with Megatron-Core's schedule, weight decay and clipping."""

    lr: float = setting(1e-6, "Peak learning rate.", above=0)
    schedule: str = setting(
        "constant", "Decay after warm-up, over run.steps.", choices=("constant", "linear", "cosine")
    )
    min_lr: float = setting(0.0, "Learning rate at the end of a decay.", minimum=0)
    warmup_updates: int = setting(10, "Optimizer updates of linear warm-up from zero.", minimum=0)
    weight_decay: float = setting(0.1, "Decoupled weight decay; biases and norms have none.", minimum=0)
    clip_grad: float = setting(1.0, "Largest global gradient norm; 0 is no clipping.", minimum=0)
    beta1: float = setting(0.9, "Adam's first-moment decay.", minimum=0, maximum=1)
    beta2: float = setting(0.999, "Adam's second-moment decay.", minimum=0, maximum=1)
    eps: float = setting(1e-8, "Adam's denominator constant.", above=0)


@dataclass
class RolloutConfig:
    """The vLLM service: servers of our own, or addresses of ones that already run, and how they sample."""

    servers: int = setting(1, "vLLM servers that the run starts on this machine; 0 with rollout.addresses.", minimum=0)
    addresses: list[str] = setting(
        [], "http://host:port of servers that already run. Their token is read from FIPO_ROLLOUT_TOKEN."
    )
    host: str = setting("127.0.0.1", "Address that started servers bind to.")
    tensor_parallel: int = setting(1, "Tensor-parallel size of one server.", minimum=1)
    dtype: str = setting("bfloat16", "Type of the engine's weights.", choices=("float32", "bfloat16"))
    max_prompt_length: int = setting(
        2048, "Longest prompt in tokens; data.overlong_prompts says what becomes of longer.", minimum=1
    )
    max_response_length: int = setting(20480, "Longest response in tokens.", minimum=1)
    temperature: float = setting(1.0, "Sampling temperature in training.", above=0)
    top_p: float = setting(1.0, "Nucleus of training samples.", above=0, maximum=1)
    top_k: int = setting(-1, "Top-k of training samples; -1 is off.", minimum=-1)
    logprobs_mode: str = setting(
        "raw_logprobs",
        "What the engine reports. raw_logprobs: log_softmax(logits); processed_logprobs: after temperature and top-p.",
        choices=("raw_logprobs", "processed_logprobs"),
    )
    max_num_seqs: int = setting(256, "Sequences that one server runs at once.", minimum=1)
    gpu_memory_utilization: float = setting(0.85, "Share of a GPU's memory for one server.", above=0, maximum=1)
    cpu_kv_cache_gib: int = setting(1, "KV cache of a server on CPU, in GiB.", minimum=1)
    cpu_threads: int = setting(1, "Compute threads of a server on CPU.", minimum=1)
    enforce_eager: bool = setting(False, "Run the engine without CUDA graphs or compilation.")
    weight_transfer: str = setting(
        "process_group",
        "Plane of the weights. process_group: NCCL, or gloo on CPU; shared_memory: files in /dev/shm, one machine.",
        choices=("process_group", "shared_memory"),
    )
    bucket_mib: int = setting(
        512, "Size of one bucket of a weight update, in MiB; a larger tensor is a bucket alone.", minimum=1
    )
    start_timeout_s: float = setting(900.0, "Longest start of a server, in seconds.", above=0)
    request_timeout_s: float = setting(3600.0, "Longest generation of one group, in seconds.", above=0)
    update_timeout_s: float = setting(600.0, "Longest weight update, in seconds.", above=0)
    checksum_every: int = setting(
        10,
        "Compare a checksum of each tensor as sent and as received in weight updates whose step is a multiple of "
        "this, step 0 included; a difference ends the run. 0 is never.",
        minimum=0,
    )


@dataclass
class DataConfig:
    """Where problems come from."""

    source: str = setting(
        "files",
        "files: parquet or JSONL in the DAPO-Math-17k column layout; hub: a Hugging Face dataset of that layout; "
        "reasoning_gym: problems generated by reasoning-gym.",
        choices=("files", "hub", "reasoning_gym"),
    )
    train: list[str] = setting([], "Training files, or dataset names with source=hub.")
    validation: list[str] = setting([], "Validation files, or dataset names with source=hub.")
    task: str = setting("", "reasoning-gym task, such as chain_sum.")
    task_options: dict[str, Any] = setting({}, "Difficulty settings of the reasoning-gym task, by its own names.")
    train_size: int = setting(10000, "Problems to generate for training with source=reasoning_gym.", minimum=1)
    validation_size: int = setting(128, "Problems to generate for validation with source=reasoning_gym.", minimum=1)
    instruction: str = setting("", "Text put after each generated problem, such as the form of the answer.")
    overlong_prompts: str = setting(
        "drop",
        "Prompts longer than rollout.max_prompt_length: drop (counted), truncate_left, or error.",
        choices=("drop", "truncate_left", "error"),
    )
    shuffle: bool = setting(True, "Shuffle the training problems each epoch.")


@dataclass
class OverlongBufferConfig:
    """Soft penalty on responses that come near the length limit (DAPO, section 3.4)."""

    enable: bool = setting(False, "Subtract the overlong penalty from the reward.")
    len: int = setting(4096, "Length of the penalty's ramp below max_response_length, in tokens.", minimum=1)
    penalty_factor: float = setting(1.0, "Penalty at max_response_length.", minimum=0)


@dataclass
class RewardConfig:
    """How a response is judged."""

    rule: str = setting(
        "exact_match",
        "exact_match: the recipe's 'Answer: …' string comparison; math_verify: sympy equivalence; "
        "reasoning_gym: the task's own scorer.",
        choices=("exact_match", "math_verify", "reasoning_gym"),
    )
    correct: float = setting(1.0, "Reward of a right answer.")
    incorrect: float = setting(-1.0, "Reward of a wrong answer, and of one that could not be judged.")
    overlong_buffer: OverlongBufferConfig = section(OverlongBufferConfig)
    workers: int = setting(8, "Verifier processes.", minimum=1)
    timeout_s: float = setting(
        10.0, "Longest judgement of one response; then its process is killed and it counts as failed.", above=0
    )


@dataclass
class ValidationConfig:
    """Accuracy on held-out problems: avg@k, cons@k, pass@k."""

    every: int = setting(
        5, "Validate after this many steps, and before the first and after the last; 0 is never.", minimum=0
    )
    samples: int = setting(32, "Responses a problem: k.", minimum=1)
    temperature: float = setting(1.0, "Sampling temperature; 0 is greedy.", minimum=0)
    top_p: float = setting(0.7, "Nucleus.", above=0, maximum=1)


@dataclass
class CheckpointConfig:
    """When the run's state is saved."""

    every: int = setting(5, "Save after this many steps, and after the last; 0 is never.", minimum=0)
    keep: int = setting(2, "Newest checkpoints to keep; 0 keeps all.", minimum=0)


@dataclass
class TrackingConfig:
    """What the run writes down besides metrics.jsonl and summary.json, which it always writes."""

    tensorboard: bool = setting(True, "Write TensorBoard event files.")
    samples_per_step: int = setting(8, "Rollouts kept a step as readable text, with their rewards.", minimum=0)


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


@dataclass
class Config:
    """One run. Groups of conf/ fill the sections; an experiment picks the groups and overrides single keys."""

    run: RunConfig = section(RunConfig)
    model: ModelConfig = section(ModelConfig)
    parallel: ParallelConfig = section(ParallelConfig)
    algorithm: AlgorithmConfig = section(AlgorithmConfig)
    optimizer: OptimizerConfig = section(OptimizerConfig)
    rollout: RolloutConfig = section(RolloutConfig)
    data: DataConfig = section(DataConfig)
    reward: RewardConfig = section(RewardConfig)
    validation: ValidationConfig = section(ValidationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
    tracking: TrackingConfig = section(TrackingConfig)
    cluster: ClusterConfig = section(ClusterConfig)
    hardware: HardwareConfig = section(HardwareConfig)


def sections(kind: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each section of the schema, such as "algorithm.filter_groups", with its dataclass, outer ones first."""
    for entry in fields(kind):
        for nested in (entry.type, *get_args(entry.type)):
            if is_dataclass(nested):
                yield f"{prefix}{entry.name}", nested
                yield from sections(nested, f"{prefix}{entry.name}.")


def every_setting() -> Iterator[tuple[str, Field]]:
    """Each key of the schema, such as "run.steps", with its dataclass field; sections themselves are left out."""
    nested = dict(sections())
    for name, kind in nested.items():
        yield from ((f"{name}.{entry.name}", entry) for entry in fields(kind) if f"{name}.{entry.name}" not in nested)
