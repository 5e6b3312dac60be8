"""SASRec family: `user item item ...` per line, in time order; or the original's `user item` per line.

Items are numbered from 1 in most copies (0 is then the padding) and from 0 in some. The base is taken from the smallest
item id and reported in the notes: from 1, item "1" becomes index 0 and the id map holds the original "1"; from 0, ids
stay the row numbers. `{name}_item2attributes.json` beside it gives the items categories, as numbers. A rating or a time
in a third or fourth column of `user item` is recognised.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms import _times as times
from hellm.data.forms._base import (
    Form,
    Source,
    as_text,
    feature_rows,
    file_name,
    find_one,
    load_features,
    load_id_mapping,
    save_features,
    save_id_mapping,
)
from hellm.data.forms._ids import find_large
from hellm.data.forms._text import encoding_of, load_json, read_text
from hellm.data.forms.lattice import is_row_number

_ALLOWED = np.zeros(256, bool)
_ALLOWED[list(b"0123456789 \t\r\n")] = True
# Later than 1973 in seconds since 1970, and more items than any such file numbers.
_LIKE_TIME = 100_000_000
_LIKE_RATING = 10
_ATTRIBUTES = "_item2attributes.json"


def _find(path: Path) -> Path | None:
    # "{name}_sample.txt" holds negatives where it stands beside another file.
    found = find_one(path, "*.txt", accept=lambda file: _looks_right(file) and not file.stem.endswith("_sample"))
    return found or find_one(path, "*.txt", accept=_looks_right)


def _looks_right(path: Path) -> bool:
    """Whether the first line that is not blank begins with a number; `read` then complains of what follows."""
    with path.open("rb") as file:
        start = file.read(4096)
    tokens = start.decode(encoding_of(start[:4]), "replace").split(maxsplit=1)
    return not tokens or (tokens[0].isascii() and tokens[0].lstrip("-").isdigit())


def _read(path: Path, *, encoding: str | None = None) -> Source:
    notes: list[str] = []
    lines = _parse(path, encoding)
    users, items, seconds = _columns(path, lines, notes)
    heads = lines.numbers[lines.heads]
    user_ids, user_base = _ids(path, "user", heads, notes)
    item_ids, item_base = _ids(path, "item", items, notes)
    attributes = path.with_name(f"{path.stem}{_ATTRIBUTES}")
    return Source(
        users - user_base,
        items - item_base,
        user_ids,
        item_ids,
        timestamps=None if seconds is None else times.to_seconds(seconds, notes),
        item_fields=_read_attributes(attributes, item_ids, notes) if attributes.exists() else {},
        item_features=load_features(path.parent, len(item_ids), notes),
        notes=notes,
        files={attributes.name},
    )


def _ids(path: Path, side: str, values: np.ndarray, notes: list[str]) -> tuple[IdMap, int]:
    smallest, largest = int(values.min()), int(values.max())
    mapping = load_id_mapping(path.parent, side)
    if mapping is not None:
        ids, base = mapping
        if not base <= smallest <= largest < base + len(ids):
            raise DataError(
                f"{path}: {side} ids run from {smallest} to {largest}, the id mapping has {len(ids)} from {base}"
            )
        return ids, base
    at_least = feature_rows(path.parent) if side == "item" else 0
    find_large(path, side, values, at_least)
    base = min(smallest, 1)
    count = max(largest - base + 1, at_least)
    notes.append(f"{side} ids are numbered from {base} (smallest {smallest}, largest {largest})")
    return IdMap(map(str, range(base, base + count))), base


@dataclass
class _Lines:
    """Numbers of a file.

    Attributes:
        numbers: [n] int64 of all lines.
        line: [n] int64, line of each, from 1.
        heads: [lines that are not blank] int64, where each line begins.
    """

    numbers: np.ndarray
    line: np.ndarray
    heads: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(np.append(self.heads, len(self.numbers)))


def _parse(path: Path, encoding: str | None) -> _Lines:
    """All numbers of a file, without a Python object per number."""
    try:
        with path.open("rb") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path}: not a readable file ({error.strerror or error})") from None
    if encoding_of(content[:4], encoding) != "utf-8":
        content = read_text(path, encoding).encode()
    if b"\n" not in content:
        content = content.replace(b"\r", b"\n")
    data = np.frombuffer(content, dtype=np.uint8)
    if not len(data) or not (data > 32).any():
        raise DataError(f"{path}: the file is empty")
    bad = np.flatnonzero(~_ALLOWED[data])
    if len(bad):
        at = int(bad[0])
        line_start = content.rfind(b"\n", 0, at) + 1
        text = content[at : at + 20].split()
        shown = text[0].decode(errors="replace") if text else f"byte 0x{content[at]:02x}"
        raise DataError(
            f"{path}:{content.count(10, 0, at) + 1}:{at - line_start + 1}: "
            f"must be non-negative integers (user item item ...), got {shown!r}"
        )
    solid = data > 32
    starts = np.flatnonzero(solid & ~np.concatenate([[False], solid[:-1]]))
    ends = np.flatnonzero(solid & ~np.concatenate([solid[1:], [False]])) + 1
    line = np.searchsorted(np.flatnonzero(data == 10), starts) + 1
    long = np.flatnonzero(ends - starts > 18)
    if len(long):
        at = int(long[0])
        raise DataError(
            f"{path}:{line[at]}: must be integers below 10^18, got {content[starts[at] : ends[at]][:40].decode()}"
        )
    numbers = np.fromstring(content, dtype=np.int64, sep=" ")
    heads = np.flatnonzero(np.concatenate([[True], line[1:] != line[:-1]]))
    lines = _Lines(numbers, line, heads)
    if (lines.lengths == 1).all():
        raise DataError(f"{path}:{int(line[0])}: expected a user and at least one item, got {int(numbers[0])}")
    return lines


def _columns(path: Path, lines: _Lines, notes: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Users, items and times (float64, or None) of all events.

    Raises:
        DataError: Lines of one user, all of three or four numbers, whose last ones are neither ratings nor times.
    """
    lengths, heads = lines.lengths, lines.numbers[lines.heads]
    width = int(lengths[0])
    repeated = len(np.unique(heads)) < len(heads)
    if repeated and width in (3, 4) and (lengths == width).all():
        columns = lines.numbers.reshape(-1, width).T
        timed = bool((columns[-1] >= _LIKE_TIME).all())
        rated = columns[2] if width == 4 or not timed else None
        if (timed or width == 3) and (rated is None or bool((rated <= _LIKE_RATING).all())):
            kinds = ["user", "item"] + ["rating"] * (rated is not None) + ["time"] * timed
            notes.append(
                f"{path.name}: lines are taken as {' '.join(kinds)}, as users stand on several lines of {width}"
            )
            if rated is not None:
                notes.append(
                    f"{path.name}: every event counts, however low its rating (from {rated.min()} to {rated.max()})"
                )
            return columns[0], columns[1], columns[-1].astype(np.float64) if timed else None
        raise DataError(
            f"{path}:{int(lines.line[0])}: users stand on several lines of {width} numbers, which are neither lists of "
            'items nor "user item [rating] [time]"; leave "user item", or write events.csv with the header '
            "user,item,timestamp"
        )
    if repeated and not (lengths == 2).all():
        notes.append(f"{path.name}: {len(heads) - len(np.unique(heads))} lines go on with a user of an earlier line")
    empty = int((lengths == 1).sum())
    if empty:
        notes.append(f"{path.name}: {empty} lines hold a user without items")
    first = np.zeros(len(lines.numbers), bool)
    first[lines.heads] = True
    return np.repeat(heads, lengths - 1), lines.numbers[~first], None


