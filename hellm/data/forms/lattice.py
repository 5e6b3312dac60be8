"""LATTICE / MMSSL form: `5-core/{train,val,test}.json`, each {user: [items]}, and `*_feat.npy` with row = item id.

Ids are integers from 0 and stay the row numbers. There are no times: a user's events stand in the order of the lists,
train before validation before test.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from hellm.data.dataset import DataError, Dataset
from hellm.data.forms._base import (
    Form,
    Source,
    feature_rows,
    load_features,
    number_ids,
    save_features,
    save_id_mapping,
)
from hellm.data.forms._ids import most_rows, too_large
from hellm.data.forms._text import line_with, load_json

PARTS = ("train", "val", "test")


def _find(path: Path) -> Path | None:
    if path.is_file():
        return path if path.name == "train.json" and path.with_name("test.json").exists() else None
    for folder in (path / "5-core", path):
        if (folder / "train.json").exists() and (folder / "test.json").exists():
            return folder / "train.json"
    return None


def is_row_number(text: str) -> bool:
    """Whether a key of a JSON object is a plain non-negative integer below 2^62."""
    return text.isascii() and text.isdecimal() and len(text) < 19 and (text == "0" or not text.startswith("0"))


def flatten(path: Path, lists: Any) -> tuple[np.ndarray, np.ndarray]:
    """{user: [items]} with integer ids as users and items, both [num_events] int64, users ascending.

    Raises:
        DataError: Naming file and user where the value is not such an object.
    """
    if not isinstance(lists, dict):
        raise DataError(f"{path}: must be an object of user: [items], got {type(lists).__name__}")
    for user, items in lists.items():
        if not is_row_number(user):
            raise DataError(f"{path}: user {user[:40]!r}: must be a non-negative integer")
        if not isinstance(items, list):
            raise DataError(f"{path}: user {user!r}: must be a list of items, got {type(items).__name__}")
        if set(map(type, items)) - {int}:
            bad = next(one for one in items if type(one) is not int)
            raise DataError(f"{path}: user {user!r}: items must be integers, got {bad!r}")
        if items and min(items) < 0:
            raise DataError(f"{path}: user {user!r}: items must be >= 0, got {min(items)}")
        if items and max(items) >= 1 << 62:
            raise too_large(f"{path}:{line_with(path, str(max(items)))}", "item", max(items), most_rows(0))
    ordered = sorted(lists, key=int)
    lengths = [len(lists[user]) for user in ordered]
    users = np.repeat(np.array([int(user) for user in ordered], dtype=np.int64), lengths)
    return users, np.fromiter(chain.from_iterable(lists[user] for user in ordered), np.int64, sum(lengths))


def gather(users: np.ndarray, items: np.ndarray, num_users: int) -> dict[str, list[int]]:
    """The inverse of `flatten` for events grouped by user; every user is there, perhaps with an empty list."""
    parts = np.split(items, np.cumsum(np.bincount(users, minlength=num_users))[:-1])
    return {str(user): part.tolist() for user, part in enumerate(parts)}


def _read(path: Path, *, encoding: str | None = None) -> Source:
    users, items, labels, listed = [], [], [], []
    for label, part in enumerate(PARTS):
        file = path.with_name(f"{part}.json")
        if part == "val" and not file.exists():
            continue
        lists = load_json(file, encoding)
        of_users, of_items = flatten(file, lists)
        # A user whose lists are all empty is still a row.
        listed += map(int, lists)
        users.append(of_users)
        items.append(of_items)
        labels.append(np.full(len(of_users), label, np.int8))
    all_items = np.concatenate(items)
    if not len(all_items):
        raise DataError(f"{path.parent}: there are no events in {', '.join(PARTS)}.json")
    folder = path.parent.parent if path.parent.name == "5-core" else path.parent
    notes: list[str] = []
    main = folder / path.name
    item_ids = number_ids(main, "item", all_items, at_least=feature_rows(folder), source=path)
    return Source(
        np.concatenate(users),
        all_items,
        number_ids(main, "user", np.array(listed, dtype=np.int64), source=path),
        item_ids,
        labels=np.concatenate(labels),
        item_features=load_features(folder, len(item_ids), notes),
        notes=notes,
        name=folder.resolve().name,
        files={"5-core", *(f"{part}.json" for part in PARTS)},
    )


def _write(dataset: Dataset, folder: Path) -> None:
    (folder / "5-core").mkdir()
    for label, part in enumerate(PARTS):
        chosen = dataset.split == label
        lists = gather(dataset.users[chosen], dataset.items[chosen], dataset.num_users)
        (folder / "5-core" / f"{part}.json").write_text(json.dumps(lists), encoding="utf-8")
    save_id_mapping(dataset.user_ids, folder, "user", dataset.users)
    save_id_mapping(dataset.item_ids, folder, "item", dataset.items)
    save_features(dataset, folder)


FORM = Form(
    "lattice",
    "5-core/{train,val,test}.json ({user: [items]}) and *_feat.npy",
    _find,
    _read,
    _write,
    before=("amazon",),
)
