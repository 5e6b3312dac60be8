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
    check_ids_known,
    feature_rows,
    find_one,
    load_features,
    load_json,
    number_ids,
    save_features,
    save_id_mapping,
)
from hellm.data.forms.lattice import flatten, gather

_FIELDS = {"title": "title", "description": "description", "brand": "brand", "categories": "category"}


def _find(path: Path) -> Path | None:
    return find_one(path, "*.inter.json")


def _read(path: Path, *, missing_items: str = "error") -> Source:
    lists = load_json(path)
    users, items = flatten(path, lists)
    if not len(items):
        raise DataError(f"{path}: there are no events")
    stem = path.name.removesuffix(".inter.json")
    item_path = path.with_name(f"{stem}.item.json")
    entries = _read_items(item_path) if item_path.exists() else {}
    if entries:
        missing = [str(one) for one in np.unique(items).tolist() if str(one) not in entries]
        check_ids_known(path, missing, item_path.name, missing_items)
        if missing and missing_items == "drop":
            keep = ~np.isin(items, np.array(missing, dtype=np.int64))
            users, items = users[keep], items[keep]
    notes: list[str] = []
    at_least = max([feature_rows(path.parent), *(int(one) + 1 for one in entries)])
    item_ids = number_ids(path, "item", int(items.max(initial=-1)), at_least=at_least)
    fields = {}
    for name, field in _FIELDS.items():
        if any(name in entry for entry in entries.values()):
            texts = [entries.get(str(item), {}).get(name) for item in range(len(item_ids))]
            fields[field] = [", ".join(text) if isinstance(text, list) else text or "" for text in texts]
    return Source(
        users,
        items,
        number_ids(path, "user", max(map(int, lists))),
        item_ids,
        item_titles=fields.pop("title", None),
        item_fields=fields,
        item_features=load_features(path.parent, len(item_ids), notes, name=stem),
        notes=notes,
        name=stem,
    )


def _read_items(path: Path) -> dict[str, dict]:
    entries = load_json(path)
    if not isinstance(entries, dict):
        raise DataError(f"{path}: must be an object of item: {{title, ...}}, got {type(entries).__name__}")
    for item, entry in entries.items():
        if not (item.isascii() and item.isdecimal()):
            raise DataError(f"{path}: item {item!r}: must be a non-negative integer")
        if not isinstance(entry, dict):
            raise DataError(f"{path}: item {item!r}: must be an object, got {type(entry).__name__}")
    return entries


def _write(dataset: Dataset, folder: Path) -> None:
    lists = gather(dataset.users, dataset.items, dataset.num_users)
    (folder / f"{dataset.name}.inter.json").write_text(json.dumps(lists), encoding="utf-8")
    texts = {"title": dataset.item_titles, **dataset.item_fields}
    names = [(name, texts[field]) for name, field in _FIELDS.items() if texts.get(field) is not None]
    entries = {str(item): {name: values[item] for name, values in names} for item in range(dataset.num_items)}
    (folder / f"{dataset.name}.item.json").write_text(
        json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8"
    )
    save_id_mapping(dataset.user_ids, folder, "user")
    save_id_mapping(dataset.item_ids, folder, "item")
    save_features(dataset, folder)


FORM = Form(
    "json",
    "{Name}.inter.json ({user: [items]}) and {Name}.item.json ({item: {title, description, brand, categories}})",
    _find,
    _read,
    _write,
    keeps_split=False,
)
