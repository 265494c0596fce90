"""Every key that a model's config.json may have: understood, refused unless it has no effect, or harmless.

A key that is in none of the three tables is refused, since nobody has checked what it does to the model. To allow a
key, find out whether the model class of transformers or of vLLM reads it, and add it to the right table.
"""

from collections.abc import Mapping

from megatron_fipo.models.families import FAMILIES
from megatron_fipo.models.kinds import (
    BOOLEAN,
    DICTIONARY,
    UNUSED_NUMBER,
    Kind,
    either,
    list_of,
    number,
    only,
    or_null,
    shown,
    whole,
)

__all__ = ["HARMLESS", "HARMLESS_KEYS", "REFUSED", "ROUTER_BIASES", "UNDERSTOOD", "shown"]

_TOKEN = whole(0, 2**31 - 1)
_DTYPE = only("float32", "bfloat16", "float16", "float64", None)

UNDERSTOOD: Mapping[str, Kind] = {
    # The architecture and its sizes.
    "architectures": Kind(
        f"a list with one of {', '.join(FAMILIES)}",
        lambda value: isinstance(value, list) and len(value) == 1 and value[0] in list(FAMILIES),
    ),
    "model_type": only(*(family.model_type for family in FAMILIES.values())),
    "num_hidden_layers": whole(1, 1000),
    "hidden_size": whole(1, 2**20),
    "intermediate_size": whole(1, 2**24),
    "num_attention_heads": whole(1, 2**16),
    "num_key_value_heads": or_null(whole(1, 2**16)),
    "head_dim": whole(2, 2**16),
    "vocab_size": whole(1, 2**24),
    "tie_word_embeddings": BOOLEAN,
    "rms_norm_eps": number(0, 1),
    "eos_token_id": or_null(either(_TOKEN, list_of(_TOKEN))),
    # Positions. models/rope.py reads the nested values.
    "max_position_embeddings": whole(1, 10**9),
    "original_max_position_embeddings": whole(1, 10**9),
    "rope_theta": number(1, 1e15),
    "rope_parameters": DICTIONARY,
    "rope_scaling": DICTIONARY,
    "partial_rotary_factor": only(1.0, None),
    # Options of which only one value is supported here.
    "hidden_act": only("silu"),
    "attention_bias": only(False),
    "mlp_bias": only(False),
    "use_sliding_window": only(False),
    "layer_types": or_null(list_of(only("full_attention"))),
    "sliding_window": only(None),
    "max_window_layers": whole(0, 2**31 - 1),
    # The type of the stored weights. A run uses model.dtype and rollout.dtype instead.
    "dtype": _DTYPE,
    "torch_dtype": _DTYPE,
    # Not used, but with other values transformers refuses the whole file.
    "attention_dropout": UNUSED_NUMBER,
    "initializer_range": Kind("a number from 0.0 to 1.0", lambda value: type(value) is float and 0 <= value <= 1),
    "bos_token_id": or_null(whole(-1, 2**31 - 1)),
}
"""Keys that are read, with the supported values. A missing key has its value from `Family.defaults`, or null.

A family can give keys of this table and the next another meaning (`Family.keys`).
"""

_NONE = only(None)
_OFF = only(None, False)
_ONE = only(None, 1)
_ZERO = only(None, 0)
_EMPTY = only(None, {}, [])

ROUTER_BIASES: Mapping[str, Kind] = {
    "topk_method": Kind("another method", lambda value: value != "noaux_tc"),
    "use_routing_bias": _OFF,
    "use_expert_bias": _OFF,
    "moe_router_enable_expert_bias": _OFF,
}
"""Keys of models whose routers add a bias to choose, which training moves towards an even load."""

REFUSED: Mapping[str, Kind] = {
    **ROUTER_BIASES,
    "topk_method": only(None, "greedy"),
    # Weights that are not plain numbers, or another model's code.
    "quantization_config": _NONE,
    "quantization": _NONE,
    "compression_config": _NONE,
    "auto_map": _NONE,
    "pruned_heads": only(None, {}),
    "per_layer_config": only(None, {}),
    "block_configs": _EMPTY,
    "vision_config": _NONE,
    "text_config": _NONE,
    # Experts.
    "num_experts": only(0),
    "num_local_experts": only(0),
    "n_routed_experts": only(0),
    "num_experts_per_tok": _ZERO,
    "moe_intermediate_size": _ZERO,
    "shared_expert_intermediate_size": _ZERO,
    "num_nextn_predict_layers": _ZERO,
    # Factors in the forward pass.
    "logit_scale": only(1),
    "logits_scaling": _ONE,
    "residual_multiplier": _ONE,
    "embedding_multiplier": _ONE,
    "attention_multiplier": _NONE,
    "query_pre_attn_scalar": _NONE,
    "attn_logit_softcapping": _NONE,
    "final_logit_softcapping": _NONE,
    "attn_temperature_tuning": _OFF,
    "clip_qkv": _NONE,
    "activation": only(None, "swiglu"),
    # Attention of another kind.
    "is_causal": only(True),
    "use_bidirectional_attention": _OFF,
    "is_decoder": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "attention_chunk_size": _NONE,
    "dual_chunk_attention_config": _NONE,
    "qk_norm": _OFF,
    "use_qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "bias": _OFF,
    "qkv_bias": _NONE,
    # Positions of another kind.
    "rope_interleaved": _OFF,
    "rotary_pct": _ONE,
    "rotary_percent": _ONE,
    "rotary_dim": _NONE,
    "rope_local_base_freq": _NONE,
    "use_mrope": _OFF,
    "mrope_section": _NONE,
    "no_rope_layers": _EMPTY,
    "no_rope_layer_interval": _NONE,
    "alibi": _OFF,
    "position_embedding_type": only(None, "rope"),
}
"""Keys that would change the model, each with the values that do not. vLLM does not treat every null as absent."""

HARMLESS: Mapping[str, tuple[str, ...]] = {
    "Dropout and initialisation: a run does not initialise weights and trains without dropout": (
        "hidden_dropout",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "resid_pdrop",
        "embd_pdrop",
    ),
    "Tokens: only the tokenizer reads these, if anything does": (
        "pad_token_id",
        "sep_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "tokenizer_class",
        "prefix",
        "add_bos_token",
        "add_eos_token",
        "chat_template",
        "model_max_length",
        "max_sequence_length",
    ),
    "Sampling: a run sends its own settings with every request": (
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "output_scores",
        "return_dict_in_generate",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
    ),
    "How the same numbers are computed, or what is returned in addition": (
        "use_cache",
        "return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "pretraining_tp",
        "gradient_checkpointing",
        "neftune_noise_alpha",
        "attn_implementation",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_attn_implementation_internal",
        "_flash_attn_2_enabled",
        "use_flash_attn",
        "torchscript",
        "use_bfloat16",
        "tf_legacy_loss",
        "tie_encoder_decoder",
        "cross_attention_hidden_size",
    ),
    "Classification heads, which a causal language model does not have": (
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "classifier_dropout",
        "finetuning_task",
        "task_specific_params",
    ),
    "Where the file comes from": (
        "_name_or_path",
        "_model_name_or_path",
        "_commit_hash",
        "transformers_version",
        "transformers.js_config",
        "is_llama_config",
        "unsloth_version",
        "unsloth_fixed",
    ),
}
"""Keys that do not change what a run computes, by the reason why."""

HARMLESS_KEYS = frozenset(key for keys in HARMLESS.values() for key in keys)
