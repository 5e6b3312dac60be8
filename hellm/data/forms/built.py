"""The package's own form, which keeps everything: `dataset.json`, parquet tables and feature arrays.

dataset.json                  name, form, version, counts, split name, notes, fingerprint
events.parquet                user, item (indices), [timestamp], split
users.parquet                 id; row = index
items.parquet                 id, [title], [description], ...; row = index
features/<modality>.npy       [num_items, dim] float32
features/<modality>.mask.npy  [num_items] bool
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, ItemFeatures
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import Form, Source, distinct_ids, load_feature_file, load_mask
from hellm.data.forms._text import load_json

VERSION = 1
# As `tables.LABEL`, and 3 for events that are only history.
_LABEL = "0, 1 or 2 (train, validation, test), or 3 (history)"


def _find(path: Path) -> Path | None:
    main = path / "dataset.json" if path.is_dir() else path
    return main if main.name == "dataset.json" and main.exists() else None


def _read(path: Path) -> Source:
    folder, about = path.parent, load_json(path)
    if not isinstance(about, dict) or about.get("form") != "hellm":
        raise DataError(f"{path}: must be an object with form 'hellm'")
    if about.get("version") != VERSION:
        raise DataError(f"{path}: version must be {VERSION}, got {about.get('version')}")
    names = ("events", "users", "items")
    for name in names:
        if not (folder / f"{name}.parquet").exists():
            raise DataError(f"{folder / name}.parquet: no such file, but dataset.json stands beside it")
    events, users, items = (tables.Table(folder / f"{name}.parquet") for name in names)
    table = _integers(events)
    user_ids, item_ids = (distinct_ids(one.path, _texts(one, "id")) for one in (users, items))
    for column, count in (("user", len(user_ids)), ("item", len(item_ids))):
        values = table[column]
        if len(values) and not 0 <= values.min() <= values.max() < count:
            raise DataError(
                f"{events.path}: column {column!r} must lie in 0..{count - 1}, got {values.min()}..{values.max()}"
            )
    if len(table["split"]) and not 0 <= table["split"].min() <= table["split"].max() <= 3:
        raise DataError(f"{events.path}: column 'split' must be {_LABEL}")
    fields = {name: _texts(items, name) for name in items.columns if name != "id"}
    modalities, notes = about.get("modalities", []), about.get("notes", [])
    for key, value in (("modalities", modalities), ("notes", notes)):
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise DataError(f"{path}: {key} must be a list of text")
    columns = about.get("columns", {})
    if not isinstance(columns, dict) or not all(isinstance(one, str) for one in columns.values()):
        raise DataError(f"{path}: columns must be an object of text")
    if any("/" in one or one.startswith(".") for one in modalities):
        raise DataError(f"{path}: modalities must be plain names, got {', '.join(modalities)}")
    encoders = about.get("encoders", {})
    if not isinstance(encoders, dict) or not all(isinstance(one, dict) for one in encoders.values()):
        raise DataError(f"{path}: encoders must be an object of objects")
    if not all(isinstance(about.get(key, ""), str) for key in ("name", "split")):
        raise DataError(f"{path}: name and split must be text")
    return Source(
        table["user"],
        table["item"],
        user_ids,
        item_ids,
        timestamps=table.get("timestamp"),
        labels=table["split"],
        split_name=about.get("split", "given"),
        item_features=_read_features(folder / "features", modalities, len(item_ids)),
        item_titles=fields.pop("title", None),
        item_fields=fields,
        notes=list(notes),
        name=about.get("name"),
        columns=columns,
        encoders={name: one for name, one in encoders.items() if name in modalities},
        files={"users.parquet", "items.parquet", "events.parquet", "features"},
    )


def _integers(events: tables.Table) -> dict[str, np.ndarray]:
    """Columns of events.parquet. Raises DataError for a column that lacks, or holds anything but numbers."""
    columns = {}
    for name in ("user", "item", "split", "timestamp"):
        if name not in events.columns:
            if name == "timestamp":
                continue
            raise DataError(f"{events.path}: no column {name!r}; found {', '.join(events.columns)}")
        dtype = events.dtype(name)
        if not (dtype.is_integer() or (name == "timestamp" and dtype.is_float())):
            raise DataError(f"{events.path}: column {name!r} must hold integers, got {dtype}")
        values = events.collect(lambda frame, name=name: frame.select(name))[name]
        if values.null_count():
            raise DataError(
                f"{events.path}: column {name!r}: row {int(values.is_null().to_numpy().argmax()) + 1} is empty"
            )
        columns[name] = values.to_numpy()
    if "timestamp" in columns and not np.isfinite(columns["timestamp"]).all():
        raise DataError(f"{events.path}: column 'timestamp' must be finite")
    return columns


def _texts(table: tables.Table, column: str) -> list[str]:
    if column not in table.columns:
        raise DataError(f"{table.path}: no column {column!r}; found {', '.join(table.columns)}")
    return table.collect(lambda frame: frame.select(table.text(column).fill_null("").alias("cell")))["cell"].to_list()


def _read_features(folder: Path, modalities: list[str], num_items: int) -> dict[str, ItemFeatures]:
    features = {}
    for modality in modalities:
        path = folder / f"{modality}.npy"
        values = load_feature_file(path, num_items).values
        mask = load_mask(path.with_name(f"{modality}.mask.npy"), num_items)
        features[modality] = ItemFeatures(values, mask)
    return features


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {"user": dataset.users.astype(np.uint32), "item": dataset.items.astype(np.uint32)}
    if dataset.timestamps is not None:
        columns["timestamp"] = dataset.timestamps
    pl.DataFrame({**columns, "split": dataset.split}).write_parquet(folder / "events.parquet")
    pl.DataFrame({"id": dataset.user_ids.ids}, schema={"id": pl.String}).write_parquet(folder / "users.parquet")
    texts = {"title": dataset.item_titles} if dataset.item_titles is not None else {}
    items = {"id": dataset.item_ids.ids, **texts, **dataset.item_fields}
    pl.DataFrame(items, schema=dict.fromkeys(items, pl.String)).write_parquet(folder / "items.parquet")
    (folder / "features").mkdir()
    for modality, features in dataset.item_features.items():
        np.save(folder / "features" / f"{modality}.npy", features.values)
        np.save(folder / "features" / f"{modality}.mask.npy", features.mask)
    about = {
        "name": dataset.name,
        "form": "hellm",
        "version": VERSION,
        "source_form": dataset.form,
        "num_users": dataset.num_users,
        "num_items": dataset.num_items,
        "num_events": dataset.num_events,
        "split": dataset.split_name,
        "split_counts": dataset.split_counts(),
        "modalities": list(dataset.item_features),
        "columns": dataset.columns,
        "encoders": dataset.encoders,
        "notes": dataset.notes,
        "fingerprint": dataset.fingerprint,
    }
    (folder / "dataset.json").write_text(json.dumps(about, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


FORM = Form(
    "hellm",
    "dataset.json with events.parquet, users.parquet, items.parquet and features/",
    _find,
    _read,
    _write,
    before=("recbole", "shop"),
)
