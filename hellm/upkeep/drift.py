"""How recent events differ from those that a run was trained on, and what the run shows to the people behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hellm.data import Dataset
from hellm.data.append import load_newer
from hellm.recommend import Recommender

__all__ = ["drift"]

# Share of the items that count as the most popular ones.
_POPULAR = 0.1


def drift(
    run: str | Path,
    events: str | Path,
    *,
    k: int = 10,
    num_users: int = 1000,
    seed: int = 0,
    device: str = "cpu",
    language_model: str | Path | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Recent events beside a run.

    Popularity is that of the training; the most popular items are a tenth of those with training events.

    Args:
        run: Run directory.
        events: Recent events, file or folder of any form.
        k: Length of the lists that are looked at, cut to the items there are.
        num_users: Known users with recent events who are recommended to, at most.
        seed: Of their choice.
        device, language_model: See `Recommender.load`.
        **reading: Of `load_dataset`, for `events`.
    Returns: Shares are in [0, 1], None of nothing.
        "events": "count", "by_unknown_users", "on_unknown_items", "on_untrained_items" (known, but without training
            events), "on_popular_items" and the same of the training, "on_popular_items_in_training".
        "users": "count", "unknown", "events_per_user" and "events_per_user_in_training" (median and 90th percentile).
        "items": "count", "unknown".
        "shown": "lists" (basis -> number), "coverage" (of the catalogue), "untrained_items", "popular_items" (both of
            all places), "found" (recent events on an item that their user's list had, of the events on items that the
            user did not have before).
    """
    recommender = Recommender.load(run, device=device, language_model=language_model)
    recent = load_newer(events, recommender.user_ids, recommender.item_ids, **reading)
    popularity = recommender.popularity.numpy()
    popular = _popular(popularity)
    known_user, known_item = recent.users < recommender.num_users, recent.items < recommender.num_items
    on_known = recent.items[known_item]
    trained = recommender.events.filter(recommender.events["split"] == 0)
    return {
        "events": {
            "count": recent.num_events,
            "by_unknown_users": _share(~known_user),
            "on_unknown_items": _share(~known_item),
            "on_untrained_items": float((popularity[on_known] == 0).sum() / recent.num_events),
            "on_popular_items": float(popular[on_known].sum() / recent.num_events),
            "on_popular_items_in_training": _share(popular[trained["item"].to_numpy()]),
        },
        "users": {
            "count": len(np.unique(recent.users)),
            "unknown": len(np.unique(recent.users[~known_user])),
            "events_per_user": _lengths(recent.users),
            "events_per_user_in_training": _lengths(trained["user"].to_numpy()),
        },
        "items": {"count": len(np.unique(recent.items)), "unknown": len(np.unique(recent.items[~known_item]))},
        "shown": _shown(recommender, recent, popular, min(k, recommender.num_items), num_users, seed),
    }


def _shown(
    recommender: Recommender, recent: Dataset, popular: np.ndarray, k: int, num_users: int, seed: int
) -> dict[str, Any]:
    users = np.unique(recent.users[recent.users < recommender.num_users])
    chosen = np.sort(np.random.default_rng(seed).permutation(users)[:num_users])
    answers = recommender.recommend([recommender.user_ids.ids[row] for row in chosen], k=k)
    lists = [recommender.item_ids.indices(item.item for item in one) for one in answers]
    places = np.concatenate(lists) if lists else np.zeros(0, np.int64)
    bases = [one.basis for one in answers]
    histories = recent.histories()
    found = []
    for row, shown in zip(chosen, lists, strict=True):
        new = np.setdiff1d(histories.take(np.array([row])).items, recommender.histories.take(np.array([row])).items)
        found.append(np.isin(new, shown))
    return {
        "users": len(chosen),
        "k": k,
        "lists": {basis: bases.count(basis) for basis in sorted(set(bases))},
        "coverage": len(np.unique(places)) / recommender.num_items,
        "untrained_items": _share(recommender.popularity.numpy()[places] == 0),
        "popular_items": _share(popular[places]),
        "found": _share(np.concatenate(found) if found else np.zeros(0, bool)),
    }


def _popular(popularity: np.ndarray) -> np.ndarray:
    """[I] bool: the tenth of the items with training events that have most, at least one; lower rows first."""
    count = max(1, round(_POPULAR * int((popularity > 0).sum())))
    popular = np.zeros(len(popularity), bool)
    popular[np.argsort(-popularity, kind="stable")[:count]] = True
    return popular


def _share(true: np.ndarray) -> float | None:
    return float(true.mean()) if len(true) else None


def _lengths(users: np.ndarray) -> dict[str, float] | None:
    counts = np.unique(users, return_counts=True)[1]
    return {"median": float(np.median(counts)), "p90": float(np.percentile(counts, 90))} if len(counts) else None
