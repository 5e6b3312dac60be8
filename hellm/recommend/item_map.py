"""Items as points of a plane: the two directions in which their keys differ the most."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Plane", "principal_plane"]

# Rows that are there in float64 at once.
_BLOCK = 1 << 16


class Plane(NamedTuple):
    """Principal components of rows.

    Attributes:
        points: [n, 2] float32, of mean 0.
        shares: Share of the variance along each of the two; 0 where nothing varies.
    """

    points: Tensor
    shares: tuple[float, float]


def principal_plane(rows: Tensor) -> Plane:
    """The first two principal components of `rows` [n, D], n >= 1, D >= 1.

    The covariance is exact, in float64. In each direction the largest entry is positive, so that the same rows come out
    the same way round.
    """
    blocks = rows.split(_BLOCK)
    mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0) / len(rows)
    spread = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for block in blocks:
        centred = block.double() - mean
        spread.addmm_(centred.T, centred)
    values, vectors = torch.linalg.eigh(spread)
    vectors = vectors.flip(1)[:, :2]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    points = torch.zeros(len(rows), 2)
    points[:, : vectors.shape[1]] = torch.cat([((block.double() - mean) @ vectors).float() for block in blocks])
    total = float(values.clamp(min=0).sum())
    shares = [float(value) / total if total > 0 else 0.0 for value in values.clamp(min=0).flip(0)[:2]]
    return Plane(points, (shares[0], shares[1] if len(shares) > 1 else 0.0))
