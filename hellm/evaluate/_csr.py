"""Lists of items of many users as CSR: (indptr [num_users + 1], items [n])."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

CSR: TypeAlias = "tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]"


def to_numpy(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def as_csr(csr: CSR, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The two parts as int64. Raises: ValueError, offsets that do not fit the items."""
    indptr, items = (to_numpy(part).astype(np.int64, copy=False) for part in csr)
    if indptr.ndim != 1 or items.ndim != 1 or not len(indptr):
        raise ValueError(f"{name} must be (indptr [num_users + 1], items [n]), got {indptr.shape}, {items.shape}")
    if indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != len(items):
        raise ValueError(f"{name} indptr must rise from 0 to len(items) = {len(items)}, got {indptr[0]}..{indptr[-1]}")
    return indptr, items


def check_items(csr: tuple[np.ndarray, np.ndarray], num_items: int, name: str) -> None:
    """Raises: ValueError, an item outside [0, num_items)."""
    items = csr[1]
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        wrong = items[(items < 0) | (items >= num_items)][0]
        raise ValueError(f"{name} items must be in [0, {num_items}), got {wrong}")


def rows_of(csr: tuple[np.ndarray, np.ndarray], users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row in `users`, item) of every stored item of these users, without a loop over them."""
    indptr, items = csr
    lengths = indptr[users + 1] - indptr[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    offset = np.arange(len(rows)) - np.repeat(lengths.cumsum() - lengths, lengths)
    return rows, items[indptr[users][rows] + offset]


def is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys
