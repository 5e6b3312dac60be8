"""Convolution over part of a hypergraph: for graphs of which a training step can read but a little.

V = vertices, M = hyperedges, R = rows asked for, S = rows read, D = columns.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_count, as_tensor
from hellm.hypergraph import Hypergraph
from hellm.ops import incidence_product

__all__ = ["SampledConvolution"]


class _Layer(NamedTuple):
    """y = out * (to_vertices (edge * to_hyperedges^T (inner * x)) - diagonal * x[places]) for the rows of a layer.

    Attributes:
        to_hyperedges: drawn vertices of the hyperedges that are read.
        to_vertices: drawn hyperedges of the rows.
        places: [R] where the rows are among those that are read.
        inner, edge, out, diagonal: factors of the rows that are read, of the hyperedges, and of the rows; None is ones,
            and zeros for the diagonal.
    """

    to_hyperedges: Hypergraph
    to_vertices: Hypergraph
    places: Tensor
    inner: Tensor | None
    edge: Tensor | None
    out: Tensor | None
    diagonal: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        x = _scaled(x, self.inner)
        joined = _scaled(incidence_product(x, self.to_hyperedges.to(x.device), transpose=True), self.edge)
        y = incidence_product(joined, self.to_vertices.to(x.device))
        if self.diagonal is not None:
            y = y - _scaled(x[self.places.to(x.device)], self.diagonal)
        return _scaled(y, self.out)


class SampledConvolution:
    """`hellm.ops.hypergraph_conv` for some vertices, estimated from hyperedges and vertices that are drawn.

    A row reads at most `num_hyperedges` of its hyperedges, each of these at most `num_vertices` of its vertices, and so
    on for every layer: the cost goes by the rows that are asked for, not by the graph. What is drawn is weighted by how
    many it stands for, so the result is right in the mean over draws, for any x, and so is its gradient; where nothing
    is left out it is exact. Draws spread over a row evenly (one of each of as many equal parts). Losses that are not
    linear in the result are not without bias. The fused operators do the work, on any device.

    Args:
        hypergraph: on the CPU, where it may be mapped from a file.
        rows: [R] int64 vertices asked for.
        num_hyperedges: of a vertex, at most, >= 1; None is all.
        num_vertices: of a hyperedge, at most, >= 1; None is all.
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
        normalization: str = "symmetric",
        hyperedge_degree: bool = True,
        self_loops: bool = True,
        num_layers: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        rows = _checked_rows(hypergraph, rows)
        limits = [
            None if limit is None else as_count(name, limit, low=1)
            for name, limit in (("num_hyperedges", num_hyperedges), ("num_vertices", num_vertices))
        ]
        options = {"hyperedge_degree": hyperedge_degree, "self_loops": self_loops, "dtype": torch.float64}
        scales = hypergraph.scales(normalization, **options)
        layers = []
        for _ in range(as_count("num_layers", num_layers, low=1)):
            rows, layer = _drawn_layer(hypergraph, rows, limits[0], limits[1], scales, generator)
            layers.append(layer)
        self.sources = rows
        # The layer that was drawn last reads x itself.
        self._layers = layers[::-1]

    def __call__(self, x: Tensor) -> Tensor:
        """[R, D] of the rows that are read, [S, D]."""
        if x.dim() != 2 or len(x) != len(self.sources):
            raise ValueError(f"x must be [{len(self.sources)}, D], the rows of `sources`, got {list(x.shape)}")
        for layer in self._layers:
            x = layer(x)
        return x


def _drawn_layer(hypergraph, rows, num_hyperedges, num_vertices, scales, generator) -> tuple[Tensor, _Layer]:
    """The rows that a layer reads, ascending, and the layer."""
    row, edge, row_value = _drawn(
        hypergraph.vertex_indptr, hypergraph.vertex_edges, hypergraph.vertex_values, rows, num_hyperedges, generator
    )
    edges, edge = torch.unique(edge, return_inverse=True)
    joined, vertex, edge_value = _drawn(
        hypergraph.edge_indptr, hypergraph.edge_vertices, hypergraph.edge_values, edges, num_vertices, generator
    )
    # The rows themselves are read for the diagonal; and without one too, which keeps what is read the same.
    sources, place = torch.unique(torch.cat([rows, vertex]), return_inverse=True)
    places, vertex = place[: len(rows)], place[len(rows) :]

    def part(scale: Tensor | None, chosen: Tensor) -> Tensor | None:
        return None if scale is None else scale[chosen]

    layer = _Layer(
        _weighted(vertex, joined, edge_value, len(sources), len(edges)),
        _weighted(row, edge, row_value, len(rows), len(edges)),
        places,
        part(scales.in_scale, sources),
        part(scales.edge_scale, edges),
        part(scales.out_scale, rows),
        part(scales.diagonal, rows),
    )
    return sources, layer


def _drawn(
    indptr: Tensor, indices: Tensor, values: Tensor | None, rows: Tensor, limit: int | None, generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows of a CSR matrix: place among `rows`, column and weighted value of each entry that is read."""
    start, count = indptr[rows], indptr[rows + 1] - indptr[rows]
    taken = count if limit is None else count.clamp(max=limit)
    row = torch.repeat_interleave(torch.arange(len(rows)), taken)
    place = torch.arange(len(row)) - (taken.cumsum(0) - taken)[row]
    value = torch.ones(len(row))
    if limit is not None:
        of, many = count[row], (count > limit)[row]
        drawn = torch.rand(len(row), dtype=torch.float64, generator=generator)
        # One of each of `limit` equal parts of a row, so that every entry is drawn limit / count times in the mean.
        spread = ((place + drawn) * of / limit).long().clamp(max=of - 1)
        place, value = torch.where(many, spread, place), torch.where(many, of / limit, 1.0)
    entry = start[row] + place
    return row, indices[entry].long(), value if values is None else value * values[entry]


def _weighted(vertex: Tensor, edge: Tensor, value: Tensor, num_vertices: int, num_hyperedges: int) -> Hypergraph:
    return Hypergraph(
        torch.stack([vertex, edge]),
        num_vertices=num_vertices,
        num_hyperedges=num_hyperedges,
        incidence_weight=value.float() if value.dtype != torch.float64 else value,
    )


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x).unsqueeze(1)


def _checked_rows(hypergraph: Hypergraph, rows: Tensor) -> Tensor:
    if hypergraph.device.type != "cpu":
        raise ValueError(f"hypergraph must be on the CPU, where hyperedges are drawn, got {hypergraph.device}")
    rows = as_tensor("rows", rows)
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows must be [R] int64, got {list(rows.shape)} {rows.dtype}")
    if len(rows) and not (int(rows.min()) >= 0 and int(rows.max()) < hypergraph.num_vertices):
        raise ValueError(f"rows must be in [0, {hypergraph.num_vertices}), got {int(rows.min())} to {int(rows.max())}")
    return rows
