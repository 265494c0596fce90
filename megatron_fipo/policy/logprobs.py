"""Log-probabilities of given tokens from vocab-parallel logits, chunked over tokens.

The plain way, log_softmax of the gathered logits, holds several full-vocabulary fp32 copies: for one 20k-token
sequence at a 152k vocabulary each is 12 GB. Here the logits stay in their own type and on their own rank; fp32 exists
for one chunk of tokens at a time, forward and backward, and two vectors a token cross the tensor-parallel group.
"""

from typing import Any

import torch
import torch.distributed
from torch import Tensor

# Elements of one fp32 chunk, 128 MiB: enough to keep a GPU busy, little beside the logits themselves.
_CHUNK_ELEMENTS = 2**25


def log_probs_and_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    temperature: float = 1.0,
    group: torch.distributed.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the labels, and the entropy of that distribution.

    Args:
        logits: [rows, tokens, local vocabulary], any floating type; this rank's contiguous slice of the vocabulary.
        labels: [rows, tokens] int64 in [0, vocab_size).
        vocab_size: true vocabulary; the padding behind it, on the last rank, takes no part.
        temperature: the sampling temperature, so that the policy is the distribution that was sampled from.
        group: tensor-parallel group, or None.

    Returns:
        log-probs [rows, tokens] fp32, differentiable; entropy [rows, tokens] fp32 in nats, without gradient.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    log_probs, entropy = _VocabParallelLogProbs.apply(flat, labels.reshape(-1), vocab_size, temperature, group)
    return log_probs.view_as(labels), entropy.view_as(labels)


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        temperature: float,
        group: torch.distributed.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        local, held = _local_labels(labels, logits.shape[1], group)
        valid = min(logits.shape[1], vocab_size - (group.rank() if group else 0) * logits.shape[1])
        maxima = torch.cat([logits[tokens, :valid].amax(-1) for tokens in _chunks(logits)]).float() / temperature
        _all_reduce(maxima, torch.distributed.ReduceOp.MAX, group)
        sums = torch.empty(3, labels.numel(), dtype=torch.float32, device=logits.device)
        for tokens in _chunks(logits):
            shifted = _scaled(logits[tokens, :valid], temperature).sub_(maxima[tokens, None])
            target = shifted.gather(1, local[tokens, None])[:, 0]
            exponential = shifted.exp()
            sums[0, tokens] = exponential.sum(-1)
            sums[1, tokens] = torch.where(held[tokens], target, 0.0)
            sums[2, tokens] = torch.einsum("tv,tv->t", exponential, shifted)
        _all_reduce(sums, torch.distributed.ReduceOp.SUM, group)
        log_total = sums[0].log()
        ctx.save_for_backward(logits, local, held, maxima + log_total)
        ctx.valid, ctx.temperature = valid, temperature
        entropy = log_total - sums[2] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[1] - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, local, held, normaliser = ctx.saved_tensors
        gradient = torch.zeros_like(logits)
        for tokens in _chunks(logits):
            scale = (grad_log_probs[tokens] / ctx.temperature)[:, None]
            chunk = _scaled(logits[tokens, : ctx.valid], ctx.temperature).sub_(normaliser[tokens, None]).exp_()
            chunk.mul_(-scale)
            chunk.scatter_add_(1, local[tokens, None], torch.where(held[tokens, None], scale, 0.0))
            gradient[tokens, : ctx.valid] = chunk.to(gradient.dtype)
        return gradient, None, None, None, None


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """An fp32 copy of one chunk; a copy even of fp32 logits, since the caller works on it in place."""
    return logits.to(torch.float32, copy=True).div_(temperature)


def _chunks(logits: Tensor) -> list[slice]:
    tokens, width = logits.shape
    step = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _local_labels(labels: Tensor, width: int, group: torch.distributed.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Each label as an index into this rank's slice, and whether this rank holds it (0 where it does not)."""
    local = labels - (group.rank() if group else 0) * width
    held = (local >= 0) & (local < width)
    return torch.where(held, local, 0), held


def _all_reduce(values: Tensor, operation: Any, group: torch.distributed.ProcessGroup | None) -> None:
    if group is not None and group.size() > 1:
        torch.distributed.all_reduce(values, operation, group=group)
