"""A sample shop in which some items come after training: the data without them, and who bought them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hellm.data import Dataset, IdMap, ItemFeatures, load_dataset, write_sample_shop


class ColdItems(NamedTuple):
    """The data before the new items came, the new items, and what is to be found.

    Attributes:
        before: Train events on old items only; new items are not in it at all.
        ids, titles: Of the n new items.
        features: Modality -> rows of the new items.
        users, items: Held-out events, by user row and new item number 0..n-1.
    """

    before: Dataset
    ids: list[str]
    titles: list[str]
    features: dict[str, ItemFeatures]
    users: np.ndarray
    items: np.ndarray


def cold_items(folder: Path, **shop: int) -> ColdItems:
    """The item-cold split of a sample shop; validation and test items are both new."""
    whole = load_dataset(write_sample_shop(folder / "shop", **shop), split="item-cold")
    new = np.unique(whole.items[whole.split > 0])
    old = np.setdiff1d(np.arange(whole.num_items), new)
    number = np.full(whole.num_items, -1)
    number[old], train = np.arange(len(old)), whole.split == 0
    before = dataclasses.replace(
        whole,
        num_items=len(old),
        users=whole.users[train],
        items=number[whole.items[train]],
        timestamps=None,
        split=whole.split[train],
        item_ids=IdMap(whole.item_ids.ids[row] for row in old),
        item_titles=[whole.item_titles[row] for row in old],
        item_fields={},
        item_features={name: _rows(one, old) for name, one in whole.item_features.items()},
    )
    return ColdItems(
        before,
        [whole.item_ids.ids[row] for row in new],
        [whole.item_titles[row] for row in new],
        {name: _rows(one, new) for name, one in whole.item_features.items()},
        whole.users[~train],
        np.searchsorted(new, whole.items[~train]),
    )


def _rows(features: ItemFeatures, rows: np.ndarray) -> ItemFeatures:
    return ItemFeatures(features.values[rows], features.mask[rows])
