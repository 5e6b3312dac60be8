"""How far two lists of recommendations agree."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

__all__ = ["overlap", "rank_biased_overlap"]


def overlap(a: Sequence[Hashable], b: Sequence[Hashable]) -> float:
    """Share of the items of the longer list that are in both, in any order; 1 for two empty lists.

    Args:
        a, b: Lists of distinct items, best first; both cut at the k that is asked about.
    """
    longest = max(len(a), len(b))
    return len(set(a) & set(b)) / longest if longest else 1.0


def rank_biased_overlap(a: Sequence[Hashable], b: Sequence[Hashable], p: float = 0.9) -> float:
    """Agreement that counts most at the top; 1 for equal lists, 0 for lists without a common item.

        (1 - p) / p sum_{d=1..k} p^d X_d / d + p^k X_k / k,    X_d = |items in the first d of both|

    The extrapolated form of Webber, Moffat and Zobel (2010, "A similarity measure for indefinite rankings", equation
    23): beyond k the lists are taken to agree as they do up to there. k is the length of the longer list; the shorter
    one has nothing more to agree on.

    Args:
        a, b: Lists of distinct items, best first.
        p: In (0, 1): how likely a reader goes on to the next place. 0.9 gives 86% of the weight to the first 10.
    Raises: ValueError, another p.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must be in (0, 1), got {p}")
    k = max(len(a), len(b))
    if not k:
        return 1.0
    first, second, common, total = set(), set(), 0, 0.0
    for depth in range(1, k + 1):
        one, other = a[depth - 1 : depth], b[depth - 1 : depth]
        first.update(one)
        second.update(other)
        # An item that both lists have at this depth is new in both, and is one.
        common += len({item for item in one if item in second} | {item for item in other if item in first})
        total += p**depth * common / depth
    return (1 - p) / p * total + p**k * common / k
