"""`{Name}.inter.json` ({user: [items]}, in time order) with `{Name}.item.json` ({item: {title, description, ...}}).

Ids are integers from 0 and stay the row numbers.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset
from hellm.data.forms._base import (
    Form,
    Source,
    as_text,
    check_ids_known,
    feature_rows,
    file_name,
    find_one,
    load_features,
    number_ids,
    save_features,
    save_id_mapping,
)
from hellm.data.forms._text import load_json
from hellm.data.forms.lattice import flatten, gather, is_row_number

_FIELDS = {"title": "title", "description": "description", "brand": "brand", "categories": "category"}


def _find(path: Path) -> Path | None:
    return find_one(path, "*.inter.json")


def _read(path: Path, *, missing_items: str = "error", encoding: str | None = None) -> Source:
    lists = load_json(path, encoding)
    users, items = flatten(path, lists)
    if not len(items):
        raise DataError(f"{path}: there are no events")
    stem = path.name.removesuffix(".inter.json")
    item_path = path.with_name(f"{stem}.item.json")
    entries = _read_items(item_path, encoding) if item_path.exists() else {}
    if entries:
        missing = [str(one) for one in np.unique(items).tolist() if str(one) not in entries]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            keep = ~np.isin(items, np.array(missing, dtype=np.int64))
            users, items = users[keep], items[keep]
        if not len(items):
            raise DataError(f"{path}: no event is left: none of its items is in {item_path.name}")
    notes: list[str] = []
    listed = np.array([int(one) for one in entries], dtype=np.int64)
    if len(listed) and listed.max() > items.max():
        number_ids(path, "item", np.concatenate([listed, items]), source=item_path)
    at_least = max(feature_rows(path.parent), int(listed.max(initial=-1)) + 1)
    item_ids = number_ids(path, "item", items, at_least=at_least)
    fields = {field: _texts(item_path, entries, name, len(item_ids)) for name, field in _FIELDS.items()}
    fields = {field: texts for field, texts in fields.items() if texts is not None}
    unused = sorted({name for entry in entries.values() for name in entry} - _FIELDS.keys())
    if unused:
        notes.append(f"{item_path.name}: fields not used: {', '.join(unused[:20])}")
    return Source(
        users,
        items,
        number_ids(path, "user", np.array([int(user) for user in lists], dtype=np.int64)),
        item_ids,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=load_features(path.parent, len(item_ids), notes, name=stem),
        notes=notes,
        name=stem,
        files={item_path.name},
    )


def _texts(path: Path, entries: dict[str, dict], name: str, num_items: int) -> list[str] | None:
    """One field of all items as text; None where no item has it."""
    if not any(name in entry for entry in entries.values()):
        return None
    texts = [""] * num_items
    for item, entry in entries.items():
        try:
            texts[int(item)] = as_text(entry.get(name))
        except (TypeError, RecursionError) as error:
            raise DataError(f"{path}: item {item!r}: {name} {error}") from None
    return texts


def _read_items(path: Path, encoding: str | None) -> dict[str, dict]:
    entries = load_json(path, encoding)
    if not isinstance(entries, dict):
        raise DataError(f"{path}: must be an object of item: {{title, ...}}, got {type(entries).__name__}")
    for item, entry in entries.items():
        if not is_row_number(item):
            raise DataError(f"{path}: item {item[:40]!r}: must be a non-negative integer")
        if not isinstance(entry, dict):
            raise DataError(f"{path}: item {item!r}: must be an object, got {type(entry).__name__}")
    return entries


def _write(dataset: Dataset, folder: Path) -> None:
    lists = gather(dataset.users, dataset.items, dataset.num_users)
    (folder / f"{file_name(dataset)}.inter.json").write_text(json.dumps(lists), encoding="utf-8")
    texts = {"title": dataset.item_titles, **dataset.item_fields}
    names = [(name, texts[field]) for name, field in _FIELDS.items() if texts.get(field) is not None]
    entries = {str(item): {name: values[item] for name, values in names} for item in range(dataset.num_items)}
    (folder / f"{file_name(dataset)}.item.json").write_text(
        json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    save_id_mapping(dataset.user_ids, folder, "user", dataset.users)
    save_id_mapping(dataset.item_ids, folder, "item", dataset.items)
    save_features(dataset, folder)


FORM = Form(
    "json",
    "{Name}.inter.json ({user: [items]}) and {Name}.item.json ({item: {title, description, brand, categories}})",
    _find,
    _read,
    _write,
    keeps_split=False,
    before=("lattice",),
)
