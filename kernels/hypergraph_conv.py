"""Sparse hypergraph convolution and bipartite propagation: every output row is one gather with one owner.

A program owns a block of columns of a block of short rows, of a long row or of a chunk of a hub, as the schedule of the
matrix says (`RowSchedule` of hellm/hypergraph.py: row_order, hub_chunk_begin, num_long, num_hub_chunks). Sums have an
order that depends on the matrix alone, so that results are the same on every run. R = rows, D = columns, nnz = entries
of a CSR matrix; A = float32, or float64 for float64 rows.
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
def _store_rows(
    total,  # [P, BLOCK_DIM]
    row,  # [P]
    live,  # [P]
    column,
    inside,
    self_x,
    self_scale,
    diagonal,
    out_scale,
    out,
    num_summed,
    dim,
    A: tl.constexpr,
):
    """out = (own + out_scale * total) / num_summed; own = -out_scale * diagonal * self_scale * self_x or self_x."""
    place = row[:, None] * dim + column[None, :]
    mask = live[:, None] & inside[None, :]
    if diagonal is not None:
        own = tl.load(self_x + place, mask=mask, other=0.0).to(A)
        if self_scale is not None:
            own *= tl.load(self_scale + row, mask=live, other=0.0)[:, None]
        total -= own * tl.load(diagonal + row, mask=live, other=0.0)[:, None]
    if out_scale is not None:
        total *= tl.load(out_scale + row, mask=live, other=0.0)[:, None]
    if self_x is not None and diagonal is None:
        total += tl.load(self_x + place, mask=mask, other=0.0).to(A)
    tl.store(out + place, (total / num_summed).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_long", "num_rows"])
def short_kernel(
    x,  # [*, D]
    indptr,  # [R + 1] int64
    indices,  # [nnz] int32
    values,  # A [nnz] or None
    row_order,  # [R] int32
    in_scale,  # A [*] or None
    self_x,  # [R, D] or None
    self_scale,  # A [R] or None
    diagonal,  # A [R] or None
    out_scale,  # A [R] or None
    out,  # [R, D]
    num_summed,
    num_long,
    num_rows,
    dim,
    A: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """The rows of row_order from num_long on, which are about equally long within a program."""
    place = num_long + tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    live, inside = place < num_rows, column < dim
    row = tl.load(row_order + place, mask=live, other=0).to(tl.int64)
    begin = tl.load(indptr + row, mask=live, other=0)
    count = (tl.load(indptr + row + 1, mask=live, other=0) - begin).to(tl.int32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_DIM), A)
    for start in range(0, tl.max(count, 0), UNROLL):
        # UNROLL loads that do not wait for each other.
        for k in tl.static_range(UNROLL):
            total += _scaled_neighbours(
                x, indices, values, in_scale, begin + start + k, start + k < count, column, inside, dim, A
            )
    _store_rows(total, row, live, column, inside, self_x, self_scale, diagonal, out_scale, out, num_summed, dim, A)


@triton.jit(do_not_specialize=["num_hubs", "num_hub_chunks"])
def long_kernel(
    x,
    indptr,
    indices,
    values,
    row_order,
    hub_chunk_begin,  # [hubs + 1] int32
    in_scale,
    self_x,
    self_scale,
    diagonal,
    out_scale,
    out,
    partial,  # A [num_hub_chunks, D]
    num_summed,
    num_hubs,
    num_hub_chunks,
    dim,
    A: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LONG: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A program for each chunk of a hub, then one for each other long row; the chunks are left in `partial`."""
    unit = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = column < dim
    place, chunk = unit - num_hub_chunks + num_hubs, unit * 0
    if unit < num_hub_chunks:
        # The last hub whose chunks begin at or before this one.
        low = unit * 0
        high = low + num_hubs - 1
        while low < high:
            middle = (low + high + 1) // 2
            before = tl.load(hub_chunk_begin + middle) <= unit
            low = tl.where(before, middle, low)
            high = tl.where(before, high, middle - 1)
        place, chunk = low, unit - tl.load(hub_chunk_begin + low)
    row = tl.load(row_order + place).to(tl.int64)
    first, last = tl.load(indptr + row) + chunk * CHUNK, tl.load(indptr + row + 1)
    if unit < num_hub_chunks:
        last = tl.minimum(last, first + CHUNK)
    part = tl.zeros((LONG, BLOCK_DIM), A)
    for start in range(0, (last - first).to(tl.int32), LONG):
        k = first + start + tl.arange(0, LONG)
        part += _scaled_neighbours(x, indices, values, in_scale, k, k < last, column, inside, dim, A)
    total = tl.sum(part, 0)[None, :]
    if unit < num_hub_chunks:
        slot = unit.to(tl.int64) * dim + column
        tl.store(partial + slot[None, :], total, mask=inside[None, :])
    one = tl.arange(0, 1)
    live = unit + one >= num_hub_chunks
    _store_rows(
        total, row + one, live, column, inside, self_x, self_scale, diagonal, out_scale, out, num_summed, dim, A
    )


