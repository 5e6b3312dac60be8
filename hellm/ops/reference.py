"""The definition of every operator in plain torch, called with plain arguments.

Tests compare each backend with these functions in float64, and benchmarks use them as a baseline; each is written in
the file of its operator. Differentiable by autograd, any floating dtype, any device. On a GPU nothing waits for the
device, so that all but `knn` can be captured in a CUDA graph. The arguments of a sparse product are those of its
operator; schedules of matrices, which only GPU kernels read, may be left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

from torch import Tensor

from hellm.ops import _sparse
from hellm.ops.bipartite_propagate import PropagateArguments
from hellm.ops.bipartite_propagate import definition as _bipartite_propagate
from hellm.ops.hypergraph_conv import ConvArguments
from hellm.ops.hypergraph_conv import definition as _hypergraph_conv
from hellm.ops.info_nce import InfoNCEGradientArguments
from hellm.ops.info_nce import by_blocks as _info_nce_by_blocks
from hellm.ops.info_nce import definition as info_nce
from hellm.ops.item_cross_entropy import CrossEntropyGradientArguments
from hellm.ops.item_cross_entropy import by_blocks as _item_cross_entropy_by_blocks
from hellm.ops.item_cross_entropy import definition as item_cross_entropy
from hellm.ops.knn import KnnArguments
from hellm.ops.knn import by_panels as _by_panels
from hellm.ops.knn import definition as knn

__all__ = [
    "bipartite_propagate",
    "hypergraph_conv",
    "incidence_dot",
    "incidence_product",
    "info_nce",
    "info_nce_with_gradients",
    "item_cross_entropy",
    "item_cross_entropy_with_gradients",
    "knn",
    "knn_by_panels",
]

T = TypeVar("T", bound=NamedTuple)
incidence_dot = _sparse.csr_dot


def incidence_product(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, *_: object) -> Tensor:
    """CSR matrix [rows, columns] times x [columns, D] -> [rows, D]; absent values are ones."""
    return _sparse.csr_product(x, indptr, indices, values)


def hypergraph_conv(*arguments: Any) -> Tensor:
    """The fields of `ConvArguments`."""
    return _hypergraph_conv(_without_schedules(ConvArguments, arguments))


def bipartite_propagate(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The fields of `PropagateArguments`."""
    return _bipartite_propagate(_without_schedules(PropagateArguments, arguments))


def info_nce_with_gradients(*arguments: Any, block: int = 512) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `InfoNCEGradientArguments`: losses and gradients by blocks of rows."""
    return _info_nce_by_blocks(InfoNCEGradientArguments(*arguments), block)


def item_cross_entropy_with_gradients(
    *arguments: Any, block_elements: int = 2**24
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fields of `CrossEntropyGradientArguments`: losses and gradients by blocks of `block_elements` logits."""
    return _item_cross_entropy_by_blocks(CrossEntropyGradientArguments(*arguments), block_elements)


def knn_by_panels(x: Tensor, k: int, panel_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
    """`knn` without the similarities of all pairs at once."""
    return _by_panels(KnnArguments(x, k), panel_bytes)


def _without_schedules(kind: type[T], arguments: tuple) -> T:
    fields = len(kind._fields)
    return kind._make((*arguments, *[None] * fields)[:fields])
