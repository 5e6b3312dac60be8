"""Exact nearest neighbours.

N = rows, D = columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_count
from hellm.ops._cases import Case, Samples
from hellm.ops._checks import checked_rows
from hellm.ops._dtypes import accumulation_dtype, wide
from hellm.ops._operator import Derivatives, Operator
from hellm.ops._rows import largest, unit_rows


def knn(x: Tensor, k: int, *, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """The k most similar rows of every row, exact, by blocks: nothing of size N * N is stored.

    The row itself is included. Lower index first among equal similarities. A row that is all zero has no neighbours
    and is nobody's neighbour. No gradient flows into x.

    Args:
        x: [N, D] float32, float16, bfloat16 or float64, finite.
        k: 1 <= k <= N.
        metric: "cosine".

    Returns:
        indices [N, k] int64, -1 where there is no neighbour, and similarities [N, k] float32 (float64 for float64),
        descending, 0 where there is no neighbour.

    Raises:
        ValueError: naming the argument, what it must be, and what it was; for x the first row that is not finite.
    """
    x = checked_rows("x", x)
    if not isinstance(metric, str) or metric != "cosine":
        raise ValueError(f"metric must be 'cosine', got {metric!r}")
    k = as_count("k", k, low=None)
    if not 1 <= k <= x.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows {x.shape[0]}, got {k}")
    return torch.ops.hellm.knn(x.detach(), k)


class KnnArguments(NamedTuple):
    """What the operator of torch takes, in this order."""

    x: Annotated[Tensor, "rows N D"]
    k: Annotated[int, "count 1 N"]


def definition(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """K nearest rows by cosine, itself included: indices [N, k] int64 and similarities [N, k], descending.

    Lower index first among equals. All-zero rows have no neighbours and are nobody's: index -1, similarity 0, also
    where fewer than k rows remain. Stores the similarities of all pairs.
    """
    present = (x != 0).any(1)
    u = unit_rows(x)
    similarity = (u @ u.T).masked_fill(~present, float("-inf"))
    similarity[~present] = float("-inf")
    value, index = similarity.sort(dim=1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k]
    absent = value == float("-inf")
    return index.masked_fill(absent, -1), value.masked_fill(absent, 0.0)


def by_panels(arguments: KnnArguments, panel_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
    """`definition` without the similarities of all pairs at once. Low-precision rows are computed in float32."""
    x, k = arguments
    present = (x != 0).any(1)
    unit = unit_rows(wide(x))
    panel = max(1, panel_bytes // (max(x.shape[0], 1) * unit.element_size()))
    found = [_nearest(unit, present, start, min(start + panel, len(unit)), k) for start in range(0, len(unit), panel)]
    index, value = (torch.cat(part) for part in zip(*found, strict=True))
    absent = value == float("-inf")
    return index.masked_fill(absent, -1), value.masked_fill(absent, 0.0)


def _nearest(unit: Tensor, present: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of some rows of unit unit^T; of equals the first ones."""
    similarity = (unit[start:stop] @ unit.T).masked_fill_(~present, float("-inf"))
    similarity[~present[start:stop]] = float("-inf")
    value, column = largest(similarity, k)
    return column, value


def _run(method: Callable, arguments: KnnArguments) -> tuple[Tensor, Tensor]:
    x = arguments.x
    capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
    if not (capturing or x.is_meta or _is_finite(x)):
        finite = torch.isfinite(x).all(1)
        raise ValueError(f"x must be finite, got NaN or infinity first in row {int((~finite).nonzero()[0])}")
    index, similarity = method(arguments)
    # A cosine is at most 1, its rounded products may not be.
    return index, similarity.clamp_(-1.0, 1.0)


def _is_finite(x: Tensor) -> bool:
    """Least and largest are NaN where one entry is: two numbers, where a mask of the entries takes longer to make."""
    return x.numel() == 0 or all(math.isfinite(bound.item()) for bound in torch.aminmax(x))


def _fake(arguments: KnnArguments) -> tuple[Tensor, Tensor]:
    x, k = arguments
    shape = (x.shape[0], k)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape, dtype=accumulation_dtype(x))


class _Derivatives(Derivatives):
    """None: neighbours are found, not differentiated."""

    @staticmethod
    def setup_context(ctx, arguments, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, needs, *_):
        return {}

    @staticmethod
    def jvp(ctx, saved, tangents):
        return None, None


def cases(samples: Samples) -> Iterator[Case]:
    """The similarities alone: which of two near neighbours comes first is up to rounding."""
    shapes = [(97, 67, 5), (97, 300, 5)] + ([(1500, 64, 10), (1500, 67, 40)] if samples.large else [])
    for num_rows, dim, k in shapes:

        def similarities(x: Tensor, k: int = k) -> Tensor:
            return knn(x, k)[1]

        def defined(x: Tensor, k: int = k) -> Tensor:
            return definition(x, k)[1].detach()

        yield Case("knn", f"N {num_rows}, D {dim}", [samples.rows(num_rows, dim)], similarities, defined)


OPERATORS = (
    Operator(
        name="knn",
        arguments=KnnArguments,
        returns="(Tensor, Tensor)",
        method="knn",
        plain=by_panels,
        run=_run,
        fake=_fake,
        derivatives=_Derivatives,
        autocast=torch.float32,
    ),
)
