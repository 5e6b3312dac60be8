"""Slices of an evaluation: by how popular the targets are, and by how long the histories of the users are."""

from __future__ import annotations

import numpy as np

from .result import RankingResult

ITEM_POPULARITY = "item popularity"
HISTORY_LENGTH = "history length"
_THIRDS = ("rare", "middle", "popular")


def popularity_groups(item_counts: np.ndarray) -> dict[str, np.ndarray]:
    """Items by their train events: "cold" without any, then "rare", "middle" and "popular".

    The three hold about a third of the events each: from the least popular item on, an item belongs where the middle of
    all events of items as popular as itself lies. So items of equal counts are never parted, and a group may be empty.

    Args:
        item_counts: [num_items] train events.
    Returns: label -> [num_items] bool, without empty groups.
    """
    counts = np.asarray(item_counts)
    groups = {"cold": counts == 0}
    values, inverse, number = np.unique(counts, return_inverse=True, return_counts=True)
    events = values * number
    middle = (events.cumsum() - events / 2) / max(events.sum(), 1)
    third = np.minimum((3 * middle).astype(np.int64), 2)[inverse]
    groups |= {name: (third == place) & (counts > 0) for place, name in enumerate(_THIRDS)}
    return {name: among for name, among in groups.items() if among.any()}


def popularity_words(item_counts: np.ndarray, groups: dict[str, np.ndarray]) -> dict[str, str]:
    """What each group is, for people."""
    words = {}
    for name, among in groups.items():
        counts = item_counts[among]
        span = "no" if name == "cold" else _span(counts.min(), counts.max())
        words[name] = f"{_counted(among.sum(), 'item')} with {span} train event{'' if span in ('no', '1') else 's'}"
    return words


def length_groups(lengths: np.ndarray, num_bins: int = 4) -> dict[str, np.ndarray]:
    """Users by the number of events that they are known by, in bins of about equally many users.

    Args:
        lengths: [U] events of each user.
        num_bins: Most bins; there are fewer where many users have the same length, who stay together.
    Returns: label such as "4 to 6" -> [U] bool, from short to long.
    """
    lengths = np.asarray(lengths)
    inner = np.quantile(lengths, np.arange(1, num_bins) / num_bins, method="lower") if len(lengths) else []
    # A bin takes the users up to its edge; a length that several quantiles share is one edge.
    place = np.searchsorted(np.unique(inner), lengths, side="left")
    groups = [place == one for one in np.unique(place)]
    return {_span(lengths[group].min(), lengths[group].max()): group for group in groups}


def slices_of(result: RankingResult, lengths: np.ndarray) -> dict[str, dict[str, RankingResult]]:
    """Both kinds of slices of a result: kind -> label -> its part.

    Args:
        result: With `by_target`.
        lengths: [num_users] events that each user is known by.
    """
    by_length = length_groups(lengths[result.users])
    return {
        ITEM_POPULARITY: dict(result.by_target),
        HISTORY_LENGTH: {label: result.of_users(chosen) for label, chosen in by_length.items()},
    }


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _span(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"
