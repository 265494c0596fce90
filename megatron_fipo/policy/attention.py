"""Core attention and norm for Megatron-Core's local layers, on torch's own kernels: the CPU, and a GPU without TE.

Megatron-Core's local attention refuses context parallelism and packed sequences and materialises the full score
matrix. This one is torch's scaled_dot_product_attention; with context parallelism keys and values are gathered over the
group and the mask follows the zigzag order in which each rank holds chunks r and 2C−1−r of every sequence.
"""

import math
from itertools import pairwise
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_fipo.algorithm.zigzag import zigzag_positions


class TorchAttention(MegatronModule):
    """Causal grouped-query attention, over a window of tokens or all; padding behind a sequence needs no mask."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **_: Any,
    ):
        super().__init__(config=config)
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp", "cp"])
        self.context_group = groups.cp
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.window = None if config.window_size is None else config.window_size[0] + 1

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **_: Any,
    ) -> Tensor:
        """Attention of one micro-batch.

        Args:
            query, key, value: [local tokens, rows, heads or key-value groups, head size]; packed ones without rows.
            packed_seq_params: where packed sequences begin and end; None where each row is one sequence.

        Returns:
            [local tokens, rows, heads × head size], one row if packed.
        """
        ranks = self.context_group.size()
        if ranks > 1:
            width = key.shape[-1]
            # The backward of this gather is the reduce-scatter that key and value gradients need.
            both = gather_from_sequence_parallel_region(torch.cat([key, value], -1), group=self.context_group)
            key, value = both.split([width, value.shape[-1]], -1)
        if packed_seq_params is None:
            return self._attend(query, key, value)
        # One by one: torch has no kernel for packed sequences on a CPU, and a mask of them all would be quadratic.
        key, value = (tensor.unflatten(0, (ranks, -1)) for tensor in (key, value))
        offsets = (packed_seq_params.cu_seqlens_q // ranks).tolist()
        parts = []
        for start, end in pairwise(offsets):
            keys, values = (tensor[:, start:end].flatten(0, 1).unsqueeze(1) for tensor in (key, value))
            parts.append(self._attend(query[start:end].unsqueeze(1), keys, values))
        return torch.cat(parts)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Of [tokens, rows, heads, head size], a row a sequence; keys and values of all context-parallel ranks."""
        tokens, rows = query.shape[:2]
        mask = self._mask(tokens, query.device)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return output.permute(2, 0, 1, 3).reshape(tokens, rows, -1)

    def _mask(self, tokens: int, device: torch.device) -> Tensor | None:
        """Which keys each of this rank's `tokens` queries attends to, [tokens, all tokens]; None: those before it."""
        ranks = self.context_group.size()
        if ranks == 1 and self.window is None:
            return None
        positions = torch.arange(tokens, device=device)[None] if ranks == 1 else zigzag_positions(tokens, ranks, device)
        back = positions[self.context_group.rank()][:, None] - positions.flatten()[None, :]
        return (back >= 0) & (back < (self.window or len(back) * ranks))


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron-Core's signature, its weight as it is or one less than what it multiplies by.

    Under sequence parallelism each rank sees a part of the tokens, and the mark on the weight is what makes
    Megatron-Core sum its gradient over the group; without it the loss is right and that gradient is not.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.zero_centered = config.layernorm_zero_centered_gamma

    def forward(self, x: Tensor) -> Tensor:
        """Of [..., hidden size], in its type. 1 + weight is taken in fp32: bfloat16 has no 1 + 2⁻⁸."""
        if not self.zero_centered:
            return super().forward(x)
        weight = 1 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), self.normalized_shape, weight, self.eps).type_as(x)
