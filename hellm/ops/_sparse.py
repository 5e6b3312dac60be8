"""What the sparse products share: sums over a CSR matrix in plain torch, their scales, and batches of columns.

Each product is linear in its rows, so that its derivative by them is the operator itself, and columns do not meet, so
that a batch of matrices is one matrix. Nothing here has a shape that depends on values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hellm.ops._dtypes import wide


def csr_product(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None) -> Tensor:
    """CSR matrix [rows, columns] times x [columns, D] -> [rows, D]; absent values are ones. Sums as in `wide`."""
    wide_x = wide(x)
    gathered = wide_x[indices.long()]
    if values is not None:
        gathered = gathered * values.to(wide_x.dtype).unsqueeze(1)
    row = _row_of_entry(indptr, indices)
    return wide_x.new_zeros(indptr.numel() - 1, x.shape[1]).index_add(0, row, gathered).to(x.dtype)


def csr_dot(left: Tensor, right: Tensor, indptr: Tensor, indices: Tensor, block: int = 2**16) -> Tensor:
    """For each entry of a CSR matrix <its row of left, its column's row of right>: [nnz], with which values learn."""
    rows, columns = _row_of_entry(indptr, indices).split(block), indices.long().split(block)
    left, right = wide(left), wide(right)
    return torch.cat([(left[row] * right[column]).sum(1) for row, column in zip(rows, columns, strict=True)])


def _row_of_entry(indptr: Tensor, indices: Tensor) -> Tensor:
    """[nnz] int64."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=indices.numel())


def scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    """Each row times its scale; None is all ones."""
    return rows if scale is None else rows * scale.to(rows.dtype).unsqueeze(1)


def side_by_side(x: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """A batch of matrices, along `dim`, or one for all of it, as [rows, B * D]."""
    return x.repeat(1, batch_size) if dim is None else x.movedim(dim, 1).flatten(1)


def batch(x: Tensor, batch_size: int) -> Tensor:
    """[rows, B * D] as [rows, B, D]."""
    return x.unflatten(1, (batch_size, x.shape[1] // batch_size))


def total(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None
