"""A report on what is in a data set, and on what in it is likely to bite."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hellm.data.dataset import SPLITS, Dataset
from hellm.data.forms import detect
from hellm.data.forms._base import MissingItemsError
from hellm.data.forms._times import day
from hellm.data.histories import user_counts

QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)
# Splits that should have no pair in common.
_LEAKS = ((0, 1), (0, 2), (1, 2))
# Events that are looked at once, or those of one user where they are more.
_EVENTS = 1 << 20


def check_dataset(data: str | Path | Dataset, **options) -> dict[str, Any]:
    """Count what is there and what is wrong with it; nothing is repaired.

    Args:
        data: Data set, or a path for `load_dataset`. Read from a path, items that the item table lacks do not stop the
            reading; they are counted in `items_missing_from_table`.
        **options: Of `load_dataset`.

    Returns: JSON-serialisable, with these keys:
        name, form, split, users, items, events, density: events is per split with a total; density is distinct pairs
            per (users x items).
        duplicates: `repeats` is how many events repeat an earlier (user, item) pair; `within_split` and `across_splits`
            say whether the first such event lies in the same split.
        leakage: distinct pairs that stand in two splits, for each two.
        time: whether there are times, the share of events that tie with another event of their user, and the first and
            last time and day.
        order: `by`: what the events of a user are ordered by; `inversions`: validation or test events that are older
            than a train event of their user.
        columns: role -> column of the table of events.
        largest_user: the user with most events, their number and share, and whether that share is `suspicious`.
        cold: users and items without train events that validation or test asks for, and events without a trained item.
        without_events: users and items that no event names.
        short_histories: users with 1 or 2 events.
        history_length: quantiles over users with events (None without events).
        five_core: users, items and events that would be left if all with fewer than 5 distinct partners were dropped,
            again and again, as papers often do.
        features: per modality: dim, missing items.
        titles: items without one (None: the source has no titles).
        items_missing_from_table: count and first few (None where there was no table to compare with).
        notes: what the reader assumed.

    Raises:
        DataError: As `load_dataset`.
    """
    missing_items = None
    if not isinstance(data, Dataset):
        data, missing_items = load_leniently(data, **options)
    lengths, sold = user_counts(data.users, data.num_users), user_counts(data.items, data.num_items)
    counts = data.split_counts()
    pairs = _distinct_pairs(data)
    return {
        "name": data.name,
        "form": data.form,
        "split": data.split_name,
        "users": data.num_users,
        "items": data.num_items,
        "events": {**counts, "total": data.num_events},
        "density": len(pairs.users) / max(data.num_users * data.num_items, 1),
        "duplicates": pairs.duplicates,
        "leakage": pairs.leakage,
        "time": _times(data),
        "order": {"by": _order(data), "inversions": _inversions(data)},
        "columns": dict(data.columns),
        "largest_user": _largest_user(data, lengths),
        "cold": _cold(data),
        "without_events": {
            "users": int((lengths == 0).sum()),
            "items": int((sold == 0).sum()),
        },
        "short_histories": int(((lengths > 0) & (lengths < 3)).sum()),
        "history_length": _quantiles(lengths[lengths > 0]),
        "five_core": _k_core(pairs.users, pairs.items, pairs.counts),
        "features": {
            name: {"dim": one.values.shape[1], "missing": int((~one.mask).sum())}
            for name, one in data.item_features.items()
        },
        "titles": None if data.item_titles is None else {"missing": sum(not title for title in data.item_titles)},
        "items_missing_from_table": missing_items,
        "notes": list(data.notes),
    }


def check_remarks(report: dict[str, Any]) -> dict[str, str]:
    """What deserves a look, in words.

    Args:
        report: Of `check_dataset`.

    Returns: Name -> sentence, of what was found only: "leakage", "repeats", "inversions", "ties", "cold_items",
        "cold_users", "users_without_events", "items_without_events", "short_histories", "items_missing_from_table",
        "titles" and "largest_user".
    """
    leaked = sum(report["leakage"].values())
    missing: Mapping[str, Any] = report["items_missing_from_table"] or {"count": 0}
    tied, cold, without = report["time"]["tied_share"], report["cold"]["test"], report["without_events"]
    repeats, inversions = report["duplicates"]["repeats"], report["order"]["inversions"] or 0
    titles = (report["titles"] or {"missing": 0})["missing"]
    largest = report["largest_user"] or {"user": "", "share": 0, "suspicious": False}
    some = ", ".join(map(str, missing.get("first", [])[:3]))
    found = {
        "leakage": (
            leaked,
            f"{leaked:,} user-item pairs stand in two splits, so a held-out item may be known already",
        ),
        "repeats": (repeats, f"{repeats:,} events repeat an earlier user-item pair"),
        "inversions": (inversions, f"{inversions:,} held-out events are older than a training event of their user"),
        "ties": (
            tied,
            f"{tied or 0:.1%} of the events have the same time as another of their user; the source order decides",
        ),
        "cold_items": (cold["events"], f"{cold['events']:,} test events ask for an item without training events"),
        "cold_users": (cold["users"], f"{cold['users']:,} test users have no training events"),
        "users_without_events": (without["users"], f"{without['users']:,} users have no events"),
        "items_without_events": (without["items"], f"{without['items']:,} items have no events"),
        "short_histories": (report["short_histories"], f"{report['short_histories']:,} users have fewer than 3 events"),
        "items_missing_from_table": (
            missing["count"],
            f"{missing['count']:,} items have events but no line in the item table"
            + (f", e.g. {some}" if some else ""),
        ),
        "titles": (titles, f"{titles:,} items have no title"),
        "largest_user": (
            largest["suspicious"],
            f"user {largest['user']!r} has {largest['share']:.1%} of all events; is that one person?",
        ),
    }
    return {name: text for name, (number, text) in found.items() if number}


def load_leniently(path: str | os.PathLike[str], **options) -> tuple[Dataset, dict[str, Any] | None]:
    """A data set to be looked at: items that the item table lacks do not stop the reading.

    Returns: The data set, and those items as `check_dataset` has them in `items_missing_from_table`.
    Raises: DataError, as `load_dataset`.
    """
    import inspect

    from hellm.data.load import load_dataset

    kind, _ = detect(Path(path), options.get("form"))
    if "missing_items" not in inspect.signature(kind.read).parameters or "missing_items" in options:
        return load_dataset(path, **options), None
    try:
        return load_dataset(path, missing_items="error", **options), {"count": 0, "first": []}
    except MissingItemsError as error:
        missing = error.missing_items
    return load_dataset(path, missing_items="keep", **options), missing


def _blocks_of_users(data: Dataset) -> Iterator[slice]:
    """Events in order, some of them at a time, and never a part of a user's."""
    start = 0
    while start < data.num_events:
        stop = min(start + _EVENTS, data.num_events)
        if stop < data.num_events:
            stop = int(np.searchsorted(data.users, data.users[stop - 1], side="right"))
        yield slice(start, stop)
        start = stop


