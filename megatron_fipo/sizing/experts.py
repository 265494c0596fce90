"""What a mixture of experts adds to memory and time: how its parameters, tokens and products are shared by ranks.

A rank holds some experts of each layer, and works on the tokens that the ranks of its group send to them. How many come
is decided by the router. LOAD is the assumption of this estimate; `stage_memory` takes another one.
"""

import functools
import math
from dataclasses import dataclass

from megatron_fipo.config import Config, ParallelConfig
from megatron_fipo.models.costs import expert_parameters, parameter_counts
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import Parameter, parameters
from megatron_fipo.weights.plan import Layout

LOAD = 1.25
"""Tokens that come to the fullest rank, relative to the mean over ranks. Assumed, not measured."""


@dataclass(frozen=True)
class RankParameters:
    """Parameters on each rank of one pipeline stage."""

    dense: int
    """What every rank of a tensor-parallel group of the stage has its part of, routers and shared experts included."""
    experts: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.dense + self.experts


@dataclass(frozen=True)
class WeightsRead:
    """The bytes of weights that a rollout server reads from each GPU's memory for one decoding step."""

    dense: float
    experts: float
    """All experts. A batch reads only those that one of its tokens goes to."""
    chosen: float
    """Share of a layer's experts that one token goes to."""

    def by_batch(self, batch: float) -> float:
        """Return the bytes for a batch of so many sequences, whose tokens choose experts independently."""
        return self.dense + self.experts * (1 - (1 - self.chosen) ** batch)


@functools.cache  # the planner asks for every layout
def parameters_by_stage(model_config: ModelConfig, layout: Layout) -> dict[int, RankParameters]:
    """Return the parameters on each rank, by stage. ConfigError for a layout that does not divide the model."""
    layout.check(model_config)
    dense, experts = dict.fromkeys(range(layout.pipeline), 0), dict.fromkeys(range(layout.pipeline), 0)
    for item in layout.place(_one_of_the_experts(model_config), model_config):
        counts = dense if item.expert_rank is None else experts
        counts[item.stage] += math.prod(item.local_shape)
    held = model_config.dimension("experts") // layout.expert
    return {stage: RankParameters(dense[stage], held * experts[stage]) for stage in dense}


@functools.cache
def _one_of_the_experts(model_config: ModelConfig) -> tuple[Parameter, ...]:
    """Return the model's parameters with the first expert of each layer: the others are as large."""
    return tuple(entry for entry in parameters(model_config).values() if entry.expert in (None, 0))


