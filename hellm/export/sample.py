"""What exports have in common: how they name items, and the histories that they are tried on."""

from __future__ import annotations

import numpy as np

from hellm.data import Histories
from hellm.recommend import Recommender

__all__ = ["ITEM_IDS", "sample_histories"]

ITEM_IDS = "items.json"
"""The ids of the items by row, in exports whose rows are numbers."""


def sample_histories(recommender: Recommender, most: int, seed: int = 0) -> Histories:
    """At most `most` histories of all lengths, the shortest and the longest among them, and an empty one at the end.

    Users without events have none. They stand in random order, so that batches are mixed.
    """
    lengths = recommender.histories.lengths
    users = np.flatnonzero(lengths)
    users = users[np.argsort(lengths[users], kind="stable")]
    if len(users) > most:
        users = users[np.linspace(0, len(users) - 1, most).round().astype(np.int64)]
    chosen = recommender.histories.take(np.random.default_rng(seed).permutation(users))
    return Histories(np.append(chosen.indptr, chosen.indptr[-1]), chosen.items)
