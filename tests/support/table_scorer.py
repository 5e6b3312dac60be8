"""Scorers and CSR lists small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import torch


class TableScorer:
    """Scores from a fixed [num_users, num_items] table; remembers the batches it was asked for."""

    def __init__(self, table):
        self.table = torch.as_tensor(table)
        self.batches: list[int] = []

    def scores(self, users):
        self.batches.append(len(users))
        return self.table[users]


def csr(lists):
    indptr = np.cumsum([0] + [len(items) for items in lists])
    return indptr, np.array([item for items in lists for item in items], dtype=np.int64)


def descending(num_users, num_items):
    """Everybody's ranking is item 0, 1, 2, ..."""
    return TableScorer(-torch.arange(num_items, dtype=torch.float32).repeat(num_users, 1))
