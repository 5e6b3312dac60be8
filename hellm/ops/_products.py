"""The sparse products as operators of torch: schemas, shapes and derivatives.

Each is linear in its rows, so that its derivative by them is the operator itself, and columns do not meet, so that a
batch of matrices is one matrix. Gradients of scales and values are summed in the accumulation dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hellm.hypergraph import RowSchedule
from hellm.ops import reference
from hellm.ops._library import Derivatives, accumulation_dtype, define, one_by_one


class _Csr(NamedTuple):
    """A sparse matrix as the operators take it."""

    indptr: Tensor
    indices: Tensor
    values: Tensor | None
    row_order: Tensor
    hub_chunk_begin: Tensor
    num_long: int
    num_hub_chunks: int

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """For each entry [nnz] the product of its row of `left` and its column's row of `right`."""
        return reference.incidence_dot(left, right, self.indptr, self.indices)


def _product(x: Tensor, matrix: _Csr, transposed: _Csr) -> Tensor:
    return torch.ops.hellm.incidence_product(x, *matrix, *transposed)


def _side_by_side(x: Tensor, dim: int | None, batch_size: int) -> Tensor:
    """A batch of matrices, along `dim`, or one for all of it, as [rows, B * D]."""
    return x.repeat(1, batch_size) if dim is None else x.movedim(dim, 1).flatten(1)


