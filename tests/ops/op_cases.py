"""Shapes, edge cases and the error budget that every operator's tests share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hellm import Hypergraph
from hellm.ops.backends import Backend, loaders
from hellm.ops.bipartite_propagate import PropagateArguments
from hellm.ops.hypergraph_conv import ConvArguments
from hellm.ops.incidence_product import ProductArguments
from hellm.ops.info_nce import InfoNCEGradientArguments
from hellm.ops.item_cross_entropy import CrossEntropyGradientArguments
from hellm.ops.knn import KnnArguments

_extension = loaders.native()
_native_is_missing = isinstance(_extension, ImportError)
needs_native = pytest.mark.skipif(_native_is_missing, reason=f"hellm._C cannot be loaded: {_extension}")
INSTRUCTION_SETS = [] if _native_is_missing else _extension.instruction_sets()

KERNELS = [
    *(pytest.param(("native", name), id=f"native-{name}") for name in INSTRUCTION_SETS or [None]),
    pytest.param(("torch", None), id="torch"),
]
if _native_is_missing:
    KERNELS[0] = pytest.param(("native", None), id="native", marks=needs_native)

DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]


# Method of a backend -> the tuple it takes.
ARGUMENTS = {
    "incidence_product": ProductArguments,
    "hypergraph_conv": ConvArguments,
    "bipartite_propagate": PropagateArguments,
    "info_nce": InfoNCEGradientArguments,
    "item_cross_entropy": CrossEntropyGradientArguments,
    "knn": KnnArguments,
}


class Direct:
    """A backend whose operators take the fields of their tuple one by one; the last ones may be left out."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def __getattr__(self, name: str):
        found = getattr(self.backend, name)
        if name not in ARGUMENTS:
            return found
        fields = ARGUMENTS[name]._fields
        return lambda *given: found(ARGUMENTS[name](*given, *[None] * (len(fields) - len(given))))


class GraphCase(NamedTuple):
    """Incidence with its sizes; None lets Hypergraph derive them."""

    index: Tensor
    num_vertices: int | None
    num_hyperedges: int | None
    dim: int
    incidence_weight: Tensor | None = None

    def build(self, hyperedge_weight: Tensor | None = None) -> Hypergraph:
        return Hypergraph(
            self.index,
            num_vertices=self.num_vertices,
            num_hyperedges=self.num_hyperedges,
            hyperedge_weight=hyperedge_weight,
            incidence_weight=self.incidence_weight,
        )


