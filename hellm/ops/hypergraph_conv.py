"""Convolution over a hypergraph.

V = vertices, M = hyperedges, D = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_count
from hellm.ops._cases import Case, SampleGraph, Samples
from hellm.ops._checks import check_device, check_hypergraph, checked_rows
from hellm.ops._dtypes import accumulation_dtype, wide
from hellm.ops._operator import Derivatives, Operator, one_by_one
from hellm.ops._sparse import batch, csr_product, scaled, side_by_side, total
from hellm.ops.incidence import Csr, Incidence, RowSchedule
from hellm.ops.incidence_product import dot, product


def hypergraph_conv(
    x: Tensor,
    hypergraph: Incidence,
    *,
    normalization: str = "symmetric",
    hyperedge_degree: bool = True,
    self_loops: bool = True,
    num_layers: int = 1,
) -> Tensor:
    """Convolution over a hypergraph, vertex -> hyperedge -> vertex, without the V x V matrix.

        y = out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x), num_layers times

    with the scales of `Hypergraph.scales`. HGNN is the default; PyTorch Geometric's HypergraphConv is
    normalization="row"; the published user branch is "row", hyperedge_degree=False, self_loops=False; the published
    item branch "symmetric", hyperedge_degree=False.

    Args:
        x: [V, D] float32, float16, bfloat16 or float64.
        hypergraph: a `hellm.Hypergraph` of V vertices, on the device of x. Its weights get a gradient if they require
            one.
        normalization: "symmetric", "row" or "none".
        hyperedge_degree: divide by the degree of each hyperedge.
        self_loops: keep the diagonal of the operator, a vertex reached from itself.
        num_layers: >= 0.

    Returns:
        [V, D] like x. Sums, those of gradients too, are accumulated in float32 (float64 for float64). Any derivative,
        in reverse and forward mode, under `torch.func` and `torch.vmap`.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    check_hypergraph(hypergraph)
    x = checked_rows("x", x, size=hypergraph.num_vertices, size_name="hypergraph.num_vertices")
    check_device("hypergraph", hypergraph.device, x)
    num_layers = as_count("num_layers", num_layers)
    scales = hypergraph.scales(
        normalization, hyperedge_degree=hyperedge_degree, self_loops=self_loops, dtype=accumulation_dtype(x)
    )
    csr = (*hypergraph.vertex_csr, *hypergraph.edge_csr)
    schedules = (*hypergraph.vertex_schedule, *hypergraph.edge_schedule)
    return torch.ops.hellm.hypergraph_conv(x, *csr, *scales, num_layers, *schedules)


class ConvArguments(NamedTuple):
    """H and H^T, which hold the same values, and the scales of one layer."""

    x: Annotated[Tensor, "rows V D"]
    vertex_indptr: Annotated[Tensor, "int64 V+1"]
    vertex_edges: Annotated[Tensor, "int32 E"]
    vertex_values: Annotated[Tensor | None, "floating E"]
    edge_indptr: Annotated[Tensor, "int64 M+1"]
    edge_vertices: Annotated[Tensor, "int32 E"]
    edge_values: Annotated[Tensor | None, "floating E"]
    in_scale: Annotated[Tensor | None, "floating V"]
    edge_scale: Annotated[Tensor | None, "floating M"]
    out_scale: Annotated[Tensor | None, "floating V"]
    diagonal: Annotated[Tensor | None, "floating V"]
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
    def vertex(self) -> Csr:
        """H."""
        return Csr(self.vertex_indptr, self.vertex_edges, self.vertex_values, *self.vertex_schedule)

    @property
    def edge(self) -> Csr:
        """H^T."""
        return Csr(self.edge_indptr, self.edge_vertices, self.edge_values, *self.edge_schedule)

    @property
    def vertex_schedule(self) -> RowSchedule:
        return RowSchedule(*(getattr(self, f"vertex_{name}") for name in RowSchedule._fields))

    @property
    def edge_schedule(self) -> RowSchedule:
        return RowSchedule(*(getattr(self, f"edge_{name}") for name in RowSchedule._fields))


