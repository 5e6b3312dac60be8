"""MMRec form: `{name}.inter` with `userID itemID [rating timestamp] x_label`, and `*_feat.npy` with row = itemID.

Ids are integers from 0 and stay the row numbers. The optional `u_id_mapping.csv` and `i_id_mapping.csv` that MMRec's
own pre-processing leaves hold the external ids and, with them, users and items that have no events.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset
from hellm.data.forms import _events as events
from hellm.data.forms import _tables as tables
from hellm.data.forms import _times as times
from hellm.data.forms._base import (
    Form,
    Source,
    feature_rows,
    file_name,
    find_one,
    load_features,
    number_ids,
    save_features,
    save_id_mapping,
)
from hellm.data.forms._text import first_line

_COLUMNS = {
    "user": ("userid",),
    "item": ("itemid",),
    "time": events.TIMES,
    "split": ("x_label",),
    "rating": events.MEANINGS["rating"],
    "label": ("label",),
}
_LABELS = {"0": 0, "1": 1, "2": 2}


def _find(path: Path) -> Path | None:
    return find_one(path, "*.inter", accept=lambda file: ":" not in first_line(file).split("\t")[0])


def _read(
    path: Path,
    *,
    columns: Mapping[str, str | Sequence[str]] | None = None,
    separator: str | None = None,
    encoding: str | None = None,
    min_rating: float | None = None,
) -> Source:
    table = tables.Table(path, separator=separator, encoding=encoding, quote=None)
    chosen = events.columns_argument(columns, tuple(_COLUMNS))
    plain = [events.plain_name(name) for name in table.columns]
    absent = [
        n for role, n in (("user", "userID"), ("item", "itemID")) if role not in chosen and n.lower() not in plain
    ]
    if absent:
        raise DataError(f"{path}:1: the header must name {' and '.join(absent)}, got {', '.join(table.columns)}")
    roles = events.find_roles(table, _COLUMNS, ("user", "item"), chosen)
    notes = table.notes
    read = events.read_events(
        table, roles, ids={}, notes=notes, labels=(_LABELS, tables.LABEL), min_rating=min_rating
    )  # fmt: skip
    events.unused_note(table, list(roles.values()), notes)
    if "time" not in roles:
        events.order_note(table, list(roles.values()), notes)
    largest = int(read.items.max())
    item_ids = number_ids(path, "item", read.items, at_least=feature_rows(path.parent))
    if len(item_ids) > largest + 1:
        notes.append(f"{len(item_ids)} items by feature rows or id mapping; the largest item id is {largest}")
    return Source(
        users=read.users,
        items=read.items,
        user_ids=number_ids(path, "user", read.users),
        item_ids=item_ids,
        timestamps=None
        if read.times is None or read.plain is None
        else times.to_seconds(read.times, notes, plain=read.plain),
        labels=read.split,
        item_features=load_features(path.parent, len(item_ids), notes),
        notes=notes,
        columns=roles,
    )


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {"userID": dataset.users, "itemID": dataset.items}
    if dataset.timestamps is not None:
        columns["timestamp"] = dataset.timestamps
    columns["x_label"] = dataset.split
    pl.DataFrame({name: np.ascontiguousarray(values) for name, values in columns.items()}).write_csv(
        folder / f"{file_name(dataset)}.inter", separator="\t"
    )
    save_id_mapping(dataset.user_ids, folder, "user", dataset.users)
    save_id_mapping(dataset.item_ids, folder, "item", dataset.items)
    save_features(dataset, folder)


FORM = Form(
    "mmrec",
    "{name}.inter (tab separated: userID itemID [rating timestamp] x_label) and *_feat.npy",
    _find,
    _read,
    _write,
    before=("json",),
)
