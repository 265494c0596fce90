"""Mistral 7B, NeMo and Small, dense: a Llama whose layers attend to a window if config.json has one."""

from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import only, or_null, whole
from megatron_fipo.models.rules import DENSE_LAYER

FAMILY = Family(
    architecture="MistralForCausalLM",
    model_type="mistral",
    layer=DENSE_LAYER,
    defaults={"max_position_embeddings": 131072, "sliding_window": 4096},
    keys={
        "num_key_value_heads": whole(1, 2**16),
        "head_dim": or_null(whole(2, 2**16)),
        "sliding_window": or_null(whole(1, 2**31 - 1)),
        # For Mistral, transformers reads neither of these, and vLLM reads only the second.
        "use_sliding_window": only(True),
        "layer_types": only(None),
    },
    windowed=True,
)