class _Pairs(NamedTuple):
    """Distinct pairs of user and item.

    Attributes:
        users, items, counts: [n] int32; how many events each pair has.
        duplicates, leakage: As `check_dataset` has them.
    """

    users: np.ndarray
    items: np.ndarray
    counts: np.ndarray
    duplicates: dict[str, int]
    leakage: dict[str, int]


def _distinct_pairs(data: Dataset) -> _Pairs:
    found, count = np.empty((3, data.num_events), np.int32), 0
    repeats = within = 0
    leakage = {f"{SPLITS[one]}_{SPLITS[other]}": 0 for one, other in _LEAKS}
    for block in _blocks_of_users(data):
        users, split = data.users[block].astype(np.int64), data.split[block]
        keys = users * data.num_items + data.items[block]
        pairs, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        for row, values in zip(found, (*np.divmod(pairs, data.num_items), counts), strict=True):
            row[count : count + len(pairs)] = values
        count += len(pairs)
        original = first[inverse]
        repeated = original != np.arange(len(keys))
        repeats += int(repeated.sum())
        within += int((repeated & (split == split[original])).sum())
        # What is only history is known like a train event.
        held = np.zeros((3, len(pairs)), bool)
        held[split % 3, inverse] = True
        for one, other in _LEAKS:
            leakage[f"{SPLITS[one]}_{SPLITS[other]}"] += int((held[one] & held[other]).sum())
    return _Pairs(
        *found[:, :count],
        duplicates={"repeats": repeats, "within_split": within, "across_splits": repeats - within},
        leakage=leakage,
    )


