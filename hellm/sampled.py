"""Propagation over part of a hypergraph: for graphs of which a training step can read but a little.

V = vertices, M = hyperedges, R = rows asked for, S = rows read, N = entries drawn, D = columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._arrays import as_count, as_tensor
from hellm.hypergraph import Hypergraph
from hellm.ops import incidence_product
from hellm.ops.incidence import Scales

__all__ = ["SampledConvolution", "SampledPropagation"]


class _Layer(NamedTuple):
    """y = out * (to_vertices (edge * to_hyperedges^T (inner * x)) - diagonal * x[places]) for the rows of a layer.

    Attributes:
        to_hyperedges: drawn vertices of the hyperedges that are read.
        to_vertices: drawn hyperedges of the rows.
        places: [R] where the rows are among those that are read; None where the diagonal is zeros.
        inner, edge, out, diagonal: factors of the rows that are read, of the hyperedges, and of the rows; None is ones,
            and zeros for the diagonal.
    """

    to_hyperedges: Hypergraph
    to_vertices: Hypergraph
    places: Tensor | None
    inner: Tensor | None
    edge: Tensor | None
    out: Tensor | None
    diagonal: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        x = _scaled(x, self.inner)
        joined = _scaled(incidence_product(x, self.to_hyperedges.to(x.device), transpose=True), self.edge)
        y = incidence_product(joined, self.to_vertices.to(x.device))
        if self.places is not None:
            y = y - _scaled(x[self.places.to(x.device)], self.diagonal)
        return _scaled(y, self.out)


class SampledConvolution:
    """`hellm.ops.hypergraph_conv` for some vertices, estimated from hyperedges and vertices that are drawn.

    A row reads at most `num_hyperedges` of its hyperedges, each of these at most `num_vertices` of its vertices, and so
    on for every layer, or as many as there are paths: the cost goes by the rows that are asked for, not by the graph.
    What is drawn is weighted by how many it stands for, so the result is right in the mean over draws, for any x, and
    so is its gradient; where nothing is left out it is exact. Draws spread over a row evenly (one of each of as many
    equal parts). Losses that are not linear in the result are not without bias. The fused operators do the work, on any
    device.

    Args:
        hypergraph: on the CPU, where it may be mapped from a file.
        rows: [R] int64 vertices asked for.
        num_hyperedges: of a vertex, at most, >= 1; None is all.
        num_vertices: of a hyperedge, at most, >= 1; None is all.
        num_paths: from each row through all layers, at most, >= 1; they part where there is more than one way, and so
            a layer reads no more than this many vertices for a row, however many layers there are; without self loops
            also the rows that it makes. None is all.
        normalization, hyperedge_degree, self_loops: as for `hellm.ops.hypergraph_conv`.
        num_layers: >= 1.
        generator: what draws; None is torch's own.

    Attributes:
        sources: [S] int64, ascending: the rows of x that are read.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.

    Example:
        >>> sample = SampledConvolution(hypergraph, rows, num_hyperedges=8, num_vertices=8)
        >>> y = sample(x[sample.sources])  # [R, D]; x may be on disk
    """

    def __init__(
        self,
        hypergraph: Hypergraph,
        rows: Tensor,
        *,
        num_hyperedges: int | None = None,
        num_vertices: int | None = None,
        num_paths: int | None = None,
        normalization: str = "symmetric",
        hyperedge_degree: bool = True,
        self_loops: bool = True,
        num_layers: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_on_cpu(hypergraph)
        rows = _checked_rows("rows", rows, hypergraph.num_vertices)
        limits = _checked_limit("num_hyperedges", num_hyperedges), _checked_limit("num_vertices", num_vertices)
        reached = _Reached(rows, _paths(rows, num_paths))
        options = {"hyperedge_degree": hyperedge_degree, "self_loops": self_loops, "dtype": torch.float64}
        scales = hypergraph.scales(normalization, **options)
        layers = []
        for _ in range(as_count("num_layers", num_layers, low=1)):
            reached, layer = _drawn_layer(hypergraph, reached, *limits, scales, generator)
            layers.append(layer)
        self.sources = reached.rows
        # The layer that was drawn last reads x itself.
        self._layers = layers[::-1]

    def __call__(self, x: Tensor) -> Tensor:
        """[R, D] of the rows that are read, [S, D]."""
        _check_read("x", x, self.sources, "sources")
        for layer in self._layers:
            x = layer(x)
        return x


class SampledPropagation:
    """`hellm.ops.bipartite_propagate` for some users and items, estimated from neighbours that are drawn.

    Like `SampledConvolution`: right in the mean over draws, and so is its gradient; exact where nothing is left out.

    Args:
        hypergraph: users are vertices, items hyperedges; without weights, on the CPU.
        users: [R] int64 users asked for.
        items: [R'] int64 items asked for.
        num_paths: from each of them through all layers, at most, >= 1; they part where a node has more than one
            neighbour, and so a layer reads no more than this many nodes for a row. None is all.
        num_layers: >= 0.
        generator: what draws; None is torch's own.

    Attributes:
        user_sources: [S] int64, ascending: the rows of user_x that are read.
        item_sources: [S'] int64, ascending: those of item_x.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.

    Example:
        >>> sample = SampledPropagation(hypergraph, users, items, num_paths=8)
        >>> user_y, item_y = sample(user_x[sample.user_sources], item_x[sample.item_sources])  # [R, D] and [R', D]
    """

    def __init__(
        self,
        hypergraph: Hypergraph,
        users: Tensor,
        items: Tensor,
        *,
        num_paths: int | None = None,
        num_layers: int = 2,
        generator: torch.Generator | None = None,
    ) -> None:
        _check_on_cpu(hypergraph)
        for name in ("incidence_weight", "hyperedge_weight"):
            if (hypergraph.vertex_values if name == "incidence_weight" else hypergraph.hyperedge_weight) is not None:
                raise ValueError(f"hypergraph must have no {name} here, got one")
        users = _checked_rows("users", users, hypergraph.num_vertices)
        items = _checked_rows("items", items, hypergraph.num_hyperedges)
        user_scale, item_scale = hypergraph.bipartite_scales(torch.float64)
        user, item = (_Reached(rows, _paths(rows, num_paths)) for rows in (users, items))
        to_users, to_items, read = [], [], [(users, items)]
        for _ in range(as_count("num_layers", num_layers)):
            of_users = _drawn(hypergraph.vertex_csr, user, None, generator)
            of_items = _drawn(hypergraph.edge_csr, item, None, generator)
            (next_item, item_place), (next_user, user_place) = of_users.reached(), of_items.reached()
            to_users.append(_Neighbours.of(of_users, item_place, user_scale[user.rows], item_scale[next_item.rows]))
            to_items.append(_Neighbours.of(of_items, user_place, item_scale[item.rows], user_scale[next_user.rows]))
            user, item = next_user, next_item
            read.append((user.rows, item.rows))
        self.user_sources, self.item_sources = (torch.unique(torch.cat(side)) for side in zip(*read, strict=True))
        self._to_users, self._to_items = to_users, to_items
        # Of each layer, beginning with the rows that are asked for.
        self._places = [
            (torch.searchsorted(self.user_sources, users), torch.searchsorted(self.item_sources, items))
            for users, items in read
        ]

    def __call__(self, user_x: Tensor, item_x: Tensor) -> tuple[Tensor, Tensor]:
        """[R, D] and [R', D] of the rows that are read, [S, D] and [S', D]."""
        _check_read("user_x", user_x, self.user_sources, "user_sources")
        _check_read("item_x", item_x, self.item_sources, "item_sources")

        def own(layer: int) -> tuple[Tensor, Tensor]:
            # F.embedding sums repeated rows of the gradient in a fixed order, plain indexing does not on CUDA.
            user, item = (place.to(user_x.device) for place in self._places[layer])
            return F.embedding(user, user_x), F.embedding(item, item_x)

        # x + P x + P^2 x + ... = x + P (x + P (x + ...)), with draws of its own for each P.
        user, item = own(-1)
        for layer in reversed(range(len(self._to_users))):
            own_user, own_item = own(layer)
            user, item = own_user + self._to_users[layer](item), own_item + self._to_items[layer](user)
        count = len(self._places)
        return user / count, item / count


class _Neighbours(NamedTuple):
    """y = out * (incidence (inner * x)) for the rows of one side of a bipartite graph."""

    incidence: Hypergraph
    inner: Tensor
    out: Tensor

    @classmethod
    def of(cls, draw: _Draw, place: Tensor, out: Tensor, inner: Tensor) -> _Neighbours:
        return cls(_weighted(draw.row, place, draw.value, len(out), len(inner)), inner, out)

    def __call__(self, x: Tensor) -> Tensor:
        return _scaled(incidence_product(_scaled(x, self.inner), self.incidence.to(x.device)), self.out)


class _Reached(NamedTuple):
    """Rows of a matrix, and the paths [R] int64 that come to each; None is as many as there are ways."""

    rows: Tensor
    paths: Tensor | None


class _Draw(NamedTuple):
    """Entries that are read of some rows of a matrix.

    Attributes:
        row: [N] place among the rows, ascending.
        column: [N].
        value: [N] that of the entry, times the entries that it stands for.
        paths: [N] int64 that go on from it, or None.
    """

    row: Tensor
    column: Tensor
    value: Tensor
    paths: Tensor | None

    def reached(self, also: Tensor | None = None) -> tuple[_Reached, Tensor]:
        """Columns of the entries, ascending, and the place [N] of each; with the rows `also`, those come first.

        A row that is read for itself has one path.
        """
        columns, paths = self.column, self.paths
        if also is not None:
            columns = torch.cat([also, columns])
            paths = None if paths is None else torch.cat([torch.ones_like(also), paths])
        rows, place = torch.unique(columns, return_inverse=True)
        if paths is not None:
            paths = paths.new_zeros(len(rows)).index_add_(0, place, paths)
        return _Reached(rows, paths), place


def _drawn_layer(
    hypergraph: Hypergraph,
    asked: _Reached,
    num_hyperedges: int | None,
    num_vertices: int | None,
    scales: Scales,
    generator: torch.Generator | None,
) -> tuple[_Reached, _Layer]:
    """The rows that a layer reads, ascending, and the layer."""
    to_edges = _drawn(hypergraph.vertex_csr, asked, num_hyperedges, generator)
    edges, edge = to_edges.reached()
    to_vertices = _drawn(hypergraph.edge_csr, edges, num_vertices, generator)
    places = None
    if scales.diagonal is None:
        sources, vertex = to_vertices.reached()
    else:
        sources, vertex = to_vertices.reached(also=asked.rows)
        places, vertex = vertex[: len(asked.rows)], vertex[len(asked.rows) :]

    def part(scale: Tensor | None, chosen: Tensor) -> Tensor | None:
        return None if scale is None else scale[chosen]

    layer = _Layer(
        _weighted(vertex, to_vertices.row, to_vertices.value, len(sources.rows), len(edges.rows)),
        _weighted(to_edges.row, edge, to_edges.value, len(asked.rows), len(edges.rows)),
        places,
        part(scales.in_scale, sources.rows),
        part(scales.edge_scale, edges.rows),
        part(scales.out_scale, asked.rows),
        part(scales.diagonal, asked.rows),
    )
    return sources, layer


def _drawn(
    csr: tuple[Tensor, Tensor, Tensor | None], asked: _Reached, limit: int | None, generator: torch.Generator | None
) -> _Draw:
    """At most `limit` entries of each row, and at most as many as paths come to it, which share them evenly."""
    (indptr, indices, values), (rows, paths) = csr, asked
    start, count = indptr[rows], indptr[rows + 1] - indptr[rows]
    taken = count if limit is None else count.clamp(max=limit)
    if paths is not None:
        taken = torch.minimum(taken, paths)
    row = torch.repeat_interleave(torch.arange(len(rows)), taken)
    place = torch.arange(len(row)) - (taken.cumsum(0) - taken)[row]
    value = torch.ones(len(row))
    if taken is not count:
        of, parts = count[row], taken[row]
        drawn = torch.rand(len(row), dtype=torch.float64, generator=generator)
        # One of each of as many equal parts of a row, so that every entry is drawn taken / count times in the mean.
        spread = ((place + drawn) * of / parts).long().clamp(max=of - 1)
        place, value = torch.where(parts < of, spread, place), of / parts
    entry = start[row] + place
    if paths is not None:
        paths = (paths // taken.clamp(min=1))[row]
    return _Draw(row, indices[entry].long(), value if values is None else value * values[entry], paths)


def _weighted(vertex: Tensor, edge: Tensor, value: Tensor, num_vertices: int, num_hyperedges: int) -> Hypergraph:
    return Hypergraph(
        torch.stack([vertex, edge]),
        num_vertices=num_vertices,
        num_hyperedges=num_hyperedges,
        incidence_weight=value.float() if value.dtype != torch.float64 else value,
    )


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x).unsqueeze(1)


def _check_on_cpu(hypergraph: Hypergraph) -> None:
    if hypergraph.device.type != "cpu":
        raise ValueError(f"hypergraph must be on the CPU, where hyperedges are drawn, got {hypergraph.device}")


def _checked_rows(name: str, rows: Tensor, count: int) -> Tensor:
    rows = as_tensor(name, rows)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"{name} must be [R] int64, got {list(rows.shape)} {rows.dtype}")
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < count):
        raise ValueError(f"{name} must be in [0, {count}), got {int(rows.min())} to {int(rows.max())}")
    return rows


def _checked_limit(name: str, limit: int | None) -> int | None:
    return None if limit is None else as_count(name, limit, low=1)


def _paths(rows: Tensor, num_paths: int | None) -> Tensor | None:
    count = _checked_limit("num_paths", num_paths)
    # Paths add up where they meet, and must fit into int64.
    return None if count is None else torch.full_like(rows, min(count, 2**31))


def _check_read(name: str, x: Tensor, sources: Tensor, attribute: str) -> None:
    if x.dim() != 2 or len(x) != len(sources):
        raise ValueError(f"{name} must be [{len(sources)}, D], the rows of `{attribute}`, got {list(x.shape)}")
