"""What every form is made of: `Form`, the `Source` that readers return, and what several forms share."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hellm._mapped import read_blocks
from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.forms._ids import find_large
from hellm.data.forms._text import read_text

MISSING_ITEMS = ("error", "keep", "drop")


class MissingItemsError(DataError):
    """Events on items that the item table lacks.

    Attributes:
        missing_items: "count" of those items, and the "first" of them.
    """

    def __init__(self, message: str, missing_items: dict[str, Any]) -> None:
        super().__init__(message)
        self.missing_items = missing_items


@dataclass
class Source:
    """What a reader found, before time order and split.

    Attributes:
        users, items: [num_events] integer indices into the id maps, in the order of the source.
        timestamps: [num_events] seconds, or None.
        labels: [num_events] int8 given split (0 train, 1 validation, 2 test), or None.
        split_name: What made `labels`.
        item_titles, item_fields, item_features, notes: As in `Dataset`.
        name: Overrides the name taken from the path.
        columns, encoders: As in `Dataset`.
        files: Names of the files and folders beside the main one that were read or looked into.
    """

    users: np.ndarray
    items: np.ndarray
    user_ids: IdMap
    item_ids: IdMap
    timestamps: np.ndarray | None = None
    labels: np.ndarray | None = None
    split_name: str = "given"
    item_features: dict[str, ItemFeatures] = field(default_factory=dict)
    item_titles: list[str] | None = None
    item_fields: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    name: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    encoders: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Form:
    """One form.

    Attributes:
        name: Used in `load_dataset(form=...)` and `save_dataset(form=...)`.
        files: What the files are called, for messages.
        find: Path of a file or folder -> main file of this form, or None.
        read: (main file, **options) -> Source.
        write: (data set, existing empty folder) -> None; None where the form is read only.
        keeps_split: Whether the form stores a split; a form that does not can only imply leave-two-out.
        before: Names of forms that are looked for after this one, as they would take its files, or files that may stand
            beside them, for theirs.
    """

    name: str
    files: str
    find: Callable[[Path], Path | None]
    read: Callable[..., Source]
    write: Callable[[Dataset, Path], None] | None = None
    keeps_split: bool = True
    before: tuple[str, ...] = ()


def find_one(path: Path, *patterns: str, accept: Callable[[Path], bool] = lambda _: True) -> Path | None:
    """The one file in a folder (or the file itself) that matches a glob pattern and is accepted.

    Raises:
        DataError: Several files match, so that the caller has to name one.
    """
    if path.is_file():
        matching = [path] if any(path.match(pattern) for pattern in patterns) and accept(path) else []
    else:
        matching = sorted({one for pattern in patterns for one in path.glob(pattern) if one.is_file() and accept(one)})
    if len(matching) > 1:
        names = ", ".join(one.name for one in matching)
        raise DataError(f"{path}: several data sets in one folder ({names}); give the path of one file")
    return matching[0] if matching else None


def check_ids_known(path: Path, missing: Sequence[str], where: str, policy: str) -> None:
    """Apply `missing_items`: raise for "error", and for a policy that does not exist."""
    num_missing = len(missing)
    if policy not in MISSING_ITEMS:
        raise ValueError(f"missing_items must be one of {', '.join(MISSING_ITEMS)}, got {policy!r}")
    if num_missing and policy == "error":
        some = ", ".join(missing[:5]) + (", ..." if num_missing > 5 else "")
        raise MissingItemsError(
            f"{path}: {num_missing} items of the events are not in {where}: {some} "
            '(missing_items="keep" keeps their events, "drop" leaves them out)',
            {"count": num_missing, "first": missing[:5]},
        )


def load_features(folder: Path, num_items: int, notes: list[str], *, name: str = "") -> dict[str, ItemFeatures]:
    """All `*_feat.npy` of a folder; row = item index, modality = what stands before `_feat`.

    Raises:
        DataError: Not a 2-d float array, a row count other than `num_items`, or a value that is not finite.
    """
    features = {}
    for path in sorted(folder.glob("*_feat.npy")):
        modality = path.name.removesuffix("_feat.npy").removeprefix(f"{name}_")
        features[modality] = load_feature_file(path, num_items)
        num_missing = int((~features[modality].mask).sum())
        if num_missing:
            notes.append(f"{path.name}: {num_missing} all-zero rows are taken as missing")
    return features


def load_table_features(path: Path, table: Path, num_items: int, notes: list[str]) -> dict[str, ItemFeatures]:
    """`load_features` beside `path` for forms with string ids, where row = line of the item table.

    Raises:
        DataError: There are features but no such table, so that nothing says which row is which item.
    """
    first = next(iter(sorted(path.parent.glob("*_feat.npy"))), None)
    if first is not None and not table.exists():
        raise DataError(f"{first}: row = line of {table.name}, which is not there")
    return load_features(path.parent, num_items, notes)


def load_feature_file(path: Path, num_items: int) -> ItemFeatures:
    """One feature file as float32; all-zero rows become missing. Raises as `load_features`."""
    values = open_array(path)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: must be a 2-d array of numbers, got {values.ndim}-d {values.dtype}")
    if len(values) != num_items:
        raise DataError(f"{path}: must have one row per item, got {len(values)} rows for {num_items} items")
    with np.errstate(over="ignore"):
        values = np.array(values, dtype=np.float32, order="C")
    check_finite(path, values)
    return ItemFeatures.from_values(values)


def check_finite(path: Path, values: np.ndarray) -> None:
    """Refuse features [num_items, dim] of which one is not finite. Raises DataError naming its row and column."""
    # A row sum is not finite if an entry is not, and needs no [num_items, dim] temporary.
    for start, block in read_blocks(values):
        suspects = np.flatnonzero(~np.isfinite(block.sum(axis=1, dtype=np.float64)))
        if len(suspects):
            row, column = start + suspects[0], int(np.argmin(np.isfinite(block[suspects[0]])))
            raise DataError(f"{path}: row {row}, column {column}: must be finite, got {values[row, column]}")


def feature_rows(folder: Path) -> int:
    """Largest row count among the `*_feat.npy` of a folder, read from the headers; 0 if there are none."""
    rows = 0
    for path in folder.glob("*_feat.npy"):
        shape = open_array(path).shape
        rows = max(rows, shape[0] if shape else 0)
    return rows


def open_array(path: Path) -> np.ndarray:
    """A `.npy` file, mapped: a header that promises more than the file holds is refused before memory is taken.

    What is written to it stays in memory and never reaches the file.

    Raises: DataError, no such array.
    """
    # A damaged header goes through Python's own parser, which raises nearly anything.
    try:
        return np.lib.format.open_memmap(path, mode="c").view(np.ndarray)
    except Exception as error:
        raise DataError(f"{path}: not a plain .npy array ({error})") from None


def load_mask(path: Path, num_items: int) -> np.ndarray:
    """[num_items] bool of a `.npy` file. Raises DataError for anything else."""
    mask = open_array(path)
    if mask.shape != (num_items,) or mask.dtype != np.bool_:
        raise DataError(f"{path}: must be [{num_items}] bool, got {list(mask.shape)} {mask.dtype}")
    return np.array(mask)


def save_features(dataset: Dataset, folder: Path) -> None:
    """Write `<modality>_feat.npy`; items without the modality get a zero row."""
    for modality, features in dataset.item_features.items():
        np.save(folder / f"{modality}_feat.npy", np.where(features.mask[:, None], features.values, np.float32(0)))


def file_name(dataset: Dataset) -> str:
    """The data set's name as the beginning of a file name."""
    return dataset.name.replace("/", "_").replace("\0", "_").lstrip(".") or "data"


