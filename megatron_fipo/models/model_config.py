"""Read and check a model's config.json. No other module reads this file. Imports no torch.

Every key is understood, known to be harmless, or refused (`keys.py`, and each family's own file). Every value is
checked before anything is built. Preflight, planner, training, conversion and the engines' plugin all use
`read_architecture`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.experts import Experts, ExpertsProblem, read_experts
from megatron_fipo.models.families import FAMILIES
from megatron_fipo.models.family import Family
from megatron_fipo.models.keys import HARMLESS_KEYS, REFUSED, ROUTER_BIASES, UNDERSTOOD
from megatron_fipo.models.kinds import shown
from megatron_fipo.models.rope import Llama3Scaling, RopeProblem, RopeScaling, read_rope
from megatron_fipo.models.rules import Rule

QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "quantization_config.json", "hf_quant_config.json")
"""Files that AutoGPTQ, AutoAWQ and NVIDIA's ModelOpt write beside quantised weights."""

ADAPTER_FILE = "adapter_config.json"
"""The file that PEFT writes beside an adapter. transformers would add the adapter to the weights, vLLM would not."""

QUANTIZED_REMEDY = "a directory with the original weights, in float32, bfloat16 or float16"

_LARGEST_FILE = 8 << 20
_REQUIRED = (
    "architectures",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
_DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}


@dataclass(frozen=True)
class ModelConfig:
    """The contents of config.json: every value that determines the model's weights or its forward pass."""

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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    max_position_embeddings: int
    eos_token_ids: tuple[int, ...]
    window: int | None = None
    """Number of tokens that a token attends to in every layer, including itself; None: all tokens before it."""
    experts: Experts | None = None
    """The mixture of experts; None: every layer is dense."""

    @property
    def family(self) -> Family:
        """The properties that all models of the architecture have in common."""
        return FAMILIES[self.architecture]

    @property
    def original_context(self) -> int:
        """Length of the context for which the rotary frequencies were made, before any scaling, in tokens."""
        if isinstance(self.rope_scaling, Llama3Scaling):
            return self.rope_scaling.original_max_position_embeddings
        return self.max_position_embeddings

    @property
    def has_dense_layers(self) -> bool:
        """Whether any layer has a feed-forward without experts."""
        return self.experts is None or not self.experts.everywhere

    def layer_rules(self, layer: int) -> tuple[Rule, ...]:
        """The family's rules for a layer, dense or with experts."""
        return self.family.expert_layer if self.experts and self.experts.layers[layer] else self.family.layer

    def padded_vocab_size(self, tensor_parallel_size: int) -> int:
        """The vocabulary rounded up to a multiple of the tensor-parallel size.

        The extra rows are zeros on load and dropped on export. Their logits are 0, not −∞, so code that normalises over
        the vocabulary has to leave them out.
        """
        return math.ceil(self.vocab_size / tensor_parallel_size) * tensor_parallel_size

    def dimension(self, name: str) -> int:
        """Return the length of a dimension, given its name in the tables."""
        experts = self.experts
        return {
            "vocabulary": self.vocab_size,
            "hidden": self.hidden_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_query_groups * self.head_dim,
            "head": self.head_dim,
            "ffn": self.ffn_hidden_size,
            "expert_ffn": experts.ffn_hidden_size if experts else 0,
            "shared_ffn": experts.shared_ffn_hidden_size if experts else 0,
            "experts": experts.number if experts else 0,
            "one": 1,
        }[name]


def read_architecture(model_dir: str | Path) -> ModelConfig:
    """Read the config.json, of transformers 4 or 5, of the Hugging Face model in `model_dir`.

    Raises ConfigError, naming the file and the key, if the file is not a config.json, a key is not known, a value is
    not supported, or the weights are quantised.
    """
    path = Path(model_dir) / "config.json"
    _check_files_beside(path.parent)
    config = _read(path)
    family = _family(path, config)
    for key, value in config.items():
        _check_key(path, family, key, value)
    config = _DEFAULTS | dict(family.defaults) | config
    try:
        rope_theta, rope_scaling = read_rope(config, family.default_rope_theta)
        experts = read_experts(config, family.experts) if family.experts else None
    except (RopeProblem, ExpertsProblem) as error:
        raise _refusal(path, _name(error.key), error.problem, error.remedy) from None
    heads, groups, head_dim = _heads(path, family, config)
    _check_layers(path, config)
    eos = config.get("eos_token_id")
    return ModelConfig(
        architecture=config["architectures"][0],
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=head_dim,
        ffn_hidden_size=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        tied_embeddings=config["tie_word_embeddings"],
        rms_norm_eps=float(config["rms_norm_eps"]),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        max_position_embeddings=config["max_position_embeddings"],
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        window=config["sliding_window"] if family.windowed else None,
        experts=experts,
    )


def _check_files_beside(directory: Path) -> None:
    for name in QUANTIZATION_FILES:
        if os.path.exists(directory / name):
            raise ConfigError("model.path", f"{directory} is quantised: it holds {name}", QUANTIZED_REMEDY)
    if os.path.exists(directory / ADAPTER_FILE):
        problem = f"{directory} holds {ADAPTER_FILE}, and adapters are not read"
        raise ConfigError("model.path", problem, "merge the adapter into the weights and remove the file")


def _refusal(path: Path, key: str, problem: str, remedy: str) -> ConfigError:
    return ConfigError("model.path", f"{path}: {key} {problem}", remedy)


