"""One declarative table an architecture: how Hugging Face tensors become Megatron-Core parameters and how they are cut.

Loading, export, the printed plan and live weight updates all read `parameters(geometry)`. To add an architecture, add
an `Architecture` to the table at the end. Imports no torch, so that a configuration can be checked against it at once.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_fipo.errors import ConfigError

LAYER_PREFIX = "decoder.layers."
EMBEDDING = "embedding.word_embeddings.weight"

FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Transformer Engine keeps a norm inside the linear layer after it; the tables use the local specification's names."""


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's stretched rotary frequencies. Megatron-Core has the other three constants of that recipe built in."""

    factor: float


@dataclass(frozen=True)
class Geometry:
    """What config.json says about a model: every number that shapes its weights or its forward pass."""

    architecture: str
    """Name in config.json's `architectures`, such as Qwen2ForCausalLM."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Key-value heads."""
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int
    """Rows of the embedding as stored, without padding for tensor parallelism."""
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor-parallel size.

        The extra rows are zeros on load and dropped on export. Their logits are 0, not −∞: whoever normalises over the
        vocabulary has to leave them out.
        """
        return math.ceil(self.vocab_size / tensor_parallel_size) * tensor_parallel_size

    def dimension(self, name: str) -> int:
        """The length that a dimension's name in the tables stands for."""
        return {
            "vocabulary": self.vocab_size,
            "hidden": self.hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_query_groups * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn_hidden_size,
        }[name]


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor of a rule: its name, with {layer} where it has one, and the names of its dimensions."""

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How one Megatron-Core parameter is made of Hugging Face tensors."""

    megatron: str
    sources: tuple[Source, ...]
    cut: int | None
    """Dimension of each source that tensor parallelism cuts into equal parts; None: every rank has the whole."""
    interleaved: bool = False
    """How a rank's parts of several sources are joined on dimension 0: by head group, or one after the other."""


@dataclass(frozen=True)
class Architecture:
    """One supported value of config.json's `architectures`."""

    name: str
    layer_rules: tuple[Rule, ...]
    defaults: Mapping[str, Any]
    """What transformers assumes for keys that an older config.json leaves out."""
    qkv_bias: bool = False
    qk_norm: bool = False


@dataclass(frozen=True)
class Parameter:
    """A rule with its layer and sizes filled in: one Megatron-Core parameter of the whole model."""

    megatron: str
    """Name with the global layer index, by the local layer specification."""
    names: tuple[str, ...]
    """Hugging Face tensors it is made of, in the order in which they are joined."""
    shapes: tuple[tuple[int, ...], ...]
    """Their full shapes."""
    cut: int | None
    head_groups: int
    """Groups that the parts are interleaved by, over the whole model; 0: the parts lie one after the other."""
    padded: bool
    """Whether the cut dimension is rounded up to a multiple of the tensor-parallel size, with zeros."""
    exported: bool = True
    """False for the output layer's copy of a tied embedding."""

    def local_shape(self, tensor_parallel_size: int) -> tuple[int, ...]:
        """Shape of the parameter on each tensor-parallel rank."""
        pieces = [list(shape) for shape in self.shapes]
        if self.cut is not None:
            for piece in pieces:
                piece[self.cut] = math.ceil(piece[self.cut] / tensor_parallel_size)
        return (sum(piece[0] for piece in pieces), *pieces[0][1:])


def read_architecture(model_dir: str | Path) -> Geometry:
    """The geometry of the Hugging Face model in `model_dir`, from its config.json as transformers 4 or 5 writes it.

    Raises ConfigError, naming the key, for a model that these tables or Megatron-Core's dense GPTModel do not cover.
    """
    path = Path(model_dir) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        names = config.get("architectures") or ["none"]
    except FileNotFoundError:
        raise ConfigError("model.path", f"{path} does not exist", "give a Hugging Face model directory") from None
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError("model.path", f"{path} cannot be read: {error}", "config.json is a JSON object") from None
    architecture = ARCHITECTURES.get(names[0])
    if architecture is None:
        supported = ", ".join(ARCHITECTURES)
        raise ConfigError("model.path", f"{path}: architecture {names[0]} is not supported", f"supported: {supported}")
    config = {**architecture.defaults, **config}
    _refuse_what_is_not_modelled(path, config)
    try:
        return _geometry(path, architecture, config)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            "model.path", f"{path}: {type(error).__name__}: {error}", "every size must be there"
        ) from None


def parameters(geometry: Geometry) -> dict[str, Parameter]:
    """Every Megatron-Core parameter of a model by its name, in export order: embedding, layers, final norm, output."""
    layer_rules = ARCHITECTURES[geometry.architecture].layer_rules
    table = [_fill(_EMBEDDING, geometry)]
    table += [_fill(rule, geometry, layer) for layer in range(geometry.num_layers) for rule in layer_rules]
    table += [_fill(_FINAL_NORM, geometry)]
    table += [_fill(_TIED_OUTPUT, geometry, exported=False) if geometry.tied_embeddings else _fill(_OUTPUT, geometry)]
    return {parameter.megatron: parameter for parameter in table}


def canonical_name(name: str, layer: int | None) -> str:
    """The name in `parameters` of a model chunk's parameter.

    `layer` is the global index of the layer it belongs to (name counts from the chunk's first one), None outside
    layers.
    """
    if layer is None:
        return name
    inner = name.removeprefix(LAYER_PREFIX).split(".", 1)[1]
    return f"{LAYER_PREFIX}{layer}.{FUSED_NORMS.get(inner, inner)}"


