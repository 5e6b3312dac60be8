"""H x and H^T x: one half of a convolution.

V = vertices, M = hyperedges, D = columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from hellm._arrays import check_flag
from hellm.ops._cases import Case, SampleGraph, Samples
from hellm.ops._checks import check_device, check_hypergraph, checked_rows
from hellm.ops._operator import Derivatives, Operator, one_by_one
from hellm.ops._sparse import batch, csr_dot, csr_product, side_by_side, total
from hellm.ops.incidence import Csr, Incidence


def incidence_product(x: Tensor, hypergraph: Incidence, *, transpose: bool = False) -> Tensor:
    """H x, or H^T x with `transpose`: one half of a convolution, unscaled.

    Args:
        x: [M, D], or [V, D] with `transpose`; float32, float16, bfloat16 or float64.
        hypergraph: a `hellm.Hypergraph` on the device of x.
        transpose: from vertices to hyperedges instead of from hyperedges to vertices.

    Returns:
        [V, D], or [M, D] with `transpose`, like x. Accumulated in float32 (float64 for float64). Any derivative.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    check_hypergraph(hypergraph)
    check_flag("transpose", transpose)
    name = "num_vertices" if transpose else "num_hyperedges"
    x = checked_rows("x", x, size=getattr(hypergraph, name), size_name=f"hypergraph.{name}")
    check_device("hypergraph", hypergraph.device, x)
    vertex = (*hypergraph.vertex_csr, *hypergraph.vertex_schedule)
    edge = (*hypergraph.edge_csr, *hypergraph.edge_schedule)
    matrices = (*edge, *vertex) if transpose else (*vertex, *edge)
    return torch.ops.hellm.incidence_product(x, *matrices)


class ProductArguments(NamedTuple):
    """A matrix [R, C] and its transpose, which hold the same values, each in the order of its rows."""

    x: Annotated[Tensor, "rows C D"]
    indptr: Annotated[Tensor, "int64 R+1"]
    indices: Annotated[Tensor, "int32 E"]
    values: Annotated[Tensor | None, "floating E"]
    row_order: Annotated[Tensor, "schedule R"]
    hub_chunk_begin: Annotated[Tensor, "schedule H+1"]
    num_long: int
    num_hub_chunks: int
    t_indptr: Tensor
    t_indices: Tensor
    t_values: Tensor | None
    t_row_order: Tensor
    t_hub_chunk_begin: Tensor
    t_num_long: int
    t_num_hub_chunks: int

    @classmethod
    def of(cls, x: Tensor, matrix: Csr, transposed: Csr) -> ProductArguments:
        return cls(x, *matrix, *transposed)

    @property
    def matrix(self) -> Csr:
        return Csr(*(getattr(self, name) for name in Csr._fields))

    @property
    def transposed(self) -> Csr:
        return Csr(*(getattr(self, f"t_{name}") for name in Csr._fields))


def product(x: Tensor, matrix: Csr, transposed: Csr) -> Tensor:
    return torch.ops.hellm.incidence_product(x, *matrix, *transposed)


def dot(matrix: Csr, left: Tensor, right: Tensor) -> Tensor:
    """Gradients of the values [nnz] in the accumulation dtype."""
    return csr_dot(left, right, matrix.indptr, matrix.indices)


def definition(arguments: ProductArguments) -> Tensor:
    return csr_product(arguments.x, arguments.indptr, arguments.indices, arguments.values)


class _Derivatives(Derivatives):
    @staticmethod
    def setup_context(ctx, arguments, output):
        x, values, t_values = arguments.x, arguments.values, arguments.t_values
        needs = ProductArguments(*ctx.needs_input_grad)
        ctx.set_materialize_grads(False)
        ctx.arguments = arguments._replace(x=None, values=None, t_values=None)
        ctx.save_for_backward(x if needs.values else None, values, t_values)
        ctx.save_for_forward(x, values, t_values)

    @staticmethod
    def backward(ctx, needs, grad):
        grads = {}
        if grad is None:
            return grads
        x, values, t_values = ctx.saved_tensors
        arguments = ctx.arguments._replace(values=values, t_values=t_values)
        if needs.x:
            grads["x"] = product(grad, arguments.transposed, arguments.matrix)
        if needs.values:
            grads["values"] = dot(arguments.matrix, grad, x).to(values.dtype)
        return grads

    @staticmethod
    def jvp(ctx, saved, tangents):
        x, values, t_values = saved
        arguments, terms = ctx.arguments._replace(x=x, values=values, t_values=t_values), []
        if tangents.x is not None:
            terms.append(arguments._replace(x=tangents.x))
        if tangents.values is not None:
            terms.append(arguments._replace(values=tangents.values, t_values=tangents.t_values))
        return total([torch.ops.hellm.incidence_product(*term) for term in terms])

    @staticmethod
    def vmap(operator, info, in_dims, arguments):
        if any(dim is not None for dim in in_dims._replace(x=None)):
            return one_by_one(operator, info, in_dims, arguments)
        out = operator(*arguments._replace(x=side_by_side(arguments.x, in_dims.x, info.batch_size)))
        return batch(out, info.batch_size), 1


def cases(samples: Samples) -> Iterator[Case]:
    for graph in samples.graphs:
        for transpose, name, rows in (
            (False, graph.name, graph.hyperedges),
            (True, f"{graph.name}, transposed", graph.vertices),
        ):

            def product_of(x: Tensor, graph: SampleGraph = graph, transpose: bool = transpose) -> Tensor:
                return incidence_product(x, graph.at(x.device), transpose=transpose)

            def defined(x: Tensor, graph: SampleGraph = graph, transpose: bool = transpose) -> Tensor:
                there = graph.at(x.device)
                return csr_product(x, *(there.edge_csr if transpose else there.vertex_csr))

            yield Case("incidence_product", name, [rows], product_of, defined, **graph.settings)


OPERATORS = (
    Operator(
        name="incidence_product",
        arguments=ProductArguments,
        returns="Tensor",
        method="incidence_product",
        plain=definition,
        run=lambda method, arguments: method(arguments),
        fake=lambda a: a.x.new_empty(a.indptr.shape[0] - 1, a.x.shape[1]),
        derivatives=_Derivatives,
    ),
)
