"""Amazon reviews: `reviews_*.json[.gz]` with `meta_*.json[.gz]` (2014), and what 2018 and 2023 (`.jsonl`) call them.

One object per line, in strict JSON or as a Python literal (2014 meta); literals go through `ast.literal_eval`. Users
and items are numbered in lexicographic order of their ids. Only meta lines of items with events are kept.
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import math
import re
import warnings
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hellm.data.dataset import DataError, IdMap
from hellm.data.forms import _events as events
from hellm.data.forms import _times as times_
from hellm.data.forms._base import Form, Source, check_ids_known, find_one
from hellm.data.forms._ids import MISSING
from hellm.data.forms._text import encoding_of, undecodable

USER_FIELDS = ("reviewerID", "user_id")
# Variants share a parent in 2023; the parent is what the meta file describes.
ITEM_FIELDS = ("parent_asin", "asin")
TIME_FIELDS = ("unixReviewTime", "timestamp")
_EVENT_FIELDS = {"user": USER_FIELDS, "item": ITEM_FIELDS, "time": TIME_FIELDS, "rating": ("overall", "rating")}
_META_FIELDS = {
    "title": ("title",),
    "description": ("description",),
    "brand": ("brand", "store"),
    "category": ("categories", "category"),
    "image_url": ("imUrl", "imageURLHighRes", "imageURL", "images"),
}
_TAG = re.compile(r"<[^>]+>")


def _find(path: Path) -> Path | None:
    return find_one(path, "*.json", "*.json.gz", "*.jsonl", "*.jsonl.gz", accept=_is_reviews)


def _is_reviews(path: Path) -> bool:
    if path.name.startswith("meta_"):
        return False
    if path.name.startswith("reviews_"):
        return True
    try:
        with _open(path) as file:
            start = file.read(1 << 16)
    except (OSError, EOFError, zlib.error):
        return False
    start = start.decode(encoding_of(start[:4]), "replace")
    return any(f'"{one}"' in start for one in USER_FIELDS) and '"asin"' in start


def _open(path: Path) -> BinaryIO | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _stem(path: Path) -> str:
    """Category name: "reviews_Beauty_5.json.gz" -> "Beauty"."""
    return re.sub(r"_\d+$", "", path.name.split(".")[0].removeprefix("reviews_"))


def _objects(path: Path, encoding: str | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects.

    Raises:
        DataError: A line that is neither JSON nor a Python literal, or not in the encoding; a file that ends too early.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in _decoded(path, file, encoding):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable file ({error}, after line {number})") from None


def _decoded(path: Path, file: BinaryIO | gzip.GzipFile, encoding: str | None) -> Iterator[tuple[int, str]]:
    start = file.read(4)
    file.seek(0)
    encoding = encoding_of(start, encoding)
    if encoding.startswith(("utf-16", "utf-32")):
        try:
            yield from enumerate(file.read().decode(encoding).split("\n"), 1)
        except UnicodeError as error:
            raise undecodable(path, error) from None
        return
    number = 0
    for block in file:
        # A file of the old Mac has one line to `file` and many to its author.
        for line in block.split(b"\r") if b"\r" in block.rstrip(b"\r\n") else (block,):
            number += 1
            try:
                yield number, line.decode(encoding)
            except UnicodeDecodeError as error:
                raise undecodable(path, error, number) from None


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    line = line.lstrip("\ufeff")
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", SyntaxWarning)
                warnings.simplefilter("ignore", DeprecationWarning)
                value = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            raise DataError(f"{path}:{number}: expected a JSON object or a Python literal, got {line[:40]!r}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected an object, got {type(value).__name__}")
    return value


def _field(path: Path, number: int, entry: dict[str, Any], names: Sequence[str]) -> Any:
    """The first of the fields that is filled; "" where all that are there are empty."""
    for name in names:
        if entry.get(name) not in (None, ""):
            return entry[name]
    if any(name in entry for name in names):
        return ""
    found = ", ".join(map(str, entry))
    raise DataError(f"{path}:{number}: expected a field {' or '.join(names)}, got {found[:200]}")


def _id(path: Path, number: int, entry: dict[str, Any], names: Sequence[str]) -> str:
    """An id as text; "" where there is none."""
    value = _field(path, number, entry, names)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{path}:{number}: {' or '.join(names)} must be text, got {str(value)[:40]}")
    text = str(value).strip()
    return "" if text.lower() in MISSING else text


def _time(path: Path, number: int, entry: dict[str, Any], names: Sequence[str]) -> float:
    value = _field(path, number, entry, names)
    if isinstance(value, str) and times_.is_number(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e19 < value < 1e19:
        raise DataError(f"{path}:{number}: {' or '.join(names)} must be a number, got {value!r}")
    return value


def _read(
    path: Path,
    *,
    missing_items: str = "keep",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    encoding: str | None = None,
    min_rating: float | None = None,
) -> Source:
    chosen = events.columns_argument(columns, tuple(_EVENT_FIELDS))
    named = {**_EVENT_FIELDS, **chosen}
    names = {role: tuple(named[role]) for role in _EVENT_FIELDS}
    user_of: dict[str, int] = {}
    item_of: dict[str, int] = {}
    users, items, times = array("i"), array("i"), array("d")
    without, low, seen = 0, 0, {}
    for number, entry in _objects(path, encoding):
        seen.update(entry)
        user = _id(path, number, entry, names["user"])
        item = _id(path, number, entry, names["item"])
        time = _time(path, number, entry, names["time"])
        if not (user and item):
            without += 1
            continue
        if min_rating is not None and _rating(path, number, entry, names["rating"]) < min_rating:
            low += 1
            continue
        users.append(user_of.setdefault(user, len(user_of)))
        items.append(item_of.setdefault(item, len(item_of)))
        times.append(time)
    notes: list[str] = []
    if without:
        notes.append(f"{path.name}: {without} reviews without user or item are left out (empty, NULL or the like)")
    if min_rating is not None:
        notes.append(f"{path.name}: {low} reviews rated below {min_rating:g} are left out")
    if not users:
        raise DataError(
            f"{path}: the file is empty" if not seen else f"{path}: there are no events ({'; '.join(notes)})"
        )
    used = {name for role in ("user", "item", "time") for name in names[role]}
    rating = next((name for name in names["rating"] if name in seen), None)
    if rating is not None and min_rating is None:
        notes.append(
            f"{path.name}: every review counts as an event, however low its {rating!r}; min_rating=X (--min-rating X) "
            "leaves out lower ones"
        )
    unused = [str(name) for name in seen if name not in used]
    if unused:
        notes.append(f"{path.name}: fields not used: {', '.join(unused[:20])}")
    user_ids, of_users = _sorted_map(user_of, users)
    item_ids, of_items = _sorted_map(item_of, items)
    seconds = times_.to_seconds(np.frombuffer(times, dtype=np.float64), notes)
    fields: dict[str, list[str]] = {}
    meta = _meta_path(path)
    if meta is not None:
        fields, described = _read_meta(meta, item_ids, encoding, notes)
        missing = list(compress(item_ids.ids, ~described))
        check_ids_known(path, missing, meta.name, missing_items)
        if missing and missing_items == "drop":
            keep = described[of_items]
            notes.append(f"{int((~keep).sum())} events on items that {meta.name} lacks are left out")
            of_users, of_items, seconds = of_users[keep], of_items[keep], seconds[keep]
            of_items = (np.cumsum(described) - 1)[of_items]
            fields = {name: list(compress(texts, described)) for name, texts in fields.items()}
            item_ids = IdMap(compress(item_ids.ids, described))
        elif missing:
            notes.append(f"{len(missing)} items are not in {meta.name}")
    return Source(
        of_users,
        of_items,
        user_ids,
        item_ids,
        timestamps=seconds,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        notes=notes,
        name=_stem(path),
        columns={role: next(name for name in names[role] if name in seen) for role in ("user", "item", "time")},
        files={meta.name} if meta is not None else set(),
    )


def _rating(path: Path, number: int, entry: dict[str, Any], names: Sequence[str]) -> float:
    value = _field(path, number, entry, names)
    if isinstance(value, str) and times_.is_number(value.strip()):
        value = float(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
        raise DataError(f"{path}:{number}: {' or '.join(names)} must be a number for min_rating, got {value!r}")
    return value


def _sorted_map(number_of: dict[str, int], numbers: array) -> tuple[IdMap, np.ndarray]:
    """Map with ids in lexicographic order, and the events renumbered to it."""
    ids = sorted(number_of)
    renumbered = np.empty(len(ids), np.int64)
    renumbered[[number_of[one] for one in ids]] = np.arange(len(ids))
    return IdMap(ids), renumbered[np.frombuffer(numbers, dtype=np.int32)]


def _meta_path(path: Path) -> Path | None:
    names = [f"meta_{_stem(path)}{suffix}" for suffix in (".json.gz", ".json", ".jsonl.gz", ".jsonl")]
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), None)


def _read_meta(
    path: Path, item_ids: IdMap, encoding: str | None, notes: list[str]
) -> tuple[dict[str, list[str]], np.ndarray]:
    fields = {name: [""] * len(item_ids) for name in _META_FIELDS}
    described = np.zeros(len(item_ids), bool)
    seen: dict[str, Any] = {}
    for number, entry in _objects(path, encoding):
        seen.update(entry)
        one = _id(path, number, entry, ITEM_FIELDS)
        if one not in item_ids:
            continue
        index = item_ids.index(one)
        described[index] = True
        for name, sources in _META_FIELDS.items():
            value = next((entry[source] for source in sources if entry.get(source)), "")
            if name == "image_url":
                fields[name][index] = _first_address(value)
            else:
                text = " ".join(_flatten(value)) if name == "description" else ", ".join(_flatten(value))
                fields[name][index] = " ".join(html.unescape(_TAG.sub(" ", text)).split())
    used = {name for names in (*_META_FIELDS.values(), ITEM_FIELDS) for name in names}
    unused = [str(name) for name in seen if name not in used]
    if unused:
        notes.append(f"{path.name}: fields not used: {', '.join(unused[:20])}")
    return {name: texts for name, texts in fields.items() if any(texts)}, described


def _flatten(value: Any) -> list[str]:
    """Strings of a string, a list of strings, or a list of category paths, of which the first counts."""
    if isinstance(value, list):
        return _flatten(value[0]) if value and isinstance(value[0], list) else [str(one) for one in value]
    return [str(value)]


def _first_address(value: Any) -> str:
    if isinstance(value, list):
        value = value[0] if value else ""
    if isinstance(value, dict):
        value = next((value[size] for size in ("hi_res", "large", "thumb") if value.get(size)), "")
    return value if isinstance(value, str) else ""


FORM = Form(
    "amazon",
    "reviews_{Name}.json[.gz] or {Name}.json[l][.gz], and meta_{Name}.json[l][.gz] (2014, 2018, 2023)",
    _find,
    _read,
    before=("shop",),
)
