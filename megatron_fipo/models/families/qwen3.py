"""Qwen3, dense."""

from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import or_null, whole
from megatron_fipo.models.rules import DENSE_LAYER, QK_NORM

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    layer=(*DENSE_LAYER, *QK_NORM),
    defaults={"max_position_embeddings": 32768, "head_dim": 128},
    # Read only if use_sliding_window is true, which is refused: vLLM does not support a window for some of the layers.
    keys={"sliding_window": or_null(whole(0, 2**31 - 1))},
)
