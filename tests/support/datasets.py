"""Small data sets that the tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl

from hellm.data import Dataset, IdMap, ItemFeatures, save_dataset
from hellm.data.splits import leave_two_out

# user -> items in time order; user "c" is short, item "q" (index 5) is never sold
HISTORIES = {"a": [0, 1, 2, 3], "b": [1, 3, 4], "c": [2, 0], "d": [4, 0, 1, 2, 3]}
ITEMS = ["k", "l", "m", "n", "o", "q"]


def make_dataset(
    *, numbered: bool = False, timestamps: bool = True, given: bool = False, features: bool = True
) -> Dataset:
    users = np.repeat(np.arange(4), [len(items) for items in HISTORIES.values()])
    items = np.concatenate([np.array(one) for one in HISTORIES.values()])
    split = np.array([0, 0, 1, 2, 0, 2, 0, 0, 0, 1, 0, 0, 0, 2], np.int8) if given else leave_two_out(users)
    values = np.arange(12, dtype=np.float32).reshape(6, 2) + 1
    values[4] = 0
    return Dataset(
        name="toy",
        num_users=4,
        num_items=6,
        users=users,
        items=items,
        timestamps=np.arange(100, 100 + len(users)) if timestamps else None,
        split=split,
        user_ids=IdMap.range(4) if numbered else IdMap(HISTORIES),
        item_ids=IdMap.range(6) if numbered else IdMap(ITEMS),
        item_features={"image": ItemFeatures.from_values(values)} if features else {},
        item_titles=["Kite", "Lamp", "", "Net", "Owl, small", "Quilt"],
        split_name="given" if given else "leave-two-out",
        item_fields={"brand": ["x", "", "y", "", "", "z"]},
    )


def triples(dataset: Dataset) -> list[tuple[str, str, int]]:
    """(user id, item id, split) of every event, sorted by user and then in the order of the data set."""
    events = zip(dataset.users.tolist(), dataset.items.tolist(), dataset.split.tolist(), strict=True)
    named = [(dataset.user_ids.ids[user], dataset.item_ids.ids[item], split) for user, item, split in events]
    return sorted(named, key=lambda event: event[0])


def write(folder, **files) -> None:
    """Write files into a folder; `events_csv="..."` is events.csv, and bytes stay as they are."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / ".".join(name.rsplit("_", 1))
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def save_version_1(dataset: Dataset, folder: Path) -> Path:
    """The form "hellm" as its version 1 had it."""
    save_dataset(dataset, folder)
    columns = {"user": dataset.users.astype(np.uint32), "item": dataset.items.astype(np.uint32)}
    if dataset.timestamps is not None:
        columns["timestamp"] = dataset.timestamps
    pl.DataFrame({**columns, "split": dataset.split}).write_parquet(folder / "events.parquet")
    pl.DataFrame({"id": list(dataset.user_ids.ids)}).write_parquet(folder / "users.parquet")
    for name in ("events", "users"):
        shutil.rmtree(folder / name)
    about = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    (folder / "dataset.json").write_text(json.dumps(about | {"version": 1}), encoding="utf-8")
    return folder


def make_blocks(num_users=60, num_items=24, num_blocks=3, seed=0) -> Dataset:
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
