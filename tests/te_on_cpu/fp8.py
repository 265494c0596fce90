"""Stand-ins for the kernels that round to FP8: the rounding is torch's, the scales are as the recipes define them.

Per tensor (delayed, current scaling): 448 or 57344 over the largest absolute value. Per block: the same for 1 × 128
values, or 128 × 128 of a weight, as powers of two. MXFP8: for 32 values, the exponent of its inverse kept as a byte.
"""

from typing import Any

import torch
from torch import Tensor

from tests.te_on_cpu.constants import torch_dtype

BLOCK, MX_BLOCK = 128, 32
MX_BIAS = 127


def is_quantized(x: Any) -> bool:
    """Whether it is one of Transformer Engine's FP8 tensors."""
    return hasattr(x, "_quantizer")


def operand(x: Any, along_rows: bool) -> Tensor:
    """An operand of a matrix product in fp32, from the copy that Hopper multiplies: rounded along rows or columns."""
    if not is_quantized(x):
        return x.float()
    if hasattr(x, "_is_2D_scaled"):
        return _from_rows(x) if along_rows else _from_columns(x)
    if hasattr(x, "_rowwise_data"):
        return _from_mx(x, along_rows)
    if along_rows:
        assert x._data is not None, "the product asks for the FP8 values, and only their transpose is there"
        return _values(x._data, x._fp8_dtype) * x._scale_inv
    assert x._transpose is not None and not x._transpose_invalid, "the product asks for the transpose, which is stale"
    return _values(x._transpose, x._fp8_dtype).movedim(0, -1) * x._scale_inv


def _from_rows(x: Any) -> Tensor:
    assert x._rowwise_data is not None, "the product asks for the rows, and only the columns are there"
    values = _values(x._rowwise_data, x._fp8_dtype)
    flat = values.reshape(-1, values.shape[-1])
    return (flat * _spread(x._rowwise_scale_inv, flat.shape, x._is_2D_scaled)).view(values.shape)


def _from_columns(x: Any) -> Tensor:
    assert x._columnwise_data is not None, "the product asks for the columns, and only the rows are there"
    values = _values(x._columnwise_data, x._fp8_dtype)
    flat = values.reshape(len(values), -1)
    flat = flat * _spread(x._columnwise_scale_inv, flat.shape, x._is_2D_scaled)
    return flat.view(values.shape).movedim(0, -1)


def _from_mx(x: Any, along_rows: bool) -> Tensor:
    """Both copies lie in the tensor's own order, with blocks along rows or along columns."""
    data, exponents = x._rowwise_data, x._rowwise_scale_inv
    if not along_rows:
        data, exponents = x._columnwise_data, x._columnwise_scale_inv
    assert data is not None, "the product asks for the copy that is not there"
    values = _values(data, x._fp8_dtype)
    flat = values.reshape(-1, values.shape[-1])
    spread = (exponents.float() - MX_BIAS).exp2().repeat_interleave(MX_BLOCK, int(along_rows))
    return (flat * spread[: flat.shape[0], : flat.shape[1]]).view(values.shape)


def _spread(scales: Tensor, shape: torch.Size, square: bool) -> Tensor:
    """A scale for each value. Of rows they lie transposed, [blocks, rows], and both kinds are padded."""
    rows, columns = shape
    if not square:
        return scales[:, :rows].T.repeat_interleave(BLOCK, 1)[:, :columns]
    return scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]


def _values(data: Tensor, dtype: int) -> Tensor:
    return data.view(torch_dtype(dtype)).float()


def _round(x: Tensor, dtype: int) -> Tensor:
    """The nearest FP8 values as bytes; what is too large becomes the largest."""
    return x.clamp(-_largest(dtype), _largest(dtype)).to(torch_dtype(dtype)).view(torch.uint8)


def _largest(dtype: int) -> float:
    return torch.finfo(torch_dtype(dtype)).max


def _scale(amax: Tensor, largest: float, power_of_two: bool, epsilon: float) -> Tensor:
    scale = torch.where(amax > 0, largest / amax.clamp_min(epsilon), 1.0)
    return scale.log2().floor().exp2() if power_of_two else scale


