"""The two passes behind info_nce and item_cross_entropy: a softmax of rows against keys, and its transpose.

Every row has one own key, its positive, which stands outside the softmax, so that a tiny loss keeps its digits:

    S_rj = scale <query_r, key_j> + bias_j                j over all keys but own_r
    pass 1, rows own:  lse_r = log sum_j exp S_rj,  mean_r = sum_j exp(S_rj - lse_r) key_j
    loss_r = softplus(lse_r - aligned_r),  weight_r = row_grad_r sigmoid(lse_r - aligned_r)
    pass 2, keys own:  gradient_j = sum_{r, own_r != j} weight_r exp(S_rj - lse_r) query_r

Both look like attention whose values are its keys, so one tile serves both products. Nothing [R, N] is stored. Every
output tile has one owner; where there are too few tiles to fill the device, SPLITS programs share one and their parts
are added in fixed order. Exponents are in base 2.

Operands of products are 16-bit, so that no version of Triton chooses their precision; sums are float32. Float32 class
is reached with two float16 parts of each number, x = high + low, and three products; both parts together hold 22 bits
of a number between 1/8 and 1, and nothing below 2**-25, so operands should have entries of at most 1.

R = rows, N = keys of one view, D = columns padded to a power of two, P = parts (1 or 2), S = splits, W = views (sets
of keys).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Exponentials are stored times 2**14: float16 then keeps eleven bits of everything above 4e-9 of the largest.
SHIFT = tl.constexpr(14.0)
# Logit of a pair that takes no part. Finite, so that differences of two are.
NOTHING = tl.constexpr(-1.0e30)


@triton.jit
def _dirty_tiles(own, block, num_keys, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Tiles of keys that hold an own key of the block: first, how many. Without `own` row r's own key is key r."""
    num_tiles = tl.cdiv(num_keys, TILE)
    first, stop = num_tiles * 0, num_tiles
    if own is None:
        first = block * (BLOCK // TILE)
        stop = tl.minimum(first + BLOCK // TILE, num_tiles)
    return first, stop - first


@triton.jit
def _tile_counts(first, dirty, num_keys, TILE: tl.constexpr):
    """How many tiles need no mask, and how many do: those with an own key and the one that is cut off by the end."""
    full, num_tiles = num_keys // TILE, tl.cdiv(num_keys, TILE)
    clean = full - (tl.minimum(first + dirty, full) - tl.minimum(first, full))
    return clean, num_tiles - clean


@triton.jit
def _tile(step, first, dirty, num_keys, TILE: tl.constexpr, MASKED: tl.constexpr):
    if MASKED:
        return tl.where(step < dirty, first + step, tl.cdiv(num_keys, TILE) - 1)
    return step + tl.where(step >= first, dirty, 0)


@triton.jit
def _load_rows(matrix, start, num_rows, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """[BLOCK, DIM] from row `start` on; 0 beyond the end."""
    row = tl.arange(0, BLOCK)
    pointer = matrix + start.to(tl.int64) * DIM + row[:, None] * DIM + tl.arange(0, DIM)[None, :]
    if MASKED:
        return tl.load(pointer, mask=(start + row < num_rows)[:, None], other=0.0)
    return tl.load(pointer)


@triton.jit
def _inner_products(rows, rows_low, keys, keys_low, PARTS: tl.constexpr):
    """rows [M, DIM] times keys [N, DIM] transposed -> float32 [M, N]."""
    product = tl.dot(rows, tl.trans(keys))
    if PARTS == 2:
        product = tl.dot(rows, tl.trans(keys_low), product)
        product = tl.dot(rows_low, tl.trans(keys), product)
    return product


@triton.jit
def _weighted_sum(share, keys, keys_low, total, PARTS: tl.constexpr):
    """total [M, DIM] + share [M, N] times keys [N, DIM]."""
    high = share.to(keys.dtype)
    total = tl.dot(high, keys, total)
    if PARTS == 2:
        total = tl.dot(high, keys_low, total)
        total = tl.dot((share - high.to(tl.float32)).to(keys.dtype), keys, total)
    return total


@triton.jit
def _sweep_keys(
    query, query_low, own_key, keys, key_stride, bias, scale, top, total, mean, begin, stop, per_view, first, dirty,
    num_keys, PARTS: tl.constexpr, DIM: tl.constexpr, TILE: tl.constexpr, MEAN: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax over tiles begin..stop: running maximum [BLOCK], sum [BLOCK] and weighted keys [BLOCK, DIM]."""
    for step in range(begin, stop):
        view = step // per_view
        start = _tile(step - view * per_view, first, dirty, num_keys, TILE, MASKED) * TILE
        base = keys + view.to(tl.int64) * num_keys * DIM
        key_tile = _load_rows(base, start, num_keys, DIM, TILE, MASKED)
        key_low = key_tile
        if PARTS == 2:
            key_low = _load_rows(base + key_stride, start, num_keys, DIM, TILE, MASKED)
        logit = _inner_products(query, query_low, key_tile, key_low, PARTS) * scale
        key = start + tl.arange(0, TILE)
        if bias is not None:
            logit += tl.load(bias + key, mask=key < num_keys, other=0.0)[None, :] * LOG2_E
        if MASKED:
            logit = tl.where((key < num_keys)[None, :] & (key[None, :] != own_key[:, None]), logit, NOTHING)
        new_top = tl.maximum(top, tl.max(logit, 1))
        share = tl.exp2(logit - (new_top - SHIFT)[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(share, 1)
        if MEAN:
            mean = _weighted_sum(share, key_tile, key_low, mean * fade[:, None], PARTS)
        top = new_top
    return top, total, mean


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def softmax_rows_kernel(
    query,  # [P, R, D]
    query_stride,  # between its parts
    keys,  # [P, W, N, D]
    key_stride,  # between its parts
    own,  # [R] int64, or None: row r's own key is key r
    bias,  # [N] float32 or None
    scale,  # scalar float32
    top_out,  # [S, R] float32
    total_out,  # [S, R] float32
    mean_out,  # [S, R, D] float32 or None
    num_rows,
    num_keys,
    VIEWS: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pass 1: a block of rows against one of SPLITS shares of the keys."""
    block, split = tl.program_id(0), tl.program_id(1)
    row = block * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    rows = _load_rows(query, block * BLOCK, num_rows, DIM, BLOCK, True)
    rows_low = rows
    if PARTS == 2:
        rows_low = _load_rows(query + query_stride, block * BLOCK, num_rows, DIM, BLOCK, True)
    own_key = row.to(tl.int64)
    if own is not None:
        own_key = tl.load(own + row, mask=live, other=-1)
    exponent_scale = tl.load(scale) * LOG2_E
    first, dirty = _dirty_tiles(own, block, num_keys, BLOCK, TILE)
    clean, masked = _tile_counts(first, dirty, num_keys, TILE)
    top = tl.full((BLOCK,), NOTHING, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    mean = tl.zeros((BLOCK, DIM), tl.float32)
    for pass_masked in tl.static_range(2):
        per_view = masked if pass_masked else clean
        begin, stop = split * per_view * VIEWS // SPLITS, (split + 1) * per_view * VIEWS // SPLITS
        top, total, mean = _sweep_keys(
            rows, rows_low, own_key, keys, key_stride, bias, exponent_scale, top, total, mean, begin, stop, per_view,
            first, dirty, num_keys, PARTS, DIM, TILE, mean_out is not None, pass_masked == 1,
        )  # fmt: skip
    place = split.to(tl.int64) * num_rows + row
    tl.store(top_out + place, top, mask=live)
    tl.store(total_out + place, total, mask=live)
    if mean_out is not None:
        tl.store(mean_out + place[:, None] * DIM + tl.arange(0, DIM)[None, :], mean, mask=live[:, None])


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1: 2 artanh(e / (2 + e)), which does not cancel where e is small."""
    z = e / (2.0 + e)
    square = z * z
    series = 1.0 / 17.0 + square * 0.0
    for k in tl.static_range(8):
        series = series * square + 1.0 / (15 - 2 * k)
    return 2.0 * z * series


@triton.jit(do_not_specialize=["num_rows"])
def row_losses_kernel(
    query,  # [P, R, D]
    query_stride,  # between its parts
    aligned,  # [R] float32: scale <query_r, own key_r> + bias
    row_grad,  # [R] float32 or None
    scale,  # scalar float32
    top_in,  # [S, R]
    total_in,  # [S, R]
    mean,  # [S, R, D] or None; mean[0] becomes weight_r mean_r
    row_loss,  # [R] float32
    lse,  # [R] float32, base 2
    weight,  # [R] float32 or None
    row_slope,  # [R] float32 or None: weight_r d (lse_r - aligned_r) / d scale, for bias None
    num_rows,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Between the passes: the shares of the keys put together, loss and weight of each row."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < num_rows
    top = tl.full((BLOCK,), NOTHING, tl.float32)
    for split in tl.static_range(SPLITS):
        top = tl.maximum(top, tl.load(top_in + split * num_rows + row, mask=live, other=NOTHING))
    total = tl.zeros((BLOCK,), tl.float32)
    for split in tl.static_range(SPLITS):
        place = split * num_rows + row
        fade = tl.exp2(tl.load(top_in + place, mask=live, other=NOTHING) - top)
        total += fade * tl.load(total_in + place, mask=live, other=0.0)
    alone = (top < 0.5 * NOTHING) | (total == 0.0)
    total = tl.where(alone, 1.0, total)
    row_lse = tl.where(alone, NOTHING, top - SHIFT + tl.log2(total))
    own_logit = tl.load(aligned + row, mask=live, other=0.0)
    margin = row_lse * LN_2 - own_logit
    decay = tl.exp(-tl.abs(margin))
    tl.store(row_loss + row, tl.where(alone, 0.0, tl.maximum(margin, 0.0) + _log1p(decay)), mask=live)
    tl.store(lse + row, row_lse, mask=live)
    if weight is not None:
        sigmoid = tl.where(margin >= 0, 1.0, decay) / (1.0 + decay)
        row_weight = tl.where(alone, 0.0, tl.load(row_grad + row, mask=live, other=0.0) * sigmoid)
        tl.store(weight + row, row_weight, mask=live)
        if mean is not None:
            column = tl.arange(0, DIM)[None, :]
            summed = tl.zeros((BLOCK, DIM), tl.float32)
            for split in tl.static_range(SPLITS):
                place = split * num_rows + row
                fade = tl.exp2(tl.load(top_in + place, mask=live, other=NOTHING) - top)
                part = tl.load(mean + place.to(tl.int64)[:, None] * DIM + column, mask=live[:, None], other=0.0)
                summed += fade[:, None] * part
            summed = summed / total[:, None]
            place = row.to(tl.int64)[:, None] * DIM + column
            if row_slope is not None:
                rows = tl.load(query + place, mask=live[:, None], other=0.0).to(tl.float32)
                if PARTS == 2:
                    rows += tl.load(query + query_stride + place, mask=live[:, None], other=0.0).to(tl.float32)
                slope = tl.sum(rows * summed, 1) - own_logit / tl.load(scale)
                tl.store(row_slope + row, row_weight * slope, mask=live)
            tl.store(mean + place, row_weight[:, None] * summed, mask=live[:, None])


@triton.jit
def _sweep_rows(
    key_tile, key_low, key, key_bias, query, query_stride, own, lse, weight, weight_top, scale, gradient, total,
    begin, stop, first, dirty, num_rows, OWN: tl.constexpr, SUM: tl.constexpr, PARTS: tl.constexpr, DIM: tl.constexpr,
    TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    for step in range(begin, stop):
        start = _tile(step, first, dirty, num_rows, TILE, MASKED) * TILE
        rows = _load_rows(query, start, num_rows, DIM, TILE, MASKED)
        rows_low = rows
        if PARTS == 2:
            rows_low = _load_rows(query + query_stride, start, num_rows, DIM, TILE, MASKED)
        row = start + tl.arange(0, TILE)
        live = row < num_rows
        row_weight = tl.load(weight + row, mask=live, other=0.0)
        row_lse = tl.load(lse + row, mask=live, other=0.0)
        # Of a row whose weight is positive every exponent stays below SHIFT: the logits are its own lse's terms.
        size = tl.log2(tl.abs(row_weight) / weight_top) + (SHIFT - row_lse)
        exponent = tl.where(row_weight == 0.0, NOTHING, size)
        logit = _inner_products(key_tile, key_low, rows, rows_low, PARTS) * scale + key_bias[:, None]
        share = tl.exp2(logit + exponent[None, :])
        share = tl.where((row_weight < 0.0)[None, :], -share, share)
        if MASKED:
            own_key = row.to(tl.int64)
            if own is not None:
                own_key = tl.load(own + row, mask=live, other=-1)
            on_own = row_weight * 0.0
            if OWN:
                on_own = row_weight * (-(2.0**SHIFT) / weight_top)
            share = tl.where(own_key[None, :] == key[:, None], on_own[None, :], share)
        gradient = _weighted_sum(share, rows, rows_low, gradient, PARTS)
        if SUM:
            total += tl.sum(share, 1)
    return gradient, total


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def softmax_keys_kernel(
    query,  # [P, R, D]
    query_stride,  # between its parts
    keys,  # [P, W, N, D]
    key_stride,  # between its parts
    own,  # [R] int64, or None: row r's own key is key r
    bias,  # [N] float32 or None
    scale,  # scalar float32
    lse,  # [R] float32, base 2
    weight,  # [R] float32
    weight_top,  # scalar float32: max |weight|, at least 1e-30
    gradient_out,  # [S, W, N, D] float32, times 2**SHIFT / weight_top
    total_out,  # [S, W, N] float32 or None: the same sum without query_r
    num_rows,
    num_keys,
    SPLITS: tl.constexpr,
    OWN: tl.constexpr,  # a row adds -weight_r query_r to its own key, instead of nothing
    PARTS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pass 2: a block of keys against one of SPLITS shares of the rows."""
    block, split, view = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    key = block * BLOCK + tl.arange(0, BLOCK)
    live = key < num_keys
    base = keys + view.to(tl.int64) * num_keys * DIM
    key_tile = _load_rows(base, block * BLOCK, num_keys, DIM, BLOCK, True)
    key_low = key_tile
    if PARTS == 2:
        key_low = _load_rows(base + key_stride, block * BLOCK, num_keys, DIM, BLOCK, True)
    key_bias = tl.zeros((BLOCK,), tl.float32)
    if bias is not None:
        key_bias = tl.load(bias + key, mask=live, other=0.0) * LOG2_E
    exponent_scale, largest = tl.load(scale) * LOG2_E, tl.load(weight_top)
    first, dirty = _dirty_tiles(own, block, num_rows, BLOCK, TILE)
    clean, masked = _tile_counts(first, dirty, num_rows, TILE)
    gradient = tl.zeros((BLOCK, DIM), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for pass_masked in tl.static_range(2):
        count = masked if pass_masked else clean
        begin, stop = split * count // SPLITS, (split + 1) * count // SPLITS
        gradient, total = _sweep_rows(
            key_tile, key_low, key, key_bias, query, query_stride, own, lse, weight, largest, exponent_scale, gradient,
            total, begin, stop, first, dirty, num_rows, OWN, total_out is not None, PARTS, DIM, TILE, pass_masked == 1,
        )  # fmt: skip
    place = (split * tl.num_programs(2) + view).to(tl.int64) * num_keys + key
    tl.store(gradient_out + place[:, None] * DIM + tl.arange(0, DIM)[None, :], gradient, mask=live[:, None])
    if total_out is not None:
        tl.store(total_out + place, total, mask=live)


# Operands of the products at each precision: dtype and parts.
OPERANDS = {"highest": (torch.float16, 2), "high": (torch.float16, 1), "medium": (torch.bfloat16, 1)}
# Columns at each precision: more do not fit beside each other in registers and shared memory.
WIDEST = {"highest": 128, "high": 256, "medium": 256}


def padded_width(dim: int) -> int:
    """Columns that the passes see: a power of two, at least what a tensor-core product needs."""
    return max(16, triton.next_power_of_2(dim))


def tile_sizes(width: int, parts: int) -> dict[str, int]:
    """Compile-time sizes of both passes: rows a program owns, rows or keys a step, warps, stages of loads in flight.

    The tiles of all stages stay under 99 KB of shared memory, which every device since sm_80 has.
    """
    sizes = {
        (64, 1): (128, 64, 4, 3),
        (128, 1): (128, 64, 8, 2),
        (256, 1): (64, 32, 8, 2),
        (64, 2): (64, 32, 4, 2),
        (128, 2): (64, 32, 8, 2),
    }[max(64, width), parts]
    return dict(zip(("BLOCK", "TILE", "num_warps", "num_stages"), sizes, strict=True))


def _num_splits(num_tiles: int, num_steps: int, most: int, device: torch.device) -> int:
    """Shares of the inner loop: the fewest with which the last round of programs is nearly full."""
    slots = 2 * torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4

    def rounds(splits: int) -> float:
        return triton.cdiv(num_tiles * splits, slots) / splits

    choices = range(1, max(1, min(most, num_steps)) + 1)
    best = min(map(rounds, choices))
    return next(splits for splits in choices if rounds(splits) <= 1.1 * best)


class SoftmaxPasses:
    """Both passes over one problem, with their scratch memory.

    Args:
        query: [P, R, D] float16, or bfloat16 with P = 1; D from `padded_width`, R >= 1; each part contiguous.
        keys: [P, W, N, D], likewise.
        own: [R] int64 or None: row r's own key is key r, R = N.
        bias: [N] float32 or None.
        scale: float32 scalar tensor, read on the device.
    """

    def __init__(self, query: Tensor, keys: Tensor, own: Tensor | None, bias: Tensor | None, scale: Tensor) -> None:
        self.query = query, query.stride(0)
        self.problem = (*self.query, keys, keys.stride(0), own, bias, scale)
        self.scale = scale
        self.parts, self.num_rows, self.width = query.shape
        self.num_views, self.num_keys = keys.shape[1:3]
        self.sizes = {"PARTS": self.parts, "DIM": self.width, **tile_sizes(self.width, self.parts)}
        # Shares cost memory, and large problems fill the device without many.
        self.most_splits = 8 if max(self.num_rows, self.num_keys) <= 16384 else 2

    def _float(self, *shape: int) -> Tensor:
        return self.scale.new_empty(shape)

    def rows(
        self, aligned: Tensor, row_grad: Tensor | None, row_loss: Tensor, row_slope: Tensor | None, mean: bool
    ) -> None:
        """Pass 1: fills row_loss [R] and row_slope [R]; keeps lse, weight and, with `mean`, weight_r mean_r."""
        blocks = triton.cdiv(self.num_rows, self.sizes["BLOCK"])
        steps = self.num_views * triton.cdiv(self.num_keys, self.sizes["TILE"])
        splits = _num_splits(blocks, steps, self.most_splits, self.scale.device)
        top, total = self._float(splits, self.num_rows), self._float(splits, self.num_rows)
        means = self._float(splits, self.num_rows, self.width) if mean else None
        softmax_rows_kernel[(blocks, splits)](
            *self.problem, top, total, means, self.num_rows, self.num_keys,
            VIEWS=self.num_views, SPLITS=splits, **self.sizes,
        )  # fmt: skip
        self.lse = self._float(self.num_rows)
        self.weight = None if row_grad is None else self._float(self.num_rows)
        block = max(1, 2048 // self.width)
        row_losses_kernel[(triton.cdiv(self.num_rows, block),)](
            *self.query, aligned, row_grad, self.scale, top, total, means, row_loss, self.lse, self.weight,
            row_slope, self.num_rows, SPLITS=splits, PARTS=self.parts, DIM=self.width, BLOCK=block, num_warps=4,
        )  # fmt: skip
        # A copy lets go of the other shares before pass 2 asks for its own.
        self.weighted_mean = means if means is None else means[0] if splits == 1 else means[0].clone()

    def columns(self, *, own_term: bool, total: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Pass 2: gradient [S, W, N, D], its row sums [S, W, N] or None, and the factor that both still need."""
        weight_top = self.weight.abs().amax().clamp_min(1e-30)
        blocks = triton.cdiv(self.num_keys, self.sizes["BLOCK"])
        steps = triton.cdiv(self.num_rows, self.sizes["TILE"])
        splits = _num_splits(blocks * self.num_views, steps, self.most_splits, self.scale.device)
        gradient = self._float(splits, self.num_views, self.num_keys, self.width)
        totals = self._float(splits, self.num_views, self.num_keys) if total else None
        softmax_keys_kernel[(blocks, splits, self.num_views)](
            *self.problem, self.lse, self.weight, weight_top, gradient, totals, self.num_rows, self.num_keys,
            SPLITS=splits, OWN=own_term, **self.sizes,
        )  # fmt: skip
        return gradient, totals, weight_top * 2.0**-SHIFT.value
