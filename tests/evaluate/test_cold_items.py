"""Items without training events: the item-cold split through training, fusion and comparison."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hellm.config import CONTENT_TOWER, FuseConfig, PretrainConfig, SASRecConfig
from hellm.data import load_dataset, write_sample_shop
from hellm.recommend.compare import compare
from hellm.recommend.fuse import fuse
from hellm.training.pretrain import pretrain
from hellm.training.sasrec import train_sasrec

pytestmark = pytest.mark.usefixtures("same_threads")
FAST = {"num_threads": 1, "tensorboard": False, "device": "cpu"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_sample_shop(tmp_path_factory.mktemp("cold") / "shop", num_users=200, num_items=160)


@pytest.fixture(scope="module")
def dataset(shop):
    return load_dataset(shop, split="item-cold")


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    stage_1 = PretrainConfig(max_epochs=20, learning_rate=5e-3, batch_size=64, **FAST)
    pretrain(stage_1, dataset, top / "stage1")
    small = {"batch_size": 256, "embedding_dim": 32, "feedforward_dim": 32, "max_epochs": 30, "patience": 4}
    # A few directions: all of those of 160 items would tell each from each, and none by what it is like.
    content = replace(CONTENT_TOWER, content_components=16, content_hidden_dim=32, **small, **FAST)
    train_sasrec(content, dataset, top / "content")
    ids = SASRecConfig(content=(), **small, **FAST)
    train_sasrec(ids, dataset, top / "ids")
    towers = {name: top / name for name in ("stage1", "content", "ids")}
    fuse(towers, dataset, top / "fused", FuseConfig(num_threads=1))
    return towers | {"fused": top / "fused"}


def test_recall_of_cold_items_is_shown_for_every_model(shop, runs, dataset):
    names = {name: str(run) for name, run in runs.items()}
    compared = compare(
        {**names, "popularity": "popularity", "random": "random"}, shop, slices=True, ks=(20,), device="cpu"
    )
    cold = {one["name"]: one["slices"]["item popularity"]["cold"] for one in compared["models"]}
    assert set(cold) == {*runs, "popularity", "random"}
    # All events that are asked for are of such items.
    assert all(one["num_users"] == compared["num_users"] for one in cold.values())
    recall = {name: one["metrics"]["recall@20"] for name, one in cold.items()}
    interval = {name: one["confidence_intervals"]["recall@20"] for name, one in cold.items()}
    assert recall["popularity"] == 0.0
    # 20 of 160 items, less what each user has had.
    assert recall["random"] == pytest.approx(20 / 150, abs=0.05)
    assert interval["content"][0] > interval["random"][1]
    assert recall["fused"] >= recall["content"] - 0.02
    counts = np.bincount(dataset.pairs("train")[1], minlength=dataset.num_items)
    words = compared["slices"]["item popularity"]["cold"]
    assert words == f"{(counts == 0).sum()} items with no train event"
