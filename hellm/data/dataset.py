"""The in-memory data set every other part of the package reads: events, id maps, features, split."""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise, starmap
from operator import lt
from typing import TYPE_CHECKING, Any

import numpy as np

from hellm._files import DataError
from hellm._mapped import read_blocks
from hellm.data.histories import Histories
from hellm.data.texts import Texts

if TYPE_CHECKING:
    from hellm.data.attributes import AttributeSet

SPLITS = ("train", "valid", "test")
# Events of users whom nothing is trained on: known when their held-out events are to be found. Label 3.
HISTORY = "history"
_LABELS = (*SPLITS, HISTORY)
# Texts of which something is made anew at once.
_ROWS = 1 << 14


class IdMap:
    """Append-only map between external string ids and the indices 0..n-1.

    An id keeps its index for ever: `add` appends what is new and moves nothing. `Texts` whose ids rise, by text or by
    length and then text as numbers do, are kept as they are and looked up by halving; other ids go into a list and a
    dictionary, which take about 200 bytes an id.

    Args:
        ids: Distinct ids, in index order.

    Attributes:
        ids: [n] the ids in index order.

    Raises:
        DataError: An id occurs twice.
    """

    def __init__(self, ids: Iterable[str] = ()) -> None:
        self._index: dict[str, int] | None = None
        self._key = _rising(ids) if isinstance(ids, Texts) else None
        self.ids: list[str] | Texts
        self.ids = ids if isinstance(ids, Texts) and self._key is not None else [str(one) for one in ids]
        if self._key is None and len(self._positions) != len(self.ids):
            seen: set[str] = set()
            twice = next(one for one in self.ids if one in seen or seen.add(one))
            raise DataError(f"ids must be distinct, got {twice!r} twice")

    @classmethod
    def range(cls, count: int) -> IdMap:
        """Map whose id i is `str(i)`, for the forms that number from 0."""
        return cls(map(str, range(count)))

    @property
    def _positions(self) -> dict[str, int]:
        if self._index is None:
            self._index = {one: position for position, one in enumerate(self.ids)}
        return self._index

    def _find(self, one: str) -> int | None:
        if self._key is None or self._index is not None:
            return self._positions.get(one)
        place = bisect_left(self.ids, self._key(one), key=self._key)
        return place if place < len(self.ids) and self.ids[place] == one else None

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, one: object) -> bool:
        return isinstance(one, str) and self._find(one) is not None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdMap) and self.ids == other.ids

    def __repr__(self) -> str:
        return f"IdMap({len(self)} ids)"

    def index(self, one: str) -> int:
        """Index of an id.

        Raises:
            DataError: The id is not in the map.
        """
        place = self._find(str(one))
        if place is None:
            raise DataError(f"id {str(one)!r} is not one of the {len(self)} known ids")
        return place

    def indices(self, ids: Iterable[str]) -> np.ndarray:
        """Indices [n] int64 of several ids. Raises DataError as `index` does."""
        if ids is self.ids:
            return np.arange(len(self))
        self._expect(ids)
        return np.fromiter((self.index(one) for one in ids), dtype=np.int64)

    def add(self, ids: Iterable[str]) -> np.ndarray:
        """Append the ids not yet known, in their order, and return the indices [n] int64 of all of them."""
        if not len(self) and isinstance(ids, Texts):
            self.__init__(ids)
            return np.arange(len(self))
        self._expect(ids)
        found = []
        for one in map(str, ids):
            place = self._find(one)
            if place is None:
                place = self._append(one)
            found.append(place)
        return np.array(found, dtype=np.int64)

    def _append(self, one: str) -> int:
        positions = self._positions
        # What other maps share is left as it is.
        ids = self.ids if isinstance(self.ids, list) else list(self.ids)
        self.ids, self._key = ids, None
        positions[one] = len(ids)
        ids.append(one)
        return positions[one]

    def _expect(self, ids: Iterable[str]) -> None:
        """Make the dictionary where so many ids are asked for that it pays."""
        if isinstance(ids, Sized) and len(ids) > len(self) // _LOOKUPS:
            _ = self._positions

    def copy(self) -> IdMap:
        copied = IdMap()
        copied._index, copied._key = None, self._key
        copied.ids = list(self.ids) if self._key is None else self.ids
        return copied


