"""Section of the schema: the vLLM service."""

from dataclasses import dataclass

from megatron_fipo.config.settings import LONGEST_WAIT_S, setting


@dataclass
class RolloutConfig:
    """The vLLM service: servers that the run starts, or addresses of running ones, and how they sample."""

    servers: int = setting(
        1,
        "vLLM servers that the run starts on this machine; 0 with rollout.addresses. With rollout.shared_gpu and no "
        "addresses, 0 has a Slurm job start as many servers as fit on every node of the trainer.",
        minimum=0,
        maximum=1024,
    )
    addresses: list[str] = setting(
        [], "Addresses of running servers: http://host:port. Their token is read from FIPO_ROLLOUT_TOKEN."
    )
    host: str = setting(
        "127.0.0.1", "IP address that the started servers bind to. An address that means all interfaces is refused."
    )
    tensor_parallel: int = setting(1, "Tensor-parallel size of one server.", minimum=1, maximum=1024)
    expert_parallel: bool = setting(
        False,
        "Deal the experts of a model to a server's tensor-parallel ranks, whole, instead of giving each rank a part of "
        "every expert (vLLM's --enable-expert-parallel).",
    )
    dtype: str = setting("bfloat16", "Type of the engine's weights.", choices=("float32", "bfloat16"))
    quantization: str | None = setting(
        None,
        "FP8 format in which the engine keeps linear layers. It quantises the bfloat16 weights that it receives, "
        "when it starts and in each update. null: off. model.fp8 sets the trainer's precision.",
        choices=("fp8_per_channel", "fp8_per_tensor", "fp8_per_block"),
    )
    max_prompt_length: int = setting(
        2048,
        "Longest prompt in tokens. data.overlong_prompts says what happens to longer prompts.",
        minimum=1,
        maximum=10**9,
    )
    max_response_length: int = setting(20480, "Longest response in tokens.", minimum=1, maximum=10**9)
    max_off_policy_steps: int = setting(
        0,
        "k: how many steps old the weights may be under which a prompt was begun when it is trained on. 0: sampling "
        "and training take turns. 1 or more: both go on at the same time, and algorithm.tis_cap is required. See "
        "docs/overlap.md.",
        minimum=0,
        maximum=64,
    )
    temperature: float = setting(1.0, "Sampling temperature in training.", minimum=0.01, maximum=100)
    top_p: float = setting(1.0, "Nucleus (top-p) of training samples.", above=0, maximum=1)
    top_k: int = setting(-1, "Top-k of training samples; -1: off.", minimum=-1, maximum=10**9)
    logprobs_mode: str = setting(
        "raw_logprobs",
        "Which log-probs the engine returns. raw_logprobs: log_softmax(logits); processed_logprobs: after "
        "temperature and top-p.",
        choices=("raw_logprobs", "processed_logprobs"),
    )
    log_prob_diff_warn: float | None = setting(
        None,
        "Mean absolute difference between the log-probs of trainer and engine, in nats per token, above which a run "
        "warns once. null: 0.001 if both use float32, 0.15 if one uses FP8, else 0.06.",
        above=0,
        maximum=1000,
    )
    log_prob_diff_stop: float | None = setting(
        None,
        "The same difference, above which a run stops in its first step or in the first step after a resume: some "
        "weight or the architecture must be wrong. null: 0.05 with float32, 0.6 with FP8, else 0.3.",
        above=0,
        maximum=1000,
    )
    max_num_seqs: int = setting(
        256, "Largest number of sequences that one server samples at the same time.", minimum=1, maximum=10**5
    )
    gpu_memory_utilization: float = setting(0.85, "Share of a GPU's memory that one server uses.", above=0, maximum=1)
    shared_gpu: bool = setting(
        False,
        "Sample on the trainer's own GPUs: the servers sleep while the policy is updated. Set gpu_memory_utilization "
        "to the share that the trainer's weights, gradients and optimizer leave free. See docs/gpu.md.",
    )
    cpu_kv_cache_gib: int = setting(1, "KV cache of a server on CPU, in GiB.", minimum=1, maximum=10**5)
    cpu_threads: int = setting(1, "Compute threads of a server on CPU.", minimum=1, maximum=1024)
    enforce_eager: bool = setting(False, "Run the engine without CUDA graphs or compilation.")
    weight_transfer: str = setting(
        "process_group",
        "How weights are sent to the engines. process_group: NCCL, or gloo on CPU; shared_memory: files in /dev/shm, "
        "on one machine, or with rollout.shared_gpu on each; cuda_ipc: memory of the GPUs that the trainer and its "
        "servers share.",
        choices=("process_group", "shared_memory", "cuda_ipc"),
    )
    bucket_mib: int = setting(
        512,
        "Size of one bucket of a weight update, in MiB. A larger tensor gets its own bucket.",
        minimum=1,
        maximum=10**6,
    )
    start_timeout_s: float = setting(
        900.0, "Time limit for the start of a server, in seconds.", minimum=1, maximum=LONGEST_WAIT_S
    )
    request_timeout_s: float = setting(
        3600.0, "Time limit for generating one group, in seconds.", minimum=1, maximum=LONGEST_WAIT_S
    )
    stream_tokens: int = setting(
        2048,
        "A long response is sent in parts of this many tokens. If its server is lost, another server continues after "
        "the last part.",
        minimum=1,
        maximum=10**6,
    )
    update_timeout_s: float = setting(
        600.0, "Time limit for a weight update, in seconds.", minimum=1, maximum=LONGEST_WAIT_S
    )
    hang_timeout_s: float = setting(
        300.0,
        "If an engine that should be sampling produces nothing for this long, in seconds, it counts as lost.",
        minimum=1,
        maximum=LONGEST_WAIT_S,
    )
    max_restarts: int = setting(
        3,
        "How many times in a row a lost server is restarted or taken back without completing a step in between. After "
        "that, another loss ends the run; a server of rollout.addresses is excluded instead.",
        minimum=0,
        maximum=10**6,
    )
    kv_on_update: str = setting(
        "recompute",
        "What happens to the KV cache of requests that are running during a weight update. recompute: it is computed "
        "again with the new weights. keep: it is kept, which costs nothing, but later tokens are then sampled by the "
        "new weights from keys and values of the old ones. In both cases, later requests do not use prefixes that "
        "were cached under old weights.",
        choices=("recompute", "keep"),
    )
    checksum_every: int = setting(
        10,
        "Compare checksums of every tensor sent and received, in the weight updates of steps that are a multiple of "
        "this number, including step 0. A difference ends the run. 0: never.",
        minimum=0,
        maximum=10**9,
    )
