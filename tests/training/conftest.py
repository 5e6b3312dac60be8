from __future__ import annotations

import numpy as np
import pytest

from hellm.data import Dataset, IdMap, ItemFeatures


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
