"""Histories of different lengths as one padded batch.

B = histories, T = longest of them after cutting.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["batches_by_length", "check_histories", "pad_histories"]


def check_histories(indptr: Tensor, items: Tensor, num_items: int) -> None:
    """Raises: ValueError, an item outside [0, num_items) or offsets that do not fit `items`."""
    if indptr.ndim != 1 or not len(indptr) or int(indptr[0]) != 0 or int(indptr[-1]) != len(items):
        raise ValueError(f"indptr must run from 0 to the number of items {len(items)}, got {indptr.tolist()[:3]} ...")
    if len(items) and not (int(items.min()) >= 0 and int(items.max()) < num_items):
        wrong = items[(items < 0) | (items >= num_items)][0]
        raise ValueError(f"items must be in [0, {num_items}), got {int(wrong)}")


def pad_histories(indptr: Tensor, items: Tensor, *, max_length: int | None = None) -> tuple[Tensor, Tensor]:
    """The last `max_length` items of each history, left-aligned in one matrix.

    Args:
        indptr: [B + 1] int64, where each history starts in `items`.
        items: [indptr[-1]] int64 item rows in time order.
        max_length: items kept per history, the latest; None keeps all.
    Returns: items [B, T] int64 with 0 where there is padding, and mask [B, T] bool, True at items. T is the longest
        kept history.
    """
    end = indptr[1:]
    length = end - indptr[:-1]
    if max_length is not None:
        length = length.clamp(max=max_length)
    place = torch.arange(int(length.max()) if len(length) else 0, device=items.device)
    mask = place < length.unsqueeze(1)
    source = (end - length).unsqueeze(1) + place
    padded = torch.zeros(mask.shape, dtype=torch.int64, device=items.device)
    padded[mask] = items[source[mask]]
    return padded, mask


def batches_by_length(
    lengths: Tensor, max_tokens: int, *, tokens_around: int, tokens_per_item: int, same_length: bool = False
) -> list[Tensor]:
    """Rows of histories in batches of about `max_tokens` padded tokens, the longest first.

    Args:
        lengths: [B] int64 items of each.
        max_tokens: of a batch; a longer history has one of its own.
        tokens_around: tokens of a history besides its items.
        tokens_per_item: tokens of an item.
        same_length: batches hold histories of one length only.
    """
    batches, start = [], 0
    order = lengths.argsort(descending=True, stable=True)
    sizes = lengths[order].tolist()
    while start < len(sizes):
        stop = start + max(1, max_tokens // max(1, tokens_around + sizes[start] * tokens_per_item))
        rows = order[start:stop]
        if same_length:
            rows = rows[lengths[rows] == sizes[start]]
        batches.append(rows)
        start += len(rows)
    return batches
