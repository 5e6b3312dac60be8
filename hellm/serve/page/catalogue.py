"""What the data set of a run tells beside it: pictures of items, their categories, and what deserves a look."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from hellm.data import DataError, Dataset, IdMap
from hellm.data.check import check_dataset, check_remarks, load_leniently

__all__ = ["Catalogue", "Finding"]

# Fields that are no facts of an item to be read beside its title.
_NOT_FACTS = ("image", "image_url", "title")


class Finding(NamedTuple):
    """Something in the data that deserves a look.

    Attributes:
        name: As in a link; "" for one that concerns no rows.
        text: In words.
        kind: What `rows` are: "items", "users" or "events" of the data set.
        rows: [n] int64.
    """

    name: str
    text: str
    kind: str = ""
    rows: np.ndarray = np.zeros(0, np.int64)


class Catalogue:
    """A data set, looked at once.

    Args:
        dataset: The data.
        missing: Items that the item table lacks, as `hellm.data.check.load_leniently` gives them.

    Attributes:
        report: As `hellm.data.check_dataset` gives it.
        findings: What deserves a look, in its order.
    """

    def __init__(self, dataset: Dataset, missing: Mapping[str, Any] | None = None) -> None:
        self.dataset = dataset
        self.report = check_dataset(dataset) | {"items_missing_from_table": missing}
        self.findings = self._findings()

    @classmethod
    def load(cls, path: str | os.PathLike[str], item_ids: IdMap) -> Catalogue:
        """Of a data set on disk.

        Args:
            path: As `hellm.data.load_dataset` takes it.
            item_ids: Of the run that it goes with.
        Raises: DataError, FileNotFoundError as `load_dataset`; DataError, no item of the run is there.
        """
        dataset, missing = load_leniently(path, features="none")
        if not any(one in dataset.item_ids for one in item_ids.ids):
            raise DataError(f"{os.fspath(path)}: must be the data of the run, and holds none of its items")
        return cls(dataset, missing)

    def picture(self, item: str) -> str | None:
        """The file of an item's picture."""
        images = self.dataset.item_fields.get("image")
        if not images or item not in self.dataset.item_ids:
            return None
        return images[self.dataset.item_ids.index(item)] or None

    def facts(self, item: str) -> dict[str, str]:
        """What else is said of an item: field -> text."""
        if item not in self.dataset.item_ids:
            return {}
        row = self.dataset.item_ids.index(item)
        fields = self.dataset.item_fields.items()
        return {name: texts[row] for name, texts in fields if name not in _NOT_FACTS and texts[row]}

    def finding(self, name: str) -> Finding | None:
        """That of a name."""
        return next((one for one in self.findings if name and one.name == name), None)

    def _findings(self) -> list[Finding]:
        found = []
        for name, text in check_remarks(self.report).items():
            kind, rows = _ROWS.get(name, ("", lambda data: Finding.rows))
            found.append(Finding(name if kind else "", text, kind, rows(self.dataset)))
        images = self.dataset.item_fields.get("image")
        if images and (without := _where([not one for one in images])).size:
            found.append(Finding("pictures", f"{len(without):,} items have no picture", "items", without))
        return found + [Finding("", note) for note in self.dataset.notes]


def _where(mask: Any) -> np.ndarray:
    return np.flatnonzero(np.asarray(mask, bool))


def _lengths(data: Dataset) -> np.ndarray:
    return np.bincount(data.users, minlength=data.num_users)


def _counts(data: Dataset, split: str | None = None) -> np.ndarray:
    items = data.items if split is None else data.pairs(split)[1]
    return np.bincount(items, minlength=data.num_items)


def _pairs(data: Dataset) -> np.ndarray:
    return data.users * data.num_items + data.items


def _leaked(data: Dataset) -> np.ndarray:
    """Held-out events whose pair stands in another split as well."""
    split = data.split % 3
    _, inverse = np.unique(_pairs(data), return_inverse=True)
    splits_of_pair = np.zeros((inverse.max(initial=-1) + 1, 3), bool)
    splits_of_pair[inverse, split] = True
    return _where((splits_of_pair.sum(axis=1) > 1)[inverse] & (split > 0))


def _repeated(data: Dataset) -> np.ndarray:
    _, first, inverse = np.unique(_pairs(data), return_index=True, return_inverse=True)
    return _where(first[inverse] != np.arange(data.num_events))


def _times(data: Dataset) -> np.ndarray:
    assert data.timestamps is not None  # where a finding is about time
    return data.timestamps


def _inverted(data: Dataset) -> np.ndarray:
    last = np.full(data.num_users, -np.inf)
    train = data.split == 0
    np.maximum.at(last, data.users[train], _times(data)[train])
    return _where((_times(data) < last[data.users]) & ~train)


def _tied(data: Dataset) -> np.ndarray:
    equal = (np.diff(data.users) == 0) & (np.diff(_times(data)) == 0)
    return _where(np.concatenate([[False], equal]) | np.concatenate([equal, [False]]))


def _cold(data: Dataset, of: str) -> np.ndarray:
    """Users or items of test events that have no train events."""
    place = ("users", "items").index(of)
    return np.setdiff1d(data.pairs("test")[place], data.pairs("train")[place])


_ROWS: dict[str, tuple[str, Callable[[Dataset], np.ndarray]]] = {
    "leakage": ("events", _leaked),
    "repeats": ("events", _repeated),
    "inversions": ("events", _inverted),
    "ties": ("events", _tied),
    "cold_items": ("items", lambda data: _cold(data, "items")),
    "cold_users": ("users", lambda data: _cold(data, "users")),
    "users_without_events": ("users", lambda data: _where(_lengths(data) == 0)),
    "items_without_events": ("items", lambda data: _where(_counts(data) == 0)),
    "short_histories": ("users", lambda data: _where((_lengths(data) > 0) & (_lengths(data) < 3))),
    "titles": ("items", lambda data: _where([not one for one in data.item_titles or ()])),
    "largest_user": ("users", lambda data: np.atleast_1d(_lengths(data).argmax())),
}
