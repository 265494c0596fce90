"""Compute the bytes that each rank of a pipeline stage needs, from the configurations of the run and the model.

Tensors are counted as Megatron-Core's code keeps them. Tests compare the counts with the bytes that are really
allocated. The peak is in an update or in a weight update, whichever is larger: they do not overlap.

With rollout.shared_gpu the trainer's state leaves the GPU while engines have their turn (policy/offload.py): gradients
are freed, weights and optimizer state are in host memory. Only the weights come back for a weight update.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_fipo.config import Config
from megatron_fipo.config.servers import servers_on_every_node
from megatron_fipo.models.costs import parameter_counts
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.sizing.experts import (
    RankParameters,
    expert_bytes_per_token,
    expert_working_bytes,
    load,
    parameters_by_stage,
    replicas,
)
from megatron_fipo.weights.plan import Layout

GIB = 1 << 30
_LOG_PROB_CHUNK_ELEMENTS = 1 << 25
"""Number of logits that exist in fp32 at the same time (policy/logprobs.py)."""


@dataclass
class StageMemory:
    """Bytes on each rank of one pipeline stage."""

    stage: int
    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept for the backward pass, for all micro-batches in flight, each of the largest allowed size."""
    logits: int
    """Logits and the fp32 pieces of the log-probs; last stage only."""
    working: int
    """Additional memory of a layer's backward pass: gradients, and gathered tokens."""
    refit: int
    """A bucket of a weight update, the packed copy of the previous one, the shards from which it is gathered, and the
    weights of a server on the same GPU."""
    server: int = 0
    """A server that shares the GPU, while it samples. It sleeps during updates."""
    host: int = 0
    """Host memory for the state that leaves the GPU; 0 if nothing does."""

    @property
    def always(self) -> int:
        """Weights, gradients and optimizer state. The trainer never releases them, unless GPUs are shared."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The peak: the largest of an update, a weight update and a shared server, with the state beside each."""
        update = self.always + self.activations + max(self.logits, self.working)
        beside_refit, beside_server = (self.weights, 0) if self.host else (self.always, self.always)
        return max(update, beside_refit + self.refit, beside_server + self.server)


def stage_memory(
    config: Config, model_config: ModelConfig, data_parallel_size: int, fullest: float | None = None
) -> list[StageMemory]:
    """Return the memory of every pipeline stage under the layout of `config.parallel`, or raise ConfigError.

    Args:
        fullest: tokens that come to the rank's experts, relative to the mean over ranks; None: as assumed.
    """
    parallel = config.parallel
    chunks = parallel.virtual_pipeline or 1
    layout = Layout(parallel.tensor, parallel.pipeline, chunks, parallel.expert, parallel.expert_tensor)
    counts = parameters_by_stage(model_config, layout)
    width = _width(config)
    fullest = load(config) if fullest is None else fullest
    stages = []
    for stage in range(parallel.pipeline):
        count = counts[stage]
        shares = _shares_a_gpu(config, stage, data_parallel_size)
        weights, optimizer = count.total * width, _optimizer_bytes(config, count, data_parallel_size)
        stages.append(
            StageMemory(
                stage=stage,
                parameters=count.total,
                weights=weights,
                gradients=count.total * 4,  # reduced in fp32
                optimizer=optimizer,
                activations=_activation_bytes(config, model_config, stage, data_parallel_size, fullest),
                logits=_log_prob_bytes(config, model_config) if stage == parallel.pipeline - 1 else 0,
                working=_working_bytes(config, model_config, stage, fullest),
                refit=_refit_bytes(config, model_config) + (server_weights(config, model_config) if shares else 0),
                server=int(config.rollout.gpu_memory_utilization * config.hardware.memory_gib * GIB) if shares else 0,
                host=weights + optimizer if config.rollout.shared_gpu else 0,
            )
        )
    return stages


def server_weights(config: Config, model_config: ModelConfig) -> int:
    """Return the bytes of the model's weights on each GPU of one server."""
    width = 2 if config.rollout.dtype == "bfloat16" else 4
    return math.ceil(parameter_counts(model_config)[0] * width / config.rollout.tensor_parallel)