def _batch(x: Tensor, batch_size: int) -> Tensor:
    """[rows, B * D] as [rows, B, D]."""
    return x.unflatten(1, (batch_size, x.shape[1] // batch_size))


def _sum(terms: list[Tensor]) -> Tensor | None:
    return sum(terms[1:], terms[0]) if terms else None


# -------------------------------------------------------------------------------------------- incidence product


class _IncidenceProduct(Derivatives):
    """y = H x; H and H^T hold the same values, each in the order of its rows."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, matrix, transposed = inputs[0], _Csr(*inputs[1:8]), _Csr(*inputs[8:])
        ctx.set_materialize_grads(False)
        ctx.matrices = matrix._replace(values=None), transposed._replace(values=None)
        ctx.save_for_backward(x if ctx.needs_input_grad[3] else None, matrix.values, transposed.values)
        ctx.save_for_forward(x, matrix.values, transposed.values)

    @staticmethod
    def _saved(ctx, saved: Sequence[Tensor | None]) -> tuple[Tensor | None, _Csr, _Csr]:
        x, *values = saved
        return x, *(csr._replace(values=v) for csr, v in zip(ctx.matrices, values, strict=True))

    @staticmethod
    def backward(ctx, grad):
        grads = [None] * 15
        if grad is not None:
            x, matrix, transposed = _IncidenceProduct._saved(ctx, ctx.saved_tensors)
            if ctx.needs_input_grad[0]:
                grads[0] = _product(grad, transposed, matrix)
            if ctx.needs_input_grad[3]:
                grads[3] = matrix.dot(grad, x).to(matrix.values.dtype)
        return tuple(grads)

    @staticmethod
    def jvp(ctx, saved, *tangents):
        x, matrix, transposed = _IncidenceProduct._saved(ctx, saved)
        terms = [] if tangents[0] is None else [_product(tangents[0], matrix, transposed)]
        if tangents[3] is not None:
            changed = matrix._replace(values=tangents[3]), transposed._replace(values=tangents[10])
            terms.append(_product(x, *changed))
        return _sum(terms)

    @staticmethod
    def vmap(info, in_dims, x, *matrices):
        if any(dim is not None for dim in in_dims[1:]):
            return one_by_one(torch.ops.hellm.incidence_product, info, in_dims, x, *matrices)
        out = torch.ops.hellm.incidence_product(_side_by_side(x, in_dims[0], info.batch_size), *matrices)
        return _batch(out, info.batch_size), 1


define(
    "incidence_product(Tensor x, Tensor indptr, Tensor indices, Tensor? values, Tensor row_order,"
    " Tensor hub_chunk_begin, int num_long, int num_hub_chunks, Tensor t_indptr, Tensor t_indices, Tensor? t_values,"
    " Tensor t_row_order, Tensor t_hub_chunk_begin, int t_num_long, int t_num_hub_chunks) -> Tensor",
    lambda ops: lambda *args: ops.incidence_product(*args[:4], RowSchedule(*args[4:8])),
    lambda x, indptr, *_: x.new_empty(indptr.shape[0] - 1, x.shape[1]),
    _IncidenceProduct,
)

# ------------------------------------------------------------------------------------------------- convolution


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


# Where they stand among the arguments of the operator.
_PLACES = (3, 6, 7, 8, 9, 10)


class _HypergraphConv(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, layer = inputs[0], _Layer(*(inputs[place] for place in _PLACES))
        learned = any(ctx.needs_input_grad[place] for place in _PLACES)
        ctx.set_materialize_grads(False)
        ctx.structure, ctx.num_layers, ctx.schedules = (*inputs[1:3], *inputs[4:6]), inputs[11], inputs[12:]
        ctx.save_for_backward(x if learned else None, *layer)
        ctx.save_for_forward(x, *layer)

    @staticmethod
    def backward(ctx, grad):
        x, *factors = ctx.saved_tensors
        layer, grads = _Layer(*factors), [None] * 20
        if grad is None:
            return tuple(grads)
        if x is not None:
            grads[0], *found = _conv_gradients(ctx, layer, x, grad)
            for place, factor, gradient in zip(_PLACES, layer, found, strict=True):
                grads[place] = None if gradient is None else gradient.to(factor.dtype)
        elif ctx.needs_input_grad[0]:
            # The core H diag(e) H^T - diag(c) is symmetric: the transpose is the same operator, outer scales swapped.
            swapped = layer._replace(in_scale=layer.out_scale, out_scale=layer.in_scale)
            grads[0] = _convolve(ctx, grad, swapped, ctx.num_layers)
        return tuple(grads)

    @staticmethod
    def jvp(ctx, saved, *tangents):
        x, *factors = saved
        layer, change = _Layer(*factors), _Layer(*(tangents[place] for place in _PLACES))
        if all(tangent is None for tangent in change):
            return None if tangents[0] is None else _convolve(ctx, tangents[0], layer, ctx.num_layers)
        rows, tangent, wide = x, tangents[0], accumulation_dtype(x)
        for _ in range(ctx.num_layers):
            terms = [] if tangent is None else [_convolve(ctx, tangent.to(wide), layer)]
            terms += _changes(ctx, layer, change, rows.to(wide))
            rows, tangent = _convolve(ctx, rows.to(wide), layer), _sum(terms)
        return None if tangent is None else tangent.to(x.dtype)

    @staticmethod
    def vmap(info, in_dims, x, *rest):
        if any(dim is not None for dim in in_dims[1:]):
            return one_by_one(torch.ops.hellm.hypergraph_conv, info, in_dims, x, *rest)
        out = torch.ops.hellm.hypergraph_conv(_side_by_side(x, in_dims[0], info.batch_size), *rest)
        return _batch(out, info.batch_size), 1


def _convolve(ctx, x: Tensor, layer: _Layer, num_layers: int = 1) -> Tensor:
    vertex_indptr, vertex_edges, edge_indptr, edge_vertices = ctx.structure
    vertex, edge = (vertex_indptr, vertex_edges, layer.vertex_values), (edge_indptr, edge_vertices, layer.edge_values)
    return torch.ops.hellm.hypergraph_conv(x, *vertex, *edge, *layer[2:], num_layers, *ctx.schedules)


def _changes(ctx, layer: _Layer, change: _Layer, rows: Tensor) -> list[Tensor]:
    """What adds up to the change of the output of one layer when its factors change."""
    changed = [
        layer._replace(**{name: getattr(change, name)})
        for name in ("in_scale", "out_scale")
        if getattr(change, name) is not None
    ]
    if change.edge_scale is not None or change.diagonal is not None:
        num_hyperedges = ctx.structure[2].shape[0] - 1
        edge_scale = change.diagonal.new_zeros(num_hyperedges) if change.edge_scale is None else change.edge_scale
        changed.append(layer._replace(edge_scale=edge_scale, diagonal=change.diagonal))
    found = [_convolve(ctx, rows, other) for other in changed]
    if change.vertex_values is not None:
        # H and H^T change together: their products, and derivatives of these, take one for the other transposed.
        (vertex, edge), (to_vertex, to_edge) = _matrices(ctx, layer), _matrices(ctx, change)
        source = _scaled(rows, layer.in_scale)
        joined = _scaled(_product(source, edge, vertex), layer.edge_scale)
        joined_change = _scaled(_product(source, to_edge, to_vertex), layer.edge_scale)
        total = _product(joined, to_vertex, to_edge) + _product(joined_change, vertex, edge)
        found.append(_scaled(total, layer.out_scale))
    return found


def _matrices(ctx, layer: _Layer) -> tuple[_Csr, _Csr]:
    """H and H^T."""
    vertex_indptr, vertex_edges, edge_indptr, edge_vertices = ctx.structure
    vertex = _Csr(vertex_indptr, vertex_edges, layer.vertex_values, *ctx.schedules[:4])
    return vertex, _Csr(edge_indptr, edge_vertices, layer.edge_values, *ctx.schedules[4:])


def _conv_gradients(ctx, layer: _Layer, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients in x and in every factor, None where not needed; all but that in x in the accumulation dtype."""
    vertex, edge = _matrices(ctx, layer)
    needed = [ctx.needs_input_grad[place] for place in _PLACES]

    def core(joined: Tensor, source: Tensor) -> Tensor:
        out = _product(_scaled(joined, layer.edge_scale), vertex, edge)
        return out if layer.diagonal is None else out - _scaled(source, layer.diagonal)

    rows, passed = x.to(accumulation_dtype(x)), []
    for _ in range(ctx.num_layers):
        source = _scaled(rows, layer.in_scale)
        joined = _product(source, edge, vertex)
        inner = core(joined, source)
        passed.append((rows, source, joined, inner))
        rows = _scaled(inner, layer.out_scale)
    totals: list[list[Tensor]] = [[] for _ in _PLACES]
    cotangent = grad.to(rows.dtype)
    for rows, source, joined, inner in reversed(passed):
        scaled = _scaled(cotangent, layer.out_scale)
        left = _product(scaled, edge, vertex)
        back = core(left, scaled)
        gradients: tuple[Callable[[], Tensor], ...] = (
            lambda s=scaled, j=joined: vertex.dot(s, _scaled(j, layer.edge_scale)),
            lambda b=left, s=source: edge.dot(_scaled(b, layer.edge_scale), s),
            lambda b=back, r=rows: (b * r).sum(1),
            lambda b=left, j=joined: (b * j).sum(1),
            lambda c=cotangent, i=inner: (c * i).sum(1),
            lambda s=scaled, r=source: -(s * r).sum(1),
        )
        for total, need, gradient in zip(totals, needed, gradients, strict=True):
            if need:
                total.append(gradient())
        cotangent = _scaled(back, layer.in_scale)
    # Nothing depends on the factors of no layers.
    found = (
        (_sum(total) if total else torch.zeros_like(factor)) if need else None
        for total, need, factor in zip(totals, needed, layer, strict=True)
    )
    return cotangent.to(x.dtype) if ctx.needs_input_grad[0] else None, *found


def _scaled(rows: Tensor, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * scale.to(rows.dtype).unsqueeze(1)


define(
    "hypergraph_conv(Tensor x, Tensor vertex_indptr, Tensor vertex_edges, Tensor? vertex_values, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor? edge_values, Tensor? in_scale, Tensor? edge_scale, Tensor? out_scale,"
    " Tensor? diagonal, int num_layers, Tensor vertex_row_order, Tensor vertex_hub_chunk_begin, int vertex_num_long,"
    " int vertex_num_hub_chunks, Tensor edge_row_order, Tensor edge_hub_chunk_begin, int edge_num_long,"
    " int edge_num_hub_chunks) -> Tensor",
    lambda ops: lambda *args: ops.hypergraph_conv(*args[:12], RowSchedule(*args[12:16]), RowSchedule(*args[16:])),
    lambda x, *_: x.new_empty(x.shape),
    _HypergraphConv,
)

# ------------------------------------------------------------------------------------------------- propagation


class _BipartitePropagate(Derivatives):
    """Linear in both sides and symmetric: derivatives of either kind are the operator itself."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.rest = inputs[2:]
        ctx.shapes = [(t.shape, t.dtype, t.device) for t in inputs[:2]]

    @staticmethod
    def _of(ctx, user, item):
        sides = [
            torch.zeros(shape, dtype=dtype, device=device) if side is None else side
            for side, (shape, dtype, device) in zip((user, item), ctx.shapes, strict=True)
        ]
        return torch.ops.hellm.bipartite_propagate(*sides, *ctx.rest)

    @staticmethod
    def backward(ctx, user, item):
        if user is None and item is None:
            return (None,) * 17
        return *_BipartitePropagate._of(ctx, user, item), *[None] * 15

    @staticmethod
    def jvp(ctx, saved, user, item, *_):
        return _BipartitePropagate._of(ctx, user, item)

    @staticmethod
    def vmap(info, in_dims, user_x, item_x, *rest):
        if any(dim is not None for dim in in_dims[2:]):
            return one_by_one(torch.ops.hellm.bipartite_propagate, info, in_dims, user_x, item_x, *rest)
        sides = [_side_by_side(x, d, info.batch_size) for x, d in zip((user_x, item_x), in_dims[:2], strict=True)]
        found = torch.ops.hellm.bipartite_propagate(*sides, *rest)
        return tuple(_batch(x, info.batch_size) for x in found), (1, 1)


define(
    "bipartite_propagate(Tensor user_x, Tensor item_x, Tensor vertex_indptr, Tensor vertex_edges, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor user_scale, Tensor item_scale, int num_layers, Tensor vertex_row_order,"
    " Tensor vertex_hub_chunk_begin, int vertex_num_long, int vertex_num_hub_chunks, Tensor edge_row_order,"
    " Tensor edge_hub_chunk_begin, int edge_num_long, int edge_num_hub_chunks) -> (Tensor, Tensor)",
    lambda ops: lambda *args: ops.bipartite_propagate(*args[:9], RowSchedule(*args[9:13]), RowSchedule(*args[13:])),
    lambda user_x, item_x, *_: (user_x.new_empty(user_x.shape), item_x.new_empty(item_x.shape)),
    _BipartitePropagate,
)