def _read_attributes(path: Path, item_ids: IdMap, notes: list[str]) -> dict[str, list[str]]:
    """{item: [attributes]} as the field "category"."""
    lists = load_json(path)
    if not isinstance(lists, dict):
        raise DataError(f"{path}: must be an object of item: [attributes], got {type(lists).__name__}")
    texts, unknown = [""] * len(item_ids), 0
    for item, attributes in lists.items():
        if not is_row_number(item) or not isinstance(attributes, list):
            raise DataError(f"{path}: item {item[:40]!r}: must be a number with a list of attributes")
        try:
            text = as_text(attributes)
        except (TypeError, RecursionError) as error:
            raise DataError(f"{path}: item {item!r}: attributes {error}") from None
        if item in item_ids:
            texts[item_ids.index(item)] = text
        else:
            unknown += 1
    if unknown:
        notes.append(f"{path.name}: {unknown} items that have no events are left out")
    return {"category": texts} if any(texts) else {}


def _write(dataset: Dataset, folder: Path) -> None:
    indptr, items = dataset.histories()
    with (folder / f"{file_name(dataset)}.txt").open("w", encoding="ascii") as file:
        for user in range(dataset.num_users):
            line = [user + 1, *(items[indptr[user] : indptr[user + 1]] + 1).tolist()]
            file.write(" ".join(map(str, line)) + "\n")
    save_id_mapping(dataset.user_ids, folder, "user", dataset.users, base=1)
    save_id_mapping(dataset.item_ids, folder, "item", dataset.items, base=1)
    save_features(dataset, folder)


FORM = Form(
    "sasrec",
    '{name}.txt ("user item item ..." or "user item" per line, integers)',
    _find,
    _read,
    _write,
    keeps_split=False,
)