def longest_sequence(config: Config) -> int:
    """Return the length of the longest sequence that a run can sample, in tokens."""
    return config.rollout.max_prompt_length + config.rollout.max_response_length


def micro_batch_tokens(config: Config) -> int:
    """Return the most tokens of a micro-batch on one rank: the budget, or its part of a longer sequence."""
    return max(config.parallel.micro_batch_tokens, math.ceil(longest_sequence(config) / config.parallel.context))


def micro_batches(config: Config, data_parallel_size: int, length: float) -> int:
    """Return the number of micro-batches per update on each rank, for sequences of `length` tokens."""
    sequences = math.ceil(
        config.algorithm.mini_batch_prompts * config.algorithm.samples_per_prompt / data_parallel_size
    )
    together = max(1, int(config.parallel.micro_batch_tokens * config.parallel.context // length))
    count = math.ceil(sequences / together)
    multiple = config.parallel.pipeline if config.parallel.virtual_pipeline else 1
    return math.ceil(count / multiple) * multiple


def layer_bytes_per_token(
    config: Config, model_config: ModelConfig, layers: Iterable[int] | None = None, fullest: float | None = None
) -> float:
    """Return the bytes that one layer keeps for the backward pass per token of this rank, without recomputation.

    Args:
        layers: the layers whose mean it is; None: all of them.
        fullest: as `stage_memory` has it.
    """
    width, tensor = _width(config), config.parallel.tensor
    query, key_value = model_config.dimension("query"), model_config.dimension("key_value")
    local = config.model.layers == "local"
    # The local norm consists of plain operations, and keeps its input and the normalised input in fp32, and its output.
    # Transformer Engine's norm keeps input and output.
    norm = (8 + width if local else 2 * width) * model_config.hidden_size
    # Rotated query and attention output; the joint projection, of which value is a view; rotated key; normalisers.
    attention = (2 * query + (query + 2 * key_value) + key_value) * width + 4 * model_config.num_attention_heads
    if model_config.family.qk_norm:
        # As the norm above, but for its output, which the rotation does not keep.
        attention += (8 if local else width) * (query + key_value)
    # Cosines and sines for rotating query and key, which every rank needs for whole sequences. Transformer Engine's
    # kernel does not keep them.
    rotary = 4 * model_config.head_dim * width if local else 0
    # Gate and up as one tensor, and their product. Plain operations also keep the activated gate, and up with an offset
    # of zero.
    feed_forward = (5 if local else 3) * model_config.ffn_hidden_size * width / tensor
    if model_config.experts is not None:
        chosen = range(model_config.num_layers) if layers is None else tuple(layers)
        sparse = sum(model_config.experts.layers[layer] for layer in chosen) / len(chosen)
        assumed = load(config) if fullest is None else fullest
        of_experts = expert_bytes_per_token(config, model_config, assumed)
        feed_forward = sparse * of_experts + (1 - sparse) * feed_forward
    return 2 * norm / _sequence_cut(config) + rotary + attention / tensor + feed_forward


def _shares_a_gpu(config: Config, stage: int, data_parallel_size: int) -> bool:
    """Return whether a rank of the stage is on a server's GPU: on every node, or the first GPUs of the first node."""
    if servers_on_every_node(config):
        return True
    parallel, rollout = config.parallel, config.rollout
    first_rank = stage * parallel.tensor * parallel.context * data_parallel_size
    return rollout.shared_gpu and first_rank < rollout.servers * rollout.tensor_parallel


def _width(config: Config) -> int:
    return 2 if config.model.dtype == "bfloat16" else 4


def _sequence_cut(config: Config) -> int:
    """Return the number of ranks that share the tokens outside attention and feed-forward."""
    return config.parallel.tensor if config.parallel.sequence else 1


def _optimizer_bytes(config: Config, count: RankParameters, data_parallel_size: int) -> int:
    """Return the bytes of two fp32 moments, and of the fp32 master copy of bfloat16 weights."""
    a_parameter = 12 if _width(config) == 2 else 8
    dense, experts = (1, 1)
    if config.parallel.distributed_optimizer:
        dense, experts = replicas(config.parallel, data_parallel_size)
    return (math.ceil(count.dense / dense) + math.ceil(count.experts / experts)) * a_parameter


def layers_of_stage(config: Config, model_config: ModelConfig, stage: int) -> list[int]:
    """Return the layers of a stage: with a virtual pipeline, those of all its chunks."""
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    count = model_config.num_layers // (pipeline * chunks)
    firsts = [(chunk * pipeline + stage) * count for chunk in range(chunks)]
    return [first + index for first in firsts for index in range(count)]


def _activation_bytes(
    config: Config, model_config: ModelConfig, stage: int, data_parallel_size: int, fullest: float
) -> int:
    parallel = config.parallel
    pipeline, chunks = parallel.pipeline, parallel.virtual_pipeline or 1
    count = micro_batches(config, data_parallel_size, longest_sequence(config))
    if chunks == 1:
        in_flight = min(pipeline - stage, count)
    else:
        in_flight = min(2 * (pipeline - stage - 1) + (chunks - 1) * pipeline + 1, count * chunks)
    layers = model_config.num_layers // (pipeline * chunks)
    of_stage = layers_of_stage(config, model_config, stage)
    layer = layer_bytes_per_token(config, model_config, of_stage, fullest)
    boundary = model_config.hidden_size * _width(config) / _sequence_cut(config)
    if config.model.recompute == "full":
        # The input of each layer, and everything of the one layer that is being recomputed.
        layer = max(layer_bytes_per_token(config, model_config, [one], fullest) for one in of_stage)
        a_token = in_flight * layers * boundary + layer
    else:
        a_token = in_flight * (layers * layer + boundary)
    return math.ceil(a_token * micro_batch_tokens(config))


def _local_vocab_size(config: Config, model_config: ModelConfig) -> int:
    return model_config.padded_vocab_size(config.parallel.tensor) // config.parallel.tensor


def _logits_bytes(config: Config, model_config: ModelConfig) -> int:
    return micro_batch_tokens(config) * _local_vocab_size(config, model_config) * _width(config)


def _log_prob_bytes(config: Config, model_config: ModelConfig) -> int:
    """Return the bytes of the logits, which their gradient overwrites, and of two fp32 pieces (not on a GPU)."""
    logits = _logits_bytes(config, model_config)
    piece = min(logits // _width(config), _LOG_PROB_CHUNK_ELEMENTS)
    return logits + 8 * piece


def _working_bytes(config: Config, model_config: ModelConfig, stage: int, fullest: float) -> int:
    parallel, hidden, width = config.parallel, model_config.hidden_size, _width(config)
    # Under sequence parallelism a layer's input is gathered again, and its whole gradient exists before it is
    # scattered.
    a_token = (2 if parallel.sequence else 1) * hidden + hidden / _sequence_cut(config)
    # The gradient of a weight in the weights' own type, before it is added to the fp32 gradient.
    largest, of_experts = 0, 0.0
    if model_config.has_dense_layers:
        a_token += model_config.ffn_hidden_size / parallel.tensor
        largest = 2 * model_config.ffn_hidden_size * hidden // parallel.tensor
    if model_config.experts is not None:
        of_experts = expert_working_bytes(config, model_config, micro_batch_tokens(config), fullest)
    if stage in (0, parallel.pipeline - 1):
        largest = max(largest, _local_vocab_size(config, model_config) * hidden)
    gradient_of_logits = _logits_bytes(config, model_config) if stage == parallel.pipeline - 1 else 0
    of_layer = math.ceil(a_token * width * micro_batch_tokens(config))
    return max(of_layer + largest * width + gradient_of_logits, math.ceil(of_layer + of_experts))


def _refit_bytes(config: Config, model_config: ModelConfig) -> int:
    largest_bytes = parameter_counts(model_config)[1] * _width(config)
    bucket = max(config.rollout.bucket_mib << 20, largest_bytes)
    tensor = max(config.parallel.tensor, config.parallel.expert_tensor)
    shards = bucket + bucket // tensor if tensor > 1 else 0  # all ranks', and this rank's packed
    # On shared GPUs every rank has the whole bucket, which goes from stage to stage and from expert to expert packed.
    ways = max(config.parallel.pipeline, config.parallel.expert)
    across = bucket if config.rollout.shared_gpu and ways > 1 else 0
    return 2 * bucket + shards + across
