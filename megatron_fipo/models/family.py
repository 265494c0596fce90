"""The record in which each file of families/ describes its model family. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fipo.models.experts import ExpertKeys
from megatron_fipo.models.kinds import Kind
from megatron_fipo.models.rules import QK_NORM, QKV_BIAS, Rule


@dataclass(frozen=True)
class Family:
    """A model family. All families have the rest in common: RMSNorm, rotary embeddings, gated feed-forward."""

    architecture: str
    """The value in config.json's `architectures`, such as Qwen2ForCausalLM."""
    model_type: str
    """The value of config.json's `model_type`."""
    layer: tuple[Rule, ...]
    """The weights of one layer: how Hugging Face tensors become Megatron-Core parameters."""
    expert_layer: tuple[Rule, ...] = ()
    """The same for a layer whose feed-forward is a mixture of experts."""
    experts: ExpertKeys | None = None
    """The keys of config.json that describe the experts; None: no layer has any."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Values that transformers uses for missing keys. None for `num_key_value_heads`: the number of query heads."""
    keys: Mapping[str, Kind] = field(default_factory=dict)
    """Keys of only this family, or with another meaning than in `models/keys.py`, with their allowed values."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the feed-forward's gate. gelu_tanh is the tanh approximation of GELU."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    scaled_embedding: bool = False
    """Whether token embeddings are multiplied by √hidden_size, rounded to the weights' type, before the first layer."""
    default_rope_theta: float = 10000.0
    """Base of the rotary frequencies where config.json gives none."""
    windowed: bool = False
    """Whether every layer attends to only `sliding_window` tokens, if config.json has this key and it is not null."""
    free_head_dim: bool = True
    """Whether a head's width may differ from hidden size ÷ heads. vLLM's Qwen2 does not read head_dim."""
    heads_divide_hidden: bool = False
    """Whether the hidden size has to be a multiple of the number of heads, even if head_dim is given."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return QKV_BIAS in self.layer

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key go through a norm."""
        return set(QK_NORM) <= set(self.layer)
