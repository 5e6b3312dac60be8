"""Item rows of many users in time order, as one value that everything which reads sequences takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Histories", "user_counts"]

# Events that are looked at once.
_EVENTS = 1 << 20


def user_counts(users: np.ndarray, num_users: int, chosen: np.ndarray | None = None, *, divisor: int = 1) -> np.ndarray:
    """[num_users] int64 events of each user: of all, or of those that are chosen, [n] bool.

    It counts what `np.bincount(users // divisor, minlength=num_users)` counts, a block at a time.
    """
    counts = np.zeros(num_users, np.int64)
    for start in range(0, len(users), _EVENTS):
        block = users[start : start + _EVENTS]
        if divisor != 1:
            block = block // divisor
        if chosen is not None:
            block = block[chosen[start : start + _EVENTS]]
        if len(block):
            low = int(block.min())
            found = np.bincount(block - low)
            counts[low : low + len(found)] += found
    return counts


class Histories(NamedTuple):
    """The items of user u are `items[indptr[u] : indptr[u + 1]]`.

    It is the pair (indptr, items) of a CSR matrix, and unpacks like one.

    Attributes:
        indptr: [num_users + 1] int64, rising from 0 to n.
        items: [n] int64 item rows, each user's in time order.
    """

    indptr: np.ndarray
    items: np.ndarray

    @classmethod
    def of_events(
        cls, users: np.ndarray, items: np.ndarray, num_users: int, chosen: np.ndarray | None = None
    ) -> Histories:
        """Of events that are grouped by user, ascending, and in time order within a user; or of some, [n] bool."""
        indptr = np.zeros(num_users + 1, dtype=np.int64)
        np.cumsum(user_counts(users, num_users, chosen), out=indptr[1:])
        return cls(indptr, items if chosen is None else items[chosen])

    @classmethod
    def of_lists(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> Histories:
        """One user each."""
        indptr = np.cumsum([0, *map(len, lists)], dtype=np.int64)
        return cls(indptr, np.array([item for one in lists for item in one], dtype=np.int64))

    @classmethod
    def checked(cls, pair: Any, name: str, num_items: int | None = None) -> Histories:
        """Of a pair of arrays or tensors, as int64.

        Raises: ValueError naming `name`, offsets that do not fit the items, or an item outside [0, num_items).
        """
        indptr, items = (np.asarray(getattr(part, "cpu", lambda part=part: part)()) for part in pair)
        if indptr.ndim != 1 or items.ndim != 1 or not len(indptr):
            raise ValueError(f"{name} must be (indptr [num_users + 1], items [n]), got {indptr.shape}, {items.shape}")
        if indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != len(items):
            raise ValueError(
                f"{name} indptr must rise from 0 to len(items) = {len(items)}, got {indptr[0]}..{indptr[-1]}"
            )
        wrong = items[(items < 0) | (items >= num_items)] if num_items is not None else items[:0]
        if len(wrong):
            raise ValueError(f"{name} items must be in [0, {num_items}), got {wrong[0]}")
        return cls(indptr.astype(np.int64, copy=False), items.astype(np.int64, copy=False))

    @property
    def num_users(self) -> int:
        return len(self.indptr) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[num_users] int64."""
        return np.diff(self.indptr)

    @property
    def owners(self) -> np.ndarray:
        """[n] int64: the user of each item."""
        return np.repeat(np.arange(self.num_users), self.lengths)

    def take(self, users: np.ndarray) -> Histories:
        """Those of some users [m], in their order."""
        start = self.indptr[users]
        count = self.indptr[1:][users] - start
        indptr = np.concatenate([[0], np.cumsum(count, dtype=np.int64)])
        place = np.arange(indptr[-1]) + np.repeat(start - indptr[:-1], count)
        return Histories(indptr, self.items[place])
