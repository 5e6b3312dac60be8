"""Newer events and items added to a data set, whose users and items keep their rows.

U = users, I = items.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hellm.data import simple_features, splits
from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.forms import detect
from hellm.data.load import load_dataset

__all__ = ["append_events", "load_newer"]

# Splits that follow from the events alone.
_RECOMPUTED = ("leave-two-out", "ratio", "time")
# Features made anew are those that a data set has if they point the same way; the weights of words change a little.
_SAME_ENCODER = 0.9

# Items without events -> modality -> their features, for modalities whose encoder is known.
Encode = Callable[[Dataset], dict[str, ItemFeatures]]


def append_events(
    dataset: Dataset,
    events: str | Path,
    items: str | Path | None = None,
    *,
    split: str | None = None,
    encode: Encode | None = None,
    **reading: Any,
) -> tuple[Dataset, dict[str, Any]]:
    """A data set with newer events: old users and items keep their rows, new ones follow.

    Events that are there already (the same user, item and time) are left out, so that exports may overlap. All events
    are split anew, by the rule that split the old ones.

    Args:
        dataset: What there is.
        events: File or folder of any form that `load_dataset` reads.
        items: Table of items, where `events` is a table of the form "shop". Items that are known stay as they are.
        split: "leave-two-out", "ratio" or "time"; None is that of the data set.
        encode: Gives the features of new items, by the encoders of the old ones. What it does not give is encoded by
            the built-in encoders where they made the old features, and is missing otherwise.
        **reading: Of `load_dataset`, for `events`.
    Returns: The data set, and a report: "new_events", "new_users", "new_items", "repeated_events" (left
        out) and "without_features" (modality -> new items that lack it).
    Raises: DataError, what cannot be read, or events without times where the data have times. ValueError, a split that
        does not follow from the events.
    """
    name = split or dataset.split_name
    if name not in _RECOMPUTED:
        raise ValueError(
            f"split must be one of {', '.join(_RECOMPUTED)} for data that grow, got {name!r}; name one of them"
        )
    reading |= {} if items is None else {"items": items}
    new = load_newer(events, dataset.user_ids, dataset.item_ids, **reading)
    if dataset.timestamps is not None and new.timestamps is None:
        raise DataError(f"{events}: must have times, as the events of data set {dataset.name!r} have, got none")
    kept = _unknown_events(dataset, new)
    columns = _merged(dataset, new.of_events(kept))
    content, without = _content(dataset, new, encode)
    users, timestamps = columns["users"], columns["timestamps"]
    if name == "time":
        assigned = splits.time_cut(timestamps)
    else:
        assigned = splits.leave_two_out(users) if name == "leave-two-out" else splits.ratio(users)
    grown = replace(
        dataset,
        num_users=len(new.user_ids),
        num_items=len(new.item_ids),
        user_ids=new.user_ids,
        item_ids=new.item_ids,
        split=assigned,
        split_name=name,
        **columns,
        **content,
    )
    return grown, {
        "new_events": int(kept.sum()),
        "new_users": grown.num_users - dataset.num_users,
        "new_items": grown.num_items - dataset.num_items,
        "repeated_events": int((~kept).sum()),
        "without_features": without,
    }


def load_newer(events: str | Path, user_ids: IdMap, item_ids: IdMap, **reading: Any) -> Dataset:
    """Events of any form as a data set in which known users and items keep their rows and new ones follow.

    Args:
        events: File or folder.
        user_ids, item_ids: What is known.
        **reading: Of `load_dataset`. Items that a table of items lacks are kept: the known ones are in no new table.
    """
    kind, _ = detect(Path(events), reading.get("form"))
    if "missing_items" in inspect.signature(kind.read).parameters:
        reading = {"missing_items": "keep", **reading}
    ids = {"user_ids": user_ids, "item_ids": item_ids}
    return load_dataset(events, split="leave-two-out", features="none", **ids, **reading)


def _unknown_events(dataset: Dataset, new: Dataset) -> np.ndarray:
    """[n] bool: new events that the data set has not; without times nobody can tell."""
    import polars as pl

    if dataset.timestamps is None or new.timestamps is None:
        return np.ones(new.num_events, bool)
    old, added = (
        pl.DataFrame({"user": one.users, "item": one.items, "time": times.astype(np.float64)})
        for one, times in ((dataset, dataset.timestamps), (new, new.timestamps))
    )
    kept = np.zeros(new.num_events, bool)
    kept[added.with_row_index("row").join(old, on=["user", "item", "time"], how="anti")["row"].to_numpy()] = True
    return kept


def _merged(dataset: Dataset, new: Dataset) -> dict[str, Any]:
    """Users, items and times of all events, by user and time; old ones first among those of one time."""
    users, items = (np.concatenate([getattr(one, name) for one in (dataset, new)]) for name in ("users", "items"))
    if dataset.timestamps is None or new.timestamps is None:
        order = np.argsort(users, kind="stable")
        return {"users": users[order], "items": items[order], "timestamps": None}
    times = np.concatenate([dataset.timestamps, new.timestamps])
    order = np.lexsort((times, users))
    return {"users": users[order], "items": items[order], "timestamps": times[order]}


def _content(dataset: Dataset, new: Dataset, encode: Encode | None) -> tuple[dict[str, Any], dict[str, int]]:
    """Titles, fields and features of all items, and how many new items lack each modality."""
    before, count = dataset.num_items, new.num_items - dataset.num_items

    def continued(old: list[str] | None, added: list[str] | None) -> list[str]:
        return (old or [""] * before) + (added[before:] if added else [""] * count)

    titles = None
    if dataset.item_titles is not None or new.item_titles is not None:
        titles = continued(dataset.item_titles, new.item_titles)
    names = [*dataset.item_fields, *(name for name in new.item_fields if name not in dataset.item_fields)]
    fields = {name: continued(dataset.item_fields.get(name), new.item_fields.get(name)) for name in names}
    features: dict[str, ItemFeatures] = {}
    made = encode(_items_alone(new, before, titles, fields)) if encode is not None and count else {}
    for modality, old in dataset.item_features.items():
        own = made.get(modality) or _built_in(modality, old, titles, fields)
        values, mask = np.zeros((count, old.values.shape[1]), np.float32), np.zeros(count, bool)
        if own is not None and own.values.shape == values.shape:
            values, mask = own.values, own.mask
        features[modality] = ItemFeatures(np.concatenate([old.values, values]), np.concatenate([old.mask, mask]))
    without = {modality: int((~one.mask[before:]).sum()) for modality, one in features.items()}
    return {"item_titles": titles, "item_fields": fields, "item_features": features}, without


def _items_alone(new: Dataset, before: int, titles: list[str] | None, fields: dict[str, list[str]]) -> Dataset:
    """The new items as a data set without events."""
    nothing = np.zeros(0, np.int64)
    return replace(
        new,
        num_users=0,
        num_items=new.num_items - before,
        users=nothing,
        items=nothing,
        timestamps=None,
        split=nothing.astype(np.int8),
        user_ids=IdMap(),
        item_ids=IdMap(new.item_ids.ids[before:]),
        item_titles=None if titles is None else titles[before:],
        item_fields={name: texts[before:] for name, texts in fields.items()},
        item_features={},
    )


def _built_in(
    modality: str, old: ItemFeatures, titles: list[str] | None, fields: dict[str, list[str]]
) -> ItemFeatures | None:
    """Features of the new items by the built-in encoder, if the old features are by it."""
    if modality == "text" and (texts := simple_features.item_texts(titles, fields)) is not None:
        made = simple_features.text_features(texts, dim=old.values.shape[1])
    elif modality == "image" and "image" in fields:
        made = simple_features.image_features(fields["image"])
    else:
        return None
    before, there = len(old.mask), old.mask & made.mask[: len(old.mask)]
    if made.values.shape[1] != old.values.shape[1] or not there.any():
        return None
    lengths = np.linalg.norm(old.values[there], axis=1) * np.linalg.norm(made.values[:before][there], axis=1)
    cosine = (old.values[there] * made.values[:before][there]).sum(1) / np.maximum(lengths, 1e-12)
    return ItemFeatures(made.values[before:], made.mask[before:]) if np.median(cosine) > _SAME_ENCODER else None
