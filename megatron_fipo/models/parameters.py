"""One table per model: how its Hugging Face tensors become Megatron-Core parameters, and how they are cut.

Loading, export, the printed plan and live weight updates all use `parameters(model_config)`, where `model_config` comes
from `models/model_config.py`. The rules of a layer belong to the family (`models/families/`). The rules outside of
layers are here. Imports no torch, so that a configuration can be checked quickly.
"""

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.model_config import ModelConfig
from megatron_fipo.models.rules import EXPERT, LAYER_PREFIX, Rule, Source

EMBEDDING = "embedding.word_embeddings.weight"

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine stores a norm in the linear layer after it. The tables use the local specification's names."""

_STORED_NORMS = {local: fused for fused, local in FUSED_NORMS.items()}
_NORM_BEFORE_EXPERTS = "pre_mlp_layernorm.weight"
"""The norm that stays by itself in a layer with experts, since the router reads it too."""


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
    stored: str
    """Its key in a distributed checkpoint, which several layers and experts share."""
    rows: tuple[tuple[int, int], ...] = ()
    """For each dimension that its stored tensor has before its own, the layer's or the expert's: row and length."""
    expert: int | None = None
    """Number of the expert in its layer that it belongs to."""
    exported: bool = True
    """Whether it is exported. False for the output layer's copy of a tied embedding."""

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Return the shape on each tensor-parallel rank: of an expert's parameter, of the experts' own groups."""
        pieces = [list(shape) for shape in self.shapes]
        if self.cut is not None:
            for piece in pieces:
                piece[self.cut] = math.ceil(piece[self.cut] / tensor_parallel_size)
        return (sum(piece[0] for piece in pieces), *pieces[0][1:])


@functools.lru_cache(maxsize=4)
def parameters(model_config: ModelConfig) -> Mapping[str, Parameter]:
    """Return every Megatron-Core parameter by name, in export order: embedding, layers, final norm, output.

    The table is kept: with experts it has tens of thousands of entries, and preflight asks for it for every rank.
    """
    table = [_fill(_EMBEDDING, model_config)]
    for layer in range(model_config.num_layers):
        table += _layer(model_config, layer)
    table += [_fill(_FINAL_NORM, model_config)]
    if model_config.tied_embeddings:
        table.append(_fill(_TIED_OUTPUT, model_config, exported=False))
    else:
        table.append(_fill(_OUTPUT, model_config))
    return MappingProxyType({parameter.megatron: parameter for parameter in table})


def canonical_name(name: str, layer: int | None, first_expert: int = 0) -> str:
    """Return the name that a model chunk's parameter has in `parameters`.

    `layer` is the global index of its layer, or None outside of layers, and `first_expert` the global number of the
    rank's first expert. `name` counts layers from the first layer of the chunk, and experts from that one.
    """
    if layer is None:
        return name
    inner = name.removeprefix(LAYER_PREFIX).split(".", 1)[1]
    if found := _LOCAL_EXPERT.fullmatch(inner) or _GROUPED_EXPERT.fullmatch(inner):
        expert = first_expert + int(found["expert"])
        inner = f"{EXPERT.format(expert=expert)}.{found['linear']}.weight"
    return f"{LAYER_PREFIX}{layer}.{FUSED_NORMS.get(inner, inner)}"


_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(?P<expert>\d+)\.(?P<linear>linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(?P<linear>linear_fc[12])\.weight(?P<expert>\d+)")
"""Transformer Engine has the experts of a layer in one module, by which one grouped product serves them all."""


def check_tensor_parallel(model_config: ModelConfig, tensor_parallel_size: int) -> None:
    """Raise ConfigError if the size does not divide heads, key-value groups and feed-forward widths, or if the last
    rank would have no token of the vocabulary.
    """
    sizes = {
        "attention heads": model_config.num_attention_heads,
        "key-value groups": model_config.num_query_groups,
    }
    if model_config.has_dense_layers:
        sizes["feed-forward width"] = model_config.ffn_hidden_size
    if model_config.experts and model_config.experts.shared_ffn_hidden_size:
        sizes["width of the shared expert"] = model_config.experts.shared_ffn_hidden_size
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


def check_expert_parallel(model_config: ModelConfig, expert_parallel_size: int, expert_tensor_size: int) -> None:
    """Raise ConfigError if the sizes do not divide the number and the width of the experts, or there are none."""
    experts = model_config.experts
    sizes = {"expert": expert_parallel_size, "expert_tensor": expert_tensor_size}
    for (key, size), (what, count) in zip(
        sizes.items(),
        {
            "experts": experts.number if experts else 1,
            "width of an expert": experts.ffn_hidden_size if experts else 1,
        }.items(),
        strict=True,
    ):
        if experts is None and size > 1:
            raise ConfigError(f"parallel.{key}", f"{size}, but the model has no experts", f"parallel.{key}=1")
        if count % size:
            fitting = ", ".join(str(number) for number in range(1, count + 1) if count % number == 0)
            raise ConfigError(
                f"parallel.{key}", f"{size} does not divide the model's {count} {what}", f"this model takes {fitting}"
            )


def _layer(model_config: ModelConfig, layer: int) -> list[Parameter]:
    """The parameters of a layer, those of each expert together."""
    rules = model_config.layer_rules(layer)
    table = [_fill(rule, model_config, layer) for rule in rules if not rule.of_each_expert]
    for expert in range(model_config.dimension("experts")):
        table += [_fill(rule, model_config, layer, expert) for rule in rules if rule.of_each_expert]
    return table


def _fill(
    rule: Rule, model_config: ModelConfig, layer: int | None = None, expert: int | None = None, exported: bool = True
) -> Parameter:
    stored, rows = _stored_place(rule, model_config, layer, expert)
    return Parameter(
        stored=stored if exported else EMBEDDING,  # tied embeddings are stored once
        rows=rows,
        expert=expert,
        megatron=rule.megatron.format(layer=layer, expert=expert),
        names=tuple(source.name.format(layer=layer, expert=expert) for source in rule.sources),
        shapes=tuple(tuple(map(model_config.dimension, source.shape)) for source in rule.sources),
        cut=rule.cut,
        head_groups=model_config.num_query_groups if rule.interleaved else 0,
        padded=rule.cut is not None and rule.sources[0].shape[rule.cut] == "vocabulary",
        exported=exported,
    )


def _stored_place(
    rule: Rule, model_config: ModelConfig, layer: int | None, expert: int | None
) -> tuple[str, tuple[tuple[int, int], ...]]:
    """Return `Parameter.stored` and `Parameter.rows`, by Transformer Engine's names.

    Where all layers are alike, Megatron-Core stacks them. It always stacks experts.
    """
    if layer is None:
        return rule.megatron, ()
    experts, rows = model_config.experts, []
    inner = rule.megatron.removeprefix(LAYER_PREFIX + "{layer}.")
    if experts is None or not experts.layers[layer] or inner != _NORM_BEFORE_EXPERTS:
        inner = _STORED_NORMS.get(inner, inner)
    stacked = experts is None or experts.everywhere
    if stacked:
        rows.append((layer, model_config.num_layers))
    if expert is not None:
        rows.append((expert, model_config.dimension("experts")))
        inner = inner.replace(".local_experts.{expert}", "")
    return f"{LAYER_PREFIX}{'' if stacked else f'{layer}.'}{inner}", tuple(rows)


_EMBEDDING_SOURCE = Source("model.embed_tokens.weight", ("vocabulary", "hidden"))
_EMBEDDING = Rule(EMBEDDING, (_EMBEDDING_SOURCE,), cut=0)
_TIED_OUTPUT = Rule("output_layer.weight", (_EMBEDDING_SOURCE,), cut=0)
_OUTPUT = Rule("output_layer.weight", (Source("lm_head.weight", ("vocabulary", "hidden")),), cut=0)
_FINAL_NORM = Rule("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),), cut=None)
