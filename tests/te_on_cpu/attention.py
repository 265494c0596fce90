"""Stand-ins for cuDNN's fused attention, and for what merges its parts over the ranks of context parallelism.

Packed tensors are [tokens, heads, head size], padded ones [positions, rows, heads, head size], as Megatron-Core has
them. The softmax's statistics are log-sum-exp, [tokens, heads, 1] or [rows, heads, positions, 1], as of cuDNN 9.6.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.constants import NVTE_Fused_Attn_Backend, NVTE_Mask_Type

CAUSAL = (NVTE_Mask_Type.NVTE_CAUSAL_MASK, NVTE_Mask_Type.NVTE_PADDING_CAUSAL_MASK)
UNMASKED = (NVTE_Mask_Type.NVTE_NO_MASK, NVTE_Mask_Type.NVTE_PADDING_MASK)


def get_fused_attn_backend(_: Any) -> tuple[int, str]:
    """The one for bf16 and any length; fp32 goes through Transformer Engine's own matrix products and softmax.

    And why there is none.
    """
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def get_cudnn_version() -> int:
    """9.20"""
    return 92000


Lengths = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""Offsets of the queries' and the keys' sequences; where they begin, if there is padding between them."""


def fused_attn_fwd(
    _longest_query: int,
    _longest_key: int,
    _training: bool,
    scale: float,
    dropout: float,
    _fast_zero_fill: bool,
    _layout: int,
    _out_format: int,
    _scale_format: int,
    _bias_type: int,
    mask: int,
    _softmax_type: int,
    window: tuple[int, int],
    _bottom_right: bool,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _dtype: torch.dtype,
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    *_: Any,
) -> list[Tensor]:
    """Output, statistics and the state of a random generator that nothing draws from."""
    assert dropout == 0 and mask in CAUSAL + UNMASKED
    out = torch.zeros_like(query)
    statistics = _new_statistics(query)
    lengths = query_offsets, key_offsets, query_starts, key_starts
    for places, of_statistics in _sequences(query, key, lengths):
        q, k, v = (tensor[place] for tensor, place in zip((query, key, value), places, strict=True))
        scores = _scores(q, k, scale, mask, window)
        logsumexp = scores.logsumexp(-1)
        out[places[0]] = torch.einsum("hqk,khd->qhd", (scores - logsumexp[..., None]).exp(), _per_query_head(v, q)).to(
            out.dtype
        )
        statistics[of_statistics] = logsumexp
    return [out, _as_cudnn_has_them(statistics).unsqueeze(-1), torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    _longest_query: int,
    _longest_key: int,
    scale: float,
    _dropout: float,
    _fast_zero_fill: bool,
    _layout: int,
    _out_format: int,
    _gradient_format: int,
    _gradients_layout: int,
    _scale_format: int,
    _gradient_scale_format: int,
    _bias_type: int,
    mask: int,
    _softmax_type: int,
    window: tuple[int, int],
    _bottom_right: bool,
    _deterministic: bool,
    query_offsets: Tensor,
    key_offsets: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    gradient: Tensor,
    _dtype: torch.dtype,
    auxiliary: list[Tensor],
    query_starts: Tensor | None,
    key_starts: Tensor | None,
    *_: Any,
) -> list[Tensor | None]:
    """Gradients of query, key and value, by the statistics of the softmax over all keys, on whatever ranks they are."""
    gradients = [torch.zeros_like(tensor) for tensor in (query, key, value)]
    statistics = _as_cudnn_has_them(auxiliary[0].squeeze(-1))
    lengths = query_offsets, key_offsets, query_starts, key_starts
    for places, of_statistics in _sequences(query, key, lengths):
        q, k, v = (tensor[place] for tensor, place in zip((query, key, value), places, strict=True))
        o, do = out[places[0]].float(), gradient[places[0]].float()
        probabilities = (_scores(q, k, scale, mask, window) - statistics[of_statistics][..., None]).exp()
        of_value = torch.einsum("hqk,qhd->khd", probabilities, do)
        of_probabilities = torch.einsum("qhd,khd->hqk", do, _per_query_head(v, q))
        of_scores = probabilities * (of_probabilities - (do * o).sum(-1).T[..., None]) * scale
        of_query = torch.einsum("hqk,khd->qhd", of_scores, _per_query_head(k, q))
        of_key = torch.einsum("hqk,qhd->khd", of_scores, q.float())
        groups = k.shape[1]
        parts = (of_query, *(part.unflatten(1, (groups, -1)).sum(2) for part in (of_key, of_value)))
        for found, place, part in zip(gradients, places, parts, strict=True):
            found[place] = part.to(found.dtype)
    return [*gradients, None]


def _new_statistics(query: Tensor) -> Tensor:
    """[heads, tokens] or [rows, heads, positions]."""
    first, *others = query.shape[:-1]
    return torch.zeros(*others, first)


def _as_cudnn_has_them(statistics: Tensor) -> Tensor:
    """Of packed sequences with the tokens first; the other way round it is the same."""
    return statistics.T if statistics.dim() == 2 else statistics