def as_text(value: object) -> str:
    """A JSON value as text: lists joined by commas, however nested; empty for null.

    Raises:
        TypeError: It is an object, or holds one.
    """
    if value is None:
        return ""
    return ", ".join(dict.fromkeys(_flat(value))) if isinstance(value, list) else "".join(_flat(value))


def _flat(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        raise TypeError("must be text, a number or a list, got an object")
    if isinstance(value, list):
        for one in value:
            yield from _flat(one)
    elif value not in (None, ""):
        yield str(value)


ID_MAPPINGS = {"user": ("u_id_mapping.csv", "user_id", "userID"), "item": ("i_id_mapping.csv", "asin", "itemID")}


def save_id_mapping(ids: IdMap, folder: Path, side: str, used: np.ndarray, *, base: int = 0) -> None:
    """Write MMRec's `u_id_mapping.csv` / `i_id_mapping.csv` (tab separated), unless the events alone say the same.

    Args:
        ids: All ids.
        folder: Where to.
        side: "user" or "item".
        used: Indices that the written events hold.
        base: Number of the first id.
    """
    same = all(one == str(number) for number, one in enumerate(ids.ids, base))
    if same and len(used) and int(used.max()) == len(ids) - 1:
        return
    name, external, internal = ID_MAPPINGS[side]
    for one in ids.ids:
        if "\0" in one or any("\ud800" <= mark <= "\udfff" for mark in one):
            raise ValueError(f"{name} cannot hold {side} id {one!r}; rename it, or write form 'hellm'")
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        plain, quoted = (
            csv.writer(file, delimiter="\t", lineterminator="\n", quoting=quoting)
            for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL)
        )
        plain.writerow([external, internal])
        for number, one in enumerate(ids.ids, base):
            # `csv` takes this for the end of a line only when it reads.
            (quoted if "\r" in one else plain).writerow([one, number])


