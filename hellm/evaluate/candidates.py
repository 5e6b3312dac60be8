"""Candidates drawn for each user, where a protocol does not rank the whole catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from hellm.data import Histories

from .protocols import Candidates

# Users whose numbers come from one stream of random numbers; another value draws other candidates.
_BLOCK = 64


def draw_candidates(
    candidates: Candidates,
    users: np.ndarray,
    num_items: int,
    *,
    excluded: Sequence[Histories] = (),
    item_counts: np.ndarray | None = None,
) -> np.ndarray:
    """Items drawn without replacement for each user, the same whoever is asked for beside them and in what order.

    Every item runs a race with an exponential time, divided by its weight; the first `count` win, which is drawing one
    after the other in proportion to the weights (Efraimidis and Spirakis 2006).

    Args:
        candidates: How many, by what weights, of what seed.
        users: [B] int64.
        num_items: Items there are.
        excluded: Of all users, items that a user's candidates must not hold.
        item_counts: [num_items] weights, for "popularity"; items without events are not drawn.
    Returns: [B, count] int64; -1 where a user has fewer candidates.
    """
    size = min(candidates.count, num_items)
    drawn = np.full((len(users), size), -1, dtype=np.int64)
    blocks = users // _BLOCK
    for block in np.unique(blocks):
        rng = np.random.default_rng((candidates.seed, block))
        race = rng.standard_exponential((_BLOCK, num_items), dtype=np.float32)
        places = np.flatnonzero(blocks == block)
        race = race[users[places] - block * _BLOCK]
        if candidates.weighting == "popularity":
            assert item_counts is not None
            # Weights below 1 are weights as well; only 0 is never drawn.
            weights = np.where(item_counts > 0, item_counts, 1)
            race = np.where(item_counts > 0, race / weights, np.inf)
        for one in excluded:
            own = Histories(*one).take(users[places])
            race[own.owners, own.items] = np.inf
        times, items = torch.from_numpy(race).topk(size, dim=1, largest=False)
        drawn[places] = items.masked_fill_(times == torch.inf, -1).numpy()
    return drawn