# Ids for each one asked for, below which a dictionary of all is made.
_LOOKUPS = 50


def _same(one: str) -> str:
    return one


def _by_length(one: str) -> tuple[int, str]:
    return len(one), one


def _rising(texts: Texts) -> Callable[[str], Any] | None:
    """The key by which every text lies above the one before it, if there is one; then all are distinct."""
    keys: list[Callable[[str], Any]] = [_same, _by_length]
    before: list[str] = []
    for chunk in texts.chunks():
        chunk = before + chunk
        keys = [key for key in keys if all(starmap(lt, pairwise(map(key, chunk))))]
        if not keys:
            return None
        before = chunk[-1:]
    return keys[0]


@dataclass(frozen=True, eq=False)
class ItemFeatures:
    """Features of one modality.

    Attributes:
        values: [num_items, dim] float32, finite; rows outside `mask` are zero.
        mask: [num_items] bool; False = the item lacks this modality.

    Raises:
        ValueError: Wrong shape or a value that is not finite.
    """

    values: np.ndarray
    mask: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2:
            raise ValueError(f"values must be [num_items, dim], got shape {list(self.values.shape)}")
        if self.mask.shape != self.values.shape[:1] or self.mask.dtype != np.bool_:
            raise ValueError(f"mask must be [{len(self.values)}] bool, got {list(self.mask.shape)} {self.mask.dtype}")
        for start, block in read_blocks(self.values):
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                raise ValueError(f"values must be finite, got NaN or infinity in row {start + int(np.argmin(finite))}")

    @classmethod
    def from_values(cls, values: np.ndarray) -> ItemFeatures:
        """Features whose all-zero rows count as missing."""
        values = np.ascontiguousarray(values, dtype=np.float32)
        return cls(values, np.any(values, axis=1))


