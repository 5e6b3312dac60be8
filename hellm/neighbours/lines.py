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


def order_of_plane(num_rows: int, most_rows: int) -> int:
    """The least prime q whose lines hold at most `most_rows` of the rows, or a row of each panel."""
    for q in count_from(2):
        if all(q % divisor for divisor in range(2, int(q**0.5) + 1)) and -(-num_rows // q**2) * q <= max(most_rows, q):
            return q
    raise AssertionError


def knn_by_lines(values: np.ndarray, k: int, most_rows: int, device: torch.device | str = "cpu") -> tuple:
    """What `hellm.ops.knn` gives, in the memory of two blocks of rows and of twice the result.

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
        parts = [slice(begin[panel], begin[panel + 1]) for panel in panels]
        rows = torch.from_numpy(np.concatenate([np.arange(part.start, part.stop) for part in parts])).to(device)
        if not len(rows):
            continue
        x = torch.from_numpy(np.concatenate([values[part] for part in parts])).to(device)
        release(values)
        found, value = _unclamped_knn(x, min(k, len(rows)))
        del x
        value.masked_fill_(found < 0, float("-inf"))
        if number >= q:
            # Pairs within a panel met on the first line that holds it.
            panel = torch.repeat_interleave(torch.tensor([part.stop - part.start for part in parts], device=device))
            value.masked_fill_(panel[found.clamp(min=0)] == panel.unsqueeze(1), float("-inf"))
        index[rows], similarity[rows] = _best(
            torch.cat([index[rows], rows[found.clamp(min=0)]], 1), torch.cat([similarity[rows], value], 1), k
        )
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


def _unclamped_knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`hellm.ops.knn` before similarities of more than 1 are cut, which would make equals of them."""
    return getattr(backends.select(x.device), "knn", by_panels)(KnnArguments(x, k))


def _best(index: Tensor, similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k most similar of each row, descending; of equals the lower index first."""
    order = index.argsort(dim=1)
    index, similarity = index.gather(1, order), similarity.gather(1, order)
    similarity, order = similarity.sort(dim=1, descending=True, stable=True)
    return index.gather(1, order)[:, :k], similarity[:, :k]
