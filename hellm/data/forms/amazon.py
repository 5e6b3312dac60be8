"""Amazon reviews: `reviews_*.json[.gz]` with `meta_*.json[.gz]` (2014), and what 2018 and 2023 (`.jsonl`) call them.

One object per line, in strict JSON or as a Python literal (2014 meta); literals go through `ast.literal_eval`. Users
and items are numbered in lexicographic order of their ids. Only meta lines of items with events are kept.
"""

from __future__ import annotations

import ast
import gzip
import html
import json
import re
from array import array
from collections.abc import Iterator
from itertools import compress
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from hellm.data.dataset import DataError, IdMap
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import Form, Source, check_ids_known, find_one

USER_FIELDS = ("reviewerID", "user_id")
# Variants share a parent in 2023; the parent is what the meta file describes.
ITEM_FIELDS = ("parent_asin", "asin")
TIME_FIELDS = ("unixReviewTime", "timestamp")
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
    except (OSError, EOFError):
        return False
    return any(f'"{one}"' in start for one in USER_FIELDS) and '"asin"' in start


def _open(path: Path) -> TextIO:
    opener = gzip.open if path.suffix == ".gz" else open
    return opener(path, "rt", encoding="utf-8", errors="replace")


def _stem(path: Path) -> str:
    """Category name: "reviews_Beauty_5.json.gz" -> "Beauty"."""
    return re.sub(r"_\d+$", "", path.name.split(".")[0].removeprefix("reviews_"))


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects. Raises DataError for a line that is neither JSON nor a Python literal."""
    try:
        with _open(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: not a readable file ({error})") from None


def _parse(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        try:
            value = ast.literal_eval(line.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            raise DataError(f"{path}:{number}: expected a JSON object or a Python literal, got {line[:40]!r}") from None
    if not isinstance(value, dict):
        raise DataError(f"{path}:{number}: expected an object, got {type(value).__name__}")
    return value


def _field(path: Path, number: int, entry: dict[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        if entry.get(name) not in (None, ""):
            return entry[name]
    raise DataError(f"{path}:{number}: expected a field {' or '.join(names)}, got {', '.join(entry)}")


def _read(path: Path, *, missing_items: str = "keep") -> Source:
    user_of: dict[str, int] = {}
    item_of: dict[str, int] = {}
    users, items, times = array("i"), array("i"), array("d")
    for number, entry in _objects(path):
        user = str(_field(path, number, entry, USER_FIELDS))
        item = str(_field(path, number, entry, ITEM_FIELDS))
        time = _field(path, number, entry, TIME_FIELDS)
        if isinstance(time, bool) or not isinstance(time, (int, float)):
            raise DataError(f"{path}:{number}: {' or '.join(TIME_FIELDS)} must be a number, got {time!r}")
        users.append(user_of.setdefault(user, len(user_of)))
        items.append(item_of.setdefault(item, len(item_of)))
        times.append(time)
    if not users:
        raise DataError(f"{path}: the file is empty")
    user_ids, of_users = _sorted_map(user_of, users)
    item_ids, of_items = _sorted_map(item_of, items)
    notes: list[str] = []
    seconds = tables.to_seconds(np.frombuffer(times, dtype=np.float64), notes)
    fields: dict[str, list[str]] = {}
    meta = _meta_path(path)
    if meta is not None:
        fields, described = _read_meta(meta, item_ids)
        missing = list(compress(item_ids.ids, ~described))
        check_ids_known(path, missing, meta.name, missing_items)
        if missing and missing_items == "drop":
            keep = described[of_items]
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
    )


def _sorted_map(number_of: dict[str, int], numbers: array) -> tuple[IdMap, np.ndarray]:
    """Map with ids in lexicographic order, and the events renumbered to it."""
    ids = sorted(number_of)
    renumbered = np.empty(len(ids), np.int64)
    renumbered[[number_of[one] for one in ids]] = np.arange(len(ids))
    return IdMap(ids), renumbered[np.frombuffer(numbers, dtype=np.int32)]


def _meta_path(path: Path) -> Path | None:
    names = [f"meta_{_stem(path)}{suffix}" for suffix in (".json.gz", ".json", ".jsonl.gz", ".jsonl")]
    return next((path.with_name(name) for name in names if path.with_name(name).exists()), None)


def _read_meta(path: Path, item_ids: IdMap) -> tuple[dict[str, list[str]], np.ndarray]:
    fields = {name: [""] * len(item_ids) for name in _META_FIELDS}
    described = np.zeros(len(item_ids), bool)
    for number, entry in _objects(path):
        one = str(_field(path, number, entry, ITEM_FIELDS))
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
    return str(value)


FORM = Form(
    "amazon",
    "reviews_{Name}.json[.gz] or {Name}.json[l][.gz], and meta_{Name}.json[l][.gz] (2014, 2018, 2023)",
    _find,
    _read,
)
