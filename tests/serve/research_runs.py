"""Two trained runs of the shop of `served.save_shop`, one with an item hypergraph and one without, in a few seconds."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from hellm.config import ModelConfig, PretrainConfig
from hellm.data import load_dataset
from hellm.training.pretrain import pretrain

LOOP = {"ks": (5, 10), "monitor": ("ndcg@10",), "num_threads": 1, "device": "cpu", "tensorboard": False}


class Runs(NamedTuple):
    """Run directories."""

    graph: Path
    plain: Path


def train_runs(folder: Path, shop: Path) -> Runs:
    data = load_dataset(shop, features="simple", columns={"attribute": "colour"})
    runs = Runs(folder / "graph", folder / "plain")
    for run in runs:
        has_graph = run == runs.graph
        model = ModelConfig(embedding_dim=8, knn_k=4, item_hypergraph=has_graph, user_hypergraph=has_graph)
        config = PretrainConfig(model=model, learning_rate=0.02, batch_size=36, max_epochs=4, validate_every=2, **LOOP)
        pretrain(config, data, run)
    return runs
