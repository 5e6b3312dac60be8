from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from saved_llm import save_tiny_llm

from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig
from hellm.data import Dataset, IdMap, ItemFeatures

LOOP = {"ks": (1, 5), "monitor": ("recall@5",), "num_threads": 1, "device": "cpu", "tensorboard": False}


def make_dataset(num_users=60, num_items=24, num_blocks=3, seed=0):
    """Users like the items of their block; the last event of each is the test, the one before the validation event."""
    rng = np.random.default_rng(seed)
    blocks = [np.flatnonzero(np.arange(num_items) % num_blocks == block) for block in range(num_blocks)]
    histories = [rng.choice(blocks[user % num_blocks], 6, replace=False) for user in range(num_users)]
    split = np.tile(np.array([0, 0, 0, 0, 1, 2], dtype=np.int8), num_users)
    content = np.eye(num_blocks)[np.arange(num_items) % num_blocks]
    features = {
        name: (content + 0.3 * rng.standard_normal(content.shape)).astype(np.float32) for name in ("image", "text")
    }
    features["image"][3] = 0
    return Dataset(
        name="blocks",
        num_users=num_users,
        num_items=num_items,
        users=np.repeat(np.arange(num_users), 6),
        items=np.concatenate(histories),
        timestamps=None,
        split=split,
        user_ids=IdMap(f"u{index}" for index in range(num_users)),
        item_ids=IdMap(f"i{index}" for index in range(num_items)),
        item_features={name: ItemFeatures.from_values(values) for name, values in features.items()},
        item_titles=["" if index == 1 else f"item {index}" for index in range(num_items)],
    )


@pytest.fixture(scope="session")
def small_dataset():
    return make_dataset()


@pytest.fixture(scope="session")
def dataset_with_brands(small_dataset):
    """Items 0 to 21 have the brand of their block, and no features; the last two have none."""
    brands = [f"brand {index % 3}" if index < 22 else "" for index in range(24)]
    return replace(small_dataset, item_features={}, item_fields={"brand": brands, "description": ["a", "b"] * 12})


@pytest.fixture(scope="session")
def llm(tmp_path_factory):
    """Folder of a tiny random Llama."""
    return save_tiny_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="session")
def runs(small_dataset, tmp_path_factory):
    """Finished stage-1 and SASRec runs of the small data set, as the arguments of `finetune`."""
    from hellm.training.pretrain import pretrain
    from hellm.training.sasrec import train_sasrec

    folder = tmp_path_factory.mktemp("runs")
    stage_1 = PretrainConfig(learning_rate=0.02, batch_size=32, max_epochs=4, contrastive_rows=None, **LOOP)
    pretrain(stage_1, small_dataset, folder / "graph")
    sequence = SASRecConfig(
        embedding_dim=8, num_layers=1, feedforward_dim=16, batch_size=64, learning_rate=0.02, max_epochs=6, **LOOP
    )
    train_sasrec(sequence, small_dataset, folder / "sequence")
    return {"graph": folder / "graph", "sequence": folder / "sequence"}


@pytest.fixture
def config(llm):
    """Settings of a fine-tuning of a second."""
    inputs = ("graph", "sequence")
    return FinetuneConfig(llm=str(llm), item_inputs=inputs, learning_rate=0.01, batch_tokens=48, max_epochs=3, **LOOP)
