"""Rules of how Hugging Face tensors become Megatron-Core parameters. Each family is a list of such rules.

Names are those of Megatron-Core's local layer specification. `models/parameters.py` fills in layers and sizes.
"""

from dataclasses import dataclass

LAYER_PREFIX = "decoder.layers."


@dataclass(frozen=True)
class Source:
    """One Hugging Face tensor of a rule: its name, with {layer} and {expert}, and the names of its dimensions.

    Dimensions are vocabulary, hidden, query, key_value, head and ffn; of experts also expert_ffn, shared_ffn, experts
    and one.
    """

    name: str
    shape: tuple[str, ...]


@dataclass(frozen=True)
class Rule:
    """How one Megatron-Core parameter is formed from Hugging Face tensors."""

    megatron: str
    sources: tuple[Source, ...]
    cut: int | None
    """Dimension of each source that tensor parallelism cuts into equal parts; None: every rank has the whole tensor."""
    interleaved: bool = False
    """Whether a rank's parts of several sources are joined by head group on dimension 0, or one after the other."""

    @property
    def of_each_expert(self) -> bool:
        """Whether every expert has a parameter of its own by this rule."""
        return "{expert}" in self.megatron


def layer_rule(
    megatron: str, *sources: tuple[str, tuple[str, ...]], cut: int | None = None, interleaved: bool = False
) -> Rule:
    """Return a rule that applies to every layer. `megatron` and the names in `sources` are relative to the layer."""
    return Rule(
        megatron=LAYER_PREFIX + "{layer}." + megatron,
        sources=tuple(Source("model.layers.{layer}." + name, shape) for name, shape in sources),
        cut=cut,
        interleaved=interleaved,
    )


QKV_BIAS = layer_rule(
    "self_attention.linear_qkv.bias",
    ("self_attn.q_proj.bias", ("query",)),
    ("self_attn.k_proj.bias", ("key_value",)),
    ("self_attn.v_proj.bias", ("key_value",)),
    cut=0,
    interleaved=True,
)
"""Bias of the query, key and value projections."""

QK_NORM = (
    layer_rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight", ("head",))),
    layer_rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight", ("head",))),
)
"""A norm of each head's query and key."""

ATTENTION = (
    layer_rule("input_layernorm.weight", ("input_layernorm.weight", ("hidden",))),
    layer_rule(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", ("query", "hidden")),
        ("self_attn.k_proj.weight", ("key_value", "hidden")),
        ("self_attn.v_proj.weight", ("key_value", "hidden")),
        cut=0,
        interleaved=True,
    ),
    layer_rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight", ("hidden", "query")), cut=1),
    layer_rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight", ("hidden",))),
)
"""Two norms, and grouped-query attention without biases between them."""


def gated_feed_forward(megatron: str, prefix: str, names: tuple[str, str, str], width: str) -> tuple[Rule, Rule]:
    """Return the rules of a feed-forward: `names` are those of its gate, up and down projections in Hugging Face."""
    gate, up, down = (f"{prefix}.{name}.weight" for name in names)
    return (
        layer_rule(f"{megatron}.linear_fc1.weight", (gate, (width, "hidden")), (up, (width, "hidden")), cut=0),
        layer_rule(f"{megatron}.linear_fc2.weight", (down, ("hidden", width)), cut=1),
    )


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The names that most families give to a feed-forward's parts."""


def router(name: str) -> Rule:
    """Return the rule of the matrix that scores the experts for a token: `name` is its name in Hugging Face."""
    return layer_rule("mlp.router.weight", (f"{name}.weight", ("experts", "hidden")))


EXPERT = "mlp.experts.local_experts.{expert}"
"""Megatron-Core's name of an expert, here with its number in the whole model."""

DENSE_LAYER = (
    *ATTENTION,
    *gated_feed_forward("mlp", "mlp", PROJECTIONS, "ffn"),
)
"""Attention, and one gated feed-forward."""
