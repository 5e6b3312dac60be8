"""Sparse hypergraph convolution and bipartite propagation: every output row is one gather with one owner.

A program owns a block of rows and a block of columns. Neighbours are added in the order in which they are stored, so
that results are the same on every run. R = rows, D = columns, nnz = entries of a CSR matrix; A = float32, or float64
for float64 rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _scaled_neighbours(x, indices, values, in_scale, position, live, column, inside, dim, A: tl.constexpr):
    """Rows [P, BLOCK_DIM] of x that the CSR entries at `position` [P] name, times value and scale; 0 where not live."""
    index = tl.load(indices + position, mask=live, other=0).to(tl.int64)
    mask = live[:, None] & inside[None, :]
    found = tl.load(x + index[:, None] * dim + column[None, :], mask=mask, other=0.0).to(A)
    if values is not None:
        found *= tl.load(values + position, mask=live, other=0.0)[:, None]
    if in_scale is not None:
        found *= tl.load(in_scale + index, mask=live, other=0.0)[:, None]
    return found


@triton.jit
def gather_kernel(
    x,  # [*, D]
    indptr,  # [R + 1] int64
    indices,  # [nnz] int32
    values,  # A [nnz] or None
    in_scale,  # A [*] or None
    self_x,  # [R, D] or None: what diagonal * self_scale * self_x subtracts
    self_scale,  # A [R] or None
    diagonal,  # A [R] or None
    out_scale,  # A [R] or None
    out,  # [R, D] or None
    running_sum,  # [R, D] or None
    mean_out,  # [R, D] or None: (running_sum + out) / num_summed
    num_summed,
    num_rows,
    dim,
    A: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UNROLL: tl.constexpr,
    TOGETHER: tl.constexpr,
    LONG: tl.constexpr,
):
    """out = out_scale * (matrix (in_scale * x) - diagonal * self_scale * self_x)"""
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    live, inside = row < num_rows, column < dim
    begin = tl.load(indptr + row, mask=live, other=0)
    count = (tl.load(indptr + row + 1, mask=live, other=0) - begin).to(tl.int32)
    longest = tl.max(count, 0)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), A)
    for start in range(0, tl.minimum(longest, TOGETHER), UNROLL):
        # UNROLL loads that do not wait for each other.
        for k in tl.static_range(UNROLL):
            total += _scaled_neighbours(
                x, indices, values, in_scale, begin + start + k, start + k < count, column, inside, dim, A
            )
    if longest > TOGETHER:
        # The rest of a long row, by itself: LONG neighbours at a time instead of one.
        for r in range(0, BLOCK_ROWS):
            this = tl.arange(0, BLOCK_ROWS) == r
            rest, stop = tl.sum(tl.where(this, begin, 0), 0), tl.sum(tl.where(this, count, 0), 0)
            part = tl.zeros((LONG, BLOCK_DIM), A)
            for start in range(TOGETHER, stop, LONG):
                k = start + tl.arange(0, LONG)
                part += _scaled_neighbours(x, indices, values, in_scale, rest + k, k < stop, column, inside, dim, A)
            total += tl.where(this[:, None], tl.sum(part, 0)[None, :], 0.0)

    place = row[:, None] * dim + column[None, :]
    mask = live[:, None] & inside[None, :]
    if diagonal is not None:
        own = tl.load(self_x + place, mask=mask, other=0.0).to(A)
        if self_scale is not None:
            own *= tl.load(self_scale + row, mask=live, other=0.0)[:, None]
        total -= own * tl.load(diagonal + row, mask=live, other=0.0)[:, None]
    if out_scale is not None:
        total *= tl.load(out_scale + row, mask=live, other=0.0)[:, None]
    if out is not None:
        tl.store(out + place, total.to(out.dtype.element_ty), mask=mask)
    if mean_out is not None:
        total += tl.load(running_sum + place, mask=mask, other=0.0).to(A)
        tl.store(mean_out + place, (total / num_summed).to(mean_out.dtype.element_ty), mask=mask)


def block_sizes(dim: int) -> dict[str, int]:
    """Compile-time sizes for rows of `dim` columns: 512 elements of output and 2,048 of a long row a program."""
    columns = min(128, triton.next_power_of_2(dim))
    return {
        "BLOCK_ROWS": min(64, 512 // columns),
        "BLOCK_DIM": columns,
        "UNROLL": 4,
        "TOGETHER": 32,
        "LONG": min(128, 2048 // columns),
    }


def _gather(
    x: Tensor,
    csr: tuple[Tensor, Tensor, Tensor | None],
    *,
    in_scale: Tensor | None = None,
    self_x: Tensor | None = None,
    self_scale: Tensor | None = None,
    diagonal: Tensor | None = None,
    out_scale: Tensor | None = None,
    out: Tensor | None = None,
    running_sum: Tensor | None = None,
    mean_out: Tensor | None = None,
    num_summed: int = 1,
) -> None:
    target = mean_out if out is None else out
    num_rows, dim = target.shape
    if target.numel() == 0:
        return
    sizes = block_sizes(dim)
    grid = (triton.cdiv(num_rows, sizes["BLOCK_ROWS"]), triton.cdiv(dim, sizes["BLOCK_DIM"]))
    accumulate = tl.float64 if x.dtype == torch.float64 else tl.float32
    gather_kernel[grid](
        x, *csr, in_scale, self_x, self_scale, diagonal, out_scale, out, running_sum, mean_out, num_summed,
        num_rows, dim, A=accumulate, **sizes, num_warps=2,
    )  # fmt: skip


def incidence_product(
    x: Tensor, matrix_indptr: Tensor, matrix_indices: Tensor, matrix_values: Tensor | None, out: Tensor
) -> None:
    """out [R, D] = matrix [R, *] x [*, D]; absent values are ones."""
    _gather(x, (matrix_indptr, matrix_indices, matrix_values), out=out)


def hypergraph_conv(
    x: Tensor,
    vertex_indptr: Tensor,
    vertex_indices: Tensor,
    vertex_values: Tensor | None,
    edge_indptr: Tensor,
    edge_indices: Tensor,
    edge_values: Tensor | None,
    in_scale: Tensor | None,
    edge_scale: Tensor | None,
    out_scale: Tensor | None,
    diagonal: Tensor | None,
    out: Tensor,
    workspace: Tensor,
    num_layers: int,
) -> None:
    """num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x).

    x and out are [V, D]; workspace is A [num_hyperedges + (V if num_layers > 1), D].
    """
    num_hyperedges = edge_indptr.numel() - 1
    edge, between = workspace[:num_hyperedges], workspace[num_hyperedges:]
    for layer in range(num_layers):
        _gather(x, (edge_indptr, edge_indices, edge_values), in_scale=in_scale, out_scale=edge_scale, out=edge)
        target = out if layer == num_layers - 1 else between
        _gather(
            edge, (vertex_indptr, vertex_indices, vertex_values),
            self_x=x, self_scale=in_scale, diagonal=diagonal, out_scale=out_scale, out=target,
        )  # fmt: skip
        x = target


def bipartite_propagate(
    user_x: Tensor,
    item_x: Tensor,
    user_indptr: Tensor,
    user_indices: Tensor,
    user_values: Tensor | None,
    item_indptr: Tensor,
    item_indices: Tensor,
    item_values: Tensor | None,
    user_scale: Tensor,
    item_scale: Tensor,
    user_out: Tensor,
    item_out: Tensor,
    workspace: Tensor,
    num_layers: int,
) -> None:
    """Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- likewise with R^T.

    user_x and user_out are [U, D], item_x and item_out [I, D]; workspace is A [3 (U + I), D].
    """
    num_users, num_items = user_x.shape[0], item_x.shape[0]
    parts = workspace.split([num_users, num_items] * 3)
    layers, sums = (parts[0:2], parts[2:4]), parts[4:6]
    sides = (
        ((user_indptr, user_indices, user_values), user_scale, item_scale, user_out),
        ((item_indptr, item_indices, item_values), item_scale, user_scale, item_out),
    )
    current, summed = (user_x, item_x), (user_x, item_x)
    for layer in range(num_layers):
        last = layer == num_layers - 1
        following = layers[layer % 2]
        for side, (csr, own_scale, other_scale, result) in enumerate(sides):
            _gather(
                current[1 - side], csr, in_scale=other_scale, out_scale=own_scale,
                out=None if last else following[side], running_sum=summed[side],
                mean_out=result if last else sums[side], num_summed=num_layers + 1 if last else 1,
            )  # fmt: skip
        current, summed = following, sums