def quantize(x: Any, quantizer: Any, out: Any = None, noop: Tensor | None = None) -> Any:
    """Round by the quantizer's recipe into a new tensor, or into `out`; not if the flag `noop` is 1."""
    if noop is not None and noop.numel() and noop.item() == 1:
        return out
    x = (x.dequantize() if is_quantized(x) else x).detach()
    if out is None:
        out = quantizer.make_empty(x.shape, dtype=x.dtype, device="cpu")
    if hasattr(quantizer, "block_scaling_dim"):
        _quantize_blocks(x.float().reshape(-1, x.shape[-1]), quantizer, out)
        return out
    if hasattr(quantizer, "with_amax_reduction"):
        scale = _scale_at_hand(x, quantizer)
    elif hasattr(quantizer, "scale"):
        # Delayed scaling: the largest value is for the scales of batches to come.
        quantizer.amax.copy_(x.float().abs().max())
        scale = quantizer.scale
    else:
        _quantize_mx(x.float().reshape(-1, x.shape[-1]), quantizer, out)
        return out
    data = _round(x.float() * scale, quantizer.dtype)
    if out._data is not None:
        out._data.copy_(data.view(out._data.shape))
    if out._transpose is not None:
        out._transpose.copy_(data.reshape(-1, data.shape[-1]).T.reshape(out._transpose.shape))
        out._transpose_invalid = False
    out._scale_inv.copy_(1 / scale)
    return out


def create_empty_quantized_tensor(
    quantizer: Any, shape: list[int], dtype: torch.dtype, _device: torch.device, _pinned: bool
) -> Any:
    """An FP8 tensor without values, laid out as Transformer Engine itself describes it for torch.compile."""
    from transformer_engine.pytorch.tensor.float8_tensor import Float8CurrentScalingQuantizer, Float8Quantizer

    # Of delayed scaling there is no description. Its layout is that of the other recipe with one scale a tensor.
    kind = Float8CurrentScalingQuantizer if isinstance(quantizer, Float8Quantizer) else type(quantizer)
    described = kind.storage_metadata(quantizer, dtype)
    inner = {
        name: torch.empty(inner_shape, dtype=inner_dtype)
        for name, (inner_shape, inner_dtype) in kind.inner_tensor_specs(quantizer, tuple(shape)).items()
    }
    context = described | {"is_tensor": not quantizer.internal, "requires_grad": False}
    return described["cls"].__tensor_unflatten__(inner, context, shape, None)


