"""Gemma, the first: GeGLU, norms of 1 + weight, scaled input embeddings that are also the output layer."""

from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import only, whole
from megatron_fipo.models.rules import DENSE_LAYER

FAMILY = Family(
    architecture="GemmaForCausalLM",
    model_type="gemma",
    layer=DENSE_LAYER,
    defaults={"max_position_embeddings": 8192, "head_dim": 256, "tie_word_embeddings": True},
    keys={
        # The released files say gelu and mean its tanh approximation. transformers and vLLM use that for both values.
        "hidden_act": only("gelu_pytorch_tanh", "gelu"),
        "hidden_activation": only(None, "gelu_pytorch_tanh"),
        "num_key_value_heads": whole(1, 2**16),
    },
    activation="gelu_tanh",
    zero_centered_norms=True,
    scaled_embedding=True,
)
