"""Seconds of a training step by phase, from arithmetic and the hardware's published rates.

This is an estimate, for comparing layouts and choosing the size of a job. Its constants come from updates on one H200,
and it is within 15 % of these measurements (docs/gpu.md). Rates that were not measured, such as those of networks, are
in the section `hardware`. Responses are assumed to have half the maximum length, as at the end of the published FIPO
run (10,970 of 20,480 tokens).
"""

import math
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.config.servers import job_starts_servers, servers_per_node
from megatron_fipo.models.costs import (
    active_parameters,
    attended_tokens,
    attention_operations,
    expert_parameters,
    layer_products,
    parameter_counts,
    products,
)
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.sizing.experts import WeightsRead, dispatch_s, load, mean_held, replicas, weights_traffic
from megatron_fipo.sizing.memory import (
    GIB,
    layer_bytes_per_token,
    longest_sequence,
    micro_batches,
    server_weights,
)

MEAN_SHARE = 0.5
"""Mean length of responses, relative to the maximum."""
KEPT_SHARE = 0.5
"""Share of groups that dynamic sampling keeps: those whose samples differ in accuracy."""
_TRAFFIC = 1.9
"""Memory traffic of each third of an update, as a multiple of the bytes that a layer keeps for the backward pass."""
_LAUNCH_S = 0.0024
"""CPU time to launch kernels, per third of an update, layer and micro-batch. A GPU waits for it if layers are small."""
_FP8_EFFICIENCY = 0.76
"""Efficiency of FP8 products relative to that of bf16 products. Quantising takes time."""
_ATTENTION_HEAD = 128
"""Head size at which attention is as efficient as matrix products. With half the size it is half as efficient."""
_ENGINE_OVERHEAD_S = 0.004
"""Fixed time of one decoding step of vLLM: launches, sampling, scheduling."""
_SMALL_ALL_REDUCE_S = 10e-6
"""Time of an all-reduce of few bytes between an engine's GPUs. Assumed, not measured."""
_RECEIVE_SAMPLE_S, _RECEIVE_TOKEN_S = 150e-6, 13e-9
"""CPU time of the rollout process for a sample, and for each of its tokens (benchmarks/README.md)."""


@dataclass
class StepTime:
    """Seconds of one step, without validation and checkpoints."""

    sample: float
    log_probs: float
    update: float
    weights: float
    bubble: float
    """Share of an update in which a pipeline stage waits for other stages."""
    micro_batches: int
    """Micro-batches per update on each rank."""
    whole_sample: float
    """Seconds of sampling all generation batches of a step if no groups are left over from the last step."""
    overlaps: bool
    """Whether engines sample while the trainer works (rollout.max_off_policy_steps)."""
    turns: float = 0.0
    """Seconds of copies between GPUs and their hosts, where trainer and engines use the GPUs in turns."""

    @property
    def trainer(self) -> float:
        """Seconds of the step in which the trainer works."""
        return self.log_probs + self.update + self.weights + self.turns

    @property
    def total(self) -> float:
        """Seconds of the step: the phases follow one another, or sampling is hidden behind the trainer's."""
        if self.overlaps:
            return max(self.sample, self.log_probs + self.update) + self.weights
        return self.sample + self.trainer

    @property
    def longest(self) -> float:
        """Seconds that a job needs to stop before its limit: of a step that samples whole generation batches.

        Where sampling overlaps, a stop waits for no sample.
        """
        return self.trainer if self.overlaps else self.whole_sample + self.trainer


@dataclass(frozen=True)
class TrainerTime:
    """Seconds of the trainer for one step's tokens."""

    log_probs: float
    update: float
    bubble: float
    """As StepTime has it."""
    micro_batches: int