def _scale_at_hand(x: Tensor, quantizer: Any) -> Tensor:
    """The scale by the values at hand, over all ranks that hold a part of them."""
    amax = x.float().abs().max()
    if quantizer.with_amax_reduction:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=quantizer.amax_reduction_group)
    return _scale(amax, _largest(quantizer.dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def _quantize_blocks(x: Tensor, quantizer: Any, out: Any) -> None:
    """Rows, and columns transposed, as products take them; 2.11 has them in their own order for an all-gather."""
    square, compact = quantizer.block_scaling_dim == 2, getattr(quantizer, "all_gather_usage", False)
    for columns, data, inverse in (
        (False, out._rowwise_data, out._rowwise_scale_inv),
        (True, out._columnwise_data, out._columnwise_scale_inv),
    ):
        if data is None:
            continue
        matrix = x.T if columns else x
        scale = _scale(
            _block_amax(matrix, square),
            _largest(quantizer.dtype),
            quantizer.force_pow_2_scales,
            quantizer.amax_epsilon,
        )
        rounded = _round(matrix * _spread(scale if square else scale.T, matrix.shape, square), quantizer.dtype)
        stored = scale if square or (compact and not columns) else scale.T
        inverse.fill_(1.0)
        inverse[: stored.shape[0], : stored.shape[1]] = 1 / stored
        rounded = rounded.T if compact and columns else rounded
        data.view(rounded.shape).copy_(rounded)


def _quantize_mx(x: Tensor, quantizer: Any, out: Any) -> None:
    rows, columns = x.shape
    for data, stored, dimension in (
        (out._rowwise_data, out._rowwise_scale_inv, 1),
        (out._columnwise_data, out._columnwise_scale_inv, 0),
    ):
        if data is None:
            continue
        amax = x.abs().unflatten(dimension, (-1, MX_BLOCK)).amax(dimension + 1)
        exponent = (
            (amax / _largest(quantizer.dtype)).log2().ceil().clamp(-MX_BIAS, MX_BIAS)
        )  # of nothing but zeros: the least
        stored[: exponent.shape[0], : exponent.shape[1]] = (exponent + MX_BIAS).to(torch.uint8)
        rounded = _round(x / exponent.exp2().repeat_interleave(MX_BLOCK, dimension), quantizer.dtype)
        data.view(rows, columns).copy_(rounded)


def _block_amax(x: Tensor, square: bool) -> Tensor:
    """[blocks of rows, or rows; blocks of columns]"""
    tall = BLOCK if square else 1
    rows, columns = x.shape
    padded = torch.nn.functional.pad(x.abs(), (0, -columns % BLOCK, 0, -rows % tall))
    return padded.view(-(-rows // tall), tall, -(-columns // BLOCK), BLOCK).amax((1, 3))


def dequantize(x: Any, dtype: int) -> Tensor:
    """The values, of whichever copy is there."""
    rows = getattr(x, "_rowwise_data", x.get_metadata().get("data")) is not None
    return operand(x, along_rows=rows).to(torch_dtype(dtype))


def bgrad_quantize(gradient: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The bias's gradient, and the gradient in FP8."""
    return gradient.reshape(-1, gradient.shape[-1]).sum(0), quantize(gradient, quantizer)


def split_quantize(x: Tensor, splits: list[int], quantizers: list[Any], **_: Any) -> list[Any]:
    """The tokens of each expert in FP8 by themselves; an expert may have none."""
    return [
        quantize(part, quantizer) if len(part) else quantizer.make_empty(part.shape, dtype=part.dtype, device="cpu")
        for part, quantizer in zip(x.split(splits), quantizers, strict=True)
    ]


def fp8_transpose(data: Tensor, _dtype: int, *, out: Tensor | None = None) -> Tensor:
    """The bytes of the transpose."""
    transposed = data.reshape(-1, data.shape[-1]).T.contiguous().view(data.shape[-1], *data.shape[:-1])
    return transposed if out is None else out.copy_(transposed.view(out.shape))


def compute_amax(x: Tensor, amax: Tensor) -> None:
    """The largest absolute value."""
    amax.copy_(x.float().abs().max())


def fused_amax_and_scale_update_after_reduction(
    reduced: Tensor, histories: list[Tensor], scales: list[Tensor], algorithm: str, dtype: int, margin: float
) -> None:
    """Delayed scaling: put the batch's largest values into the histories, and set the scales of the next by these."""
    for amax, history, scale in zip(reduced.split([len(s) for s in scales]), histories, scales, strict=True):
        history[0] = amax
        largest = history.amax(0) if algorithm == "max" else amax
        scale.copy_(torch.where(largest > 0, _scale(largest, _largest(dtype), False, 0.0) / 2**margin, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


def multi_tensor_compute_scale_and_scale_inv(
    _chunk: int, _overflow: Tensor, lists: list[list[Tensor]], largest: float, power_of_two: bool, epsilon: float
) -> None:
    """Scales of the optimizer's weights from their largest values."""
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(_scale(amax, largest, power_of_two, epsilon))
        inverse.copy_(1 / scale)


def fp8_block_scaling_compute_partial_amax(
    part: Tensor, amax: Tensor, rows: int, columns: int, start: int, _block: int
) -> None:
    """The largest values of a weight's blocks, from a data-parallel rank's part of it."""
    whole = torch.zeros(rows * columns)
    whole[start : start + part.numel()] = part.float().flatten()
    found = _block_amax(whole.view(rows, columns), square=True)
    amax[: found.shape[0], : found.shape[1]] = found


def fp8_block_scaling_partial_cast(
    part: Tensor, out: Tensor, scale: Tensor, rows: int, columns: int, start: int, _block: int, dtype: int
) -> None:
    """Round a data-parallel rank's part of a weight by its blocks' scales."""
    spread = _spread(scale, torch.Size((rows, columns)), square=True).flatten()[start : start + part.numel()]
    out.copy_(_round(part.float().flatten() * spread, dtype))


FUNCTIONS = {
    function.__name__: function
    for function in (
        create_empty_quantized_tensor,
        quantize,
        dequantize,
        bgrad_quantize,
        split_quantize,
        fp8_transpose,
        compute_amax,
        fused_amax_and_scale_update_after_reduction,
        multi_tensor_compute_scale_and_scale_inv,
        fp8_block_scaling_compute_partial_amax,
        fp8_block_scaling_partial_cast,
    )
}