def _sequences(query: Tensor, key: Tensor, lengths: Lengths) -> Iterator[tuple[tuple[Any, Any, Any], Any]]:
    """Where each sequence's query, key and value lie, and its statistics."""
    if query.dim() == 4:
        for row in range(query.shape[1]):
            yield ((slice(None), row),) * 3, row
        return
    query_offsets, key_offsets, query_starts, key_starts = lengths
    for queries, keys in zip(_slices(query_offsets, query_starts), _slices(key_offsets, key_starts), strict=True):
        yield (queries, keys, keys), (slice(None), queries)


def _slices(offsets: Tensor, starts: Tensor | None) -> list[slice]:
    counts = offsets.diff().tolist()
    begins = (offsets if starts is None else starts).tolist()
    return [slice(begin, begin + count) for begin, count in zip(begins, counts, strict=False)]


def _scores(query: Tensor, key: Tensor, scale: float, mask: int, window: tuple[int, int]) -> Tensor:
    """[heads, queries, keys], -inf behind the mask and before the window, which start at the first query and key."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), _per_query_head(key, query)) * scale
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool)
    if mask in CAUSAL:
        hidden = hidden.logical_not().triu(1)
    if window[0] >= 0:
        hidden = hidden | torch.ones_like(hidden).tril(-window[0] - 1)
    return scores.masked_fill(hidden, float("-inf"))


def _per_query_head(x: Tensor, query: Tensor) -> Tensor:
    return x.float().repeat_interleave(query.shape[1] // x.shape[1], 1)


def _half(offsets: Tensor, half: int) -> Tensor:
    """Positions of the first or second half of each sequence: the two chunks that a context-parallel rank holds."""
    positions = []
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        middle = (start + end) // 2
        positions.append(torch.arange(middle, end) if half else torch.arange(start, middle))
    return torch.cat(positions)


def thd_read_half_tensor(x: Tensor, offsets: Tensor, half: int) -> Tensor:
    """One half of each sequence."""
    return x.index_select(x.dim() - 3, _half(offsets, half))


def thd_read_second_half_lse(statistics: Tensor, offsets: Tensor, _packed: bool, _length: int) -> Tensor:
    """Statistics, [heads, tokens], of the second halves."""
    return statistics[:, _half(offsets, 1)]


def thd_second_half_lse_correction(statistics: Tensor, of_step: Tensor, offsets: Tensor, _packed: bool) -> None:
    """Add a step's keys to the second halves' statistics, [heads, tokens]."""
    second = _half(offsets, 1)
    statistics[:, second] = torch.logaddexp(statistics[:, second], of_step)


def thd_out_correction(
    out: Tensor,
    of_step: Tensor,
    statistics_before: Tensor,
    statistics: Tensor,
    statistics_of_step: Tensor,
    offsets: Tensor,
    only_second_half: bool,
    _packed: bool,
) -> None:
    """Scale the output to the statistics that include a step's keys, and add the step's by its share of the softmax."""
    places = _half(offsets, 1) if only_second_half else torch.arange(len(out))
    kept = (statistics_before - statistics)[:, places].exp().T[..., None]
    share = (statistics_of_step - statistics[:, places]).exp().T[..., None]
    out[places] = (out[places] * kept + of_step.view(-1, *out.shape[1:]) * share).to(out.dtype)


def thd_grad_correction(gradient: Tensor, of_step: Tensor, offsets: Tensor, first: str, second: str) -> None:
    """Take over a step's gradient of each half: "add", "copy" or "none", of which it has no values."""
    taken = 0
    for action, places in zip((first, second), (_half(offsets, 0), _half(offsets, 1)), strict=True):
        if action == "none":
            continue
        values = of_step[places] if len(of_step) == len(gradient) else of_step
        taken += len(places)
        gradient[places] = values if action == "copy" else gradient[places] + values
    assert taken == len(of_step), "each value belongs to one half"


NO_FORMAT, NO_CORNER = 0, False


def _fused_attn_fwd_of_2_11(*given: Any) -> list[Tensor]:
    """Without formats after the layout, and without the corner that a mask starts from after the window."""
    return fused_attn_fwd(*given[:7], *[NO_FORMAT] * 2, *given[7:11], NO_CORNER, *given[11:])


def _fused_attn_bwd_of_2_11(*given: Any) -> list[Tensor | None]:
    """The same, and with the gradient's type after the other's."""
    return fused_attn_bwd(*given[:6], *[NO_FORMAT] * 5, *given[6:10], NO_CORNER, *given[10:19], *given[20:])


FUNCTIONS = {
    function.__name__: function
    for function in (
        get_fused_attn_backend,
        get_cudnn_version,
        fused_attn_fwd,
        fused_attn_bwd,
        thd_read_half_tensor,
        thd_read_second_half_lse,
        thd_second_half_lse_correction,
        thd_out_correction,
        thd_grad_correction,
    )
}


def _thd_out_correction_of_2_11(out: Tensor, of_step: Tensor, statistics: Tensor, *given: Any) -> None:
    """Once all steps are done: the statistics have them all, and the output begins at zero."""
    thd_out_correction(out, of_step, statistics, statistics, *given)


FUNCTIONS_OF_2_11 = FUNCTIONS | {
    "get_fused_attn_backend": lambda *given: get_fused_attn_backend(given)[0],
    "fused_attn_fwd": _fused_attn_fwd_of_2_11,
    "fused_attn_bwd": _fused_attn_bwd_of_2_11,
    "thd_out_correction": _thd_out_correction_of_2_11,
}
