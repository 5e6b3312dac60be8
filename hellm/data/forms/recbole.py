"""RecBole atomic files: `{name}.inter` with a typed header, optional `.item` and `.user`; or its benchmark files.

The benchmark files `{name}.train.inter`, `{name}.valid.inter` and `{name}.test.inter` carry a given split; they are
what this module writes. Ids are strings; items stand in the order of `.item`, users in that of `.user`, ids in neither
follow, sorted. Columns ending in `_title`, or called `title`, give titles.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import (
    Form,
    Source,
    check_ids_known,
    find_one,
    first_line,
    load_table_features,
    save_features,
)

TYPES = ("token", "token_seq", "float", "float_seq")
PARTS = ("train", "valid", "test")
_PART = re.compile(r"\.(train|valid|test)\.inter$")
_FIELDS = {"title": "title", "description": "description", "brand": "brand", "categories": "category"}


def _find(path: Path) -> Path | None:
    def accept(file: Path) -> bool:
        # Of the three benchmark files the first stands for all.
        other_part = path.is_dir() and _PART.search(file.name) and not file.name.endswith(".train.inter")
        return not other_part and ":" in first_line(file).split("\t")[0]

    return find_one(path, "*.inter", accept=accept)


def _column(path: Path, columns: list[str], field: str, *, required: bool = True) -> str | None:
    """Full header name of a field, e.g. "user_id:token"."""
    for column in columns:
        if column.split(":")[-1] not in TYPES or ":" not in column:
            raise DataError(f"{path}:1: header fields must read name:type with type {', '.join(TYPES)}, got {column!r}")
    found = next((one for one in columns if one.split(":")[0] == field), None)
    if found is None and required:
        raise DataError(f"{path}:1: the header must name {field}, got {', '.join(columns)}")
    return found


def _read(path: Path, *, missing_items: str = "error") -> Source:
    stem = _PART.sub("", path.name).removesuffix(".inter")
    parts = [path]
    if _PART.search(path.name):
        parts = [path.with_name(f"{stem}.{part}.inter") for part in PARTS]
        for part in parts:
            if not part.exists():
                raise DataError(f"{part}: no such file, but {path.name} stands beside it")
    notes: list[str] = []
    item_path, user_path = path.with_name(f"{stem}.item"), path.with_name(f"{stem}.user")
    listed, fields = _read_items(item_path) if item_path.exists() else ([], {})
    users = IdMap(_read_column(user_path, "user_id") if user_path.exists() else ())
    items = IdMap(listed)
    frames = [_Part(part) for part in parts if _has_rows(part, len(parts))]
    if not frames:
        raise DataError(f"{path}: there are no events")
    for part in frames:
        users.add(tables.index_ids(part.frame, part.user).ids)
        items.add(tables.index_ids(part.frame, part.item).ids)
    if listed:
        missing = items.ids[len(listed) :]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            items = IdMap(listed)
    read = [part.read(users, items, drop=missing_items == "drop") for part in frames]
    user, item, time = (None if read[0][at] is None else np.concatenate([one[at] for one in read]) for at in range(3))
    labels = None
    if len(parts) > 1:
        label = [parts.index(part.path) for part in frames]
        labels = np.repeat(np.array(label, np.int8), [len(one[0]) for one in read])
    pad = [""] * (len(items) - len(listed))
    fields = {name: texts + pad for name, texts in fields.items()}
    features = load_table_features(path, item_path, len(items), notes)
    return Source(
        user,
        item,
        users,
        items,
        timestamps=None if time is None else tables.to_seconds(time, notes),
        labels=labels,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=features,
        notes=notes,
        name=stem,
    )


def _has_rows(path: Path, num_parts: int) -> bool:
    if num_parts == 1:
        return True
    first_line(path)
    with path.open("rb") as file:
        file.readline()
        return bool(file.readline().strip())


class _Part:
    """One `.inter` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        frame = tables.scan(path, quote=None)
        columns = tables.columns_of(frame)
        self.user = _column(path, columns, "user_id")
        self.item = _column(path, columns, "item_id")
        self.time = _column(path, columns, "timestamp", required=False)
        self.frame = tables.without_blank_lines(frame, (self.user, self.item))

    def read(self, users: IdMap, items: IdMap, *, drop: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        import polars as pl

        chosen = [tables.to_index(self.user, users), tables.to_index(self.item, items)]
        rules = {self.user: tables.ID, self.item: tables.ID}
        if self.time:
            chosen.append(pl.col(self.time).cast(pl.Float64, strict=False))
            rules[self.time] = tables.NUMBER
        frame = self.frame
        if drop:
            frame = frame.filter(pl.col(self.item).is_in(items.ids))
        table = tables.collect(frame.select(chosen), self.path, rules, quote=None)
        columns = [table[name].to_numpy() for name in (self.user, self.item)]
        return columns[0], columns[1], table[self.time].to_numpy() if self.time else None


def _read_column(path: Path, field: str) -> list[str]:
    frame = tables.scan(path, quote=None)
    column = _column(path, tables.columns_of(frame), field)
    return tables.collect(frame.select(column), path, {column: tables.ID}, quote=None)[column].to_list()


def _read_items(path: Path) -> tuple[list[str], dict[str, list[str]]]:
    """Item ids in file order, and the texts that the file has of them."""
    ids = _read_column(path, "item_id")
    if len(set(ids)) != len(ids):
        twice = next(one for one in ids if ids.count(one) > 1)
        raise DataError(f"{path}: column item_id must hold distinct ids, got {twice!r} twice")
    table = tables.scan(path, quote=None).collect()
    fields = {}
    for column in table.columns:
        name = column.split(":")[0]
        field = "title" if name.endswith("_title") else _FIELDS.get(name)
        if field and field not in fields:
            fields[field] = table[column].fill_null("").to_list()
    return ids, fields


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {
        "user_id:token": pl.Series(dataset.user_ids.ids).gather(dataset.users),
        "item_id:token": pl.Series(dataset.item_ids.ids).gather(dataset.items),
    }
    if dataset.timestamps is not None:
        columns["timestamp:float"] = dataset.timestamps
    events = pl.DataFrame(columns)
    for label, part in enumerate(PARTS):
        _write_table(events.filter(pl.Series(dataset.split == label)), folder / f"{dataset.name}.{part}.inter")
    _write_table(pl.DataFrame({"user_id:token": dataset.user_ids.ids}), folder / f"{dataset.name}.user")
    texts = {"title": dataset.item_titles, **dataset.item_fields}
    names = {field: name for name, field in _FIELDS.items()}
    items = {"item_id:token": dataset.item_ids.ids}
    for field, values in texts.items():
        if values is not None and field in names:
            items[f"{names[field]}:token_seq"] = [" ".join(text.split()) for text in values]
    _write_table(pl.DataFrame(items), folder / f"{dataset.name}.item")
    save_features(dataset, folder)


def _write_table(table, path: Path) -> None:
    table.write_csv(path, separator="\t", quote_style="never")


FORM = Form(
    "recbole",
    "{name}.inter (tab separated: user_id:token item_id:token [rating:float] [timestamp:float]), optional {name}.item",
    _find,
    _read,
    _write,
)