@triton.jit
def hub_kernel(
    partial,
    row_order,
    hub_chunk_begin,
    self_x,
    self_scale,
    diagonal,
    out_scale,
    out,
    num_summed,
    dim,
    A: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """A program for each hub: its chunks, in their order."""
    hub = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = column < dim
    total = tl.zeros((1, BLOCK_DIM), A)
    for chunk in range(tl.load(hub_chunk_begin + hub), tl.load(hub_chunk_begin + hub + 1)):
        place = tl.full((1, 1), chunk, tl.int64) * dim + column[None, :]
        total += tl.load(partial + place, mask=inside[None, :], other=0.0)
    one = tl.arange(0, 1)
    row = tl.load(row_order + hub).to(tl.int64) + one
    _store_rows(total, row, one == 0, column, inside, self_x, self_scale, diagonal, out_scale, out, num_summed, dim, A)


# Entries that a program of a hub takes: HUB_CHUNK of hellm/hypergraph.py, by which its chunks were counted.
HUB_CHUNK = 512


def block_sizes(dim: int) -> dict[str, int]:
    """Compile-time sizes for rows of `dim` columns: 512 elements of output and 2,048 of a long row a program."""
    columns = min(128, triton.next_power_of_2(dim))
    return {
        "BLOCK_ROWS": min(64, 512 // columns),
        "BLOCK_DIM": columns,
        "UNROLL": 4,
        "LONG": min(128, 2048 // columns),
    }


def _gather(
    x: Tensor,
    csr: tuple[Tensor, Tensor, Tensor | None],
    schedule: tuple[Tensor, Tensor, int, int],
    out: Tensor,
    *,
    in_scale: Tensor | None = None,
    self_x: Tensor | None = None,
    self_scale: Tensor | None = None,
    diagonal: Tensor | None = None,
    out_scale: Tensor | None = None,
    num_summed: int = 1,
) -> None:
    """out = out_scale * (matrix (in_scale * x)), and what `_store_rows` makes of it."""
    num_rows, dim = out.shape
    if out.numel() == 0:
        return
    row_order, hub_chunk_begin, num_long, num_hub_chunks = schedule
    num_hubs = hub_chunk_begin.numel() - 1
    sizes = block_sizes(dim)
    columns = {"A": tl.float64 if x.dtype == torch.float64 else tl.float32, "BLOCK_DIM": sizes["BLOCK_DIM"]}
    panels = triton.cdiv(dim, sizes["BLOCK_DIM"])
    finish = (self_x, self_scale, diagonal, out_scale, out)
    partial = x.new_empty(num_hub_chunks, dim, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if num_long:
        long_kernel[num_hub_chunks + num_long - num_hubs, panels](
            x, *csr, row_order, hub_chunk_begin, in_scale, *finish, partial, num_summed, num_hubs, num_hub_chunks, dim,
            **columns, LONG=sizes["LONG"], CHUNK=HUB_CHUNK, num_warps=2,
        )  # fmt: skip
    if num_long < num_rows:
        short_kernel[triton.cdiv(num_rows - num_long, sizes["BLOCK_ROWS"]), panels](
            x, *csr, row_order, in_scale, *finish, num_summed, num_long, num_rows, dim,
            **columns, BLOCK_ROWS=sizes["BLOCK_ROWS"], UNROLL=sizes["UNROLL"], num_warps=2,
        )  # fmt: skip
    if num_hubs:
        hub_kernel[num_hubs, panels](
            partial, row_order, hub_chunk_begin, *finish, num_summed, dim, **columns, num_warps=1
        )


def incidence_product(
    x: Tensor,
    matrix_indptr: Tensor,
    matrix_indices: Tensor,
    matrix_values: Tensor | None,
    out: Tensor,
    schedule: tuple[Tensor, Tensor, int, int],
) -> None:
    """out [R, D] = matrix [R, *] x [*, D]; absent values are ones."""
    _gather(x, (matrix_indptr, matrix_indices, matrix_values), schedule, out)


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
    vertex_schedule: tuple[Tensor, Tensor, int, int],
    edge_schedule: tuple[Tensor, Tensor, int, int],
) -> None:
    """num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x).

    x and out are [V, D]; workspace is A [num_hyperedges + (V if num_layers > 1), D].
    """
    num_hyperedges = edge_indptr.numel() - 1
    edge, between = workspace[:num_hyperedges], workspace[num_hyperedges:]
    for layer in range(num_layers):
        _gather(
            x, (edge_indptr, edge_indices, edge_values), edge_schedule, edge,
            in_scale=in_scale, out_scale=edge_scale,
        )  # fmt: skip
        target = out if layer == num_layers - 1 else between
        _gather(
            edge, (vertex_indptr, vertex_indices, vertex_values), vertex_schedule, target,
            self_x=None if diagonal is None else x, self_scale=in_scale, diagonal=diagonal, out_scale=out_scale,
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
    user_schedule: tuple[Tensor, Tensor, int, int],
    item_schedule: tuple[Tensor, Tensor, int, int],
) -> None:
    """Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- likewise with R^T.

    user_x and user_out are [U, D], item_x and item_out [I, D]; workspace is A [2 (U + I), D]. Horner's scheme: L times
    h <- x + A h gives the sum of layers 0..L; the last one divides by L + 1.
    """
    own, out = (user_x, item_x), (user_out, item_out)
    tables = workspace.split([len(user_x), len(item_x)] * 2)
    sides = (
        ((user_indptr, user_indices, user_values), user_schedule, item_scale, user_scale),
        ((item_indptr, item_indices, item_values), item_schedule, user_scale, item_scale),
    )
    current = own
    for layer in range(num_layers):
        last = layer == num_layers - 1
        following = out if last else tables[layer % 2 * 2 :][:2]
        for side, (csr, schedule, in_scale, out_scale) in enumerate(sides):
            _gather(
                current[1 - side], csr, schedule, following[side],
                in_scale=in_scale, out_scale=out_scale, self_x=own[side],
                num_summed=num_layers + 1 if last else 1,
            )  # fmt: skip
        current = following
