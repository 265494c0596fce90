"""Check a configuration before anything heavy is imported: ranges first, then combinations, then this machine's files.

A configuration that cannot run raises ConfigError with the key and what would be right. A configuration that can run
but is probably a mistake causes a warning.
"""

import contextlib
import ipaddress
import math
import re
from collections.abc import Iterator

from megatron_fipo.config import LOSS_SETTINGS, AlgorithmConfig, Config
from megatron_fipo.config.agreement import agreement_limits
from megatron_fipo.config.algorithm_names import label
from megatron_fipo.config.checks_data import data
from megatron_fipo.config.checks_environment import environment
from megatron_fipo.config.checks_experts import check_expert_ranks, experts
from megatron_fipo.config.checks_here import check_here
from megatron_fipo.config.checks_overlap import overlap
from megatron_fipo.config.checks_precision import precision
from megatron_fipo.config.checks_reward import reward
from megatron_fipo.config.checks_tracking import tracking
from megatron_fipo.config.checks_values import check_values
from megatron_fipo.config.servers import job_starts_servers, servers_on_every_node
from megatron_fipo.errors import ConfigError
from megatron_fipo.models.keys import shown
from megatron_fipo.plugins import check_form

_LOOPBACK = re.compile(r"https?://(localhost|127\.[0-9.]+|\[::1\]):[0-9]+/?")
_ADDRESS = re.compile(r"https?://[^\s/:]+:([0-9]{1,5})/?|https?://\[([0-9a-fA-F:]+)\]:([0-9]{1,5})/?")
_LAST_PORT = 65535


def check_evaluation(config: Config) -> list[str]:
    """Do the part of `check` that concerns sampling and judging validation problems, without this machine's files."""
    check_values(config)
    warnings = [*_service(config), *data(config, trains=False), *environment(config), *reward(config)]
    _check_servers(config)
    return warnings


def check(
    config: Config, *, world_size: int | None = None, local: bool = True, on_login_node: bool = False
) -> list[str]:
    """Raise ConfigError if `config` cannot run. Return a warning for each setting that is probably a mistake.

    `world_size` is the number of ranks, if it is known. `local` also checks what must be on this machine: the model
    directory, the problem files, servers to sample from and their token. A login node need not have GPUs.
    """
    check_values(config)
    judges = (
        _layout,
        experts,
        precision,
        _batches,
        _algorithm,
        overlap,
        _sampling,
        _service,
        data,
        environment,
        reward,
        tracking,
        _schedule,
    )
    warnings = [warning for judge in judges for warning in judge(config)]
    _check_world(config, world_size)
    if local:
        _check_servers(config)
        warnings += check_here(config, on_login_node=on_login_node)
    return warnings


def _layout(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.virtual_pipeline is not None and parallel.pipeline == 1:
        raise ConfigError(
            "parallel.virtual_pipeline",
            f"{parallel.virtual_pipeline} chunks per stage need a pipeline",
            "parallel.pipeline=2 or more, or parallel.virtual_pipeline=null",
        )
    if parallel.sequence and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence",
            "works inside a tensor-parallel group",
            "parallel.tensor=2 or more, or parallel.sequence=false",
        )
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        raise ConfigError(
            "parallel.overlap_param_gather",
            "needs the distributed optimizer and overlapped reduction of gradients",
            "parallel.distributed_optimizer=true parallel.overlap_grad_reduce=true, or "
            "parallel.overlap_param_gather=false",
        )
    yield from ()


