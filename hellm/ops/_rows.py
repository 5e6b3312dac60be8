"""Lengths, directions and largest entries of rows in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def unit_rows(x: Tensor) -> Tensor:
    """Rows over their lengths; a row that is all zero stays zero and has derivative 0, of any order and mode."""
    largest = _largest(x)
    zero = largest == 0
    scaled = torch.where(zero, 0.0, x / largest.masked_fill(zero, 1.0))
    return scaled * scaled.square().sum(dim=1, keepdim=True).masked_fill(zero, 1.0).rsqrt()


def unit_rows_and_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their lengths, and lengths [N, 1], infinite for rows that are all zero; not to be differentiated."""
    largest = _largest(x)
    largest = largest.masked_fill(largest == 0, float("inf"))
    scaled = x / largest
    norm = scaled.norm(dim=1, keepdim=True).masked_fill(largest.isinf(), 1.0)
    length = largest * norm
    # A subnormal length has few digits; any other rounds once less this way.
    return torch.where(length < torch.finfo(x.dtype).smallest_normal, scaled / norm, x / length), length


def _largest(x: Tensor) -> Tensor:
    """[N, 1]; no square of entries overflows or is lost where they were divided by it first."""
    return x.detach().abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row [N, M] and their columns, descending; of equals the first, which topk does not promise.

    So those of a smaller k stand at the beginning of those of a larger one.
    """
    least = x.topk(k, dim=1).values[:, -1:]
    better, equal = x > least, x == least
    room = k - better.sum(1, keepdim=True)
    column = (better | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    value, order = x.gather(1, column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, order)
