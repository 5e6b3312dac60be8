"""InfoNCE between two views, without the [N, N] similarities: `softmax_passes` over one or both views.

N = keys (rows of each view), R = rows whose loss is wanted, D = columns, P = parts of an operand, W = 2 views as keys,
1 without intra-view negatives. Views are stored positive first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmax_passes import OPERANDS, SoftmaxPasses, padded_width


@triton.jit
def _store_parts(pointer, x, stride, mask, PARTS: tl.constexpr):
    high = x.to(pointer.dtype.element_ty)
    tl.store(pointer, high, mask=mask)
    if PARTS == 2:
        tl.store(pointer + stride, (x - high.to(tl.float32)).to(high.dtype), mask=mask)


@triton.jit
def _reciprocal_length(x):
    """1 / |x| of each row, 0 if it is all zero, at most 3e38. In float32 the squares would over- or underflow."""
    wide = x.to(tl.float64)
    length = tl.sqrt(tl.sum(wide * wide, 1))
    return tl.where(length == 0, 0.0, 1.0 / tl.where(length < 3.4e-39, 3.4e-39, length)).to(tl.float32)


@triton.jit(do_not_specialize=["num_keys"])
def unit_rows_kernel(
    anchor,  # [N, D]
    positive,  # [N, D]
    unit,  # [P, 2, N, WIDTH] positive, anchor: rows over their lengths
    reciprocal,  # [2, N] float32, 1 / length; 0 for a row that is all zero
    aligned,  # [N] float32: cosine of the two views of a row
    num_keys,
    dim,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    live = row < num_keys
    mask = live[:, None] & (column < dim)[None, :]
    place = row[:, None] * dim + column[None, :]
    out = row[:, None] * WIDTH + column[None, :]
    v = tl.load(positive + place, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(anchor + place, mask=mask, other=0.0).to(tl.float32)
    v_reciprocal, u_reciprocal = _reciprocal_length(v), _reciprocal_length(u)
    v, u = v * v_reciprocal[:, None], u * u_reciprocal[:, None]
    view = tl.cast(num_keys, tl.int64) * WIDTH
    _store_parts(unit + out, v, 2 * view, live[:, None], PARTS)
    _store_parts(unit + view + out, u, 2 * view, live[:, None], PARTS)
    tl.store(reciprocal + row, v_reciprocal, mask=live)
    tl.store(reciprocal + num_keys + row, u_reciprocal, mask=live)
    tl.store(aligned + row, tl.sum(u * v, 1), mask=live)


@triton.jit
def _store_tangent(out, gradient, unit, reciprocal, place, mask):
    """Gradient in a row from the gradient in its direction."""
    along = tl.sum(gradient * unit, 1)
    tl.store(
        out + place, ((gradient - along[:, None] * unit) * reciprocal[:, None]).to(out.dtype.element_ty), mask=mask
    )


@triton.jit(do_not_specialize=["num_keys"])
def info_nce_gradient_kernel(
    anchor,  # [N, D]
    positive,  # [N, D]
    reciprocal,  # [2, N]
    scale,  # scalar float32, 1 / t
    weighted_mean,  # [R, WIDTH] float32
    weight,  # [R] float32
    row_begin,  # [N + 1] int64: where the chosen rows of each key begin in row_order; None: row r is key r
    row_order,  # [R] int64 or None
    gradient,  # [S, W, N, WIDTH] float32
    factor,  # scalar float32
    grad_anchor,  # [N, D]
    grad_positive,  # [N, D]
    num_keys,
    dim,
    VIEWS: tl.constexpr,
    SPLITS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """t du = sum_r weight_r (mean_r - v) + G_u and t dv = G_v - sum_r weight_r u, over the chosen rows r of a key."""
    key = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)[None, :]
    live = key < num_keys
    if row_begin is None:
        row_weight = tl.load(weight + key, mask=live, other=0.0)
        mean = tl.load(weighted_mean + key[:, None] * WIDTH + column, mask=live[:, None], other=0.0)
    else:
        begin = tl.load(row_begin + key, mask=live, other=0)
        count = tl.load(row_begin + key + 1, mask=live, other=0) - begin
        row_weight = tl.zeros((BLOCK,), tl.float32)
        mean = tl.zeros((BLOCK, WIDTH), tl.float32)
        for k in range(0, tl.max(count, 0)):
            taken = (k < count)[:, None]
            row = tl.load(row_order + (begin + k)[:, None], mask=taken, other=0)
            mean += tl.load(weighted_mean + row * WIDTH + column, mask=taken, other=0.0)
            row_weight += tl.sum(tl.load(weight + row, mask=taken, other=0.0), 1)

    mask = live[:, None] & (column < dim)
    place = key[:, None] * dim + column
    inverse_t, largest = tl.load(scale), tl.load(factor)
    v_reciprocal = tl.load(reciprocal + key, mask=live, other=0.0)
    u_reciprocal = tl.load(reciprocal + num_keys + key, mask=live, other=0.0)
    v = tl.load(positive + place, mask=mask, other=0.0).to(tl.float32) * v_reciprocal[:, None]
    u = tl.load(anchor + place, mask=mask, other=0.0).to(tl.float32) * u_reciprocal[:, None]
    dv, du = tl.zeros((BLOCK, WIDTH), tl.float32), tl.zeros((BLOCK, WIDTH), tl.float32)
    view = tl.cast(num_keys, tl.int64) * WIDTH
    for split in tl.static_range(SPLITS):
        part = gradient + split * VIEWS * view + key[:, None] * WIDTH + column
        dv += tl.load(part, mask=live[:, None], other=0.0)
        if VIEWS == 2:
            du += tl.load(part + view, mask=live[:, None], other=0.0)
    du = (du * largest + mean - row_weight[:, None] * v) * inverse_t
    dv = (dv * largest - row_weight[:, None] * u) * inverse_t
    _store_tangent(grad_anchor, du, u, u_reciprocal, place, mask)
    _store_tangent(grad_positive, dv, v, v_reciprocal, place, mask)


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    rows: Tensor | None,
    row_grad: Tensor | None,
    row_loss: Tensor,
    grad_anchor: Tensor | None,
    grad_positive: Tensor | None,
    row_slope: Tensor | None,
    temperature: Tensor,
    intra_view_negatives: bool,
    precision: str,
) -> None:
    """loss_r = softplus(lse_r - <u_r, v_r> / t), lse_r over the negatives of row r; u, v the L2-normalised views.

    anchor, positive, grad_anchor and grad_positive are [N, D]; rows [R] int64 or None for all; row_grad, row_loss and
    row_slope [R] float32, R >= 1; without row_grad there are no gradients. row_slope sums to d / d (1 / t). A row that
    is not in [0, N) has loss and gradients NaN. temperature is a tensor of one element, read on the device. precision:
    "highest", "high" or "medium", see `OPERANDS`.
    """
    num_keys, dim = anchor.shape
    width, block = padded_width(dim), max(1, 2048 // padded_width(dim))
    grid = (triton.cdiv(num_keys, block),)
    dtype, parts = OPERANDS[precision]
    unit = anchor.new_empty((parts, 2, num_keys, width), dtype=dtype)
    reciprocal = row_loss.new_empty((2, num_keys))
    aligned = row_loss.new_empty(num_keys)
    unit_rows_kernel[grid](
        anchor, positive, unit, reciprocal, aligned, num_keys, dim, PARTS=parts, WIDTH=width, BLOCK=block
    )
    query = unit[:, 1]
    if rows is not None:
        chosen = rows.clamp(0, num_keys - 1)
        query, aligned = query[:, chosen], aligned[chosen].masked_fill(chosen != rows, float("nan"))
    keys = unit if intra_view_negatives else unit[:, :1]
    scale = temperature.double().reciprocal().float()
    passes = SoftmaxPasses(query, keys, rows, None, scale)
    passes.rows(aligned * scale, row_grad, row_loss, row_slope, mean=row_grad is not None)
    if row_grad is None:
        return
    gradient, _, factor = passes.columns(own_term=False, total=False)
    row_begin = row_order = None
    if rows is not None:
        ascending, row_order = torch.sort(rows, stable=True)
        row_begin = torch.searchsorted(ascending, torch.arange(num_keys + 1, device=rows.device))
    info_nce_gradient_kernel[grid](
        anchor, positive, reciprocal, scale, passes.weighted_mean, passes.weight, row_begin, row_order, gradient,
        factor, grad_anchor, grad_positive, num_keys, dim,
        VIEWS=keys.shape[1], SPLITS=gradient.shape[0], WIDTH=width, BLOCK=block,
    )  # fmt: skip
