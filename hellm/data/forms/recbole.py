"""RecBole atomic files: `{name}.inter` with a typed header, optional `.item` and `.user`; or its benchmark files.

The benchmark files `{name}.train.inter`, `{name}.valid.inter` and `{name}.test.inter` carry a given split; they are
what this module writes. Ids are strings; items stand in the order of `.item`, users in that of `.user`, ids in neither
follow, sorted. Columns ending in `_title`, or called `title`, give titles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms import _events as events
from hellm.data.forms import _times as times
from hellm.data.forms._base import (
    Form,
    Source,
    check_ids_known,
    distinct_ids,
    file_name,
    find_one,
    load_table_features,
    save_features,
)
from hellm.data.forms._ids import IdColumn, check_ids_writable, clean, read_ids, without_unused
from hellm.data.forms._tables import Table
from hellm.data.forms._text import first_line

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


_COLUMNS = {
    "user": ("user_id",),
    "item": ("item_id",),
    "time": events.TIMES,
    "rating": ("rating",),
    "label": ("label",),
}


def _open(path: Path, separator: str | None, encoding: str | None) -> Table:
    """An atomic file, its columns named without their types.

    Raises:
        DataError: A header field without a type.
    """
    table = Table(path, separator=separator, encoding=encoding, quote=None)
    for column in table.columns:
        if ":" not in column or column.split(":")[-1] not in TYPES:
            raise DataError(f"{path}:1: header fields must read name:type with type {', '.join(TYPES)}, got {column!r}")
    return table


def _name(column: str) -> str:
    return column.partition(":")[0]


def _column(table: Table, field: str) -> str:
    """Full header name of a field, e.g. "user_id:token"."""
    found = next((column for column in table.columns if _name(column) == field), None)
    if found is None:
        raise DataError(f"{table.path}:1: the header must name {field}, got {', '.join(table.columns)}")
    return found


def _roles(table: Table, chosen: dict[str, list[str]]) -> dict[str, str]:
    names = {_name(column): column for column in reversed(table.columns)}
    for role, (name,) in chosen.items():
        if name not in names and name not in table.columns:
            raise DataError(f"{table.path}: no column {name!r} for the {role}; found {', '.join(table.columns)}")
    roles = {role: name if name in table.columns else names[name] for role, (name,) in chosen.items()}
    for role, usual in _COLUMNS.items():
        column = next((names[name] for name in usual if name in names and names[name] not in roles.values()), None)
        if role not in roles and column is not None:
            roles[role] = column
    for role in ("user", "item"):
        if role not in roles:
            raise DataError(f"{table.path}:1: the header must name {role}_id, got {', '.join(table.columns)}")
    return roles


def _read(
    path: Path,
    *,
    missing_items: str = "error",
    columns: Mapping[str, str | Sequence[str]] | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    min_rating: float | None = None,
) -> Source:
    chosen = events.columns_argument(columns, tuple(_COLUMNS))
    stem = _PART.sub("", path.name).removesuffix(".inter")
    parts = [path]
    if _PART.search(path.name):
        parts = [path.with_name(f"{stem}.{part}.inter") for part in PARTS]
        for part in parts:
            if not part.exists():
                raise DataError(f"{part}: no such file, but {path.name} stands beside it")
    notes: list[str] = []
    item_path, user_path = path.with_name(f"{stem}.item"), path.with_name(f"{stem}.user")
    listed, fields = _read_items(item_path, separator, encoding, notes) if item_path.exists() else ([], {})
    users = IdMap(_read_users(user_path, separator, encoding, notes) if user_path.exists() else ())
    items, num_listed_users = IdMap(listed), len(users)
    tables = [_open(part, separator, encoding) for part in parts if _has_rows(part, len(parts))]
    if not tables:
        raise DataError(f"{path}: there are no events")
    roles = [_roles(table, chosen) for table in tables]
    found = [
        {role: read_ids(table, named[role], notes) for role in ("user", "item")}
        for table, named in zip(tables, roles, strict=True)
    ]
    for one in found:
        users.add(one["user"].ids.ids)
        items.add(one["item"].ids.ids)
    read = []
    for table, named, one in zip(tables, roles, found, strict=True):
        ids = {"user": _renumbered(one["user"], users), "item": _renumbered(one["item"], items)}
        read.append(events.read_events(table, named, ids=ids, notes=notes, min_rating=min_rating))
        notes += table.notes
        _note_columns(table, named, notes)
        if (read[-1].times is None) != (read[0].times is None):
            raise DataError(f"{table.path}: must have a column of times as {tables[0].path.name} has, or neither")
    user, item = (np.concatenate([getattr(one, side) for one in read]) for side in ("users", "items"))
    users, user = without_unused(users, num_listed_users, user)
    items, item = without_unused(items, len(listed), item)
    seconds = None
    if read[0].times is not None:
        plain = np.concatenate([one.plain for one in read])
        seconds = times.to_seconds(np.concatenate([one.times for one in read]), notes, plain=plain)
    labels = None
    if len(parts) > 1:
        label = [parts.index(table.path) for table in tables]
        labels = np.repeat(np.array(label, np.int8), [len(one.users) for one in read])
    if listed:
        missing = items.ids[len(listed) :]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            keep = item < len(listed)
            notes.append(f"{int((~keep).sum())} events on items that {item_path.name} lacks are left out")
            user, item = user[keep], item[keep]
            labels = None if labels is None else labels[keep]
            seconds = None if seconds is None else seconds[keep]
            items = IdMap(listed)
    pad = [""] * (len(items) - len(listed))
    fields = {name: texts + pad for name, texts in fields.items()}
    features = load_table_features(path, item_path, len(items), notes)
    return Source(
        user,
        item,
        users,
        items,
        timestamps=seconds,
        labels=labels,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=features,
        notes=list(dict.fromkeys(notes)),
        name=stem,
        columns=roles[0],
        files={part.name for part in parts} | {item_path.name, user_path.name},
    )


def _renumbered(column: IdColumn, ids: IdMap) -> IdColumn:
    """The column with the indices of a larger map."""
    lookup = np.append(ids.indices(column.ids.ids), -1)
    return IdColumn(ids, column.raw, lookup[column.index])


def _note_columns(table: Table, roles: dict[str, str], notes: list[str]) -> None:
    events.unused_note(table, list(roles.values()), notes)
    lists = [column for column in table.columns if column.endswith("_seq") and column not in roles.values()]
    if lists:
        notes.append(
            f"{table.path.name}: each row counts as one event on its {_name(roles['item'])}; the lists in "
            f"{', '.join(lists)} are no events"
        )
    if "time" not in roles:
        events.order_note(table, list(roles.values()), notes)


def _has_rows(path: Path, num_parts: int) -> bool:
    if num_parts == 1:
        return True
    first_line(path)
    with path.open("rb") as file:
        file.readline()
        return bool(file.readline().strip())


def _read_ids(
    table: Table, field: str, notes: list[str], others: Sequence[str] = ()
) -> tuple[list[str], dict[str, list[str]]]:
    """Clean ids in file order, and the texts of other columns in the rows that have one."""
    import polars as pl

    column = _column(table, field)
    if column in table.repeated:
        raise DataError(f"{table.path}: the header names {column!r} twice")
    rows = table.collect(lambda frame: frame.select(table.text(name).alias(name) for name in (column, *others)))
    ids = clean(rows[column], f"{table.path.name}: column {column!r}", notes)
    if ids.null_count():
        blank = table.num_blank()
        if ids.null_count() > blank:
            notes.append(f"{table.path.name}: {ids.null_count() - blank} rows without {field} are left out")
    rows = rows.with_columns(ids.alias(column)).filter(pl.col(column).is_not_null())
    distinct_ids(table.path, rows[column].to_list(), field)
    return rows[column].to_list(), {name: rows[name].fill_null("").to_list() for name in others}


def _read_users(path: Path, separator: str | None, encoding: str | None, notes: list[str]) -> list[str]:
    table = _open(path, separator, encoding)
    events.unused_note(table, [_column(table, "user_id")], notes)
    return _read_ids(table, "user_id", notes)[0]


def _read_items(
    path: Path, separator: str | None, encoding: str | None, notes: list[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Item ids in file order, and the texts that the file has of them."""
    table = _open(path, separator, encoding)
    columns: dict[str, str] = {}
    for column in table.columns:
        name = _name(column)
        field = "title" if name.endswith("_title") else _FIELDS.get(name)
        if field:
            columns.setdefault(field, column)
    ids, texts = _read_ids(table, "item_id", notes, list(columns.values()))
    events.unused_note(table, [_column(table, "item_id"), *columns.values()], notes)
    return ids, {field: texts[column] for field, column in columns.items()}


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    check_ids_writable(dataset, "recbole", "\0\t\n\r")
    columns = {
        "user_id:token": pl.Series(dataset.user_ids.ids).gather(dataset.users),
        "item_id:token": pl.Series(dataset.item_ids.ids).gather(dataset.items),
    }
    if dataset.timestamps is not None:
        columns["timestamp:float"] = pl.Series(dataset.timestamps)
    events = pl.DataFrame(columns)
    for label, part in enumerate(PARTS):
        _write_table(events.filter(pl.Series(dataset.split == label)), folder / f"{file_name(dataset)}.{part}.inter")
    _write_table(pl.DataFrame({"user_id:token": dataset.user_ids.ids}), folder / f"{file_name(dataset)}.user")
    texts = {"title": dataset.item_titles, **dataset.item_fields}
    names = {field: name for name, field in _FIELDS.items()}
    items = {"item_id:token": dataset.item_ids.ids}
    for field, values in texts.items():
        if values is not None and field in names:
            items[f"{names[field]}:token_seq"] = [" ".join(text.split()) for text in values]
    _write_table(pl.DataFrame(items), folder / f"{file_name(dataset)}.item")
    save_features(dataset, folder)


def _write_table(table, path: Path) -> None:
    table.write_csv(path, separator="\t", quote_style="never")


FORM = Form(
    "recbole",
    "{name}.inter (tab separated: user_id:token item_id:token [rating:float] [timestamp:float]), optional {name}.item",
    _find,
    _read,
    _write,
    before=("mmrec",),
)
