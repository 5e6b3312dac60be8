"""Embeddings of users without a row in the tables, from what a trained encoder knows of each item.

B = users, I = items, D = embedding width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FoldIn"]


class FoldIn(NamedTuple):
    """Everything needed to embed a bare history; made by `GraphEncoder.fold_in_tables`, where the formula stands.

        user = sum_{i in N} source_i / |N|^exponent + normalize(sum_{i in N} view_i)

    Attributes:
        source: [I, D] float, what an item passes to its users in the backbone.
        view: [I, D] float, sum of the user-branch embeddings of the item's users; None without a user branch.
        exponent: 0.5 (lightgcn) or 1.0 (the mean).
    """

    source: Tensor
    view: Tensor | None
    exponent: float

    @torch.no_grad()
    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        """User embeddings [B, D]; an empty history gives zeros.

        Args:
            indptr: [B + 1] int64, where each history starts in `items`.
            items: [indptr[-1]] int64 item rows; repeats within a history count once.
        Raises: ValueError, an item outside [0, I).
        """
        num_items, device = self.source.shape[0], self.source.device
        indptr, items = (torch.as_tensor(value, device=device).long() for value in (indptr, items))
        if items.numel() and not (int(items.min()) >= 0 and int(items.max()) < num_items):
            wrong = items[(items < 0) | (items >= num_items)][0]
            raise ValueError(f"items must be in [0, {num_items}), got {int(wrong)}")
        num_users = indptr.numel() - 1
        row = torch.repeat_interleave(torch.arange(num_users, device=device), indptr.diff())
        pair = torch.unique(row * num_items + items)
        row, items = pair // num_items, pair % num_items
        count = torch.bincount(row, minlength=num_users).clamp(min=1)
        user = _sum_rows(self.source, row, items, num_users) / count.unsqueeze(1) ** self.exponent
        if self.view is not None:
            user = user + F.normalize(_sum_rows(self.view, row, items, num_users), dim=1)
        return user


def _sum_rows(source: Tensor, row: Tensor, index: Tensor, num_rows: int) -> Tensor:
    return source.new_zeros(num_rows, source.shape[1]).index_add(0, row, source[index])
