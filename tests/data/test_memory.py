"""Memory of reading and of loading, in bytes for each event of a user of its own; a data set holds 25 of them."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc

import numpy as np
from support.datasets import write

from hellm.data import Dataset, IdMap, load_dataset, save_dataset

COUNT = 200_000


def test_reading_makes_no_python_object_for_an_id(tmp_path):
    numbers = np.random.default_rng(0).permutation(COUNT)
    rows = "".join(f"user-{number:07},item-{number % 999},{number}\n" for number in numbers.tolist())
    write(tmp_path, events_csv="user,item,timestamp\n" + rows)
    tracemalloc.start()
    try:
        dataset = load_dataset(tmp_path, features="none")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert dataset.num_users == COUNT and dataset.user_ids.index("user-0000007") == 7
    assert peak / COUNT < 120


def test_a_built_data_set_is_not_copied(tmp_path):
    row = np.arange(COUNT)
    dataset = Dataset(
        "large", COUNT, 999, row, row % 999, row, np.zeros(COUNT, np.int8),
        IdMap(f"user-{number:07}" for number in row.tolist()), IdMap.range(999),
    )  # fmt: skip
    save_dataset(dataset, tmp_path / "built")
    code = (
        "import sys, tracemalloc; import polars; from hellm.data import load_dataset\n"
        "tracemalloc.start(); data = load_dataset(sys.argv[1])\n"
        "data.user_ids.index('user-0000007'); print(tracemalloc.get_traced_memory()[1])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "built")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Some texts at a time, and comparisons of a byte an event.
    assert int(done.stdout) / COUNT < 90
