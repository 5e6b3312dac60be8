"""Rows of matrices: the largest of each, and products whose rows have the same bits alone and beside others.

No library for matrices promises the latter, but they take rows in tiles, and a row keeps its bits in a tile of the same
kind. So rows come in full tiles here: on one thread, that makes answers independent of who else is asked for, which
`hellm.serve.readiness` tries on the machine that it runs on.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["dot_products", "full_tiles", "largest"]

_TILE = 16


def full_tiles(x: Tensor) -> Tensor:
    """Rows [N, D] with rows of zeros at the end, up to a multiple of 16."""
    return F.pad(x, (0, 0, 0, -len(x) % _TILE)) if len(x) % _TILE else x


def dot_products(queries: Tensor, keys: Tensor) -> Tensor:
    """[B, I] products of queries [B, D] with keys [I, D]."""
    return (full_tiles(queries) @ keys.T)[: len(queries)]


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [N, M] and their columns, descending; of equals the first, which topk does not promise.

    So those of a smaller k stand at the beginning of those of a larger one.
    """
    least = x.topk(k, dim=1).values[:, -1:]
    better, equal = x > least, x == least
    room = k - better.sum(1, keepdim=True)
    column = (better | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    value, order = x.gather(1, column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, order)
