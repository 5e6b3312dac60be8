"""ids.parquet and histories.parquet: which id each embedding row belongs to, and the events as embedding rows."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hellm._files import reading
from hellm.artifact.files import HISTORIES, IDS
from hellm.data import Dataset, IdMap

if TYPE_CHECKING:
    import polars as pl

__all__ = ["histories_table", "ids_table", "read_histories", "read_ids", "side_of"]


def ids_table(user_ids: IdMap, item_ids: IdMap, titles: Sequence[str | None] | None) -> pl.DataFrame:
    """Columns side ("user" or "item"), index (embedding row), id, title (of items that have one)."""
    import polars as pl

    num_users, num_items = len(user_ids), len(item_ids)
    titles = titles if titles is not None else [None] * num_items
    return pl.DataFrame(
        {
            "side": ["user"] * num_users + ["item"] * num_items,
            "index": [*range(num_users), *range(num_items)],
            "id": [*user_ids.ids, *item_ids.ids],
            "title": [None] * num_users + [title or None for title in titles],
        },
        schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
    )


def histories_table(dataset: Dataset) -> pl.DataFrame:
    """Columns user and item (embedding rows) and split (0, 1, 2) of each event, in time order."""
    import polars as pl

    return pl.DataFrame({"user": dataset.users, "item": dataset.items, "split": dataset.split})


def read_ids(folder: str | os.PathLike[str]) -> pl.DataFrame:
    """As `ids_table`. Raises: FileNotFoundError; ValueError naming the file, a damaged one."""
    path = Path(folder) / IDS
    with reading(path):
        table = _read(path, ("side", "index", "id", "title"))
        for side in ("user", "item"):
            rows = table.filter(table["side"] == side)
            index = rows["index"].sort()
            if len(rows) and (index[0] != 0 or index[-1] != len(rows) - 1 or rows["index"].is_duplicated().any()):
                raise ValueError(f"index must number the {side}s from 0 on")
            if rows["id"].null_count() or rows["id"].is_duplicated().any():
                raise ValueError(f"ids must be distinct, got a {side} twice")
    return table


def read_histories(folder: str | os.PathLike[str], ids: pl.DataFrame) -> pl.DataFrame:
    """As `histories_table`, of the users and items of `ids`. Raises: as `read_ids`."""
    path = Path(folder) / HISTORIES
    with reading(path):
        table = _read(path, ("user", "item", "split"))
        if table.null_count().sum_horizontal().item():
            raise ValueError("events must have a user, an item and a split")
        for side in ("user", "item"):
            rows, count = table[side], (ids["side"] == side).sum()
            if not (rows.dtype.is_integer() and rows.is_between(0, count, closed="left").all()):
                raise ValueError(f"{side} must be rows of the {count} {side}s, got {rows.min()} to {rows.max()}")
    return table


def side_of(ids: pl.DataFrame, side: str) -> tuple[IdMap, list[str | None]]:
    """Ids and titles of one side ("user" or "item") of ids.parquet."""
    rows = ids.filter(ids["side"] == side).sort("index")
    return IdMap(rows["id"].to_list()), [title or None for title in rows["title"].to_list()]


def _read(path: Path, names: tuple[str, ...]) -> pl.DataFrame:
    import polars as pl

    return pl.read_parquet(path, glob=False).select(names)
