"""A small config.json of each family, and what transformers reads from one."""

import copy
import json
from pathlib import Path
from typing import Any

import transformers

from megatron_fipo.errors import ConfigError
from megatron_fipo.models.experts import ExpertKeys, Experts
from megatron_fipo.models.families import FAMILIES
from megatron_fipo.models.model_config import ModelConfig, read_architecture
from megatron_fipo.models.rope import LinearScaling, Llama3Scaling
from tests.config.published import LLAMA3

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 128,
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        **SIZES,
        "rope_theta": 1000000.0,
        "sliding_window": 128,
        "use_sliding_window": False,
    },
    "qwen3": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **SIZES,
        "head_dim": 32,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **SIZES,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
    },
    "mistral": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES, "sliding_window": 8},
    "gemma": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        **SIZES,
        "head_dim": 32,
        "hidden_act": "gelu",
    },
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        **SIZES,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [0],
    },
    "qwen2_moe": {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **SIZES,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 40,
        "decoder_sparse_step": 2,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **SIZES,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
    },
}


def read(directory: Path, config: dict[str, Any]) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return read_architecture(directory)


def judge(directory: Path, config: dict[str, Any]) -> ConfigError | None:
    """Return None if the model configuration is the same as transformers'; else the refusal, which is one line."""
    try:
        model_config = read(directory, config)
    except ConfigError as refusal:
        assert "\n" not in str(refusal) and str(directory / "config.json") in str(refusal)
        assert len(str(refusal)) < 800
        return refusal
    assert model_config == transformers_model_config(config), config
    return None


def transformers_model_config(config: dict[str, Any]) -> ModelConfig:
    """Return the same record, read by transformers, which fills in its own defaults."""
    family = FAMILIES[config["architectures"][0]]
    kind = family.architecture.replace("ForCausalLM", "Config")
    found = getattr(transformers, kind).from_dict(copy.deepcopy(config))
    assert found.hidden_act == {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[family.activation]
    assert family.qkv_bias or not getattr(found, "attention_bias", False)
    assert getattr(found, "qkv_bias", None) is not False
    assert not getattr(found, "attention_out_bias", False) and not getattr(found, "mlp_bias", False)
    assert family.windowed or not getattr(found, "use_sliding_window", False)
    assert set(getattr(found, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    rope = dict(found.rope_parameters)
    theta, rope_type = rope.pop("rope_theta"), rope.pop("rope_type")
    assert rope.pop("partial_rotary_factor", 1) == 1
    rope.pop("type", None)
    scaling = {"default": lambda **none: None, "linear": LinearScaling, "llama3": Llama3Scaling}[rope_type](**rope)
    assert scaling is not None or not rope
    eos = found.eos_token_id if "eos_token_id" in config else None
    return ModelConfig(
        architecture=config["architectures"][0],
        num_layers=found.num_hidden_layers,
        hidden_size=found.hidden_size,
        num_attention_heads=found.num_attention_heads,
        num_query_groups=found.num_key_value_heads,
        head_dim=getattr(found, "head_dim", None) or found.hidden_size // found.num_attention_heads,
        ffn_hidden_size=found.intermediate_size,
        vocab_size=found.vocab_size,
        tied_embeddings=found.tie_word_embeddings,
        rms_norm_eps=found.rms_norm_eps,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=found.max_position_embeddings,
        eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        window=getattr(found, "sliding_window", None) or None,
        experts=transformers_experts(found, family.experts) if family.experts else None,
    )


def transformers_experts(found: Any, keys: ExpertKeys) -> Experts:
    """Return the same record, with the layers by the rule in transformers' decoder layers."""
    dense, step = getattr(found, "mlp_only_layers", []), getattr(found, "decoder_sparse_step", 1)
    assert not getattr(found, "router_jitter_noise", 0)
    return Experts(
        number=found.num_experts,
        per_token=found.num_experts_per_tok,
        ffn_hidden_size=getattr(found, keys.ffn_hidden_size),
        normalized=getattr(found, "norm_topk_prob", True),
        layers=tuple(index not in dense and (index + 1) % step == 0 for index in range(found.num_hidden_layers)),
        shared_ffn_hidden_size=found.shared_expert_intermediate_size if keys.shared_ffn_hidden_size else 0,
    )