def replicas(parallel: ParallelConfig, data_parallel_size: int) -> tuple[int, int]:
    """Return the number of ranks that hold the same dense parameters, and of those that hold the same experts."""
    same = data_parallel_size * parallel.context
    return same, max(1, same * parallel.tensor // (parallel.expert * parallel.expert_tensor))


def mean_held(config: Config, model_config: ModelConfig) -> tuple[float, float]:
    """Return the dense parameters and the experts' on a rank, on average over pipeline stages."""
    parallel, experts = config.parallel, expert_parameters(model_config)
    dense = parameter_counts(model_config)[0] - experts
    return (
        dense / (parallel.tensor * parallel.pipeline),
        experts / (parallel.expert * parallel.expert_tensor * parallel.pipeline),
    )


def load(config: Config) -> float:
    """Return the assumed load of the fullest rank: 1 where no rank takes tokens of another."""
    return 1.0 if config.parallel.expert * config.parallel.expert_tensor == 1 else LOAD


def received_tokens(config: Config, model_config: ModelConfig, fullest: float) -> float:
    """Return how many copies of tokens a rank's experts work on, per token of its micro-batch.

    Args:
        fullest: load of the rank, as LOAD.
    """
    assert model_config.experts is not None
    parallel = config.parallel
    sequence_cut = parallel.tensor if parallel.sequence else 1
    return fullest * model_config.experts.per_token * parallel.expert_tensor / sequence_cut


def expert_bytes_per_token(config: Config, model_config: ModelConfig, fullest: float) -> float:
    """Return the bytes that the experts of a layer keep for the backward pass per token of this rank.

    Args:
        fullest: load of the rank, as LOAD.
    """
    experts, parallel = model_config.experts, config.parallel
    assert experts is not None
    width, local = (2 if config.model.dtype == "bfloat16" else 4), config.model.layers == "local"
    sequence_cut = parallel.tensor if parallel.sequence else 1
    # The token itself, sorted by expert; gate and up as one tensor, and their product with the router's score. Plain
    # operations also keep the activated gate, up with an offset of zero, and the product without the score.
    copy = model_config.hidden_size + (6 if local else 3) * experts.ffn_hidden_size / parallel.expert_tensor
    # Its score in fp32, its place before and after sorting.
    received = received_tokens(config, model_config, fullest) * (copy * width + 20)
    # For each token and expert: the score in fp32 and whether it is chosen, and the softmax over all of them.
    router = experts.number * (5 if experts.normalized else 9) / sequence_cut
    if config.algorithm.adds_router_losses:
        router += experts.number * 8 / sequence_cut  # the scores and their softmax once more
    shared = 0.0
    if experts.shared_ffn_hidden_size:
        # As a dense feed-forward, and its output, which is multiplied by a gate.
        shared = (5 if local else 3) * experts.shared_ffn_hidden_size * width / parallel.tensor
        shared += model_config.hidden_size * width / sequence_cut
    return received + router + shared


def expert_working_bytes(config: Config, model_config: ModelConfig, tokens: int, fullest: float) -> float:
    """Return the additional memory of the backward pass of a layer's experts.

    Args:
        tokens: those of a micro-batch on this rank.
        fullest: load of the rank, as LOAD.
    """
    experts, parallel = model_config.experts, config.parallel
    assert experts is not None
    width = 2 if config.model.dtype == "bfloat16" else 4
    # Gradients of the copies before and after they are sent and sorted, and of gate and up.
    a_copy = 3 * model_config.hidden_size + 3 * experts.ffn_hidden_size / parallel.expert_tensor
    # One expert's gradient at a time, or with a grouped product those of all experts of the rank.
    at_once = 1 if config.model.layers == "local" else experts.number // parallel.expert
    gradient = 2 * at_once * experts.ffn_hidden_size * model_config.hidden_size / parallel.expert_tensor
    return width * (received_tokens(config, model_config, fullest) * tokens * a_copy + gradient)


def weights_traffic(config: Config, model_config: ModelConfig) -> float:
    """Return the bytes of experts' weights that cross a GPU's memory in a third of an update of one micro-batch.

    Each of them is read forward and backward, and its fp32 gradient is added to. With few tokens per expert this takes
    as long as the products. For dense layers it does not matter.
    """
    width = 2 if config.model.dtype == "bfloat16" else 4
    return mean_held(config, model_config)[1] * (2 * width + 8) / 3


def dispatch_s(config: Config, model_config: ModelConfig, tokens_of_rank: float) -> float:
    """Return the seconds in which a forward pass over so many tokens of a rank sends them to experts, and back."""
    experts, parallel, hardware = model_config.experts, config.parallel, config.hardware
    size = parallel.expert * parallel.expert_tensor
    if experts is None or size == 1:
        return 0.0
    width = 2 if config.model.dtype == "bfloat16" else 4
    layers = sum(experts.layers) / parallel.pipeline
    sequence_cut = parallel.tensor if parallel.sequence else 1
    copies = LOAD * experts.per_token * tokens_of_rank / sequence_cut
    # To an expert-parallel rank, and from it to all that have a part of the expert.
    sent = copies * ((parallel.expert - 1) / parallel.expert + parallel.expert_tensor - 1)
    there_and_back = 2 * sent * layers * model_config.hidden_size * width
    across = max(0.0, 1 - config.cluster.gpus_per_node / size)
    a_byte = (1 - across) / hardware.node_gb_s + across / hardware.network_gb_s
    return there_and_back * a_byte / (1e9 * hardware.bandwidth_efficiency)
