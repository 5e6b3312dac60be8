"""Recommenders of random weights over the planted blocks, with titles and content: they take new items."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from saved_llm import save_tiny_llm

from hellm.data import ItemFeatures
from hellm.models import SASRec
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender, ServedGraph, ServedLLM, ServedSASRec
from support.recommender_contract import planted_blocks

DATA = planted_blocks()


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def served_graph(folder):
    draw = torch.Generator().manual_seed(0)
    sizes = {"user": DATA.num_users, "item": DATA.num_items, "fold_in_source": DATA.num_items}
    return ServedGraph({name: torch.randn(size, 8, generator=draw) for name, size in sizes.items()}, 0.5)


def served_sasrec(folder):
    torch.manual_seed(0)
    return ServedSASRec(SASRec(DATA.num_items, embedding_dim=8, num_layers=1, num_heads=1, feedforward_dim=8).eval())


def served_llm(folder):
    pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
    pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')
    from hellm.models import RecommenderLLM, load_language_model

    tables = {"text": torch.from_numpy(features(DATA.num_items, 0)), "graph": torch.randn(DATA.num_items, 4)}
    titles = [f"item {row}" if row % 2 else None for row in range(DATA.num_items)]
    base = load_language_model(save_tiny_llm(folder))
    model = RecommenderLLM(*base, tables, item_titles=titles, titles=True, max_length=8, learned_prefix=True)
    return ServedLLM(model, tables)


MODELS = {"stage 1": served_graph, "SASRec": served_sasrec, "language model": served_llm}


def make_recommender(name: str, folder: Path) -> Recommender:
    """A recommender of the planted blocks with titles and content; the language model is written into `folder`."""
    sides = {"user": DATA.num_users, "item": DATA.num_items}
    ids = pl.DataFrame(
        [
            (side, row, f"{side[0]}{row}", f"item {row}" if side == "item" and row % 2 else None)
            for side, count in sides.items()
            for row in range(count)
        ],
        schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
        orient="row",
    )
    users, items = DATA.train
    events = pl.DataFrame({"user": users, "item": items, "split": np.zeros(len(users), np.int8)})
    content = ItemContent.of({"text": ItemFeatures.from_values(features(DATA.num_items, 0))}, k=4)
    return Recommender(MODELS[name](folder), ids, events, content)
