"""What every form is made of: `Form`, the `Source` that readers return, and what several forms share."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures

MISSING_ITEMS = ("error", "keep", "drop")


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
    """

    name: str
    files: str
    find: Callable[[Path], Path | None]
    read: Callable[..., Source]
    write: Callable[[Dataset, Path], None] | None = None
    keeps_split: bool = True


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


def first_line(path: Path) -> str:
    """First line of a text file, without its end. Raises DataError for an empty file."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        line = file.readline().rstrip("\r\n")
    if not line.strip():
        raise DataError(f"{path}: the file is empty")
    return line


def load_json(path: Path) -> Any:
    """A JSON file. Raises DataError naming line and column of a syntax error."""
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None


def check_ids_known(path: Path, missing: list[str], where: str, policy: str) -> None:
    """Apply `missing_items`: raise for "error", and for a policy that does not exist."""
    num_missing = len(missing)
    if policy not in MISSING_ITEMS:
        raise ValueError(f"missing_items must be one of {', '.join(MISSING_ITEMS)}, got {policy!r}")
    if num_missing and policy == "error":
        some = ", ".join(missing[:5]) + (", ..." if num_missing > 5 else "")
        error = DataError(
            f"{path}: {num_missing} items of the events are not in {where}: {some} "
            '(missing_items="keep" keeps their events, "drop" leaves them out)'
        )
        # For check_dataset, which reports these rather than stopping at them.
        error.missing_items = {"count": num_missing, "first": missing[:5]}
        raise error


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
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise DataError(f"{path}: not a plain .npy array ({error})") from None
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise DataError(f"{path}: must be a 2-d array of numbers, got {values.ndim}-d {values.dtype}")
    if len(values) != num_items:
        raise DataError(f"{path}: must have one row per item, got {len(values)} rows for {num_items} items")
    values = np.ascontiguousarray(values, dtype=np.float32)
    # A row sum is not finite if an entry is not, and needs no [num_items, dim] temporary.
    suspects = np.flatnonzero(~np.isfinite(values.sum(axis=1, dtype=np.float64)))
    if len(suspects):
        column = int(np.argmin(np.isfinite(values[suspects[0]])))
        raise DataError(
            f"{path}: row {suspects[0]}, column {column}: must be finite, got {values[suspects[0], column]}"
        )
    return ItemFeatures.from_values(values)


def feature_rows(folder: Path) -> int:
    """Largest row count among the `*_feat.npy` of a folder, read from the headers; 0 if there are none."""
    rows = 0
    for path in folder.glob("*_feat.npy"):
        try:
            shape = np.load(path, mmap_mode="r", allow_pickle=False).shape
        except (ValueError, EOFError, OSError) as error:
            raise DataError(f"{path}: not a plain .npy array ({error})") from None
        rows = max(rows, shape[0] if shape else 0)
    return rows


def save_features(dataset: Dataset, folder: Path) -> None:
    """Write `<modality>_feat.npy`; items without the modality get a zero row."""
    for modality, features in dataset.item_features.items():
        np.save(folder / f"{modality}_feat.npy", np.where(features.mask[:, None], features.values, np.float32(0)))


ID_MAPPINGS = {"user": ("u_id_mapping.csv", "user_id", "userID"), "item": ("i_id_mapping.csv", "asin", "itemID")}


def save_id_mapping(ids: IdMap, folder: Path, side: str, *, base: int = 0) -> None:
    """Write MMRec's `u_id_mapping.csv` / `i_id_mapping.csv` (tab separated), unless ids and numbers are the same."""
    if all(one == str(number) for number, one in enumerate(ids.ids, base)):
        return
    name, external, internal = ID_MAPPINGS[side]
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow([external, internal])
        writer.writerows((one, number) for number, one in enumerate(ids.ids, base))


def load_id_mapping(folder: Path, side: str) -> tuple[IdMap, int] | None:
    """Ids of `save_id_mapping` or MMRec and the number of the first; None if there is no such file.

    Raises:
        DataError: The numbers are not consecutive.
    """
    path = folder / ID_MAPPINGS[side][0]
    if not path.exists():
        return None
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t"))[1:]
    try:
        numbered = sorted((int(number), one) for one, number in rows)
    except ValueError:
        line = next(at for at, row in enumerate(rows, 2) if len(row) != 2 or not row[1].isdecimal())
        raise DataError(f"{path}:{line}: must hold an id, a tab and its number, got {rows[line - 2]}") from None
    base = numbered[0][0] if numbered else 0
    if base not in (0, 1) or [number for number, _ in numbered] != list(range(base, base + len(numbered))):
        raise DataError(f"{path}: the numbers must be consecutive and start at 0 or 1, got a gap or a repeat")
    return IdMap(one for _, one in numbered), base


def number_ids(path: Path, side: str, largest: int, *, at_least: int = 0) -> IdMap:
    """Ids of one side of a form with integer ids from 0: those of the id mapping beside it, else the numbers.

    Raises:
        DataError: The mapping is shorter than the largest number.
    """
    mapping = load_id_mapping(path.parent, side)
    if mapping is None:
        return IdMap.range(max(largest + 1, at_least))
    ids, base = mapping
    if base != 0 or largest >= len(ids):
        raise DataError(
            f"{path}: {side} number {largest} is not in {ID_MAPPINGS[side][0]}, which numbers {len(ids)} from {base}"
        )
    return ids
