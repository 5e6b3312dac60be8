"""Propagation over a bipartite graph, as in LightGCN.

V = users, M = items, D = columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_count
from hellm.ops._cases import Case, SampleGraph, Samples
from hellm.ops._checks import check_device, check_hypergraph, check_same, checked_rows
from hellm.ops._dtypes import accumulation_dtype, wide
from hellm.ops._operator import Derivatives, Operator, one_by_one
from hellm.ops._sparse import batch, csr_product, scaled, side_by_side
from hellm.ops.incidence import Incidence, RowSchedule


def bipartite_propagate(
    user_x: Tensor, item_x: Tensor, hypergraph: Incidence, *, num_layers: int = 2
) -> tuple[Tensor, Tensor]:
    """LightGCN over the user-item graph: the mean of layers 0..num_layers of D^-1/2 A D^-1/2, A = [[0, R], [R^T, 0]].

    Args:
        user_x: [V, D] float32, float16, bfloat16 or float64.
        item_x: [M, D], same dtype and device.
        hypergraph: incidence R as `user_hypergraph` gives it: users are vertices, items hyperedges; without weights.
        num_layers: >= 0.

    Returns:
        ([V, D], [M, D]) like the inputs. Sums are accumulated in float32 (float64 for float64). Any derivative.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    check_hypergraph(hypergraph)
    user_x = checked_rows("user_x", user_x, size=hypergraph.num_vertices, size_name="hypergraph.num_vertices")
    item_x = checked_rows("item_x", item_x, size=hypergraph.num_hyperedges, size_name="hypergraph.num_hyperedges")
    check_same("item_x", item_x, "user_x", user_x)
    check_device("hypergraph", hypergraph.device, user_x)
    num_layers = as_count("num_layers", num_layers)
    for name in ("incidence_weight", "hyperedge_weight"):
        if (hypergraph.vertex_values if name == "incidence_weight" else hypergraph.hyperedge_weight) is not None:
            raise ValueError(f"hypergraph must have no {name} here, got one")
    scales = hypergraph.bipartite_scales(accumulation_dtype(user_x))
    csr = (*hypergraph.vertex_csr[:2], *hypergraph.edge_csr[:2])
    schedules = (*hypergraph.vertex_schedule, *hypergraph.edge_schedule)
    return torch.ops.hellm.bipartite_propagate(user_x, item_x, *csr, *scales, num_layers, *schedules)


class PropagateArguments(NamedTuple):
    """R [V, M] and R^T, whose values are ones, and D^-1/2 of both sides."""

    user_x: Annotated[Tensor, "rows V D"]
    item_x: Annotated[Tensor, "rows M D"]
    vertex_indptr: Annotated[Tensor, "int64 V+1"]
    vertex_edges: Annotated[Tensor, "int32 E"]
    edge_indptr: Annotated[Tensor, "int64 M+1"]
    edge_vertices: Annotated[Tensor, "int32 E"]
    user_scale: Annotated[Tensor, "floating V"]
    item_scale: Annotated[Tensor, "floating M"]
    num_layers: Annotated[int, "count 0"]
    vertex_row_order: Annotated[Tensor, "schedule V"]
    vertex_hub_chunk_begin: Annotated[Tensor, "schedule H+1"]
    vertex_num_long: int
    vertex_num_hub_chunks: int
    edge_row_order: Annotated[Tensor, "schedule M"]
    edge_hub_chunk_begin: Annotated[Tensor, "schedule K+1"]
    edge_num_long: int
    edge_num_hub_chunks: int

    @property
    def vertex_schedule(self) -> RowSchedule:
        return RowSchedule(*(getattr(self, f"vertex_{name}") for name in RowSchedule._fields))

    @property
    def edge_schedule(self) -> RowSchedule:
        return RowSchedule(*(getattr(self, f"edge_{name}") for name in RowSchedule._fields))


