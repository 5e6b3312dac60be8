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

from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import Form, Source, load_feature_file, load_json

VERSION = 1
# As `tables.LABEL`, and 3 for events that are only history.
_LABEL: tables.Rule = (lambda text: text in ("0", "1", "2", "3"), "0, 1 or 2 (train, validation, test), or 3 (history)")
_INTEGER: tables.Rule = (str.isdecimal, "a non-negative integer")


def _find(path: Path) -> Path | None:
    main = path / "dataset.json" if path.is_dir() else path
    return main if main.name == "dataset.json" and main.exists() else None


def _read(path: Path) -> Source:
    import polars as pl

    folder, about = path.parent, load_json(path)
    if not isinstance(about, dict) or about.get("form") != "hellm":
        raise DataError(f"{path}: must be an object with form 'hellm'")
    if about.get("version") != VERSION:
        raise DataError(f"{path}: version must be {VERSION}, got {about.get('version')}")
    names = ("events", "users", "items")
    for name in names:
        if not (folder / f"{name}.parquet").exists():
            raise DataError(f"{folder / name}.parquet: no such file, but dataset.json stands beside it")
    events, users, items = (tables.scan(folder / f"{name}.parquet") for name in names)
    rules = {"user": _INTEGER, "item": _INTEGER, "split": _LABEL}
    table = tables.collect(events, folder / "events.parquet", rules)
    catalogue = items.with_columns(pl.exclude("id").fill_null("")).collect()
    user_ids, item_ids = IdMap(users.collect()["id"].to_list()), IdMap(catalogue["id"].to_list())
    for column, ids in (("user", user_ids), ("item", item_ids)):
        if not 0 <= table[column].min() <= table[column].max() < len(ids):
            raise DataError(
                f"{folder / 'events.parquet'}: column {column!r} must lie in 0..{len(ids) - 1}, "
                f"got {table[column].min()}..{table[column].max()}"
            )
    if not 0 <= table["split"].min() <= table["split"].max() <= 3:
        raise DataError(f"{folder / 'events.parquet'}: column 'split' must be {_LABEL[1]}")
    fields = {name: catalogue[name].to_list() for name in catalogue.columns if name != "id"}
    return Source(
        table["user"].to_numpy(),
        table["item"].to_numpy(),
        user_ids,
        item_ids,
        timestamps=table["timestamp"].to_numpy() if "timestamp" in table.columns else None,
        labels=table["split"].to_numpy(),
        split_name=about.get("split", "given"),
        item_features=_read_features(folder / "features", about.get("modalities", []), len(item_ids)),
        item_titles=fields.pop("title", None),
        item_fields=fields,
        notes=list(about.get("notes", [])),
        name=about.get("name"),
    )


def _read_features(folder: Path, modalities: list[str], num_items: int) -> dict[str, ItemFeatures]:
    features = {}
    for modality in modalities:
        path = folder / f"{modality}.npy"
        values = load_feature_file(path, num_items).values
        mask = np.load(path.with_name(f"{modality}.mask.npy"), allow_pickle=False)
        if mask.shape != (num_items,) or mask.dtype != np.bool_:
            raise DataError(f"{path.with_name(f'{modality}.mask.npy')}: must be [{num_items}] bool, got {mask.shape}")
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
)