def definition(arguments: ConvArguments) -> Tensor:
    """num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x)."""
    a = arguments
    if a.num_layers == 0:
        return a.x.clone()  # the output of an operator must not share memory with its input
    rows = wide(a.x)
    for _ in range(a.num_layers):
        source = scaled(rows, a.in_scale)
        joined = scaled(csr_product(source, a.edge_indptr, a.edge_vertices, a.edge_values), a.edge_scale)
        rows = csr_product(joined, a.vertex_indptr, a.vertex_edges, a.vertex_values)
        if a.diagonal is not None:
            rows = rows - scaled(source, a.diagonal)
        rows = scaled(rows, a.out_scale)
    return rows.to(a.x.dtype)


class _Layer(NamedTuple):
    """The factors of one layer y = out * (H_v (edge * H_e (in * x)) - diagonal * in * x), H_v = H, H_e = H^T.

    y is linear in x and in each scale, in edge scale and diagonal together.
    """

    vertex_values: Tensor | None
    edge_values: Tensor | None
    in_scale: Tensor | None
    edge_scale: Tensor | None
    out_scale: Tensor | None
    diagonal: Tensor | None

    @classmethod
    def of(cls, arguments: ConvArguments) -> _Layer:
        return cls(*(getattr(arguments, name) for name in cls._fields))


class _Derivatives(Derivatives):
    @staticmethod
    def setup_context(ctx, arguments, output):
        x, layer = arguments.x, _Layer.of(arguments)
        learned = any(_Layer.of(ConvArguments(*ctx.needs_input_grad)))
        ctx.set_materialize_grads(False)
        ctx.arguments = arguments._replace(x=None, **dict.fromkeys(_Layer._fields))
        ctx.save_for_backward(x if learned else None, *layer)
        ctx.save_for_forward(x, *layer)

    @staticmethod
    def backward(ctx, needs, grad):
        if grad is None:
            return {}
        x, *factors = ctx.saved_tensors
        layer = _Layer(*factors)
        if x is not None:
            return _gradients(ctx.arguments._replace(x=x, **layer._asdict()), needs, grad)
        if not needs.x:
            return {}
        # The core H diag(e) H^T - diag(c) is symmetric: the transpose is the same operator, outer scales swapped.
        swapped = layer._replace(in_scale=layer.out_scale, out_scale=layer.in_scale)
        return {"x": _convolve(ctx.arguments, grad, swapped, ctx.arguments.num_layers)}

    @staticmethod
    def jvp(ctx, saved, tangents):
        x, *factors = saved
        layer, change, num_layers = _Layer(*factors), _Layer.of(tangents), ctx.arguments.num_layers
        if all(tangent is None for tangent in change):
            return None if tangents.x is None else _convolve(ctx.arguments, tangents.x, layer, num_layers)
        rows, tangent, dtype = x, tangents.x, accumulation_dtype(x)
        for _ in range(num_layers):
            terms = [] if tangent is None else [_convolve(ctx.arguments, tangent.to(dtype), layer)]
            terms += _changes(ctx.arguments, layer, change, rows.to(dtype))
            rows, tangent = _convolve(ctx.arguments, rows.to(dtype), layer), total(terms)
        return None if tangent is None else tangent.to(x.dtype)

    @staticmethod
    def vmap(operator, info, in_dims, arguments):
        if any(dim is not None for dim in in_dims._replace(x=None)):
            return one_by_one(operator, info, in_dims, arguments)
        out = operator(*arguments._replace(x=side_by_side(arguments.x, in_dims.x, info.batch_size)))
        return batch(out, info.batch_size), 1


def _convolve(arguments: ConvArguments, x: Tensor, layer: _Layer, num_layers: int = 1) -> Tensor:
    return torch.ops.hellm.hypergraph_conv(*arguments._replace(x=x, num_layers=num_layers, **layer._asdict()))


