"""Saved recommenders of random weights over the planted blocks: a run of every model without any training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch

from hellm.data import Histories
from hellm.models import SASRec
from hellm.models.sequence import TransitionModel
from hellm.models.sequence.transitions import ItemPairs
from hellm.recommend import Recommender, ServedFused, ServedGraph, ServedModel, ServedSASRec, ServedTransitions
from support.recommender_contract import planted_blocks

__all__ = ["DATA", "MODELS", "make_recommender", "make_run"]

DATA = planted_blocks()
MODELS = ("graph", "sequence", "transitions", "fused", "sum")
WEIGHTS = {"fused": {"graph": 1.0, "sequence": 0.5}, "sum": {"graph": 1.0, "transitions": 2.0, "sequence": 0.5}}


def make_model(name: str) -> ServedModel:
    if name in WEIGHTS:
        return ServedFused({tower: make_model(tower) for tower in WEIGHTS[name]}, WEIGHTS[name])
    draw, items = torch.Generator().manual_seed(0), DATA.num_items
    if name == "graph":
        sizes = {"user": DATA.num_users, "item": items, "fold_in_source": items, "fold_in_view": items}
        return ServedGraph({table: torch.randn(rows, 8, generator=draw) for table, rows in sizes.items()}, 0.5)
    if name == "transitions":
        pairs = ItemPairs(torch.arange(items), torch.arange(items).roll(1), torch.rand(items, generator=draw))
        histories = Histories.of_events(*DATA.train, DATA.num_users)
        return ServedTransitions(TransitionModel.fit(histories, items, similar=pairs, content_weight=0.5))
    torch.manual_seed(0)
    # Shorter than the longest histories.
    shape = {"embedding_dim": 8, "num_layers": 2, "num_heads": 2, "feedforward_dim": 8, "max_length": 4}
    return ServedSASRec(SASRec(items, **shape, norm_first=name == "pre-norm").eval())


def make_recommender(name: str) -> Recommender:
    """The last user has no events."""
    users, items = DATA.num_users, DATA.num_items
    ids = pl.DataFrame(
        {
            "side": ["user"] * users + ["item"] * items,
            "index": [*range(users), *range(items)],
            "id": [f"u{row}" for row in range(users)] + [f"p{row}" for row in range(items)],
            "title": [None] * users + [f"item {row}" for row in range(items)],
        }
    )
    kept = DATA.train[0] < users - 1
    events = pl.DataFrame({"user": DATA.train[0][kept], "item": DATA.train[1][kept], "split": np.int8(0)})
    return Recommender(make_model(name), ids, events)


def make_run(folder: Path, name: str) -> Path:
    return make_recommender(name).save(folder / name)
