"""What a model costs by its sizes alone: parameters, and operations of one token. Layouts are sizing/'s."""

import functools
import math

from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.parameters import parameters


@functools.cache
def parameter_counts(model_config: ModelConfig) -> tuple[int, int]:
    """Parameters of the whole model, a tied output layer not counted twice, and those of its largest tensor."""
    exported = (entry for entry in parameters(model_config).values() if entry.exported)
    counts = [math.prod(shape) for entry in exported for shape in entry.shapes]
    return sum(counts), max(counts)


def layer_products(model_config: ModelConfig) -> int:
    """Weights of a layer that a token is multiplied by: two operations each, forward."""
    query, key_value = model_config.dimension("query"), model_config.dimension("key_value")
    return model_config.hidden_size * (2 * query + 2 * key_value + 3 * model_config.ffn_hidden_size)


def products(model_config: ModelConfig) -> int:
    """Weights of the whole model that a token is multiplied by, the output layer included."""
    return model_config.num_layers * layer_products(model_config) + model_config.vocab_size * model_config.hidden_size


def attention_operations(model_config: ModelConfig, attended: float) -> float:
    """Operations of one token's attention to `attended` tokens in all layers, forward: 2 for scores, 2 for values."""
    return 4 * model_config.num_layers * model_config.dimension("query") * attended


def attended_tokens(model_config: ModelConfig, length: float) -> float:
    """Tokens that a token of a sequence attends to, on average: half of them, or fewer where there is a window."""
    window = min(model_config.window or length, length)
    return window - window**2 / (2 * length)


def attention_cost(model_config: ModelConfig) -> float:
    """Work of attention for one token of context, in units of the rest of a layer's work for one token.

    Forward operations of a layer for one token: 2 per weight, and 4 · heads · head size per token it attends to, of
    which there are half as many as the sequence has. 1e-5 for Qwen2.5-32B: a fifth at 20k tokens.
    """
    return model_config.dimension("query") / layer_products(model_config)