@dataclass(frozen=True)
class EngineCosts:
    """What one rollout server reads and computes for each decoding step, and what its cache holds."""

    weights: WeightsRead
    """Bytes on each of its GPUs."""
    token_bytes: float
    """Keys and values of one token, on each of its GPUs."""
    cache_tokens: float
    bandwidth: float
    """Bytes per second that are reached."""
    token_flops_s: float
    """Seconds of products for one token."""
    step_s: float
    """Seconds that each decoding step takes whatever its size."""
    token_sent_s: float
    """Seconds in which one token's activations cross between its GPUs."""

    def decode_s(self, batch: float, held: float) -> float:
        """Seconds of a decoding step of `batch` sequences, whose caches hold `held` tokens in all."""
        read = self.weights.by_batch(batch) + held * self.token_bytes
        return max(read / self.bandwidth, self.token_flops_s * batch) + self.step_s + self.token_sent_s * batch

    def prefill_s(self, tokens: float) -> float:
        """Seconds of products for a context of so many tokens."""
        return (self.token_flops_s + self.token_sent_s) * tokens


def step_time(config: Config, model_config: ModelConfig, data_parallel_size: int) -> StepTime:
    """Estimate a step of the run on `config.hardware` and `config.cluster`."""
    algorithm, mean = config.algorithm, MEAN_SHARE * longest_sequence(config)
    tokens = algorithm.prompts_per_step * algorithm.samples_per_prompt * mean
    trainer = trainer_time(config, model_config, data_parallel_size, tokens, mean)
    return StepTime(
        sample=_sample_s(config, model_config, _sampled_prompts(config)),
        log_probs=trainer.log_probs,
        update=trainer.update,
        weights=weight_sync_s(config, model_config),
        bubble=trainer.bubble,
        micro_batches=trainer.micro_batches,
        whole_sample=_sample_s(config, model_config, _whole_batches_prompts(config)),
        overlaps=config.rollout.max_off_policy_steps > 0,
    )


def trainer_time(
    config: Config, model_config: ModelConfig, data_parallel_size: int, tokens: float, mean: float
) -> TrainerTime:
    """Log-probs and updates of a step over `tokens` tokens, in sequences of `mean` tokens."""
    algorithm, parallel = config.algorithm, config.parallel
    count = micro_batches(config, data_parallel_size, mean)
    bubble_share = (parallel.pipeline - 1) / (count * (parallel.virtual_pipeline or 1))
    forward = forward_s(config, model_config, tokens, data_parallel_size, mean)
    passes = 4 if config.model.recompute == "full" else 3
    updates = algorithm.prompts_per_step // algorithm.mini_batch_prompts
    return TrainerTime(
        log_probs=forward * (1 + bubble_share),
        update=passes * forward * (1 + bubble_share) + updates * _reduce_s(config, model_config, data_parallel_size),
        bubble=bubble_share / (1 + bubble_share),
        micro_batches=count,
    )


def model_bytes(config: Config, model_config: ModelConfig) -> int:
    """Return the bytes of the whole model as it is sent to the rollout service."""
    return parameter_counts(model_config)[0] * (2 if config.model.dtype == "bfloat16" else 4)


def weight_sync_s(config: Config, model_config: ModelConfig) -> float:
    """Return the seconds of a weight update. Stages send one after the other, and each sends to all engines at once."""
    size, hardware = model_bytes(config, model_config), config.hardware
    of_experts = size * expert_parameters(model_config) / parameter_counts(model_config)[0]
    gathered = (size - of_experts) * (config.parallel.tensor > 1) + of_experts * (config.parallel.expert_tensor > 1)
    gather = gathered / (hardware.node_gb_s * 1e9)
    return (gather + size / (hardware.network_gb_s * 1e9)) / hardware.bandwidth_efficiency


