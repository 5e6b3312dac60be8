"""Runs to be served, trained on the spot on the sample shop."""

from __future__ import annotations

import random
from pathlib import Path

__all__ = ["recommend_bodies", "trained_runs"]

_BODIES = 2000


def trained_runs(
    folder: Path,
    *,
    num_users: int = 1000,
    num_items: int = 1000,
    epochs: int = 2,
    seed: int = 0,
    llm: str | None = None,
) -> dict[str, Path]:
    """Stage 1, a sequence model and their sum; with `llm`, a language model fine-tuned on them.

    A few epochs are enough: what an answer costs does not depend on what was learned. For the same reason both towers
    are in the sum, whatever validation would say.
    """
    import torch

    from hellm.artifact import read_ids
    from hellm.artifact.files import CONTENT
    from hellm.artifact.tables import read_histories
    from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig, load_config
    from hellm.data import load_dataset, write_sample_shop
    from hellm.models.graph.content import ItemContent
    from hellm.recommend import Recommender, ServedFused
    from hellm.training.finetune import finetune
    from hellm.training.pretrain import pretrain
    from hellm.training.sasrec import train_sasrec

    def settings(epochs: int) -> list[str]:
        return [f"max_epochs={epochs}", f"seed={seed}", "tensorboard=false", f"num_threads={torch.get_num_threads()}"]

    shop = folder / "shop"
    if not shop.is_dir():
        write_sample_shop(shop, num_users=num_users, num_items=num_items)
    data = load_dataset(shop)
    runs = {name: folder / f"{name}-{seed}" for name in ("stage1", "sequence", "fused")}
    pretrain(load_config(PretrainConfig, "demo", settings(epochs)), data, runs["stage1"])
    train_sasrec(load_config(SASRecConfig, "demo", settings(epochs)), data, runs["sequence"])
    towers = {name: Recommender.load(runs[name]).model for name in ("stage1", "sequence")}
    content = ItemContent.load(runs["stage1"] / CONTENT)
    fused = ServedFused(towers, {"stage1": 1.0, "sequence": 0.5})
    ids = read_ids(runs["stage1"])
    Recommender(fused, ids, read_histories(runs["stage1"], ids), content).save(runs["fused"])
    if llm is not None:
        runs["language-model"] = folder / f"language-model-{seed}"
        config = load_config(FinetuneConfig, "demo", [*settings(1), f"llm={llm}"])
        finetune(config, data, runs["language-model"], graph=runs["stage1"], sequence=runs["sequence"])
    return runs


def recommend_bodies(run: Path, seed: int = 0) -> list[dict]:
    """What a shop's page asks for: ten items for one user."""
    from hellm.artifact import read_ids
    from hellm.artifact.tables import side_of

    users, _ = side_of(read_ids(run), "user")
    return [{"users": [user], "k": 10} for user in random.Random(seed).choices(users.ids, k=_BODIES)]
