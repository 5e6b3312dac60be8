"""Matrix products whose rows have the same bits alone and beside others.

No library for matrices promises that, but they take rows in tiles, and a row keeps its bits in a tile of the same kind.
So rows come in full tiles here: on one thread, that makes answers independent of who else is asked for, which
`hellm.serve.readiness` tries on the machine that it runs on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dot_products", "full_tiles", "row_products"]

_TILE = 16


def full_tiles(x: Tensor) -> Tensor:
    """Rows [N, D] with rows of zeros at the end, up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -len(x) % _TILE)) if len(x) % _TILE else x


def dot_products(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, I] products of queries [B, D] with keys [I, D]."""
    return (full_tiles(queries) @ keys.T)[: len(queries)]


def row_products(rows: Tensor, matrix: Tensor) -> Tensor:
    """Products [N, M] of rows [N, D] and a matrix [D, M].

    On one thread, a row has the same bits alone, beside others and in any place: tiles at the edge of the matrix are
    full as well, as the place of a row counts in those that are not.
    """
    return (full_tiles(rows) @ F.pad(matrix, (0, -matrix.shape[1] % _TILE)))[: len(rows), : matrix.shape[1]]