def _read(path: Path) -> dict[str, Any]:
    """Read the object in the file. NaN, infinity and numbers with too many digits are left for the keys' own checks."""
    remedy = "config.json is a JSON object, as transformers writes it"
    if not os.path.isfile(path):  # unlike Path.is_file, it never raises
        raise ConfigError("model.path", f"{path} does not exist", "give a Hugging Face model directory")
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError("model.path", f"{path} has more than {_LARGEST_FILE >> 20} MiB", remedy)
        text = path.read_text(encoding="utf-8")
        config = json.loads(
            text,
            object_pairs_hook=lambda pairs: _without_doubles(path, pairs),
            parse_int=lambda digits: int(digits) if len(digits) < 32 else math.inf,
        )
    except (OSError, ValueError) as error:
        raise ConfigError("model.path", f"{path} cannot be read, it is not JSON: {_line(str(error))}", remedy) from None
    except RecursionError:
        raise ConfigError("model.path", f"{path} is nested too deeply", remedy) from None
    if not isinstance(config, dict):
        raise ConfigError("model.path", f"{path} is not JSON of the right kind: {shown(config)}", remedy)
    return config


def _without_doubles(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _refusal(path, _name(key), "is there twice", "keep one of the two")
        found[key] = value
    return found


def _check_router(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a router whose bias is updated beside the gradient, whatever the family is."""
    for key, off in ROUTER_BIASES.items():
        if not off.accepts(config.get(key)):
            raise _refusal(
                path,
                key,
                f"= {shown(config[key])}: a bias chooses this model's experts, which is updated beside the gradient",
                "a router without it: nothing here would keep it alike in trainer and servers",
            )


def _family(path: Path, config: Mapping[str, Any]) -> Family:
    _check_router(path, config)
    for key in _REQUIRED:
        if config.get(key) is None:
            raise _refusal(path, key, "is missing", UNDERSTOOD[key].expected)
    named, listed = config["architectures"], UNDERSTOOD["architectures"]
    if isinstance(named, list) and len(named) == 1 and named[0] not in list(FAMILIES):
        name = _name(named[0]) if isinstance(named[0], str) else shown(named[0])
        problem = f"names one that is unknown: architecture {name} is not supported"
        raise _refusal(path, "architectures", problem, f"supported: {', '.join(FAMILIES)}")
    if not listed.accepts(named):
        raise _refusal(path, "architectures", f"= {shown(named)} is not supported", f"it must be {listed.expected}")
    architecture = named[0]
    family = FAMILIES[architecture]
    if config.get("model_type", family.model_type) != family.model_type:
        problem = f"is {shown(config['model_type'])}, but architectures says {architecture}"
        raise _refusal(path, "model_type", problem, family.model_type)
    return family


def _check_key(path: Path, family: Family, key: str, value: Any) -> None:
    kind = family.keys.get(key) or UNDERSTOOD.get(key) or REFUSED.get(key)
    if kind is not None and not kind.accepts(value):
        if key in REFUSED and "quant" in key:
            raise _refusal(path, key, f"= {shown(value)}: the weights are quantised", QUANTIZED_REMEDY)
        raise _refusal(path, key, f"= {shown(value)} is not supported", f"it must be {kind.expected}")
    if kind is None and key not in HARMLESS_KEYS:
        near = get_close_matches(key[:80], [*UNDERSTOOD, *family.keys, *HARMLESS_KEYS], n=1, cutoff=0.85)
        meant = f"did you mean {near[0]}? " if near else ""
        raise _refusal(
            path,
            _name(key),
            f"= {shown(value)} is a key that is not known, and it may change the model",
            f"{meant}if the model computes the same without it, remove it from the file; docs/models.md lists the keys",
        )


def _heads(path: Path, family: Family, config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the numbers of query heads and key-value heads, and the width of one head."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if "num_key_value_heads" not in config:
        raise _refusal(path, "num_key_value_heads", "is missing", "add it; null is as many as num_attention_heads")
    groups = config["num_key_value_heads"] or heads
    if heads % groups:
        problem = f"= {groups} does not divide num_attention_heads = {heads}"
        raise _refusal(path, "num_key_value_heads", problem, "one that divides them")
    if family.heads_divide_hidden and hidden % heads:
        problem = f"= {heads} does not divide hidden_size = {hidden}"
        raise _refusal(path, "num_attention_heads", problem, "one that divides it")
    head_dim = config.get("head_dim") or hidden // heads
    if not family.free_head_dim and head_dim * heads != hidden:
        problem = f"= {head_dim} is not hidden_size ÷ num_attention_heads, the only width of vLLM's {family.model_type}"
        raise _refusal(path, "head_dim", problem, f"{hidden // heads}")
    if head_dim % 2:
        key = "head_dim" if config.get("head_dim") else "head_dim, hidden_size ÷ num_attention_heads,"
        raise _refusal(path, key, f"= {head_dim} is odd", "an even one: rotary embeddings turn pairs")
    return heads, groups, head_dim


def _check_layers(path: Path, config: Mapping[str, Any]) -> None:
    """Check the keys that describe single layers."""
    kinds, layers = config.get("layer_types"), config["num_hidden_layers"]
    if kinds is not None and len(kinds) != layers:
        problem = f"has {len(kinds)} entries, num_hidden_layers is {layers}"
        raise _refusal(path, "layer_types", problem, "one for each layer")


def _name(key: str) -> str:
    """Return a key as it is, or quoted and shortened if it is not a plain word."""
    plain = len(key) <= 80 and key.isascii() and key.replace(".", "_").replace("-", "_").isidentifier()
    return key if plain else shown(key)


def _line(text: str) -> str:
    return " ".join(text.split())