@dataclass(frozen=True, eq=False)
class Dataset:
    """Events of users on items, split, with whatever is known of the items.

    Events are grouped by user, ascending, and in time order within a user; events of one user with equal time, and all
    events of a source without times, keep the order of the source.

    Attributes:
        name: Short name.
        num_users, num_items: Counts, those without events included.
        users, items: [num_events] int64.
        timestamps: [num_events] int64 or float64 seconds since 1970, or None.
        split: [num_events] int8: 0 train, 1 validation, 2 test, 3 only history (of users who are not trained on).
        user_ids, item_ids: External ids of the rows.
        item_features: Modality -> features, e.g. "image", "text", "audio".
        item_titles: [num_items], "" where there is none; None where the source has no titles at all.
        split_name: "given", "leave-two-out", "ratio", "time", "item-cold" or "user-cold".
        form: Form of the source, e.g. "mmrec".
        item_fields: What else the source says of the items ("description", "brand", "category", "image", and columns
            taken as attributes): field -> [num_items] strings, "" where unknown.
        notes: What the reader had to assume or met on the way, in words.
        columns: What was read of a table of events: role ("user", "item", "time", ...) -> column.
        encoders: Modality -> what made its features, as plain values: "encoder" and what else it was told
            (`hellm.features`). With it, an item that comes later can be described alike.
    """

    name: str
    num_users: int
    num_items: int
    users: np.ndarray
    items: np.ndarray
    timestamps: np.ndarray | None
    split: np.ndarray
    user_ids: IdMap
    item_ids: IdMap
    item_features: dict[str, ItemFeatures] = field(default_factory=dict)
    item_titles: list[str] | None = None
    split_name: str = "given"
    form: str = "hellm"
    item_fields: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.user_ids) != self.num_users or len(self.item_ids) != self.num_items:
            raise ValueError(
                f"user_ids and item_ids must hold num_users ({self.num_users}) and num_items ({self.num_items}) ids, "
                f"got {len(self.user_ids)} and {len(self.item_ids)}"
            )
        columns = {"users": self.users, "items": self.items, "split": self.split, "timestamps": self.timestamps}
        for name, values in columns.items():
            if values is not None and values.shape != self.users.shape:
                raise ValueError(f"{name} must be [{len(self.users)}], got {list(values.shape)}")
        for name, limit in (("users", self.num_users), ("items", self.num_items), ("split", len(_LABELS))):
            values = columns[name]
            if len(values) and not 0 <= values.min() <= values.max() < limit:
                raise ValueError(f"{name} must lie in 0..{limit - 1}, got {values.min()}..{values.max()}")
        if (self.users[1:] < self.users[:-1]).any():
            raise ValueError("users must be grouped and ascending, got events out of that order")
        for name, features in self.item_features.items():
            if len(features.mask) != self.num_items:
                raise ValueError(f"item_features[{name!r}] must have {self.num_items} rows, got {len(features.mask)}")

    @property
    def num_events(self) -> int:
        return len(self.users)

    def _select(self, splits: tuple[str, ...]) -> np.ndarray:
        for name in splits:
            if name not in _LABELS:
                raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        chosen = np.zeros(self.num_events, bool)
        for name in set(splits):
            chosen |= self.split == _LABELS.index(name)
        return chosen

    def pairs(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Users and items, both [n] int64, of the events of one split ("train", "valid", "test" or "history").

        Raises:
            ValueError: Unknown split.
        """
        chosen = self._select((split,))
        return self.users[chosen], self.items[chosen]

    def histories(self, *splits: str) -> Histories:
        """Each user's items in time order, over the named splits (all, if none is named).

        "train" is what is known from the start, so it has the events that are only history as well.

        Raises:
            ValueError: Unknown split.
        """
        if not splits:
            return Histories.of_events(self.users, self.items, self.num_users)
        chosen = self._select((*splits, HISTORY) if "train" in splits else splits)
        return Histories.of_events(self.users, self.items, self.num_users, chosen)

    @cached_property
    def item_attributes(self) -> dict[str, list[tuple[str, ...]]]:
        """Attribute -> [num_items] tuples of values, () where unknown: brand, category and chosen columns.

        Several values of an item are told apart as `hellm.data.attributes.split_values` says.
        """
        from hellm.data.attributes import NOT_ATTRIBUTES, split_values

        return {
            name: split_values(texts, single=name == "brand")
            for name, texts in self.item_fields.items()
            if name not in NOT_ATTRIBUTES
        }

    def of_events(self, kept: np.ndarray) -> Dataset:
        """The same users and items with some of the events: `kept` is [num_events] bool."""
        times = None if self.timestamps is None else self.timestamps[kept]
        return replace(self, users=self.users[kept], items=self.items[kept], split=self.split[kept], timestamps=times)

    def with_permuted_content(self, seed: int = 0) -> Dataset:
        """The same events, with all that is known of the items (features, titles, fields) handed to other items.

        A control: what a model gains by the content of items, it must lose by that of others. What belongs to one item
        stays together.
        """
        order = np.random.default_rng(seed).permutation(self.num_items)

        def permuted(values: list[str]) -> list[str]:
            return [values[place] for place in order]

        return replace(
            self,
            item_features={
                name: ItemFeatures(one.values[order], one.mask[order]) for name, one in self.item_features.items()
            },
            item_titles=None if self.item_titles is None else permuted(self.item_titles),
            item_fields={name: permuted(values) for name, values in self.item_fields.items()},
        )

    @cached_property
    def attribute_sets(self) -> dict[str, AttributeSet]:
        """Attribute -> items by its values, for attributes that items share and no features are called like."""
        from hellm.data.attributes import AttributeSet

        sets = {
            name: AttributeSet.of(lists)
            for name, lists in sorted(self.item_attributes.items())
            if name not in self.item_features
        }
        return {name: one for name, one in sets.items() if one.values}

    @property
    def item_content(self) -> dict[str, ItemFeatures]:
        """Modality -> features, attributes among them, whose columns tell which values an item has."""
        features = {name: self.item_features[name] for name in sorted(self.item_features)}
        return features | {name: one.features for name, one in self.attribute_sets.items()}

    def split_counts(self) -> dict[str, int]:
        """Number of events in each split; "history" where there are any."""
        counts = np.bincount(self.split, minlength=len(_LABELS)).tolist()
        return {name: count for name, count in zip(_LABELS, counts, strict=True) if name != HISTORY or count}

    def summary(self) -> dict[str, Any]:
        """Name, counts and fingerprint as plain values, as result.json and `--json` have them."""
        return {
            "name": self.name,
            "form": self.form,
            "split": self.split_name,
            "num_users": self.num_users,
            "num_items": self.num_items,
            "num_events": self.split_counts(),
            "features": {name: list(one.values.shape) for name, one in self.item_features.items()},
            "fingerprint": self.fingerprint,
        }

    @property
    def has_cold_users(self) -> bool:
        """Whether there are users whose events are only history, as in the "user-cold" split."""
        return bool((self.split == _LABELS.index(HISTORY)).any())

    @cached_property
    def fingerprints(self) -> dict[str, str]:
        """Hex digest of each part that a model or its answers depend on, by what the part is called."""
        parts = {
            "events": {"users": self.users, "items": self.items},
            "times": {} if self.timestamps is None else {"timestamps": self.timestamps},
            "split": {"split": self.split},
            "item features": {
                f"{modality} {name}": values
                for modality, features in sorted(self.item_features.items())
                for name, values in (("values", features.values), ("mask", features.mask))
            },
        }
        found = {name: hashlib.sha256() for name in parts}
        for name, arrays in parts.items():
            for key, values in arrays.items():
                _add_array(found[name], key, values)
        if self.attribute_sets:
            found["attributes"] = hashlib.sha256()
            for name, one in self.attribute_sets.items():
                found["attributes"].update(json.dumps([name, one.values]).encode())
                found["attributes"].update(np.stack(one.indicators.nonzero()).tobytes())
        texts = {"user ids": self.user_ids.ids, "item ids": self.item_ids.ids, "item titles": self.item_titles or []}
        for name, values in texts.items():
            found[name] = hashlib.sha256()
            _add_texts(found[name], values)
        return {name: digest.hexdigest()[:16] for name, digest in found.items()}

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the counts, the events, their split and the features; ids, titles and names do not count."""
        digest = hashlib.sha256(f"{self.num_users} {self.num_items}".encode())
        parts = {"users": self.users, "items": self.items, "split": self.split}
        if self.timestamps is not None:
            parts["timestamps"] = self.timestamps
        for modality, features in sorted(self.item_features.items()):
            parts[f"{modality} values"] = features.values
            parts[f"{modality} mask"] = features.mask
        for name, values in parts.items():
            _add_array(digest, name, values)
        return digest.hexdigest()[:32]


def _add_array(digest: Any, name: str, values: np.ndarray) -> None:
    """Add an array and what it is to a digest of `hashlib`; times as float64, whether they are whole or not."""
    dtype = np.dtype(np.float64) if name == "timestamps" else values.dtype
    digest.update(f"{name} {dtype.str} {values.shape}".encode())
    for _, block in read_blocks(values):
        digest.update(np.ascontiguousarray(block, dtype).data)


def _add_texts(digest: Any, values: Sequence[str | None]) -> None:
    """Add texts as one JSON list, which is empty if all of them are."""
    digest.update(b"[")
    between = ""
    for chunk in _chunks(values) if any(values) else ():
        digest.update(f"{between}{json.dumps([one or '' for one in chunk])[1:-1]}".encode())
        between = ", "
    digest.update(b"]")


def _chunks(values: Sequence[str | None]) -> Iterator[Sequence[str | None]]:
    return (values[start : start + _ROWS] for start in range(0, len(values), _ROWS))
