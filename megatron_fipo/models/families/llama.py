"""Llama 2 and 3, and the many models in the Llama format."""

from megatron_fipo.models.family import Family
from megatron_fipo.models.kinds import or_null, whole
from megatron_fipo.models.rules import DENSE_LAYER

FAMILY = Family(
    architecture="LlamaForCausalLM",
    model_type="llama",
    layer=DENSE_LAYER,
    defaults={"max_position_embeddings": 2048, "num_key_value_heads": None},
    keys={"head_dim": or_null(whole(2, 2**16))},
    heads_divide_hidden=True,  # transformers refuses the file otherwise
)
