"""Approximate neighbours by a graph that is walked (usearch), and how many of the exact ones it finds."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm import _mapped
from hellm._mapped import read_blocks
from hellm.ops._rows import unit_rows

__all__ = ["approximate_knn", "check_approximate"]

TARGET = 0.99
"""Share of the exact neighbours that the search widens for."""
# Of a walk: links of a row, candidates that it holds while the graph is made, and then.
_CONNECTIVITY, _EXPANSION_ADD, _EXPANSIONS = 16, 128, (32, 64, 128, 256, 512, 1024)
_SAMPLED, _ROWS = 500, 1 << 14
# Rounding of a cosine in float32.
_SLACK = 1e-6


def approximate_knn(values: np.ndarray, k: int, *, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """Most of the k most similar rows of every row, the row itself among them, and the share that is found.

    The graph holds the rows in memory, as halves; what it finds is ranked by cosines in float32. The search widens
    until `TARGET` of the neighbours of 500 rows are found, or as far as it goes. With one thread of torch the result is
    always the same; several make the graph in an order of their own.

    Args:
        values: [N, D] float32, finite; may lie in a mapped file.
        k: 1 <= k <= N.
        seed: of the choice of those rows.
    Returns: indices [N, k] int64, -1 where none is found, similarities [N, k] float32, descending, 0 there, and the
        recall: of the exact neighbours of some rows, the share that is found, any of equal similarity counting.
    Raises: ImportError, without the extra "export".
    """
    usearch = check_approximate()
    num_rows, dim = values.shape
    threads = torch.get_num_threads()
    index = usearch.Index(ndim=dim, metric="cos", dtype="f16", connectivity=_CONNECTIVITY, expansion_add=_EXPANSION_ADD)
    present = np.zeros(num_rows, bool)
    for start, block in read_blocks(values):
        there = present[start : start + len(block)] = block.any(axis=1)
        rows = np.flatnonzero(there)
        # Unit rows: halves neither overflow nor vanish.
        index.add((start + rows).astype(np.uint64), _unit(block[rows]).numpy(), threads=threads)
    known = np.flatnonzero(present)
    indices = torch.full((num_rows, k), -1, dtype=torch.int64)
    similarities = torch.zeros(num_rows, k)
    if not len(known):
        return indices, similarities, 1.0
    # Twice as many: halves may rank those at the end otherwise.
    search = _Search(index, values, k, candidates=min(2 * k, len(known)), threads=threads)
    sample = np.sort(np.random.default_rng(seed).permutation(known)[:_SAMPLED])
    most = min(k, len(known))
    least = _least_similarities(values, sample, most) - _SLACK
    recall = 0.0
    for expansion in _EXPANSIONS:
        index.expansion_search = expansion
        found, value = search(sample)
        recall = float(((value >= least) & (found >= 0))[:, :most].float().mean())
        if recall >= TARGET:
            break
    # Each reads as many rows as it has candidates.
    rows_at_once = max(1, _mapped.HELD_BYTES // (16 * search.candidates * 4 * max(dim, 1)))
    for start in range(0, len(known), rows_at_once):
        rows = known[start : start + rows_at_once]
        indices[rows], similarities[rows] = search(rows)
    return indices, similarities, recall


class _Search:
    """Of rows of `values` in an index of them, ranked by cosines in float32."""

    def __init__(self, index: Any, values: np.ndarray, k: int, *, candidates: int, threads: int) -> None:
        self.index, self.values, self.k = index, values, k
        self.candidates, self.threads = candidates, threads

    def __call__(self, rows: np.ndarray) -> tuple[Tensor, Tensor]:
        queries = _unit(self.values[rows])
        keys = self.index.search(queries.numpy(), self.candidates, threads=self.threads).keys
        found = np.asarray(keys).reshape(len(rows), -1).astype(np.int64)
        # The walk may miss the row that it begins with.
        found = np.concatenate([rows[:, None], np.where(found == rows[:, None], -1, found)], 1)
        found.sort(axis=1)
        keys = _unit(self.values[np.maximum(found, 0).ravel()]).view(*found.shape, -1)
        index = torch.from_numpy(found)
        value = (keys @ queries.unsqueeze(2)).squeeze(2).masked_fill_(index < 0, float("-inf"))
        value, order = value.sort(dim=1, descending=True, stable=True)
        value, index = value[:, : self.k], index.gather(1, order)[:, : self.k]
        room = (0, self.k - index.shape[1])
        absent = value == float("-inf")
        return F.pad(index, room, value=-1), F.pad(value.masked_fill(absent, 0.0).clamp_(-1.0, 1.0), room)


def _least_similarities(values: np.ndarray, rows: np.ndarray, k: int) -> Tensor:
    """[len(rows), 1] float32: cosine of each row with its k-th nearest."""
    queries = _unit(values[rows])
    best = queries.new_full((len(rows), k), float("-inf"))
    for _, block in read_blocks(values):
        # Of narrow rows, a block holds so many that their products with the queries are split.
        for part in np.array_split(block, -(-len(block) // _ROWS)):
            there = torch.from_numpy(part.any(axis=1))
            value = (queries @ _unit(part).T).masked_fill_(~there, float("-inf"))
            best = torch.cat([best, value], 1).topk(k, dim=1).values
    return best[:, -1:]


def _unit(x: np.ndarray) -> Tensor:
    return unit_rows(torch.from_numpy(np.ascontiguousarray(x)))


def check_approximate() -> Any:
    """What searches. Raises: ImportError, which says how to install it."""
    try:
        import usearch.index
    except ImportError as error:
        raise ImportError('knn_search "approximate" needs the package usearch: pip install "hellm[export]"') from error
    return usearch.index