def _times(data: Dataset) -> dict[str, Any]:
    if data.timestamps is None or not data.num_events:
        return {"known": False, "tied_share": None}
    tied = 0
    for block in _blocks_of_users(data):
        # Events are in time order within a user, so a tie is an equal neighbour.
        equal = (np.diff(data.users[block]) == 0) & (np.diff(data.timestamps[block]) == 0)
        tied += int((np.concatenate([[False], equal]) | np.concatenate([equal, [False]])).sum())
    return {
        "known": True,
        "tied_share": tied / data.num_events,
        "first": float(data.timestamps.min()),
        "last": float(data.timestamps.max()),
        "first_day": day(data.timestamps.min()),
        "last_day": day(data.timestamps.max()),
    }


def _order(data: Dataset) -> str:
    if data.timestamps is None:
        return "order of the source, oldest first"
    column = data.columns.get("time")
    return f"time in column {column!r}, oldest first" if column else "time, oldest first"


def _largest_user(data: Dataset, lengths: np.ndarray) -> dict[str, Any] | None:
    if not data.num_events:
        return None
    user = int(lengths.argmax())
    share = float(lengths[user] / data.num_events)
    # One of few users has a large share in any case.
    usual = 0.5 if data.num_users < 20 else 0.1
    suspicious = data.num_users > 2 and share > usual
    return {"user": data.user_ids.ids[user], "events": int(lengths[user]), "share": share, "suspicious": suspicious}


def _inversions(data: Dataset) -> int | None:
    if data.timestamps is None:
        return None
    found = 0
    for block in _blocks_of_users(data):
        users, times, train = data.users[block], data.timestamps[block], data.split[block] == 0
        users = users - users[0]
        last_train = np.full(users[-1] + 1, -np.inf)
        np.maximum.at(last_train, users[train], times[train])
        found += int((times < last_train[users])[~train].sum())
    return found


def _cold(data: Dataset) -> dict[str, dict[str, int]]:
    user_known, item_known = np.zeros(data.num_users, bool), np.zeros(data.num_items, bool)
    for block in _blocks_of_users(data):
        train = data.split[block] == 0
        user_known[data.users[block][train]] = True
        item_known[data.items[block][train]] = True
    report = {}
    for split in ("valid", "test"):
        users, items = data.pairs(split)
        report[split] = {
            "users": len(np.unique(users[~user_known[users]])),
            "items": len(np.unique(items[~item_known[items]])),
            "events": int((~item_known[items]).sum()),
        }
    return report


def _k_core(users: np.ndarray, items: np.ndarray, counts: np.ndarray, k: int = 5) -> dict[str, int]:
    """What is left of distinct pairs in the k-core; `counts` is the number of events of each pair."""
    if not len(users):
        return {"users": 0, "items": 0, "events": 0}
    num_users, num_items = int(users.max()) + 1, int(items.max()) + 1
    while True:
        few_items = user_counts(users, num_users) < k
        few_users = user_counts(items, num_items) < k
        kept = ~(few_items[users] | few_users[items])
        if kept.all():
            break
        users, items, counts = users[kept], items[kept], counts[kept]
    return {"users": len(np.unique(users)), "items": len(np.unique(items)), "events": int(counts.sum())}


def _quantiles(lengths: np.ndarray) -> dict[str, float] | None:
    if not len(lengths):
        return None
    report = {f"p{round(share * 100)}": float(np.quantile(lengths, share)) for share in QUANTILES}
    return {**report, "mean": float(lengths.mean())}