def load_id_mapping(folder: Path, side: str) -> tuple[IdMap, int] | None:
    """Ids of `save_id_mapping` or MMRec and the number of the first; None if there is no such file.

    Raises:
        DataError: The numbers are not consecutive.
    """
    path = folder / ID_MAPPINGS[side][0]
    if not path.exists():
        return None
    reader = csv.reader(io.StringIO(read_text(path).removeprefix("\ufeff"), newline=""), delimiter="\t", strict=True)
    numbered: list[tuple[int, str]] = []
    try:
        for row in reader:
            if reader.line_num == 1 or not row:
                continue
            if len(row) != 2 or not (row[1].isascii() and row[1].isdecimal() and len(row[1]) < 19):
                raise DataError(f"{path}:{reader.line_num}: must hold an id, a tab and its number, got {row}")
            numbered.append((int(row[1]), row[0]))
    except csv.Error as error:
        raise DataError(f"{path}:{reader.line_num}: {error}") from None
    numbered.sort()
    base = numbered[0][0] if numbered else 0
    if base not in (0, 1) or [number for number, _ in numbered] != list(range(base, base + len(numbered))):
        raise DataError(f"{path}: the numbers must be consecutive and start at 0 or 1, got a gap or a repeat")
    return distinct_ids(path, [one for _, one in numbered]), base


def distinct_ids(path: Path, ids: list[str], column: str = "id") -> IdMap:
    """Map of the ids of a file. Raises DataError naming the file where one occurs twice."""
    try:
        return IdMap(ids)
    except DataError:
        seen: set[str] = set()
        twice = next(one for one in ids if one in seen or seen.add(one))
        raise DataError(f"{path}: column {column} must hold distinct ids, got {twice!r} twice") from None


def number_ids(path: Path, side: str, values: np.ndarray, *, at_least: int = 0, source: Path | None = None) -> IdMap:
    """Ids of one side of a form with integer ids from 0: those of the id mapping beside it, else the numbers.

    Args:
        path: Main file, beside which the mapping stands.
        side: "user" or "item".
        values: Numbers that occur.
        at_least: Number of rows that something else says there are.
        source: File of the numbers; None is `path`.

    Raises:
        DataError: The mapping is shorter than the largest number, or there is none and the number is out of proportion.
    """
    mapping = load_id_mapping(path.parent, side)
    largest = int(values.max(initial=-1))
    if mapping is None:
        find_large(source or path, side, values, at_least)
        return IdMap.range(max(largest + 1, at_least))
    ids, base = mapping
    if base != 0 or largest >= len(ids):
        raise DataError(
            f"{path}: {side} number {largest} is not in {ID_MAPPINGS[side][0]}, which numbers {len(ids)} from {base}"
        )
    return ids
