"""SASRec family: `user item item ...` per line, in time order; or the original's `user item` per line.

Items are numbered from 1 in most copies (0 is then the padding) and from 0 in some. The base is taken from the smallest
item id and reported in the notes: from 1, item "1" becomes index 0 and the id map holds the original "1"; from 0, ids
stay the row numbers. A `*_item2attributes.json` beside it is left alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms._base import (
    Form,
    Source,
    feature_rows,
    find_one,
    load_features,
    load_id_mapping,
    save_features,
    save_id_mapping,
)

_ALLOWED = np.zeros(256, bool)
_ALLOWED[list(b"0123456789 \t\r\n")] = True


def _find(path: Path) -> Path | None:
    return find_one(path, "*.txt", accept=_looks_right)


def _looks_right(path: Path) -> bool:
    """Whether the first line that is not blank begins with a number; `read` then complains of what follows."""
    if path.stem.endswith("_sample"):
        return False
    with path.open("rb") as file:
        start = file.read(4096)
    tokens = start.split(maxsplit=1)
    return not tokens or tokens[0].lstrip(b"-").isdigit()


def _read(path: Path) -> Source:
    users, items, listed = _parse(path)
    notes: list[str] = []
    user_ids, user_base = _ids(path, "user", int(users.min(initial=listed.min())), int(listed.max()), notes)
    item_ids, item_base = _ids(path, "item", int(items.min()), int(items.max()), notes)
    return Source(
        users - user_base,
        items - item_base,
        user_ids,
        item_ids,
        item_features=load_features(path.parent, len(item_ids), notes),
        notes=notes,
    )


def _ids(path: Path, side: str, smallest: int, largest: int, notes: list[str]) -> tuple[IdMap, int]:
    mapping = load_id_mapping(path.parent, side)
    if mapping is not None:
        ids, base = mapping
        if not base <= smallest <= largest < base + len(ids):
            raise DataError(
                f"{path}: {side} ids run from {smallest} to {largest}, the id mapping has {len(ids)} from {base}"
            )
        return ids, base
    base = min(smallest, 1)
    count = largest - base + 1
    if side == "item":
        count = max(count, feature_rows(path.parent))
    notes.append(f"{side} ids are numbered from {base} (smallest {smallest}, largest {largest})")
    return IdMap(map(str, range(base, base + count))), base


def _parse(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users and items of all events, and the users of all lines, without a Python object per event."""
    data = np.fromfile(path, dtype=np.uint8)
    if not len(data) or not (data > 32).any():
        raise DataError(f"{path}: the file is empty")
    bad = np.flatnonzero(~_ALLOWED[data])
    if len(bad):
        at = int(bad[0])
        line_start = int(np.flatnonzero(data[:at] == 10)[-1]) + 1 if (data[:at] == 10).any() else 0
        text = bytes(data[at : at + 20]).split()[0].decode(errors="replace")
        raise DataError(
            f"{path}:{int((data[:at] == 10).sum()) + 1}:{at - line_start + 1}: "
            f"must be non-negative integers (user item item ...), got {text!r}"
        )
    solid = data > 32
    starts = np.flatnonzero(solid & ~np.concatenate([[False], solid[:-1]]))
    newlines = np.flatnonzero(data == 10)
    line = np.searchsorted(newlines, starts)
    numbers = np.fromstring(data.tobytes(), dtype=np.int64, sep=" ")
    first = np.concatenate([[True], line[1:] != line[:-1]])
    heads = np.flatnonzero(first)
    lengths = np.diff(np.append(heads, len(numbers))) - 1
    if not lengths.any():
        raise DataError(f"{path}:{int(line[0]) + 1}: expected a user and at least one item, got {int(numbers[0])}")
    return np.repeat(numbers[heads], lengths), numbers[~first], numbers[heads]


def _write(dataset: Dataset, folder: Path) -> None:
    indptr, items = dataset.histories()
    with (folder / f"{dataset.name}.txt").open("w", encoding="ascii") as file:
        for user in range(dataset.num_users):
            line = [user + 1, *(items[indptr[user] : indptr[user + 1]] + 1).tolist()]
            file.write(" ".join(map(str, line)) + "\n")
    save_id_mapping(dataset.user_ids, folder, "user", base=1)
    save_id_mapping(dataset.item_ids, folder, "item", base=1)
    save_features(dataset, folder)


FORM = Form(
    "sasrec",
    '{name}.txt ("user item item ..." or "user item" per line, integers)',
    _find,
    _read,
    _write,
    keeps_split=False,
)
