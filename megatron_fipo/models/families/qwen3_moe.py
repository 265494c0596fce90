"""Qwen3 with a mixture of experts (30B-A3B, 235B-A22B)."""

from megatron_fipo.models.experts import LAYER_KEYS, NUMBER, ROUTER_KEYS, ExpertKeys
from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import BOOLEAN, or_null, whole
from megatron_fipo.models.rules import ATTENTION, DENSE_LAYER, EXPERT, PROJECTIONS, QK_NORM, gated_feed_forward, router

FAMILY = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    layer=(*DENSE_LAYER, *QK_NORM),
    expert_layer=(
        *ATTENTION,
        *QK_NORM,
        router("mlp.gate"),
        *gated_feed_forward(EXPERT, "mlp.experts.{expert}", PROJECTIONS, "expert_ffn"),
    ),
    # transformers 4 writes the first name, and 5 the second.
    experts=ExpertKeys(("num_experts", "num_local_experts"), "moe_intermediate_size", normalized="norm_topk_prob"),
    defaults={
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    keys={
        **ROUTER_KEYS,
        **LAYER_KEYS,
        "num_experts": NUMBER,
        "num_local_experts": NUMBER,
        "moe_intermediate_size": whole(1, 2**24),
        "num_key_value_heads": whole(1, 2**16),
        "norm_topk_prob": BOOLEAN,
        # Read only if use_sliding_window is true, which is refused.
        "sliding_window": or_null(whole(0, 2**31 - 1)),
    },
)