def forward_s(
    config: Config, model_config: ModelConfig, tokens: float, data_parallel_size: int, length: float
) -> float:
    """Return the seconds of a forward pass over `tokens` tokens in sequences of `length` tokens, without bubble.

    It is a third of a forward and backward pass. The GPU computes while the CPU launches the next kernels, so the
    slower of the two counts.
    """
    parallel, hardware = config.parallel, config.hardware
    ranks = parallel.tensor * parallel.pipeline * parallel.context * data_parallel_size
    layers = model_config.num_layers / parallel.pipeline
    tokens_of_rank = tokens / (data_parallel_size * parallel.context)
    compute = tokens / ranks * _products_s(config, model_config, length)
    kept = tokens_of_rank * layers * layer_bytes_per_token(config, model_config)
    passes = tokens_of_rank / parallel.micro_batch_tokens
    moved = _TRAFFIC * kept + passes * weights_traffic(config, model_config)
    memory = moved / (hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency)
    launches = _LAUNCH_S * layers * passes
    return max(compute + memory, launches) + _communication_s(config, model_config, tokens_of_rank)


def _products_s(config: Config, model_config: ModelConfig, length: float) -> float:
    """Return the seconds of one GPU for a token's matrix products and attention, forward."""
    hardware, layer = config.hardware, layer_products(model_config)
    # The first and the last layer stay in bf16, except with the recipe that treats all layers alike.
    in_fp8 = {"off": 0, "delayed": model_config.num_layers}.get(config.model.fp8, max(0, model_config.num_layers - 2))
    in_bf16 = float(products(model_config) - in_fp8 * layer)
    if model_config.experts is not None:
        # Ranks wait for the one whose experts have most tokens.
        share = expert_parameters(model_config) / model_config.experts.number * model_config.experts.per_token
        in_bf16 += (load(config) - 1) * share
    attended = attention_operations(model_config, attended_tokens(model_config, length))
    attention = attended / min(1.0, model_config.head_dim / _ATTENTION_HEAD)
    seconds = (2 * in_bf16 + attention) / (hardware.bf16_tflops * 1e12)
    if hardware.fp8_tflops is not None:  # otherwise nothing is in FP8: estimate() has refused it
        seconds += 2 * in_fp8 * layer / (hardware.fp8_tflops * 1e12 * _FP8_EFFICIENCY)
    return seconds / hardware.compute_efficiency


def _communication_s(config: Config, model_config: ModelConfig, tokens_of_rank: float) -> float:
    """Return the seconds of communication for tensor and context parallelism in a forward pass."""
    parallel, hardware = config.parallel, config.hardware
    width = 2 if config.model.dtype == "bfloat16" else 4
    layers = model_config.num_layers / parallel.pipeline
    # Two all-reduces per layer, or the all-gathers and reduce-scatters of which they consist.
    sent = 4 * tokens_of_rank * layers * model_config.hidden_size * width * (parallel.tensor - 1) / parallel.tensor
    inside = hardware.node_gb_s if parallel.tensor <= config.cluster.gpus_per_node else hardware.network_gb_s
    gathered = 2 * tokens_of_rank * layers * model_config.dimension("key_value") * width / parallel.tensor
    gathered *= parallel.context - 1
    across = parallel.tensor * parallel.context <= config.cluster.gpus_per_node
    context_gb_s = hardware.node_gb_s if across else hardware.network_gb_s
    seconds = (sent / (inside * 1e9) + gathered / (context_gb_s * 1e9)) / hardware.bandwidth_efficiency
    return seconds + dispatch_s(config, model_config, tokens_of_rank)


def _reduce_s(config: Config, model_config: ModelConfig, data_parallel_size: int) -> float:
    """Return the seconds of one update's gradient reduction (fp32) and gathering of new weights."""
    parallel, hardware = config.parallel, config.hardware
    width = 2 if config.model.dtype == "bfloat16" else 4
    sent = sum(
        held * (4 + width) * (same - 1) / same
        for held, same in zip(mean_held(config, model_config), replicas(parallel, data_parallel_size), strict=True)
    )
    ranks = parallel.tensor * parallel.pipeline * parallel.context * data_parallel_size
    gb_s = hardware.node_gb_s if ranks <= config.cluster.gpus_per_node else hardware.network_gb_s
    return sent / (gb_s * 1e9 * hardware.bandwidth_efficiency)