def _check_world(config: Config, world_size: int | None) -> None:
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    product = f"tensor {parallel.tensor} × pipeline {parallel.pipeline} × context {parallel.context}"
    if world_size is not None and world_size % replica:
        raise ConfigError(
            "parallel", f"{world_size} processes are not a multiple of {replica} = {product}", "change one of them"
        )
    if world_size is not None and parallel.data is not None and world_size != replica * parallel.data:
        raise ConfigError(
            "parallel.data",
            f"{product} × data {parallel.data} is {replica * parallel.data}, but {world_size} processes were started",
            f"parallel.data=null or {world_size // replica}",
        )
    data = parallel.data or (world_size // replica if world_size else 1)
    samples = config.algorithm.mini_batch_prompts * config.algorithm.samples_per_prompt
    if samples < data:
        raise ConfigError(
            "algorithm.mini_batch_prompts",
            f"{samples} samples per update are too few for {data} data-parallel ranks",
            "a larger mini-batch or fewer ranks",
        )
    if world_size is not None or parallel.data is not None:
        check_expert_ranks(config, data)


def _batches(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    if algorithm.prompts_per_step % algorithm.mini_batch_prompts:
        raise ConfigError(
            "algorithm.mini_batch_prompts",
            f"{algorithm.mini_batch_prompts} does not divide prompts_per_step {algorithm.prompts_per_step}",
            f"a divisor, such as {math.gcd(algorithm.prompts_per_step, algorithm.mini_batch_prompts)}",
        )
    batch = algorithm.generation_batch_prompts
    if batch is None:
        return
    filtering = algorithm.filter_groups
    if not filtering.enable:
        yield (
            "algorithm.generation_batch_prompts is not used: without dynamic sampling a step samples exactly its "
            f"{algorithm.prompts_per_step} prompts"
        )
        return
    if batch * filtering.max_num_gen_batches < algorithm.prompts_per_step:
        raise ConfigError(
            "algorithm.generation_batch_prompts",
            f"{filtering.max_num_gen_batches} batches of {batch} can never fill a step of {algorithm.prompts_per_step}",
            f"at least {math.ceil(algorithm.prompts_per_step / filtering.max_num_gen_batches)}",
        )


def _algorithm(config: Config) -> Iterator[str]:
    algorithm = config.algorithm
    _check_loss_settings(algorithm)
    yield from label(algorithm)
    future_kl = algorithm.future_kl
    if future_kl is None:
        return
    if not future_kl.band_low <= 1 <= future_kl.band_high:
        raise ConfigError(
            "algorithm.future_kl.band_low",
            f"the band [{future_kl.band_low:g}, {future_kl.band_high:g}] does not contain 1, an unchanged policy's "
            "weight",
            "bounds around 1, such as [0.8, 1.2]; give the bounds themselves, not their distances from 1",
        )
    if algorithm.prompts_per_step == algorithm.mini_batch_prompts:
        yield (
            "algorithm.mini_batch_prompts: with one update per step every ratio is 1 and so is every influence weight: "
            "this FIPO is DAPO; make mini_batch_prompts smaller than prompts_per_step"
        )


def _check_loss_settings(algorithm: AlgorithmConfig) -> None:
    """Check that a loss's settings are set and the others null. A user's own loss may read any setting."""
    if algorithm.loss is None:
        _check_shipped_loss(algorithm)
    else:
        check_form(algorithm.loss, "algorithm.loss")
    by_constant = algorithm.loss_agg_mode == "seq-mean-token-sum-norm"
    if by_constant != (algorithm.loss_scale_factor is not None):
        raise ConfigError(
            "algorithm.loss_scale_factor",
            f"is {algorithm.loss_scale_factor}, but loss_agg_mode is {algorithm.loss_agg_mode}",
            "a length in tokens" if by_constant else "null, or algorithm.loss_agg_mode=seq-mean-token-sum-norm",
        )
    bounds = algorithm.is_bounds
    if bounds is not None and not (len(bounds) == 2 and 0 <= bounds[0] < 1 < bounds[1]):
        raise ConfigError("algorithm.is_bounds", f"is {bounds}", "[low, high] with low < 1 < high, such as [0.5,5]")


def _check_shipped_loss(algorithm: AlgorithmConfig) -> None:
    mode = algorithm.loss_mode
    if algorithm.loss_options:
        raise ConfigError(
            "algorithm.loss_options", f"is not read by loss_mode {mode}", "algorithm.loss names a loss of your own"
        )
    example = {"future_kl": "fipo", "vanilla": "dapo"}.get(mode, mode)
    for name in sorted({name for names in LOSS_SETTINGS.values() for name in names}, key="future_kl".__ne__):
        key, value, is_read = f"algorithm.{name}", getattr(algorithm, name), name in LOSS_SETTINGS[mode]
        if is_read and value is None:
            raise ConfigError(key, f"is null, but loss_mode {mode} reads it", f"algorithm={example} sets both")
        if not is_read and value is not None:
            readers = [other for other, names in LOSS_SETTINGS.items() if name in names]
            raise ConfigError(
                key,
                f"is set, but loss_mode {mode} does not read it",
                f"{key}=null, or algorithm.loss_mode={' or '.join(readers)}; algorithm={example} is a whole choice",
            )


def _sampling(config: Config) -> Iterator[str]:
    rollout = config.rollout
    cut = f"rollout.top_p={rollout.top_p:g}" if rollout.top_p < 1 else f"rollout.top_k={rollout.top_k}"
    if rollout.top_p < 1 or rollout.top_k > 0:
        if rollout.logprobs_mode != "raw_logprobs":
            raise ConfigError(
                "rollout.logprobs_mode",
                f"processed_logprobs with {cut} are renormalised over the kept tokens, which the trainer cannot "
                "reproduce",
                "rollout.logprobs_mode=raw_logprobs, or rollout.top_p=1 rollout.top_k=-1",
            )
        if rollout.temperature != 1:
            raise ConfigError(
                "rollout.temperature",
                f"{rollout.temperature:g} with {cut}: no log-prob mode of the engine then matches the trainer's",
                "rollout.temperature=1, or rollout.top_p=1 rollout.top_k=-1",
            )
        yield f"{cut.replace('=', ': ')} samples from fewer tokens than the trained policy: the gradient is biased"
    elif rollout.temperature != 1 and rollout.logprobs_mode != "processed_logprobs":
        raise ConfigError(
            "rollout.logprobs_mode",
            f"raw_logprobs ignore the temperature {rollout.temperature:g}, but the trainer divides its logits by it",
            "rollout.logprobs_mode=processed_logprobs, or rollout.temperature=1",
        )
    agreement_limits(config)
    if rollout.top_k == 0:
        raise ConfigError("rollout.top_k", "0 keeps no token", "-1 turns top-k off")
    if config.validation.temperature == 0 and config.validation.samples > 1:
        yield "validation.samples: with temperature 0 all samples of a problem are the same; 1 is enough"


def _service(config: Config) -> Iterator[str]:
    rollout = config.rollout
    _check_host(rollout.host)
    _check_rollout_nodes(config)
    _check_shared_gpu(config)
    if rollout.servers and rollout.addresses:
        raise ConfigError(
            "rollout.servers",
            "the run would start servers beside those of rollout.addresses",
            "rollout.servers=0, or no addresses",
        )
    if not job_starts_servers(config):
        _check_servers(config)
    for address in rollout.addresses:
        if not _is_address(address):
            remedy = f"http://HOST:PORT with a port from 1 to {_LAST_PORT}"
            raise ConfigError("rollout.addresses", f"{shown(address)} is not a server's address", remedy)
        # With shared_gpu there is a sender beside each engine.
        local = rollout.weight_transfer != "process_group" and not rollout.shared_gpu
        if local and not _LOOPBACK.fullmatch(address):
            raise ConfigError(
                "rollout.weight_transfer",
                f"{rollout.weight_transfer} does not reach {address} on another machine",
                "rollout.weight_transfer=process_group",
            )
    if len(set(rollout.addresses)) < len(rollout.addresses):
        raise ConfigError("rollout.addresses", "one server is listed twice", "each server once")
    if rollout.weight_transfer == "cuda_ipc" and not rollout.shared_gpu:
        raise ConfigError(
            "rollout.shared_gpu",
            "is off, so the servers have their own GPUs, which cuda_ipc cannot reach",
            "rollout.shared_gpu=true, or rollout.weight_transfer=process_group",
        )
    if rollout.quantization:
        for key, dtype in (("rollout.dtype", rollout.dtype), ("model.dtype", config.model.dtype)):
            if dtype != "bfloat16":
                raise ConfigError(
                    key,
                    f"is {dtype}, but rollout.quantization={rollout.quantization} starts from bfloat16 weights",
                    f"{key}=bfloat16, or rollout.quantization=null",
                )
        yield (
            f"rollout.quantization: {rollout.quantization} samples from a coarser policy than the trained one "
            "(log_prob_diff_mean shows by how much); algorithm.tis_cap corrects for it"
        )


def _is_address(text: str) -> bool:
    """Return whether `text` has the form of a server's URL."""
    found = _ADDRESS.fullmatch(text)
    if found is None or not 0 < int(found[1] or found[3]) <= _LAST_PORT:
        return False
    with contextlib.suppress(ValueError):
        return found[2] is None or bool(ipaddress.IPv6Address(found[2]))
    return False


def _check_host(host: str) -> None:
    remedy = "one address of this machine, such as 127.0.0.1"
    try:
        address = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
    except ValueError:
        raise ConfigError("rollout.host", f"{shown(host)} is not an IP address", remedy) from None
    address = getattr(address, "ipv4_mapped", None) or address  # ::ffff:0.0.0.0 means all addresses too
    if address.is_unspecified or address.is_multicast or address == ipaddress.IPv4Address("255.255.255.255"):
        raise ConfigError("rollout.host", f"{host} is not a single address of a machine", remedy)


def _check_rollout_nodes(config: Config) -> None:
    cluster, width = config.cluster, config.rollout.tensor_parallel
    if job_starts_servers(config) and width > cluster.gpus_per_node:
        raise ConfigError(
            "rollout.tensor_parallel",
            f"a server of {width} GPUs does not fit on a node of {cluster.gpus_per_node}",
            f"rollout.tensor_parallel={cluster.gpus_per_node} or fewer",
        )


def _check_shared_gpu(config: Config) -> None:
    rollout = config.rollout
    if not rollout.shared_gpu:
        return
    if config.cluster.rollout_nodes:
        raise ConfigError(
            "rollout.shared_gpu",
            f"the servers of cluster.rollout_nodes={config.cluster.rollout_nodes} have nodes of their own",
            "cluster.rollout_nodes=0, or rollout.shared_gpu=false",
        )
    if rollout.weight_transfer == "process_group":
        raise ConfigError(
            "rollout.weight_transfer",
            "process_group is NCCL, which cannot connect two processes on one GPU",
            "rollout.weight_transfer=cuda_ipc or shared_memory, or rollout.shared_gpu=false",
        )


def _schedule(config: Config) -> Iterator[str]:
    optimizer = config.optimizer
    for key, beta in (("optimizer.beta1", optimizer.beta1), ("optimizer.beta2", optimizer.beta2)):
        if beta == 1:
            raise ConfigError(key, "with 1 the average never changes", "below 1")
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            "optimizer.min_lr", f"{optimizer.min_lr:g} is above optimizer.lr {optimizer.lr:g}", "at most lr"
        )
    saves = config.checkpoint
    if saves.huggingface_every and (saves.every == 0 or saves.huggingface_every % saves.every):
        raise ConfigError(
            "checkpoint.huggingface_every",
            f"{saves.huggingface_every} is not a multiple of checkpoint.every={saves.every}, and so has no checkpoints",
            f"a multiple of {saves.every}, or 0" if saves.every else "0, or a checkpoint.every above 0",
        )
    updates = config.run.steps * (config.algorithm.prompts_per_step // config.algorithm.mini_batch_prompts)
    if 0 < updates <= optimizer.warmup_updates:
        yield (
            f"optimizer.warmup_updates: warm-up takes {optimizer.warmup_updates} updates, but the run has only "
            f"{updates}: the learning rate does not stay at {optimizer.lr:g}"
        )


def _check_servers(config: Config) -> None:
    if not config.rollout.servers and not config.rollout.addresses:
        only_in_a_job = ": those on every node of the trainer are started by a Slurm job's script"
        raise ConfigError(
            "rollout.addresses",
            f"there is no server to sample from{only_in_a_job if servers_on_every_node(config) else ''}",
            "rollout.servers=1 starts one here, with rollout.shared_gpu=true on the trainer's GPUs; "
            "rollout.addresses=[http://HOST:PORT] uses running ones; on a cluster cluster.rollout_nodes=1 or more, or "
            "rollout=colocated",
        )
