"""MMRec form: `{name}.inter` with `userID itemID [rating timestamp] x_label`, and `*_feat.npy` with row = itemID.

Ids are integers from 0 and stay the row numbers. The optional `u_id_mapping.csv` and `i_id_mapping.csv` that MMRec's
own pre-processing leaves hold the external ids and, with them, users and items that have no events.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hellm.data.dataset import DataError, Dataset
from hellm.data.forms import _tables as tables
from hellm.data.forms._base import (
    Form,
    Source,
    feature_rows,
    find_one,
    first_line,
    load_features,
    number_ids,
    save_features,
    save_id_mapping,
)


def _find(path: Path) -> Path | None:
    return find_one(path, "*.inter", accept=lambda file: ":" not in first_line(file).split("\t")[0])


def _read(path: Path) -> Source:
    import polars as pl

    frame = tables.scan(path, quote=None)
    columns = tables.columns_of(frame)
    absent = [name for name in ("userID", "itemID") if name not in columns]
    if absent:
        raise DataError(f"{path}:1: the header must name {' and '.join(absent)}, got {', '.join(columns)}")
    rules = {"userID": tables.NON_NEGATIVE_INTEGER, "itemID": tables.NON_NEGATIVE_INTEGER}
    chosen = [pl.col(name).cast(pl.UInt32, strict=False) for name in rules]
    if "x_label" in columns:
        rules["x_label"] = tables.LABEL
        # A label of 3 turns null here and is then reported with its line.
        chosen.append(pl.col("x_label").replace_strict({"0": 0, "1": 1, "2": 2}, default=None, return_dtype=pl.Int8))
    if "timestamp" in columns:
        rules["timestamp"] = tables.NUMBER
        chosen.append(pl.col("timestamp").cast(pl.Float64, strict=False))
    frame = tables.without_blank_lines(frame, columns[:2])
    table = tables.collect(frame.select(chosen), path, rules, quote=None)

    notes: list[str] = []
    items = table["itemID"].to_numpy()
    item_ids = number_ids(path, "item", int(items.max()), at_least=feature_rows(path.parent))
    if len(item_ids) > int(items.max()) + 1:
        notes.append(f"{len(item_ids)} items by feature rows or id mapping; the largest item id is {int(items.max())}")
    return Source(
        users=table["userID"].to_numpy(),
        items=items,
        user_ids=number_ids(path, "user", int(table["userID"].max())),
        item_ids=item_ids,
        timestamps=tables.to_seconds(table["timestamp"].to_numpy(), notes) if "timestamp" in columns else None,
        labels=table["x_label"].to_numpy() if "x_label" in columns else None,
        item_features=load_features(path.parent, len(item_ids), notes),
        notes=notes,
    )


def _write(dataset: Dataset, folder: Path) -> None:
    import polars as pl

    columns = {"userID": dataset.users, "itemID": dataset.items}
    if dataset.timestamps is not None:
        columns["timestamp"] = dataset.timestamps
    columns["x_label"] = dataset.split
    pl.DataFrame({name: np.ascontiguousarray(values) for name, values in columns.items()}).write_csv(
        folder / f"{dataset.name}.inter", separator="\t"
    )
    save_id_mapping(dataset.user_ids, folder, "user")
    save_id_mapping(dataset.item_ids, folder, "item")
    save_features(dataset, folder)


FORM = Form(
    "mmrec",
    "{name}.inter (tab separated: userID itemID [rating timestamp] x_label) and *_feat.npy",
    _find,
    _read,
    _write,
)
