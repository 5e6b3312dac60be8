"""Exact neighbours by blocks of rows are those of one search, in memory that does not grow with the rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hellm import _mapped, graphs
from hellm.data import Dataset, IdMap, ItemFeatures, save_dataset
from hellm.neighbours import knn_by_lines
from hellm.neighbours.lines import _lines, order_of_plane
from hellm.ops import knn


@pytest.mark.parametrize("q", [2, 3, 5, 7])
def test_any_two_panels_share_one_line(q):
    lines = [set(line) for line in _lines(q)]
    assert len(lines) == q * (q + 1) and all(len(line) == q for line in lines)
    for one in range(q * q):
        for other in range(one):
            assert sum({one, other} <= line for line in lines) == 1
    assert sorted(panel for line in list(_lines(q))[:q] for panel in line) == list(range(q * q))


@pytest.mark.parametrize(
    ("num_rows", "most_rows", "q"), [(10, 10, 2), (100, 50, 2), (100, 49, 3), (1000, 201, 5), (1000, 199, 7), (3, 1, 2)]
)
def test_lines_hold_as_many_rows_as_may_be(num_rows, most_rows, q):
    assert order_of_plane(num_rows, most_rows) == q


def rows_with_equals(num_rows, dim):
    """Random rows, some of them zero, some the same, and some of one direction, whose cosines round to more than 1."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((num_rows, dim)).astype(np.float32)
    x[rng.integers(0, num_rows, num_rows // 10)] = 0
    x[rng.permutation(num_rows)[: num_rows // 5]] = x[1]
    alike = rng.permutation(num_rows)[: num_rows // 5]
    x[alike] = x[2] * rng.uniform(0.1, 9, (len(alike), 1)).astype(np.float32)
    return x


@pytest.mark.parametrize(
    ("num_rows", "dim", "k", "most_rows"),
    [(1000, 33, 10, 300), (1000, 33, 10, 90), (37, 5, 37, 4), (500, 16, 7, 499), (50, 4, 3, 2), (7, 3, 2, 1)],
)
def test_bits_are_those_of_one_search(num_rows, dim, k, most_rows):
    x = rows_with_equals(num_rows, dim)
    index, similarity = knn(torch.from_numpy(x), k)
    by_lines = knn_by_lines(x, k, most_rows)
    assert torch.equal(by_lines[0], index) and torch.equal(by_lines[1], similarity)


def test_cosines_above_one_do_not_become_equals():
    """What the case is there for: rows of one direction do not tie, and the search of all ranks them by rounding."""
    x = rows_with_equals(1000, 33)
    similarity = knn(torch.from_numpy(x), 10)[1]
    assert ((similarity == 1).sum(1) > 2).any()


def test_nearest_items_goes_by_lines_beyond_what_may_be_held(monkeypatch, tmp_path):
    values = rows_with_equals(600, 24)
    whole = graphs.nearest_items(ItemFeatures.from_values(values), 5)
    monkeypatch.setattr(_mapped, "HELD_BYTES", values.nbytes // 3)
    searched = []
    by_lines = graphs.knn_by_lines
    monkeypatch.setattr(graphs, "knn_by_lines", lambda *given: searched.append(given[2]) or by_lines(*given))
    with graphs.searching(cache=tmp_path):
        found = graphs.nearest_items(ItemFeatures.from_values(values), 5)
    assert searched == [200]
    assert torch.equal(found.rows, whole.rows) and torch.equal(found.similarities, whole.similarities)


PROGRAM = """
import json, sys
from pathlib import Path
import torch
from hellm import _mapped, graphs
from hellm.data import load_dataset

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

def searched(path):
    data = load_dataset(path)
    data.fingerprint
    features = data.item_features["look"]
    with graphs.searching(cache=sys.argv[4]):
        found = graphs.nearest_items(features, 5)
    graphs.item_hypergraph({"look": torch.from_numpy(features.values)}, 5, neighbours={"look": found})
    return found.rows

_mapped.HELD_BYTES = int(sys.argv[3])
searched(sys.argv[1])
Path("/proc/self/clear_refs").write_text("5")
before = resident("VmRSS")
rows = searched(sys.argv[2])
print(json.dumps({"extra": resident("VmHWM") - before, "first": rows[:, 0].tolist()}))
"""


def save_features(folder, num_items, width):
    """A data set whose items have features of so many columns; returns their bytes."""
    values = np.random.default_rng(0).standard_normal((num_items, width), dtype=np.float32)
    one = np.zeros(1, np.int64)
    data = Dataset(
        "wide", 1, num_items, one, one, None, np.zeros(1, np.int8), IdMap.range(1), IdMap.range(num_items),
        item_features={"look": ItemFeatures.from_values(values)},
    )  # fmt: skip
    save_dataset(data, folder)
    return values.nbytes


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_features_in_a_mapped_file_are_searched_in_little_memory(tmp_path):
    """Beside a search of few rows, which brings in what any needs."""
    save_features(tmp_path / "small", 300, 256)
    size = save_features(tmp_path / "large", 1000, 16384)
    paths = [str(tmp_path / name) for name in ("small", "large")]
    command = [sys.executable, "-c", PROGRAM, *paths, str(size // 5), str(tmp_path / "cache")]
    # Else the allocator keeps blocks of this size, though not of those that are usual.
    alone = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1000000", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=alone)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["first"] == list(range(1000))
    # The rows of a block, and what the search makes of them.
    assert found["extra"] < 0.6 * size, found["extra"] / size
