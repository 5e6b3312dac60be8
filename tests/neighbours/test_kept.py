"""Neighbours on disk: found by the values of features and how they are searched, and never in the way."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from hellm import graphs
from hellm.data import ItemFeatures
from hellm.graphs import nearest_items, searching
from hellm.neighbours import kept


def values(seed=0, num_rows=1200, dim=16):
    return np.random.default_rng(seed).standard_normal((num_rows, dim)).astype(np.float32)


class Searches:
    """A cache, and how often it did not help."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.count, knn = folder, 0, graphs.knn

        def counted(x, k):
            self.count += 1
            return knn(x, k)

        monkeypatch.setattr(graphs, "knn", counted)

    def __call__(self, x, k=12, **options):
        """Neighbours as a process finds them that has searched nothing yet."""
        with searching(cache=self.folder):
            return nearest_items(ItemFeatures.from_values(x), k, **options)

    @property
    def files(self):
        return sorted((self.folder / "neighbours").glob("*"))


@pytest.fixture
def searches(tmp_path, monkeypatch):
    return Searches(tmp_path / "cache", monkeypatch)


def test_a_second_run_searches_nothing(searches):
    first, second = searches(values()), searches(values())
    assert searches.count == 1 and len(searches.files) == 1
    assert first.rows.dtype == second.rows.dtype == torch.int64
    assert torch.equal(first.rows, second.rows) and torch.equal(first.similarities, second.similarities)


def test_whatever_else_counts_is_searched_again(searches):
    x = values()
    searches(x)
    searches(x, 13)
    changed = x.copy()
    changed[-1, -1] += 1e-3
    assert not torch.equal(searches(changed).similarities, searches(x).similarities)
    searches(x.reshape(2400, 8))
    assert searches.count == 4
    pytest.importorskip("usearch")
    searches(x, search="approximate")
    assert searches.count == 4 and len(searches.files) == 5


def test_the_recall_of_an_approximate_search_is_kept(searches, monkeypatch):
    pytest.importorskip("usearch")
    recalls = []
    for _ in range(2):
        with searching("approximate", searches.folder):
            recalls.append(graphs.search_recall(ItemFeatures.from_values(values()), 12))
        monkeypatch.setattr(graphs, "approximate_knn", None)
    assert recalls[0] == recalls[1] > 0.5


def test_the_mask_counts(tmp_path):
    x, mask = values(), np.ones(1200, bool)
    other = mask.copy()
    other[3] = False
    assert kept.key_of(x, mask, k=2) == kept.key_of(x.copy(), mask, k=2) != kept.key_of(x, other, k=2)
    assert kept.key_of(x, mask, k=2) != kept.key_of(x, mask, k=3)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 1
    path.write_bytes(content)


def replace(path):
    path.write_bytes(b"not a file of neighbours")


def empty(path):
    path.write_bytes(b"")


def of_others(path):
    """A whole file of other features under the name."""
    other = kept.read_found(path.parent.parent, path.stem, (1200, 12))
    kept.write_found(path.parent.parent, "0" * 64, *other)
    os.replace(path.with_name(f"{'0' * 64}.safetensors"), path)


@pytest.mark.parametrize("damage", [cut, flip, replace, empty, of_others])
def test_a_file_that_is_not_what_it_must_be_is_made_again(searches, damage):
    first = searches(values())
    (file,) = searches.files
    damage(file)
    again = searches(values())
    assert searches.count == 2 and torch.equal(first.rows, again.rows)
    assert torch.equal(searches(values()).rows, first.rows) and searches.count == 2


def test_a_folder_that_cannot_be_written_is_no_error(searches, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder would be")
    assert torch.equal(searches(values()).rows, searches(values()).rows) and searches.count == 2


def test_a_full_disk_is_no_error_and_leaves_nothing(searches, monkeypatch):
    def full(*given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert (searches(values()).rows[:, 0] == torch.arange(1200)).all()
    assert not searches.files


def test_what_was_not_used_for_longest_goes_first(searches, monkeypatch):
    for seed in range(3):
        searches(values(seed))
    size = searches.files[0].stat().st_size
    for age, file in enumerate(searches.files):
        os.utime(file, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(kept, "MOST_BYTES", 3 * size)
    oldest, middle = searches.files[2], searches.files[1]
    killed = searches.folder / "neighbours" / ".left.1.tmp"
    killed.write_bytes(b"what a killed process left")
    os.utime(killed, (1e9, 1e9))
    searches(values(3))
    assert not oldest.exists() and middle.exists() and len(searches.files) == 3 and not killed.exists()
    monkeypatch.setattr(kept, "MOST_BYTES", size // 2)
    searches(values(4))
    assert len(searches.files) == 3


def test_what_is_searched_at_once_is_not_kept(searches):
    searches(values(num_rows=100))
    assert not (searches.folder / "neighbours").exists()


PROGRAM = """
import sys
import numpy as np
from hellm.data import ItemFeatures
from hellm.graphs import nearest_items, searching
x = np.random.default_rng(0).standard_normal((1200, 16)).astype(np.float32)
with searching(cache=sys.argv[1]):
    for _ in range(20):
        print(nearest_items(ItemFeatures.from_values(x), 12).rows.sum().item())
"""


def test_processes_share_it(tmp_path, searches):
    command = [sys.executable, "-c", PROGRAM, str(searches.folder)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0] * 3, said
    expected = str(searches(values()).rows.sum().item())
    assert {line for out, _ in said for line in out.split()} == {expected}
    assert searches.count == 0 and len(searches.files) == 1
