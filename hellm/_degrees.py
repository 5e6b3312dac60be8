"""Rows of a sparse matrix in order, and the factors that follow from their sums, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def csr(row: Tensor, column: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR with columns ascending within a row, [num_rows + 1] int64 and [nnz] int32, and the order of its entries."""
    # Rows alone are less to sort, where columns ascend in any case.
    key = row if _ascending(column) else row.long() * max(num_columns, 1) + column
    order = torch.arange(len(key), device=key.device) if _ascending(key) else torch.argsort(key, stable=True)
    del key
    indptr = row.new_zeros(num_rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=num_rows), 0, out=indptr[1:])
    return indptr, column[order].to(torch.int32), order


def _ascending(values: Tensor) -> bool:
    return bool((values[1:] >= values[:-1]).all())


def any_repeated(indptr: Tensor, columns: Tensor) -> bool:
    """Whether a row of a CSR matrix with ascending columns has a column twice."""
    equal = columns[1:] == columns[:-1]
    begin = indptr[(indptr > 0) & (indptr < columns.numel())]
    return bool(equal.index_fill(0, begin - 1, False).any())


def rows(indptr: Tensor, nnz: int) -> Tensor:
    """Row of each stored entry, [nnz] int64; nothing here has a shape that depends on values."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=nnz)


def pair_sum(vertex: Tensor, edge: Tensor, value: Tensor, num_hyperedges: int) -> Tensor:
    """For each entry, the sum of the values of all entries of its (vertex, hyperedge) pair; entries are sorted.

    A few float32 numbers summed in float64: exact, in whatever order a GPU adds them.
    """
    key = vertex * max(num_hyperedges, 1) + edge
    starts = torch.cat([torch.zeros_like(key[:1]), (key[1:] != key[:-1]).long()])
    pair = starts.cumsum(0)
    return value.new_zeros(value.numel()).index_add(0, pair, value)[pair]


def inverse(degree: Tensor) -> Tensor:
    """1 / degree, 0 for 0; safe to differentiate."""
    zero = degree == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, degree))


def inverse_root(degree: Tensor) -> Tensor:
    """|degree|^-1/2, 0 for 0; safe to differentiate."""
    zero = degree == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, degree.abs()) ** -0.5)
