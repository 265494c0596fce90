"""Mixtral 8x7B and 8x22B: a Mistral without a window, every feed-forward a mixture of experts."""

from megatron_fipo.models.experts import NUMBER, ROUTER_KEYS, ExpertKeys
from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import Kind, or_null, whole
from megatron_fipo.models.rules import ATTENTION, DENSE_LAYER, EXPERT, gated_feed_forward, router

FAMILY = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    layer=DENSE_LAYER,
    expert_layer=(
        *ATTENTION,
        router("block_sparse_moe.gate"),
        *gated_feed_forward(EXPERT, "block_sparse_moe.experts.{expert}", ("w1", "w3", "w2"), "expert_ffn"),
    ),
    # transformers takes either name.
    experts=ExpertKeys(("num_local_experts", "num_experts"), "intermediate_size"),
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 2,
    },
    keys={
        **ROUTER_KEYS,
        "num_local_experts": NUMBER,
        "num_experts": NUMBER,
        "num_key_value_heads": whole(1, 2**16),
        "head_dim": or_null(whole(2, 2**16)),
        # Noise on the router's input in training, which the engine does not have.
        "router_jitter_noise": Kind("0.0", lambda value: type(value) is float and value == 0),
    },
    default_rope_theta=1e6,
)
