"""Stand-ins for the kernels of Transformer Engine's layers and optimizer that do not round to FP8, computed in fp32.

Names, arguments and results are those of the functions that `transformer_engine_torch` 2.20 binds, and 2.11 too but for
what attention.py has for both.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu import fp8
from tests.te_on_cpu.constants import NVTE_QKV_Format, torch_dtype


def generic_gemm(
    a: Any,
    transpose_a: bool,
    b: Any,
    transpose_b: bool,
    out: Tensor | None,
    quantizer: Any,
    out_dtype: int | None,
    bias: Tensor | None,
    bias_dtype: int,
    gelu: bool,
    gelu_input: Tensor | None,
    gradient: bool,
    *workspace_and_flags: Any,
    alpha: float = 1.0,
    **_: Any,
) -> tuple[Any, Tensor | None, None, None]:
    """B·Aᵀ (TN: forward), B·A (NN: gradient of the input) or Bᵀ·A (NT: gradient of the weight).

    In FP8 it holds to what Hopper's tensor cores ask for: both operands along the dimension that is summed over, and
    dimensions that divide by 16.
    """
    assert not gelu, "no layer here has GELU in its GEMM"
    accumulate = workspace_and_flags[2]
    left, right = fp8.operand(a, along_rows=transpose_a), fp8.operand(b, along_rows=not transpose_b)
    if fp8.is_quantized(a) or fp8.is_quantized(b):
        assert fp8.is_quantized(a) and fp8.is_quantized(b), "one operand is in FP8 and the other is not"
        assert all(size % 16 == 0 for m in (left, right) for size in (m.shape[0], prod(m.shape[1:]), m.shape[-1])), (
            f"FP8 takes dimensions that divide by 16, not {tuple(left.shape)} and {tuple(right.shape)}"
        )
    rows, columns = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    if transpose_a:
        result = (columns @ rows.T).view(*right.shape[:-1], rows.shape[0])
    elif not transpose_b:
        result = (columns @ rows).view(*right.shape[:-1], rows.shape[1])
    else:
        result = columns.T @ rows
    result = result * alpha
    bias_gradient = None
    if bias is not None and gradient:
        bias_gradient = columns.sum(0).to(bias.dtype)
    elif bias is not None:
        result = result + bias.float()
    if out is not None:
        out.add_(result) if accumulate else out.copy_(result)
    else:
        out = result.to(torch_dtype(out_dtype) if out_dtype is not None else a.dtype)
    return out if quantizer is None else quantizer(out), bias_gradient, None, None


def te_general_grouped_gemm(
    a: list[Any],
    transpose_a: bool,
    b: list[Any],
    transpose_b: bool,
    out: list[Tensor],
    out_dtype: int,
    splits: list[int] | None,
    bias: list[Tensor],
    bias_dtype: int,
    single_output: bool,
    _gelu_inputs: list[Tensor],
    gradient: bool,
    _workspaces: list[Tensor],
    _workspace_bytes: int,
    accumulate: bool,
    *_: Any,
) -> list[Tensor]:
    """The products of all experts, as `generic_gemm` has each. `single_output`: one tensor has the rows of all."""
    assert not any(each.numel() for each in bias), "no expert here has a bias"
    parts = out[0].split(splits) if single_output else out
    for left, right, part in zip(a, b, parts, strict=True):
        generic_gemm(
            *(left, transpose_a, right, transpose_b, part, None, out_dtype, None, bias_dtype, False, None, gradient),
            *(None, 0, accumulate),
        )
    return bias


def get_cublasLt_version() -> int:
    """An old one, which multiplies the experts' matrices one by one."""
    return 0


def get_num_cublas_streams() -> int:
    """As if one after the other."""
    return 1


def rmsnorm_fwd(
    x: Tensor, weight: Tensor, eps: float, out: Any, quantizer: Any, dtype: int, _margin: int, zero_centered: bool
) -> tuple[Any, None, Tensor]:
    """x / √(mean x² + eps) · weight, and the reciprocal of the root."""
    scale = torch.rsqrt(x.float().square().mean(-1) + eps)
    result = (x.float() * scale[..., None] * (weight.float() + zero_centered)).to(torch_dtype(dtype))
    if quantizer is not None:
        return fp8.quantize(result, quantizer, out), None, scale
    return result if out is None else out.copy_(result), None, scale


