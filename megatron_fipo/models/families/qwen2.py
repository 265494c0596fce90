"""Qwen2 and Qwen2.5, dense."""

from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import or_null, whole
from megatron_fipo.models.rules import DENSE_LAYER, QKV_BIAS

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    model_type="qwen2",
    layer=(*DENSE_LAYER, QKV_BIAS),
    defaults={"max_position_embeddings": 32768},
    # Read only if use_sliding_window is true, which is refused: vLLM does not support a window for some of the layers.
    keys={"sliding_window": or_null(whole(0, 2**31 - 1))},
    free_head_dim=False,
    heads_divide_hidden=True,
)
