"""Queries of users and keys of items as parquet, for vector stores.

U = users, I = items, D = embedding width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm.export.encoders import ExportError, without_queries
from hellm.recommend import Recommender, ServedFused

__all__ = ["UserVectors", "check_has_queries", "export_parquet", "user_vectors"]

_ITEMS, _USERS = "items.parquet", "users.parquet"
# Users at once, and rows in a row group.
_BLOCK = 16 * 1024


class UserVectors(NamedTuple):
    """What users are known by.

    Attributes:
        rows: [n] int64 users, ascending; those without anything to go by are left out.
        vectors: [n, D] float32.
        basis: "user" or "history", see `hellm.recommend.Recommendations`.
    """

    rows: np.ndarray
    vectors: Tensor
    basis: str


def check_has_queries(recommender: Recommender, what: str) -> list[str]:
    """The towers that vectors do not stand for. Raises: ExportError, a model that has no vectors at all."""
    model = recommender.model
    scored = without_queries(model)
    towers = len(model.towers) if isinstance(model, ServedFused) else 1
    if len(scored) == towers:
        raise ExportError(
            f"{what} needs vectors of users and items, and this model has none: transitions rank by what followed "
            "what; hellm batch writes their lists, and hellm export --to onnx their scores"
        )
    return scored


def user_vectors(recommender: Recommender, users: np.ndarray) -> UserVectors:
    """Queries of users, as `Recommender.recommend` goes by: trained embeddings, or made from all of a user's events."""
    table = recommender.model.user
    if table is not None:
        users = users[recommender.is_trained[users]]
        return UserVectors(users, table[torch.from_numpy(users)], "user")
    users = users[recommender.histories.lengths[users] > 0]
    blocks = [recommender.histories.take(users[start : start + _BLOCK]) for start in range(0, len(users), _BLOCK)]
    made = [recommender.model.embed(*(torch.from_numpy(one) for one in block)) for block in blocks]
    return UserVectors(users, torch.cat(made) if made else recommender.item[:0], "history")


def export_parquet(recommender: Recommender, folder: Path) -> dict[str, Any]:
    """Write the vectors; the score of an item for a user is their dot product.

        items.parquet  item (id), title, vector [D] float32
        users.parquet  user (id), basis, vector [D] float32; users without anything to go by are left out

    Returns: "files", "items", "users", "users_left_out", "width" (D), "basis" and "notes".
    Raises: ExportError, a model without vectors.
    """
    import polars as pl

    scored = check_has_queries(recommender, "--to parquet")
    keys, users = recommender.item, user_vectors(recommender, np.arange(recommender.num_users))
    width = keys.shape[1]
    ids, titles = recommender.item_ids.ids, recommender.item_titles
    names = {"item": ids, "title": titles}
    schema = {"item": pl.String, "title": pl.String}
    _write(folder / _ITEMS, pl.DataFrame(names, schema=schema), keys)
    names = {"user": [recommender.user_ids.ids[row] for row in users.rows.tolist()]}
    table = pl.DataFrame(names, schema={"user": pl.String}).with_columns(basis=pl.lit(users.basis))
    _write(folder / _USERS, table, users.vectors)
    notes = [f"the vectors are without {', '.join(scored)}, which has scores and no vectors"] if scored else []
    return {
        "files": [_ITEMS, _USERS],
        "items": len(ids),
        "users": len(users.rows),
        "users_left_out": recommender.num_users - len(users.rows),
        "width": width,
        "basis": users.basis,
        "notes": notes,
    }


def _write(file: Path, names: Any, vectors: Tensor) -> None:
    import polars as pl

    vector = pl.Series("vector", vectors.float().contiguous().numpy(), dtype=pl.Array(pl.Float32, vectors.shape[1]))
    names.with_columns(vector).write_parquet(file, row_group_size=_BLOCK)
