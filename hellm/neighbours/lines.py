"""Exact neighbours by blocks of rows, each searched as if it were all, so that every pair of rows meets in one.

N rows are cut into q^2 panels, the points of an affine plane of prime order q. Its q (q + 1) lines hold q panels each,
and two panels lie on exactly one line together. So blocks of N / q rows compare all pairs, at (q + 1) / q times the
products of one search over all rows, and rows are read q + 1 times.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count as count_from

import numpy as np
import torch
from torch import Tensor

from hellm._mapped import release
from hellm.ops import backends
from hellm.ops.knn import KnnArguments, by_panels

__all__ = ["knn_by_lines", "order_of_plane"]

# Rows whose best are merged at once.
_MERGED = 1 << 13


def order_of_plane(num_rows: int, most_rows: int) -> int:
    """The least prime q whose lines hold at most `most_rows` of the rows, or a row of each panel."""
    for q in count_from(2):
        if all(q % divisor for divisor in range(2, int(q**0.5) + 1)) and -(-num_rows // q**2) * q <= max(most_rows, q):
            return q
    raise AssertionError


def knn_by_lines(values: np.ndarray, k: int, most_rows: int, device: torch.device | str = "cpu") -> tuple:
    """What `hellm.ops.knn` gives, in the memory of two blocks of rows and of the result.

    Bits are those of one search where its sums do not depend on where a row stands, as in the compiled kernels.

    Args:
        values: [N, D] float32, finite; may lie in a mapped file.
        k: 1 <= k <= N.
        most_rows: of a block.
        device: where they are searched, and where the result is.
    Returns: indices [N, k] int64, -1 where there is no neighbour, and similarities [N, k] float32, descending, 0 there.
    """
    num_rows = len(values)
    q = order_of_plane(num_rows, most_rows)
    begin = num_rows * np.arange(q * q + 1) // (q * q)
    index = torch.full((num_rows, k), -1, dtype=torch.int64, device=device)
    similarity = torch.full((num_rows, k), float("-inf"), device=device)
    for number, panels in enumerate(_lines(q)):
        # Ascending, so that of equals the first of a block is the first of all.
        parts = [np.arange(begin[panel], begin[panel + 1]) for panel in panels]
        rows = torch.from_numpy(np.concatenate(parts)).to(device)
        if not len(rows):
            continue
        found, value = _unclamped_knn(torch.from_numpy(_block(values, parts)).to(device), min(k, len(rows)))
        value.masked_fill_(found < 0, float("-inf"))
        found.clamp_(min=0)
        if number >= q:
            # Pairs within a panel met on the first line that holds it.
            panel = torch.repeat_interleave(torch.tensor([len(part) for part in parts], device=device))
            value.masked_fill_(panel[found] == panel.unsqueeze(1), float("-inf"))
        for row, near, cosine in zip(*(one.split(_MERGED) for one in (rows, rows[found], value)), strict=True):
            both = torch.cat([index[row], near], 1), torch.cat([similarity[row], cosine], 1)
            index[row], similarity[row] = _best(*both, k)
    absent = similarity == float("-inf")
    # A cosine is at most 1, its rounded products may not be.
    return index.masked_fill_(absent, -1), similarity.masked_fill_(absent, 0.0).clamp_(-1.0, 1.0)


def _lines(q: int) -> Iterator[list[int]]:
    """Panels of each line, ascending; the first q lines share no panel."""
    for a in range(q):
        yield [a * q + b for b in range(q)]
    for slope in range(q):
        for shift in range(q):
            yield [a * q + (slope * a + shift) % q for a in range(q)]


def _block(values: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    """A copy of consecutive rows of each part, read one part after the other."""
    block, filled = np.empty((sum(map(len, parts)), values.shape[1]), values.dtype), 0
    for part in parts:
        if len(part):
            block[filled : filled + len(part)] = values[part[0] : part[-1] + 1]
            filled += len(part)
            release(values)
    return block


def _unclamped_knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`hellm.ops.knn` before similarities of more than 1 are cut, which would make equals of them."""
    return getattr(backends.select(x.device), "knn", by_panels)(KnnArguments(x, k))


def _best(index: Tensor, similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of each row, descending; of equals the lower index first."""
    order = index.argsort(dim=1)
    index, similarity = index.gather(1, order), similarity.gather(1, order)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return index.gather(1, order)[:, :k], similarity[:, :k]