def definition(arguments: PropagateArguments) -> tuple[Tensor, Tensor]:
    """Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- likewise with R^T."""
    a = arguments
    user, item = user_sum, item_sum = wide(a.user_x), wide(a.item_x)
    for _ in range(a.num_layers):
        user_next = csr_product(scaled(item, a.item_scale), a.vertex_indptr, a.vertex_edges, None)
        item_next = csr_product(scaled(user, a.user_scale), a.edge_indptr, a.edge_vertices, None)
        user, item = scaled(user_next, a.user_scale), scaled(item_next, a.item_scale)
        user_sum, item_sum = user_sum + user, item_sum + item
    count = a.num_layers + 1
    return (user_sum / count).to(a.user_x.dtype), (item_sum / count).to(a.item_x.dtype)


class _Derivatives(Derivatives):
    """Linear in both sides and symmetric: derivatives of either kind are the operator itself."""

    @staticmethod
    def setup_context(ctx, arguments, output):
        ctx.set_materialize_grads(False)
        ctx.shapes = {name: (x.shape, x.dtype, x.device) for name, x in _sides(arguments).items()}
        ctx.arguments = arguments._replace(user_x=None, item_x=None)

    @staticmethod
    def _of(ctx, **sides):
        for name, (shape, dtype, device) in ctx.shapes.items():
            if sides[name] is None:
                sides[name] = torch.zeros(shape, dtype=dtype, device=device)
        return torch.ops.hellm.bipartite_propagate(*ctx.arguments._replace(**sides))

    @staticmethod
    def backward(ctx, needs, user, item):
        if user is None and item is None:
            return {}
        return dict(zip(ctx.shapes, _Derivatives._of(ctx, user_x=user, item_x=item), strict=True))

    @staticmethod
    def jvp(ctx, saved, tangents):
        return _Derivatives._of(ctx, **_sides(tangents))

    @staticmethod
    def vmap(operator, info, in_dims, arguments):
        if any(dim is not None for dim in in_dims._replace(user_x=None, item_x=None)):
            return one_by_one(operator, info, in_dims, arguments)
        dims = _sides(in_dims)
        sides = {name: side_by_side(x, dims[name], info.batch_size) for name, x in _sides(arguments).items()}
        found = operator(*arguments._replace(**sides))
        return tuple(batch(x, info.batch_size) for x in found), (1, 1)


def _sides(arguments: Any) -> dict[str, Any]:
    """Of `PropagateArguments`, or of what there is for each of them."""
    return {"user_x": arguments.user_x, "item_x": arguments.item_x}


def cases(samples: Samples) -> Iterator[Case]:
    for graph in samples.graphs:

        def propagate(user_x: Tensor, item_x: Tensor, graph: SampleGraph = graph) -> tuple[Tensor, Tensor]:
            return bipartite_propagate(user_x, item_x, graph.at(user_x.device))

        def defined(user_x: Tensor, item_x: Tensor, graph: SampleGraph = graph) -> tuple[Tensor, Tensor]:
            there = graph.at(user_x.device)
            csr = (*there.vertex_csr[:2], *there.edge_csr[:2])
            scales = there.bipartite_scales(user_x.dtype)
            return definition(
                PropagateArguments(user_x, item_x, *csr, *scales, 2, *there.vertex_schedule, *there.edge_schedule)
            )

        rows = [graph.vertices, graph.hyperedges]
        yield Case("bipartite_propagate", graph.name, rows, propagate, defined, **graph.settings)


OPERATORS = (
    Operator(
        name="bipartite_propagate",
        arguments=PropagateArguments,
        returns="(Tensor, Tensor)",
        method="bipartite_propagate",
        plain=definition,
        run=lambda method, arguments: method(arguments),
        fake=lambda a: (a.user_x.new_empty(a.user_x.shape), a.item_x.new_empty(a.item_x.shape)),
        derivatives=_Derivatives,
    ),
)
