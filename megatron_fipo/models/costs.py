"""Costs of a model that follow from its sizes: parameters, and operations per token. sizing/ adds the layout."""

import functools
import math

from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import parameters


@functools.cache
def parameter_counts(model_config: ModelConfig) -> tuple[int, int]:
    """Return the parameters of the whole model, with a tied output layer counted once, and of its largest tensor."""
    exported = (entry for entry in parameters(model_config).values() if entry.exported)
    counts = [math.prod(shape) for entry in exported for shape in entry.shapes]
    return sum(counts), max(counts)


@functools.cache
def expert_parameters(model_config: ModelConfig) -> int:
    """Return the parameters of all experts, without routers and those experts that every token goes to."""
    return sum(
        sum(map(math.prod, entry.shapes)) for entry in parameters(model_config).values() if entry.expert is not None
    )


def active_parameters(model_config: ModelConfig) -> int:
    """Return the parameters that one token's forward pass uses: all but the experts that it does not go to."""
    experts, total = model_config.experts, parameter_counts(model_config)[0]
    if experts is None:
        return total
    return total - expert_parameters(model_config) // experts.number * (experts.number - experts.per_token)


def layer_products(model_config: ModelConfig) -> int:
    """Return the number of weights in a layer's matrix products for one token, on average over the layers.

    Each takes two operations per token, forward. Of experts only those count that a token goes to.
    """
    query, key_value = model_config.dimension("query"), model_config.dimension("key_value")
    experts, layers = model_config.experts, model_config.num_layers
    sparse = sum(experts.layers) if experts else 0
    widths = 3 * model_config.ffn_hidden_size * (layers - sparse)
    if experts is not None:
        widths += sparse * (
            3 * (experts.per_token * experts.ffn_hidden_size + experts.shared_ffn_hidden_size) + experts.number
        )
    return model_config.hidden_size * (2 * query + 2 * key_value) + model_config.hidden_size * widths // layers


def products(model_config: ModelConfig) -> int:
    """Return the number of weights in the whole model's matrix products, including the output layer."""
    return model_config.num_layers * layer_products(model_config) + model_config.vocab_size * model_config.hidden_size


def attention_operations(model_config: ModelConfig, attended: float) -> float:
    """Return the operations of one token's attention to `attended` tokens in all layers, forward."""
    return 4 * model_config.num_layers * model_config.dimension("query") * attended


def attended_tokens(model_config: ModelConfig, length: float) -> float:
    """Return how many tokens a token attends to, on average: half of the sequence, or fewer with a window."""
    window = min(model_config.window or length, length)
    return window - window**2 / (2 * length)


def attention_cost(model_config: ModelConfig) -> float:
    """Return the work of attention per token of the sequence, relative to the rest of a layer's work for one token.

    The forward operations of a layer for one token are 2 per weight, and 4 · heads · head size per token that it
    attends to, which is half of the sequence on average. The result is 1e-5 for Qwen2.5-32B: a fifth at 20k tokens.
    """
    return model_config.dimension("query") / layer_products(model_config)
