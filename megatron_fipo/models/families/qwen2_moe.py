"""Qwen2 and Qwen1.5 with a mixture of experts (57B-A14B, A2.7B): one more expert gets every token, by a gate."""

from megatron_fipo.models.experts import LAYER_KEYS, NUMBER, ROUTER_KEYS, ExpertKeys
from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import BOOLEAN, only, or_null, whole
from megatron_fipo.models.rules import (
    ATTENTION,
    DENSE_LAYER,
    EXPERT,
    PROJECTIONS,
    QKV_BIAS,
    gated_feed_forward,
    layer_rule,
    router,
)

FAMILY = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    layer=(*DENSE_LAYER, QKV_BIAS),
    expert_layer=(
        *ATTENTION,
        QKV_BIAS,
        router("mlp.gate"),
        *gated_feed_forward("mlp.shared_experts", "mlp.shared_expert", PROJECTIONS, "shared_ffn"),
        layer_rule("mlp.shared_experts.gate_weight", ("mlp.shared_expert_gate.weight", ("one", "hidden"))),
        *gated_feed_forward(EXPERT, "mlp.experts.{expert}", PROJECTIONS, "expert_ffn"),
    ),
    experts=ExpertKeys(
        ("num_experts",),
        "moe_intermediate_size",
        normalized="norm_topk_prob",
        shared_ffn_hidden_size="shared_expert_intermediate_size",
    ),
    defaults={
        "max_position_embeddings": 32768,
        "num_experts": 60,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False,
    },
    keys={
        **ROUTER_KEYS,
        **LAYER_KEYS,
        "num_experts": NUMBER,
        "moe_intermediate_size": whole(1, 2**24),
        "shared_expert_intermediate_size": whole(1, 2**24),
        "num_key_value_heads": whole(1, 2**16),
        "norm_topk_prob": BOOLEAN,
        "qkv_bias": only(True),
        # Read only if use_sliding_window is true, which is refused.
        "sliding_window": or_null(whole(0, 2**31 - 1)),
    },
    free_head_dim=False,
    heads_divide_hidden=True,
)