def _changes(arguments: ConvArguments, layer: _Layer, change: _Layer, rows: Tensor) -> list[Tensor]:
    """What adds up to the change of the output of one layer when its factors change."""
    changed = [
        layer._replace(**{name: getattr(change, name)})
        for name in ("in_scale", "out_scale")
        if getattr(change, name) is not None
    ]
    edge_scale, diagonal = change.edge_scale, change.diagonal
    if edge_scale is None and diagonal is not None:
        edge_scale = diagonal.new_zeros(arguments.edge_indptr.shape[0] - 1)
    if edge_scale is not None:
        changed.append(layer._replace(edge_scale=edge_scale, diagonal=diagonal))
    found = [_convolve(arguments, rows, other) for other in changed]
    if change.vertex_values is not None:
        # H and H^T change together: their products, and derivatives of these, take one for the other transposed.
        now, then = (arguments._replace(**factors._asdict()) for factors in (layer, change))
        source = scaled(rows, layer.in_scale)
        joined = scaled(product(source, now.edge, now.vertex), layer.edge_scale)
        joined_change = scaled(product(source, then.edge, then.vertex), layer.edge_scale)
        sum_of_both = product(joined, then.vertex, then.edge) + product(joined_change, now.vertex, now.edge)
        found.append(scaled(sum_of_both, layer.out_scale))
    return found


def _gradients(arguments: ConvArguments, needs: ConvArguments, grad: Tensor) -> dict[str, Tensor]:
    """Gradients in x and in every factor that are needed, summed in the accumulation dtype."""
    x, layer, vertex, edge = arguments.x, _Layer.of(arguments), arguments.vertex, arguments.edge

    def core(joined: Tensor, source: Tensor) -> Tensor:
        out = product(scaled(joined, layer.edge_scale), vertex, edge)
        return out if layer.diagonal is None else out - scaled(source, layer.diagonal)

    rows, passed = wide(x), []
    for _ in range(arguments.num_layers):
        source = scaled(rows, layer.in_scale)
        joined = product(source, edge, vertex)
        inner = core(joined, source)
        passed.append((rows, source, joined, inner))
        rows = scaled(inner, layer.out_scale)
    needed: dict[str, list[Tensor]] = {name: [] for name in _Layer._fields if getattr(needs, name)}
    cotangent = grad.to(rows.dtype)
    for rows, source, joined, inner in reversed(passed):
        outer = scaled(cotangent, layer.out_scale)
        left = product(outer, edge, vertex)
        back = core(left, outer)
        of_factor: dict[str, Callable[[], Tensor]] = {
            "vertex_values": lambda s=outer, j=joined: dot(vertex, s, scaled(j, layer.edge_scale)),
            "edge_values": lambda b=left, s=source: dot(edge, scaled(b, layer.edge_scale), s),
            "in_scale": lambda b=back, r=rows: (b * r).sum(1),
            "edge_scale": lambda b=left, j=joined: (b * j).sum(1),
            "out_scale": lambda c=cotangent, i=inner: (c * i).sum(1),
            "diagonal": lambda s=outer, r=source: -(s * r).sum(1),
        }
        for name, terms in needed.items():
            terms.append(of_factor[name]())
        cotangent = scaled(back, layer.in_scale)
    grads = {"x": cotangent.to(x.dtype)} if needs.x else {}
    for name, terms in needed.items():
        factor = getattr(layer, name)
        # Nothing depends on the factors of no layers.
        summed = total(terms)
        grads[name] = torch.zeros_like(factor) if summed is None else summed.to(factor.dtype)
    return grads


def cases(samples: Samples) -> Iterator[Case]:
    for graph in samples.graphs:

        def conv(x: Tensor, graph: SampleGraph = graph) -> Tensor:
            return hypergraph_conv(x, graph.at(x.device), self_loops=False, num_layers=graph.num_layers)

        def defined(x: Tensor, graph: SampleGraph = graph) -> Tensor:
            there = graph.at(x.device)
            scales = there.scales(self_loops=False, dtype=x.dtype)
            csr = (*there.vertex_csr, *there.edge_csr)
            return definition(
                ConvArguments(x, *csr, *scales, graph.num_layers, *there.vertex_schedule, *there.edge_schedule)
            )

        yield Case("hypergraph_conv", graph.name, [graph.vertices], conv, defined, **graph.settings)


OPERATORS = (
    Operator(
        name="hypergraph_conv",
        arguments=ConvArguments,
        returns="Tensor",
        method="hypergraph_conv",
        plain=definition,
        run=lambda method, arguments: method(arguments),
        fake=lambda a: a.x.new_empty(a.x.shape),
        derivatives=_Derivatives,
    ),
)
