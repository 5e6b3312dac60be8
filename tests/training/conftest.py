from __future__ import annotations

from dataclasses import replace

import pytest
from saved_llm import save_tiny_llm
from support.datasets import make_blocks as make_dataset

from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig

LOOP = {"ks": (1, 5), "monitor": ("recall@5",), "num_threads": 1, "device": "cpu", "tensorboard": False}


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