def check_tensor_parallel(geometry: Geometry, tensor_parallel_size: int) -> None:
    """Raise ConfigError if the size does not divide heads, key-value groups and feed-forward width, or if the last rank
    would have no token of the vocabulary.
    """
    sizes = {
        "attention heads": geometry.num_attention_heads,
        "key-value groups": geometry.num_query_groups,
        "feed-forward width": geometry.ffn_hidden_size,
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
    before_last = geometry.padded_vocab_size(tensor_parallel_size) // tensor_parallel_size * (tensor_parallel_size - 1)
    if geometry.vocab_size <= before_last:
        raise ConfigError(
            "parallel.tensor",
            f"the last of {tensor_parallel_size} ranks has no token of a vocabulary of {geometry.vocab_size}",
            "a smaller size",
        )


def _geometry(path: Path, architecture: Architecture, config: Mapping[str, Any]) -> Geometry:
    heads = int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    head_dim = int(config.get("head_dim") or config["hidden_size"] // heads)
    if groups < 1 or heads % groups:
        raise ConfigError(
            "model.path", f"{path}: {heads} heads in {groups} key-value groups", "groups divide the heads"
        )
    eos = config.get("eos_token_id")
    rope_theta, rope_scaling = _rope(path, config)
    return Geometry(
        architecture=architecture.name,
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=int(config["intermediate_size"]),
        vocab_size=int(config["vocab_size"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=architecture.qkv_bias,
        qk_norm=architecture.qk_norm,
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=int(config["max_position_embeddings"]),
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (int(eos),),
    )


def _rope(path: Path, config: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and stretching of the rotary embedding: both in rope_parameters, or in two keys before transformers 5."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    built_in = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    if kind == "llama3" and all(rope[key] == value for key, value in built_in.items()):
        return theta, RopeScaling(factor=float(rope["factor"]))
    remedy = f"supported: rope_type default, and llama3 with {built_in}"
    raise ConfigError("model.path", f"{path}: rotary embedding {dict(rope)} is not supported", remedy)


def _refuse_what_is_not_modelled(path: Path, config: Mapping[str, Any]) -> None:
    """A key that changes the forward pass and that the Megatron model would ignore must not pass in silence."""
    modelled = {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "attention_bias": False,
        "mlp_bias": False,
        "partial_rotary_factor": 1.0,
    }
    for key, value in modelled.items():
        if config.get(key, value) != value:
            raise ConfigError(
                "model.path", f"{path}: {key} = {config[key]!r} is not supported", f"it must be {value!r}"
            )


def _fill(rule: Rule, geometry: Geometry, layer: int | None = None, exported: bool = True) -> Parameter:
    return Parameter(
        megatron=rule.megatron.format(layer=layer),
        names=tuple(source.name.format(layer=layer) for source in rule.sources),
        shapes=tuple(tuple(map(geometry.dimension, source.shape)) for source in rule.sources),
        cut=rule.cut,
        head_groups=geometry.num_query_groups if rule.interleaved else 0,
        padded=rule.cut is not None and rule.sources[0].shape[rule.cut] == "vocabulary",
        exported=exported,
    )


def _layer(
    megatron: str, *sources: tuple[str, tuple[str, ...]], cut: int | None = None, interleaved: bool = False
) -> Rule:
    return Rule(
        megatron=LAYER_PREFIX + "{layer}." + megatron,
        sources=tuple(Source("model.layers.{layer}." + name, shape) for name, shape in sources),
        cut=cut,
        interleaved=interleaved,
    )


_EMBEDDING_SOURCE = Source("model.embed_tokens.weight", ("vocabulary", "hidden"))
_EMBEDDING = Rule(EMBEDDING, (_EMBEDDING_SOURCE,), cut=0)
_TIED_OUTPUT = Rule("output_layer.weight", (_EMBEDDING_SOURCE,), cut=0)
_OUTPUT = Rule("output_layer.weight", (Source("lm_head.weight", ("vocabulary", "hidden")),), cut=0)
_FINAL_NORM = Rule("decoder.final_layernorm.weight", (Source("model.norm.weight", ("hidden",)),), cut=None)

_QKV_BIAS = _layer(
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", ("query",)),
    ("self_attn.k_proj.bias", ("key_value",)),
    ("self_attn.v_proj.bias", ("key_value",)),
    cut=0,
    interleaved=True,
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", ("head",))),
    _layer("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", ("head",))),
)
_DENSE_LAYER = (
    _layer("input_layernorm.weight", ("input_layernorm.weight", ("hidden",))),
    _layer(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("key_value", "hidden")),
        ("self_attn.v_proj.weight", ("key_value", "hidden")),
        cut=0,
        interleaved=True,
    ),
    _layer("self_attention.linear_proj.weight", ("self_attn.o_proj.weight", ("hidden", "query")), cut=1),
    _layer("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", ("hidden",))),
    _layer(
        "mlp.linear_fc1.weight",
        ("mlp.gate_proj.weight", ("ffn", "hidden")),
        ("mlp.up_proj.weight", ("ffn", "hidden")),
        cut=0,
    ),
    _layer("mlp.linear_fc2.weight", ("mlp.down_proj.weight", ("hidden", "ffn")), cut=1),
)

ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            "Qwen2ForCausalLM",
            layer_rules=(*_DENSE_LAYER, _QKV_BIAS),
            defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
            qkv_bias=True,
        ),
        Architecture(
            "Qwen3ForCausalLM",
            layer_rules=(*_DENSE_LAYER, *_QK_NORM),
            defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
            qk_norm=True,
        ),
        Architecture(
            "LlamaForCausalLM",
            layer_rules=_DENSE_LAYER,
            defaults={"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
        ),
    )
}