def random_index(num_vertices: int, num_hyperedges: int, nnz: int, seed: int = 0) -> Tensor:
    """[2, nnz] int64; draws repeat, so some incidences occur twice."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack(
        [
            torch.randint(num_vertices, (nnz,), generator=generator),
            torch.randint(num_hyperedges, (nnz,), generator=generator),
        ]
    )


_NOTHING = torch.empty(2, 0, dtype=torch.int64)
# Multiples of 1/8: exact in float32, in which the values are stored.
_EIGHTHS = torch.randint(1, 17, (40,), generator=torch.Generator().manual_seed(5)) / 8

GRAPHS = {
    "one-vertex": GraphCase(torch.zeros(2, 1, dtype=torch.int64), 1, 1, 1),
    "three": GraphCase(torch.tensor([[0, 1, 2, 1], [0, 0, 0, 1]]), 3, 2, 3),
    "odd-63": GraphCase(random_index(63, 17, 150), 63, 17, 67),
    "odd-257": GraphCase(random_index(257, 63, 900), 257, 63, 128),
    "wide-200": GraphCase(random_index(30, 20, 90), 30, 20, 200),
    "one-column": GraphCase(random_index(63, 17, 100), 63, 17, 1),
    "empty-hyperedge": GraphCase(torch.tensor([[0, 1, 2, 3], [0, 0, 3, 3]]), 4, 4, 8),
    "isolated-vertex": GraphCase(torch.tensor([[0, 2, 2, 5], [0, 0, 1, 1]]), 6, 2, 8),
    "alone-in-hyperedges": GraphCase(torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3]]), 3, 4, 5),
    "repeated": GraphCase(torch.tensor([[0, 0, 1, 1, 1, 2], [0, 0, 0, 1, 1, 1]]), 3, 2, 9),
    "more-hyperedges": GraphCase(random_index(5, 40, 60), 5, 40, 16),
    "trailing-hyperedges": GraphCase(random_index(9, 4, 20), 9, 11, 16),
    "int32": GraphCase(random_index(31, 12, 70).int(), 31, 12, 33),
    "derived-sizes": GraphCase(torch.tensor([[0, 4, 2], [1, 1, 0]]), None, None, 4),
    "no-incidence": GraphCase(_NOTHING, 4, 3, 6),
    "no-vertex": GraphCase(_NOTHING, 0, 3, 6),
    "no-hyperedge": GraphCase(_NOTHING, 3, 0, 6),
    "valued": GraphCase(random_index(12, 9, 40), 12, 9, 10, _EIGHTHS),
}
GRAPH_CASES = [pytest.param(case, id=name) for name, case in GRAPHS.items()]


def rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal entries of the given dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def dense_incidence(case: GraphCase) -> Tensor:
    """H [V, M] float64, straight from the index: repeats add up."""
    graph = case.build()
    h = torch.zeros(graph.num_vertices, graph.num_hyperedges, dtype=torch.float64)
    value = torch.ones(case.index.shape[1]) if case.incidence_weight is None else case.incidence_weight
    return h.index_put_((case.index[0].long(), case.index[1].long()), value.double(), accumulate=True)


def outputs_and_gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], seed: int = 7
) -> list[Tensor]:
    """Outputs, then the gradient of every input under a random cotangent."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    found = function(*inputs)
    found = found if isinstance(found, tuple) else (found,)
    cotangents = [rows(*out.shape, dtype=out.dtype, seed=seed + i) for i, out in enumerate(found)]
    return [*(out.detach() for out in found), *torch.autograd.grad(found, inputs, cotangents, allow_unused=True)]


def assert_within_budget(
    truth: Sequence[Tensor], baseline: Sequence[Tensor], candidate: Sequence[Tensor], *, factor: float = 4.0
) -> None:
    """|truth - candidate| <= factor * max |truth - baseline| + two units in the last place of the largest value.

    In float64 truth and baseline are the same, and another order of sums may cost 1e-13 of the largest value, or 1e-13
    where all terms cancel.
    """
    for position, (t, b, c) in enumerate(zip(truth, baseline, candidate, strict=True)):
        assert t.shape == c.shape, f"tensor {position}: shape {tuple(c.shape)}, expected {tuple(t.shape)}"
        if not t.numel():
            continue
        assert torch.isfinite(c).all(), f"tensor {position}: {int((~torch.isfinite(c)).sum())} values are not finite"
        error = (t.double() - c.double()).abs()
        budget = factor * float((t.double() - b.double()).abs().max())
        budget += max(2 * torch.finfo(c.dtype).eps, 1e-13) * float(t.abs().max()) + (
            1e-13 if c.dtype == torch.float64 else 1e-30
        )
        worst = int(error.argmax())
        assert float(error.flatten()[worst]) <= budget, (
            f"tensor {position}: worst error {float(error.max()):.3g} > {budget:.3g} at flat index {worst}: "
            f"expected {float(t.flatten()[worst]):.6g}, got {float(c.flatten()[worst]):.6g}"
        )


def assert_same_bits(left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
    for position, (a, b) in enumerate(zip(left, right, strict=True)):
        assert torch.equal(a, b), f"tensor {position} differs by up to {float((a - b).abs().max()):.3g}"


def results_for_threads(function: Callable[[], list[Tensor]], counts: Sequence[int] = (1, 2, 3)) -> list[list[Tensor]]:
    """The function's result under each number of threads."""
    before = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(function())
        return results
    finally:
        torch.set_num_threads(before)