def rmsnorm_bwd(
    gradient: Tensor, x: Tensor, scale: Tensor, weight: Tensor, _margin: int, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight."""
    normed, weighted = x.float() * scale[..., None], gradient.float() * (weight.float() + zero_centered)
    of_input = scale[..., None] * (weighted - normed * (weighted * normed).mean(-1, keepdim=True))
    return of_input.to(x.dtype), (gradient.float() * normed).flatten(0, -2).sum(0).to(weight.dtype)


def fused_rope_forward(*arguments: Any) -> Tensor:
    """Rotate the halves of each head by the position's angles."""
    return _rotate(1.0, *arguments)


def fused_rope_backward(*arguments: Any) -> Tensor:
    """Rotate the other way."""
    return _rotate(-1.0, *arguments)


def _rotate(
    direction: float,
    x: Tensor,
    angles: Tensor,
    starts: Tensor | None,
    layout: int,
    interleaved: bool,
    offsets: Tensor | None,
    context_size: int,
    context_rank: int,
) -> Tensor:
    assert starts is None and not interleaved
    width = angles.shape[-1]
    angles = angles.view(-1, width)
    if layout == NVTE_QKV_Format.NVTE_THD:
        assert offsets is not None
        positions = _packed_positions(offsets // context_size, len(x), context_size, context_rank)
        angles = angles[positions][:, None]
    else:
        assert layout == NVTE_QKV_Format.NVTE_SBHD
        angles = angles[: len(x), None, None]
    turned, kept = x[..., :width].float(), x[..., width:]
    first, second = turned.chunk(2, -1)
    rotated = turned * angles.cos() + torch.cat([-second, first], -1) * angles.sin() * direction
    return torch.cat([rotated.to(x.dtype), kept], -1)


def _packed_positions(offsets: Tensor, tokens: int, context_size: int, context_rank: int) -> Tensor:
    """Of this rank's tokens in their sequences; with context parallelism it holds a chunk from each end of them."""
    positions = torch.zeros(tokens, dtype=torch.int64)
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        length = end - start
        if context_size == 1:
            positions[start:end] = torch.arange(length)
            continue
        half = length // 2
        for place, chunk in ((start, context_rank), (start + half, 2 * context_size - 1 - context_rank)):
            positions[place : place + half] = torch.arange(chunk * half, (chunk + 1) * half)
    return positions


def convert_thd_to_bshd(x: Tensor, offsets: Tensor, batch: int, longest: int) -> Tensor:
    """Packed sequences to rows."""
    rows = x.new_zeros(batch, longest, *x.shape[1:])
    for row, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        rows[row, : end - start] = x[start:end]
    return rows


def convert_bshd_to_thd(rows: Tensor, offsets: Tensor, tokens: int) -> Tensor:
    """Rows to packed sequences."""
    x = rows.new_zeros(tokens, *rows.shape[2:])
    for row, (start, end) in enumerate(zip(offsets.tolist(), offsets.tolist()[1:], strict=False)):
        x[start:end] = rows[row, : end - start]
    return x


def swap_first_dims(x: Tensor, *, out: Tensor) -> None:
    """Transpose the first two of three dimensions."""
    out.copy_(x.transpose(0, 1))


def multi_tensor_adam(
    _chunk: int,
    _overflow: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    _decoupled: int,
    _bias_correction: int,
    weight_decay: float,
) -> None:
    """AdamW with bias correction."""
    for gradient, weight, first, second in zip(*lists, strict=True):
        first.lerp_(gradient.float(), 1 - beta1)
        second.mul_(beta2).addcmul_(gradient.float(), gradient.float(), value=1 - beta2)
        denominator = (second / (1 - beta2**step)).sqrt() + eps
        weight.sub_(lr * (first / (1 - beta1**step) / denominator + weight_decay * weight))


def multi_tensor_scale(_chunk: int, _overflow: Tensor, lists: list[list[Tensor]], factor: float) -> None:
    """Copy the first list into the second, times the factor."""
    for source, target in zip(*lists, strict=True):
        target.copy_(source * factor)


def multi_tensor_l2norm(
    _chunk: int, _overflow: Tensor, lists: list[list[Tensor]], _per_tensor: bool
) -> tuple[Tensor, None]:
    """The norm of all the tensors together."""
    (tensors,) = lists
    return torch.stack([tensor.float().norm() for tensor in tensors]).norm().view(1), None


FUNCTIONS = {
    function.__name__: function
    for function in (
        generic_gemm,
        te_general_grouped_gemm,
        get_cublasLt_version,
        get_num_cublas_streams,
        rmsnorm_fwd,
        rmsnorm_bwd,
        fused_rope_forward,
        fused_rope_backward,
        convert_thd_to_bshd,
        convert_bshd_to_thd,
        swap_first_dims,
        multi_tensor_adam,
        multi_tensor_scale,
        multi_tensor_l2norm,
    )
}
