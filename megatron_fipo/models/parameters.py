"""One table per model: how its Hugging Face tensors become Megatron-Core parameters, and how they are cut.

Loading, export, the printed plan and live weight updates all use `parameters(model_config)`, where `model_config` comes
from `models/model_config.py`. The rules of a layer belong to the family (`models/families/`). The rules outside of
layers are here. Imports no torch, so that a configuration can be checked quickly.
"""

import math
from dataclasses import dataclass

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.rules import LAYER_PREFIX, Rule, Source

EMBEDDING = "embedding.word_embeddings.weight"

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine stores a norm in the linear layer after it. The tables use the local specification's names."""


@dataclass(frozen=True)
class Parameter:
    """One Megatron-Core parameter of the whole model: a rule with its layer and sizes."""

    megatron: str
    """Its name in the local layer specification, with the global layer index."""
    names: tuple[str, ...]
    """The Hugging Face tensors that form it, in the order in which they are joined."""
    shapes: tuple[tuple[int, ...], ...]
    """Their full shapes."""
    cut: int | None
    head_groups: int
    """Number of head groups in the whole model by which the parts are interleaved; 0: not interleaved."""
    padded: bool
    """Whether the cut dimension is rounded up to a multiple of the tensor-parallel size, with zeros."""
    exported: bool = True
    """Whether it is exported. False for the output layer's copy of a tied embedding."""

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Return the shape of the parameter on each tensor-parallel rank."""
        pieces = [list(shape) for shape in self.shapes]
        if self.cut is not None:
            for piece in pieces:
                piece[self.cut] = math.ceil(piece[self.cut] / tensor_parallel_size)
        return (sum(piece[0] for piece in pieces), *pieces[0][1:])


def parameters(model_config: ModelConfig) -> dict[str, Parameter]:
    """Return every Megatron-Core parameter by name, in export order: embedding, layers, final norm, output."""
    layer_rules = model_config.family.layer
    table = [_fill(_EMBEDDING, model_config)]
    table += [_fill(rule, model_config, layer) for layer in range(model_config.num_layers) for rule in layer_rules]
    table += [_fill(_FINAL_NORM, model_config)]
    if model_config.tied_embeddings:
        table.append(_fill(_TIED_OUTPUT, model_config, exported=False))
    else:
        table.append(_fill(_OUTPUT, model_config))
    return {parameter.megatron: parameter for parameter in table}


def canonical_name(name: str, layer: int | None) -> str:
    """Return the name that a model chunk's parameter has in `parameters`.

    `layer` is the global index of its layer, or None outside of layers. `name` counts layers from the first layer of
    the chunk.
    """
    if layer is None:
        return name
    inner = name.removeprefix(LAYER_PREFIX).split(".", 1)[1]
    return f"{LAYER_PREFIX}{layer}.{FUSED_NORMS.get(inner, inner)}"


def check_tensor_parallel(model_config: ModelConfig, tensor_parallel_size: int) -> None:
    """Raise ConfigError if the size does not divide heads, key-value groups and feed-forward width, or if the last rank
    would have no token of the vocabulary.
    """
    sizes = {
        "attention heads": model_config.num_attention_heads,
        "key-value groups": model_config.num_query_groups,
        "feed-forward width": model_config.ffn_hidden_size,
    }
    wrong = [f"{size} {what}" for what, size in sizes.items() if size % tensor_parallel_size]
    if wrong:
        limit = math.gcd(*sizes.values())
        fitting = ", ".join(str(size) for size in range(1, limit + 1) if limit % size == 0)
        raise ConfigError(
            "parallel.tensor",
            f"{tensor_parallel_size} does not divide the model's {' and '.join(wrong)}",
            f"this model takes {fitting}",
        )
    share = model_config.padded_vocab_size(tensor_parallel_size) // tensor_parallel_size
    before_last = share * (tensor_parallel_size - 1)
    if model_config.vocab_size <= before_last:
        raise ConfigError(
            "parallel.tensor",
            f"the last of {tensor_parallel_size} ranks has no token of a vocabulary of {model_config.vocab_size}",
            "a smaller size",
        )


def _fill(rule: Rule, model_config: ModelConfig, layer: int | None = None, exported: bool = True) -> Parameter:
    return Parameter(
        megatron=rule.megatron.format(layer=layer),
        names=tuple(source.name.format(layer=layer) for source in rule.sources),
        shapes=tuple(tuple(map(model_config.dimension, source.shape)) for source in rule.sources),
        cut=rule.cut,
        head_groups=model_config.num_query_groups if rule.interleaved else 0,
        padded=rule.cut is not None and rule.sources[0].shape[rule.cut] == "vocabulary",
        exported=exported,
    )


_EMBEDDING_SOURCE = Source("model.embed_tokens.weight", ("vocabulary", "hidden"))
_EMBEDDING = Rule(EMBEDDING, (_EMBEDDING_SOURCE,), cut=0)
_TIED_OUTPUT = Rule("output_layer.weight", (_EMBEDDING_SOURCE,), cut=0)
_OUTPUT = Rule("output_layer.weight", (Source("lm_head.weight", ("vocabulary", "hidden")),), cut=0)
_FINAL_NORM = Rule("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),), cut=None)
