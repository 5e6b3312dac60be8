"""A recommender over hand-made embeddings, where every list can be worked out on paper."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
import torch

from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender, ServedGraph

ITEMS = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.5, 0.5]])
USERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]])
# (user, item, split): c has no training event.
EVENTS = [(0, 0, 0), (0, 1, 0), (0, 4, 2), (1, 2, 0), (1, 1, 0), (1, 3, 1), (2, 4, 2)]

# p0 and p1 read alike, p2 and p3 too, p4 has no text; p0, p2 and p4 look alike, the others have no picture.
TEXTS = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 2], [0, 0.6, 0.8], [0, 0, 0]], dtype=np.float32)
IMAGES = np.array([[1, 0], [0, 0], [0.6, 0.8], [0, 0], [0, 3]], dtype=np.float32)


def make_recommender(view: torch.Tensor | None = None, content: ItemContent | None = None) -> Recommender:
    tensors = {"user": USERS, "item": ITEMS, "fold_in_source": ITEMS.clone()}
    if view is not None:
        tensors |= {"fold_in_view": view, "item_hypergraph": view.clone()}
    ids = pl.DataFrame(
        {
            "side": ["user"] * 3 + ["item"] * 5,
            "index": [0, 1, 2, 0, 1, 2, 3, 4],
            "id": ["anna", "bert", "cleo", "p0", "p1", "p2", "p3", "p4"],
            "title": [None, None, None, "Mug", "Cup", "Lamp", "", None],
        }
    )
    histories = pl.DataFrame(EVENTS, schema=["user", "item", "split"], orient="row")
    return Recommender(ServedGraph(tensors, 1.0), ids, histories, content)


def named(recommendations) -> list[tuple[str, float]]:
    return [(one.item, pytest.approx(one.score, abs=1e-6)) for one in recommendations]
