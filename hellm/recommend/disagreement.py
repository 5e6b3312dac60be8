"""Two recommenders beside each other: for whom their lists differ the most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hellm.evaluate.agreement import overlap, rank_biased_overlap
from hellm.recommend.recommender import Recommender
from hellm.recommend.results import Recommendations

__all__ = ["Disagreement", "common_users", "disagreements"]


@dataclass(frozen=True)
class Disagreement:
    """Two lists of one user.

    Attributes:
        user: Id.
        lists: Those of the one recommender and of the other.
        by_overlap: 1 - the share of items that both have, see `hellm.evaluate.agreement.overlap`.
        by_rank: 1 - their rank-biased overlap, which counts most at the top.
    """

    user: str
    lists: tuple[Recommendations, Recommendations]
    by_overlap: float
    by_rank: float


def common_users(a: Recommender, b: Recommender, most: int, seed: int = 0) -> list[str]:
    """Ids of up to `most` users whom both know something of, drawn evenly."""
    known = [user for user in a.user_ids.ids if user in b.user_ids]
    lengths = (one.histories.lengths[one.user_ids.indices(known)] for one in (a, b))
    known = [user for user, *count in zip(known, *lengths, strict=True) if all(count)]
    drawn = np.random.default_rng(seed).permutation(len(known))[:most]
    return [known[row] for row in drawn]


def disagreements(a: Recommender, b: Recommender, users: Sequence[str], k: int = 10) -> list[Disagreement]:
    """The lists of both for the same users, in their order.

    Args:
        a, b: Recommenders, over items with the same ids or some of them.
        users: Ids that both know.
        k: Length of the lists; cut to the items that there are.
    """
    both = [one.recommend(list(users), k=min(k, one.num_items)) for one in (a, b)]
    found = []
    for user, *lists in zip(users, *both, strict=True):
        one, other = ([item.item for item in items] for items in lists)
        found.append(
            Disagreement(user, tuple(lists), 1 - overlap(one, other), max(0.0, 1 - rank_biased_overlap(one, other)))
        )
    return found
