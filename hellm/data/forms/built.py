"""The package's own form, which keeps everything and is mapped into memory rather than read.

dataset.json                  name, form, version, counts, split name, notes, fingerprint
events/users.npy, items.npy   [num_events] int64 indices; by user, in time order
events/split.npy              [num_events] int8
events/timestamps.npy         [num_events] int64 or float64, if there are times
users/text.npy, starts.npy    ids, as `hellm.data.texts.Texts` has them; row = index
items.parquet                 id, [title], [description], ...; row = index
features/<modality>.npy       [num_items, dim] float32
features/<modality>.mask.npy  [num_items] bool

Version 1 has events.parquet (user, item, [timestamp], split) and users.parquet (id) instead, and is still read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap, ItemFeatures
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import Form, Source, check_finite, distinct_ids, load_mask, open_array
from hellm.data.forms._text import load_json
from hellm.data.texts import Texts

VERSION = 2
# As `tables.LABEL`, and 3 for events that are only history.
_LABEL = "0, 1 or 2 (train, validation, test), or 3 (history)"


def _find(path: Path) -> Path | None:
    main = path / "dataset.json" if path.is_dir() else path
    return main if main.name == "dataset.json" and main.exists() else None


def _read(path: Path) -> Source:
    folder, about = path.parent, load_json(path)
    if not isinstance(about, dict) or about.get("form") != "hellm":
        raise DataError(f"{path}: must be an object with form 'hellm'")
    version = about.get("version")
    if version not in (1, VERSION):
        raise DataError(f"{path}: version must be 1 or {VERSION}, got {version}")
    events = folder / ("events.parquet" if version == 1 else "events")
    for one in (events, folder / ("users.parquet" if version == 1 else "users"), folder / "items.parquet"):
        if not one.exists():
            raise DataError(f"{one}: no such {'file' if one.suffix else 'folder'}, but dataset.json stands beside it")
    items = tables.Table(folder / "items.parquet")
    if version == 1:
        users = tables.Table(folder / "users.parquet")
        table = _integers(tables.Table(events))
        user_ids = distinct_ids(users.path, _texts(users, "id"))
    else:
        table, user_ids = _mapped_events(events), _mapped_ids(folder / "users")
    item_ids = distinct_ids(items.path, _texts(items, "id"))
    for column, count in (("user", len(user_ids)), ("item", len(item_ids))):
        values = table[column]
        if len(values) and not 0 <= values.min() <= values.max() < count:
            raise DataError(
                f"{events}: column {column!r} must lie in 0..{count - 1}, got {values.min()}..{values.max()}"
            )
    if len(table["split"]) and not 0 <= table["split"].min() <= table["split"].max() <= 3:
        raise DataError(f"{events}: column 'split' must be {_LABEL}")
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
        files={"users.parquet", "users", "items.parquet", "events.parquet", "events", "features"},
    )


# Column -> its array, and the types that it may have.
_ARRAYS = {
    "user": ("users", ("int64",)),
    "item": ("items", ("int64",)),
    "split": ("split", ("int8",)),
    "timestamp": ("timestamps", ("int64", "float64")),
}


def _mapped_events(folder: Path) -> dict[str, np.ndarray]:
    """Columns of the events, as they stand in the files. Raises DataError for an array that is not what it must be."""
    columns: dict[str, np.ndarray] = {}
    for column, (name, types) in _ARRAYS.items():
        path = folder / f"{name}.npy"
        if column == "timestamp" and not path.exists():
            continue
        values = open_array(path)
        if values.ndim != 1 or values.dtype.name not in types or len(values) != len(columns.get("user", values)):
            count = len(columns["user"]) if columns else "num_events"
            raise DataError(f"{path}: must be [{count}] {' or '.join(types)}, got {list(values.shape)} {values.dtype}")
        columns[column] = values
    if "timestamp" in columns and not _are_finite(columns["timestamp"]):
        raise DataError(f"{folder / 'timestamps.npy'}: must be finite")
    return columns


def _are_finite(times: np.ndarray) -> bool:
    """Whether all are finite."""
    return times.dtype.kind != "f" or bool(np.isfinite(times.min(initial=0)) and np.isfinite(times.max(initial=0)))


def _mapped_ids(folder: Path) -> IdMap:
    try:
        return IdMap(Texts(open_array(folder / "text.npy"), open_array(folder / "starts.npy")))
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / 'text.npy'}: must be UTF-8 ({error})") from None
    except DataError as error:
        raise DataError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None
    except ValueError as error:
        raise DataError(f"{folder / 'starts.npy'}: {error}") from None


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
        values = open_array(path)
        if values.ndim != 2 or len(values) != num_items or values.dtype != np.float32:
            raise DataError(f"{path}: must be [{num_items}, dim] float32, got {list(values.shape)} {values.dtype}")
        check_finite(path, values)
        features[modality] = ItemFeatures(values, load_mask(path.with_name(f"{modality}.mask.npy"), num_items))
    return features


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {"users": dataset.users, "items": dataset.items, "split": dataset.split, "timestamps": dataset.timestamps}
    (folder / "events").mkdir()
    for name, values in columns.items():
        if values is not None:
            np.save(folder / "events" / f"{name}.npy", values)
    (folder / "users").mkdir()
    users = Texts.of(dataset.user_ids.ids)
    np.save(folder / "users" / "text.npy", users.data)
    np.save(folder / "users" / "starts.npy", users.starts)
    texts = {"title": dataset.item_titles} if dataset.item_titles is not None else {}
    items = {"id": list(dataset.item_ids.ids), **texts, **dataset.item_fields}
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
    "dataset.json with events/, users/, items.parquet and features/",
    _find,
    _read,
    _write,
    before=("recbole", "shop"),
)
