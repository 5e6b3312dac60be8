"""Seeded inputs of the benchmark cases: interactions, features, embedding rows, the TikTok data set."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm.data import Dataset, IdMap, ItemFeatures, load_dataset

# Zipf-Mandelbrot weights (rank + shift)^-exponent: at the Sports size they give its largest item (748 users) and its
# number of non-zeros of R R^T (8.7 million).
_ITEM_EXPONENT, _ITEM_SHIFT = 0.57, 3.0
_USER_SPREAD = 0.5


class Size(NamedTuple):
    """Users, items and training interactions of a data set."""

    num_users: int
    num_items: int
    num_interactions: int


SIZES = {
    "sports": Size(35_598, 18_357, 218_409),
    "tiktok": Size(9_308, 6_710, 59_541),
    "tiny": Size(60, 40, 300),
}


def interactions(size: Size, seed: int = 0) -> np.ndarray:
    """Distinct (user, item) pairs with power-law items and log-normal users: [2, num_interactions] int64.

    Raises:
        ValueError: more interactions than half of all pairs.
    """
    num_users, num_items, count = size
    if 2 * count > num_users * num_items:
        raise ValueError(f"num_interactions must be <= {num_users * num_items // 2}, got {count}")
    rng = np.random.default_rng(seed)
    user_weight = rng.lognormal(sigma=_USER_SPREAD, size=num_users)
    item_weight = rng.permutation((np.arange(num_items) + _ITEM_SHIFT) ** -_ITEM_EXPONENT)
    keys = np.empty(0, dtype=np.int64)
    while len(keys) < count:
        draws = (count - len(keys)) * (1 if len(keys) == 0 else 2)
        # Every user gets one of the first draws.
        each = 1 if len(keys) == 0 and draws >= num_users else 0
        drawn = rng.multinomial(draws - each * num_users, user_weight / user_weight.sum())
        user = np.repeat(np.arange(num_users), drawn + each)
        item = np.repeat(np.arange(num_items), rng.multinomial(draws, item_weight / item_weight.sum()))
        rng.shuffle(item)
        keys = np.unique(np.concatenate([keys, user * num_items + item]))
    surplus = rng.choice(len(keys), len(keys) - count, replace=False)
    keys = np.delete(keys, surplus)
    return np.stack([keys // num_items, keys % num_items])


def rows(num_rows: int, dim: int, seed: int = 0) -> Tensor:
    """[num_rows, dim] float32, standard normal."""
    return torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed))


def item_features(num_items: int) -> dict[str, Tensor]:
    """Two modalities [num_items, 16] for a graph of neighbours."""
    return {modality: rows(num_items, 16, seed) for seed, modality in enumerate(("image", "audio"))}


VIEWS = ("related", "random", "aligned", "collapsed", "duplicates", "zeros")


def views(num_rows: int, dim: int, seed: int = 0, kind: str = "related") -> tuple[Tensor, Tensor]:
    """Two views of the same rows, both [num_rows, dim].

    "related" as a contrastive loss meets them in training, "random" unrelated, "aligned" nearly the same, "collapsed"
    cosines of 0.99 throughout, "duplicates" of every eighth row, "zeros" in every tenth row.
    """
    anchor, noise = rows(num_rows, dim, seed), rows(num_rows, dim, seed + 1)
    if kind == "collapsed":
        anchor = anchor[:1] + 0.1 * anchor
    elif kind == "duplicates":
        anchor, noise = anchor[torch.arange(num_rows) // 8 * 8], noise[torch.arange(num_rows) // 8 * 8]
    scale = {"aligned": 0.01, "collapsed": 0.1}.get(kind, 1.0)
    positive = noise if kind == "random" else anchor + scale * noise
    if kind == "zeros":
        anchor[::10], positive[::10] = 0.0, 0.0
    return anchor.requires_grad_(), positive.requires_grad_()


def indices(count: int, high: int, seed: int = 0) -> Tensor:
    """[count] int64, uniform in [0, high)."""
    return torch.randint(high, (count,), generator=torch.Generator().manual_seed(seed))


def tiktok(tiny: bool = False) -> Dataset:
    """The TikTok data beside the repository, or synthetic data of the same size where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "tiktok"
    if folder.is_dir() and not tiny:
        return load_dataset(folder)
    return synthetic_dataset(SIZES["tiny" if tiny else "tiktok"], dim=8 if tiny else 128)


def synthetic_dataset(size: Size, dim: int, seed: int = 0) -> Dataset:
    """Training interactions of a size, with two modalities of non-negative features."""
    users, items = interactions(size, seed)
    features = {
        name: ItemFeatures.from_values(rows(size.num_items, dim, seed + 1 + place).abs().numpy())
        for place, name in enumerate(("image", "audio"))
    }
    return Dataset(
        name="synthetic",
        num_users=size.num_users,
        num_items=size.num_items,
        users=users,
        items=items,
        timestamps=None,
        split=np.zeros(len(users), dtype=np.int8),
        user_ids=IdMap.range(size.num_users),
        item_ids=IdMap.range(size.num_items),
        item_features=features,
    )
