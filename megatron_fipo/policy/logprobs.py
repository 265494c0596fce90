"""Log-probabilities of given tokens from vocab-parallel logits, chunked over tokens.

The plain way, log_softmax of the gathered logits, holds several full-vocabulary fp32 copies: for one 20k-token
sequence at a 152k vocabulary each is 12 GB. Here the logits stay in their own type and on their own rank; fp32 exists
for one chunk of tokens at a time, forward and backward, on CUDA in registers alone; four numbers a token cross the
tensor-parallel group.
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
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits / temperature) at the labels, and the entropy of that distribution.

    Args:
        logits: [rows, tokens, local vocabulary], any floating type; this rank's contiguous slice of the vocabulary.
        labels: [rows, tokens] int64 in [0, vocab_size).
        vocab_size: true vocabulary; the padding behind it, on the last rank, takes no part.
        temperature: the sampling temperature, so that the policy is the distribution that was sampled from.
        group: tensor-parallel group, or None.
        overwrite: nobody reads the logits after the backward pass, which may write their gradient over them: half the
            memory. Only one backward pass then.

    Returns:
        log-probs [rows, tokens] fp32, differentiable; entropy [rows, tokens] fp32 in nats, without gradient.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    log_probs, entropy = _VocabParallelLogProbs.apply(
        flat, labels.reshape(-1), vocab_size, temperature, group, overwrite
    )
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
        overwrite: bool,
    ) -> tuple[Tensor, Tensor]:
        local = _local_labels(labels, logits.shape[1], group)
        valid = min(logits.shape[1], vocab_size - (group.rank() if group else 0) * logits.shape[1])
        mine, sums = statistics(logits, local, valid, temperature)
        maxima = _all_reduced(mine, torch.distributed.ReduceOp.MAX, group)
        # From this rank's maximum to that of all ranks.
        gap = mine - maxima
        sums[2] = gap.exp() * (sums[2] + gap * sums[0])
        sums[0] *= gap.exp()
        sums[1] += torch.where(local >= 0, gap, 0.0)
        sums = _all_reduced(sums, torch.distributed.ReduceOp.SUM, group)
        log_total = sums[0].log()
        ctx.save_for_backward(logits, local, maxima + log_total)
        ctx.valid, ctx.temperature, ctx.overwrite = valid, temperature, overwrite
        entropy = log_total - sums[2] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[1] - log_total, entropy

    @staticmethod
    def backward(ctx: Any, grad_log_probs: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        logits, local, normaliser = ctx.saved_tensors
        # Its own handle on the memory: autograd has nothing to check, since nobody reads the logits after this.
        into = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        scale = grad_log_probs / ctx.temperature
        write_gradient(logits, local, normaliser, scale, ctx.valid, ctx.temperature, into)
        return into, None, None, None, None, None


def statistics(logits: Tensor, labels: Tensor, valid: int, temperature: float) -> tuple[Tensor, Tensor]:
    """What this rank's logits say of each token: their maximum, and sums relative to it.

    On CUDA it is one kernel (triton_logprobs.py); this path is its reference.

    Args:
        logits: [tokens, local vocabulary].
        labels: [tokens] int64 in [0, local vocabulary), or -1 for a token whose label another rank holds.
        valid: columns that take part, the first ones.

    Returns:
        maxima m of x = logits / temperature, [tokens] fp32; [3, tokens] fp32: Σ e^(x−m), x−m at the label or 0 where it
        is not held, Σ e^(x−m) (x−m).
    """
    if logits.is_cuda:
        from megatron_fipo.policy.triton_logprobs import statistics_on_cuda  # triton is only there with CUDA

        return statistics_on_cuda(logits, labels, valid, temperature)
    maxima = torch.cat([logits[tokens, :valid].amax(-1) for tokens in _chunks(logits)]).float() / temperature
    sums = torch.empty(3, labels.numel(), dtype=torch.float32, device=logits.device)
    for tokens in _chunks(logits):
        shifted = _scaled(logits[tokens, :valid], temperature).sub_(maxima[tokens, None])
        target = shifted.gather(1, labels[tokens, None].clamp(min=0))[:, 0]
        exponential = shifted.exp()
        sums[0, tokens] = exponential.sum(-1)
        sums[1, tokens] = torch.where(labels[tokens] >= 0, target, 0.0)
        sums[2, tokens] = torch.einsum("tv,tv->t", exponential, shifted)
    return maxima, sums


def write_gradient(
    logits: Tensor, labels: Tensor, normaliser: Tensor, scale: Tensor, valid: int, temperature: float, into: Tensor
) -> None:
    """Write scale · (1[label] − softmax(logits / temperature)) into `into`, which may be `logits` itself.

    On CUDA it is one kernel (triton_logprobs.py); this path is its reference.

    Args:
        logits, labels, valid: as for `statistics`.
        normaliser: [tokens] fp32, the log of the sum of exponentials over all ranks.
        scale: [tokens] fp32.
        into: [tokens, local vocabulary] of the type of the logits.
    """
    if logits.is_cuda:
        from megatron_fipo.policy.triton_logprobs import gradient_on_cuda  # triton is only there with CUDA

        gradient_on_cuda(logits, labels, normaliser, scale, valid, temperature, into)
        return
    for tokens in _chunks(logits):
        chunk = _scaled(logits[tokens, :valid], temperature).sub_(normaliser[tokens, None]).exp_()
        chunk.mul_(-scale[tokens, None])
        held = torch.where(labels[tokens] >= 0, scale[tokens], 0.0)
        chunk.scatter_add_(1, labels[tokens, None].clamp(min=0), held[:, None])
        into[tokens, :valid] = chunk.to(into.dtype)
        into[tokens, valid:] = 0


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """An fp32 copy of one chunk; a copy even of fp32 logits, since the caller works on it in place."""
    return logits.to(torch.float32, copy=True).div_(temperature)


def _chunks(logits: Tensor) -> list[slice]:
    tokens, width = logits.shape
    step = max(1, _CHUNK_ELEMENTS // width)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def _local_labels(labels: Tensor, width: int, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Each label as an index into this rank's slice, -1 where another rank holds it."""
    local = labels - (group.rank() if group else 0) * width
    return torch.where((local >= 0) & (local < width), local, -1)


def _all_reduced(values: Tensor, operation: Any, group: torch.distributed.ProcessGroup | None) -> Tensor:
    if group is None or group.size() == 1:
        return values
    reduced = values.clone()
    torch.distributed.all_reduce(reduced, operation, group=group)
    return reduced