def rollout_servers(config: Config) -> int:
    """Return the number of vLLM servers: as many as fit on their nodes, or those that the run starts itself."""
    if job_starts_servers(config):
        return (config.cluster.rollout_nodes or config.cluster.trainer_nodes) * servers_per_node(config)
    return max(1, config.rollout.servers or len(config.rollout.addresses))


def rollout_process_s(samples: float, tokens: float) -> float:
    """Return the CPU seconds in which the rollout process, beside rank 0, receives so many samples of so many tokens.

    It does all of it on one core while engines sample, so a step cannot be shorter.
    """
    return samples * _RECEIVE_SAMPLE_S + tokens * _RECEIVE_TOKEN_S


def _sampled_prompts(config: Config) -> float:
    """Return the mean number of prompts sampled per step. A surplus that is carried over is not sampled again."""
    filtered = config.algorithm.filter_groups
    if filtered.enable and filtered.surplus == "carry":
        return config.algorithm.prompts_per_step / KEPT_SHARE
    return _whole_batches_prompts(config)


def _whole_batches_prompts(config: Config) -> int:
    """Return the prompts of the generation batches that fill a step if nothing is left over from the last step."""
    algorithm = config.algorithm
    if not algorithm.filter_groups.enable:
        return algorithm.prompts_per_step
    batch = algorithm.generation_batch_prompts or algorithm.prompts_per_step
    return math.ceil(algorithm.prompts_per_step / KEPT_SHARE / batch) * batch


def engine_costs(config: Config, model_config: ModelConfig) -> EngineCosts:
    """Return the costs of one rollout server on `config.hardware`."""
    rollout, hardware = config.rollout, config.hardware
    width = 2 if rollout.dtype == "bfloat16" else 4
    token_bytes = 2 * model_config.num_layers * model_config.dimension("key_value") * width / rollout.tensor_parallel
    weights = server_weights(config, model_config)
    of_experts = weights * expert_parameters(model_config) / parameter_counts(model_config)[0]
    experts, active = model_config.experts, active_parameters(model_config) / rollout.tensor_parallel
    free = max(hardware.memory_gib * GIB * rollout.gpu_memory_utilization - weights, token_bytes)
    # Two all-reduces per layer, of which each GPU sends and receives all but its part twice.
    reduces, others = 2 * model_config.num_layers, rollout.tensor_parallel - 1
    sent = reduces * 2 * model_config.hidden_size * width * others / rollout.tensor_parallel
    return EngineCosts(
        weights=WeightsRead(weights - of_experts, of_experts, experts.per_token / experts.number if experts else 1.0),
        token_bytes=token_bytes,
        cache_tokens=free / token_bytes,
        bandwidth=hardware.memory_gb_s * 1e9 * hardware.bandwidth_efficiency,
        token_flops_s=2 * active / (hardware.bf16_tflops * 1e12 * hardware.compute_efficiency),
        step_s=_ENGINE_OVERHEAD_S + (reduces * _SMALL_ALL_REDUCE_S if others else 0.0),
        token_sent_s=sent / (hardware.node_gb_s * 1e9 * hardware.bandwidth_efficiency),
    )


def _sample_s(config: Config, model_config: ModelConfig, prompts: float) -> float:
    """Return the seconds to sample `prompts`: each decoding step reads the weights once, and every sequence's cache."""
    rollout, costs = config.rollout, engine_costs(config, model_config)
    mean_response = MEAN_SHARE * rollout.max_response_length
    sequences = prompts * config.algorithm.samples_per_prompt / rollout_servers(config)
    in_memory = costs.cache_tokens / attended_tokens(model_config, longest_sequence(config))
    at_once = max(1.0, min(rollout.max_num_seqs, sequences, in_memory))
    held = attended_tokens(model_config, mean_response)
    full = sequences * mean_response / at_once * costs.decode_s(at_once, at_once * held)
    # At the end only a few of the longest responses are left in the batch.
    alone = max(1.0, at_once / 16)
    tail = (rollout.max_response_length - mean_response) * costs.decode_s(alone, alone * held)
    return full + tail
