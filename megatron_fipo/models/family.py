"""What sets one model family apart: the record that each file of this package fills in. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_fipo.models.kinds import Kind
from megatron_fipo.models.rules import QK_NORM, QKV_BIAS, Rule


@dataclass(frozen=True)
class Family:
    """A model family. What is not said here is the same for all: RMSNorm, rotary embeddings, gated feed-forward."""

    architecture: str
    """The value in config.json's `architectures`, such as Qwen2ForCausalLM."""
    model_type: str
    """The value of config.json's `model_type`."""
    layer: tuple[Rule, ...]
    """The weights of one layer: how Hugging Face tensors become Megatron-Core parameters."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers takes for keys that a config.json leaves out. `num_key_value_heads` None is the query heads."""
    keys: Mapping[str, Kind] = field(default_factory=dict)
    """Keys that mean another thing than in `models/keys.py`, or are this family's own, and their values."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """What the gate of the feed-forward goes through; gelu_tanh is GELU by its approximation with tanh."""
    zero_centered_norms: bool = False
    """Whether norms multiply by 1 + weight."""
    scaled_embedding: bool = False
    """Whether token embeddings are multiplied by √hidden_size, rounded to the weights' type, where they enter."""
    windowed: bool = False
    """Whether config.json's `sliding_window`, unless null, is how many tokens every layer attends to."""
    free_head_dim: bool = True
    """Whether a head's width may differ from hidden size ÷ heads: vLLM's Qwen2 does not read head_dim."""
    heads_divide_hidden: bool = False
    """Whether the number of heads has to divide the hidden size even where head_dim is given."""

    @property
    def qkv_bias(self) -> bool:
        """Whether the query, key and value projections have a bias."""
        return QKV_BIAS in self.layer

    @property
    def qk_norm(self) -> bool:
        """Whether each head's query and key go through a norm."""
        return set(QK_NORM) <= set(self.layer)
