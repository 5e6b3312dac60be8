"""The events that a recommender knows its users by, those that come while it serves among them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from hellm.data import Histories

if TYPE_CHECKING:
    import polars as pl

__all__ = ["ARRIVED", "HISTORY", "KNOWN", "Events"]

HISTORY = 3
"""Label of events that are only history: their users are not trained on."""
ARRIVED = 4
"""Label of events that came after training; no evaluation reads them."""
KNOWN = {"valid": (0, HISTORY), "test": (0, 1, HISTORY)}
"""Splits whose events a user is known by, when an event of the key is to be found."""


@dataclass(frozen=True, eq=False)
class Events:
    """Events grouped by user, ascending, and in time order within a user. Nothing of it ever changes.

    Attributes:
        users, items: [n] int64 rows.
        split: [n] int8: 0, 1, 2 as in histories.parquet, `HISTORY` or `ARRIVED`.
        num_users: Users without events included.
    """

    users: np.ndarray
    items: np.ndarray
    split: np.ndarray
    num_users: int

    @classmethod
    def of_table(cls, table: pl.DataFrame, num_users: int) -> Events:
        """Of histories.parquet."""
        # Copies: torch does not take the read-only arrays that a table lends.
        users, items, split = (np.array(table[name]) for name in ("user", "item", "split"))
        return cls(users.astype(np.int64, copy=False), items.astype(np.int64, copy=False), split, num_users)

    def table(self) -> pl.DataFrame:
        """As histories.parquet."""
        import polars as pl

        return pl.DataFrame({"user": self.users, "item": self.items, "split": self.split})

    @cached_property
    def histories(self) -> Histories:
        """All events of each user."""
        return Histories.of_events(self.users, self.items, self.num_users)

    @cached_property
    def is_trained(self) -> np.ndarray:
        """[num_users] bool: users with training events."""
        return np.bincount(self.users[self.split == 0], minlength=self.num_users) > 0

    @cached_property
    def has_arrived(self) -> np.ndarray:
        """[num_users] bool: users with events that came after training."""
        return np.bincount(self.users[self.split == ARRIVED], minlength=self.num_users) > 0

    def of_splits(self, splits: tuple[int, ...]) -> Histories:
        """Each user's events of some splits."""
        known = np.isin(self.split, splits)
        return Histories.of_events(self.users[known], self.items[known], self.num_users)

    def extended(self, users: np.ndarray, items: np.ndarray, num_users: int) -> Events:
        """With events [m] that came after training, each at the end of its user's.

        `users` may hold rows of new users, up to `num_users`.
        """
        end = np.concatenate([self.histories.indptr[1:], np.full(num_users - self.num_users, len(self.users))])
        order = np.argsort(users, kind="stable")
        users, items = users[order], items[order]
        place = end[users]
        return Events(
            np.insert(self.users, place, users),
            np.insert(self.items, place, items),
            np.insert(self.split, place, np.full(len(users), ARRIVED, self.split.dtype)),
            num_users,
        )
