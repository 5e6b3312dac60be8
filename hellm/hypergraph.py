"""Hypergraphs as sparse incidence: construction, degrees and the scales of every normalisation.

V = vertices, M = hyperedges, nnz = incidences. Nothing of size V x V, V x M or M x M is ever built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_tensor

NORMALIZATIONS = ("symmetric", "row", "none")


class Scales(NamedTuple):
    """Diagonal factors of one convolution y = out * (H (edge * H^T (in * x)) - diagonal * in * x); None is all ones."""

    in_scale: Tensor | None
    edge_scale: Tensor | None
    out_scale: Tensor | None
    diagonal: Tensor | None


# Entries of a row, as in csrc/cuda/parameters.cuh and kernels/hypergraph_conv.py.
MEDIUM_ROW, LONG_ROW, HUB_ENTRIES, HUB_CHUNK = 8, 64, 1024, 512


class RowSchedule(NamedTuple):
    """How a GPU shares out the rows of a CSR matrix. The counts size the launches: nothing asks the device for them.

    Attributes:
        row_order: [R] int32, all rows: hubs (over 1,024 entries), long rows (over 64), those over 8, the others; each
            group in the order of the matrix, so that rows that a block takes together are about equally long.
        hub_chunk_begin: [hubs + 1] int32, where the chunks of each hub begin; a chunk is 512 entries.
        num_long: rows over 64 entries, hubs included.
        num_hub_chunks: chunks of all hubs.
    """

    row_order: Tensor
    hub_chunk_begin: Tensor
    num_long: int
    num_hub_chunks: int

    @classmethod
    def of(cls, indptr: Tensor) -> RowSchedule:
        """From [R + 1] int64; reads the device once."""
        count = indptr.diff()
        group = sum((count <= limit).int() for limit in (HUB_ENTRIES, LONG_ROW, MEDIUM_ROW))
        chunks = torch.where(group == 0, (count + HUB_CHUNK - 1) // HUB_CHUNK, 0)
        totals = torch.stack([(group == 0).sum(), (group <= 1).sum(), chunks.sum()])
        num_hubs, num_long, num_hub_chunks = totals.tolist()
        row_order = torch.argsort(group, stable=True)
        hub_chunk_begin = torch.zeros(num_hubs + 1, dtype=torch.int32, device=indptr.device)
        torch.cumsum(chunks[row_order[:num_hubs]], 0, dtype=torch.int32, out=hub_chunk_begin[1:])
        return cls(row_order.int(), hub_chunk_begin, num_long, num_hub_chunks)

    def to(self, device: torch.device | str) -> RowSchedule:
        """The same schedule on `device`."""
        return self._replace(row_order=self.row_order.to(device), hub_chunk_begin=self.hub_chunk_begin.to(device))


class Hypergraph:
    """Sparse incidence matrix H [V, M], stored in both directions.

    An incidence that is listed several times counts as the sum of its values (as many ones without
    `incidence_weight`), in the degrees and in the products alike.

    Args:
        hyperedge_index: [2, nnz] int32 or int64; row 0 the vertex, row 1 the hyperedge (PyTorch Geometric's order).
        num_vertices: V; default: the largest vertex + 1.
        num_hyperedges: M; default: the largest hyperedge + 1. Give it when trailing hyperedges are empty.
        hyperedge_weight: [M] floating point; may require a gradient. None is all ones.
        incidence_weight: [nnz] floating point, the values of H in the order of `hyperedge_index`. None is all ones.

    Attributes:
        vertex_indptr, vertex_edges, vertex_values: CSR of H: [V + 1] int64, [nnz] int32, [nnz] float32 or None;
            the hyperedges of each vertex, ascending.
        edge_indptr, edge_vertices, edge_values: CSR of H^T, likewise: the vertices of each hyperedge.
        vertex_schedule, edge_schedule: how a GPU shares out the rows of each.

    Raises:
        ValueError: an index out of range (which, where, the limit), or a wrong shape, dtype, size or device.
    """

    def __init__(
        self,
        hyperedge_index: Tensor,
        *,
        num_vertices: int | None = None,
        num_hyperedges: int | None = None,
        hyperedge_weight: Tensor | None = None,
        incidence_weight: Tensor | None = None,
    ) -> None:
        vertex, edge = _checked_index(hyperedge_index)
        self.num_vertices = _checked_size("num_vertices", num_vertices, vertex, row=0)
        self.num_hyperedges = _checked_size("num_hyperedges", num_hyperedges, edge, row=1)
        self.hyperedge_weight = _checked_weight("hyperedge_weight", hyperedge_weight, self.num_hyperedges, vertex)
        value = _checked_weight("incidence_weight", incidence_weight, vertex.numel(), vertex)
        self.edge_indptr, self.edge_vertices, self.edge_values = _csr(
            edge, vertex, value, self.num_hyperedges, self.num_vertices
        )
        self.vertex_indptr, self.vertex_edges, self.vertex_values = _csr(
            vertex, edge, value, self.num_vertices, self.num_hyperedges
        )
        self.vertex_schedule, self.edge_schedule = map(RowSchedule.of, (self.vertex_indptr, self.edge_indptr))
        self._cache: dict[tuple, tuple] = {}

    @property
    def num_incidences(self) -> int:
        """nnz, repeated incidences counted."""
        return self.edge_vertices.numel()

    @property
    def device(self) -> torch.device:
        """Device of the incidence."""
        return self.edge_vertices.device

    @property
    def hyperedge_index(self) -> Tensor:
        """[2, nnz] int64 in order of vertex, then hyperedge."""
        return torch.stack([_rows(self.vertex_indptr, self.num_incidences), self.vertex_edges.long()])

    @property
    def hyperedge_degree(self) -> Tensor:
        """[M] float64: sum of the incidence values of each hyperedge, the number of its vertices when they are ones."""
        return _degree(self.edge_indptr, self.edge_values)

    @property
    def vertex_degree(self) -> Tensor:
        """[V] float64: sum of the incidence values of each vertex."""
        return _degree(self.vertex_indptr, self.vertex_values)

    @property
    def vertex_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H as (indptr, indices, values)."""
        return self.vertex_indptr, self.vertex_edges, self.vertex_values

    @property
    def edge_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H^T as (indptr, indices, values)."""
        return self.edge_indptr, self.edge_vertices, self.edge_values

    def to(self, device: torch.device | str) -> Hypergraph:
        """The same hypergraph on `device`; itself if it is there already."""
        if self.device == torch.device(device):
            return self
        moved = object.__new__(Hypergraph)
        for name, value in self.__dict__.items():
            setattr(moved, name, value.to(device) if isinstance(value, (Tensor, RowSchedule)) else value)
        moved._cache = {}
        return moved

    def with_weight(self, hyperedge_weight: Tensor | None) -> Hypergraph:
        """The same incidence with other hyperedge weights [M]; shares the index tensors."""
        weighted = object.__new__(Hypergraph)
        weighted.__dict__.update(self.__dict__)
        weighted.hyperedge_weight = _checked_weight(
            "hyperedge_weight", hyperedge_weight, self.num_hyperedges, self.edge_vertices
        )
        weighted._cache = {}
        return weighted

    def scales(
        self,
        normalization: str = "symmetric",
        *,
        hyperedge_degree: bool = True,
        self_loops: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Scales:
        """Diagonal factors that turn the incidence into a normalised operator.

        A = H diag(w / d_e) H^T, or H diag(w) H^T with `hyperedge_degree=False`; minus its diagonal with
        `self_loops=False`; D = A 1. "symmetric" is D^-1/2 A D^-1/2, "row" D^-1 A, "none" A; 0/0 is 0.

        Computed in float64. Without a weight that requires a gradient the result is cached; with one it is
        differentiable in the weight.
        """
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        weight = self.hyperedge_weight
        arguments = (normalization, hyperedge_degree, self_loops, dtype)
        if weight is None:
            return self._cached(arguments, 0, lambda: self._compute_scales(*arguments))
        if weight.requires_grad or torch.compiler.is_compiling() or weight.is_inference():
            return self._compute_scales(*arguments)
        return self._cached(arguments, weight._version, lambda: self._compute_scales(*arguments))

    def _cached(self, key: tuple, version: int, compute: Callable[[], tuple]) -> tuple:
        """One entry per key, replaced when the version of what it was computed from has changed."""
        if key not in self._cache or self._cache[key][0] != version:
            if torch.compiler.is_compiling():
                self._cache[key] = version, compute()
                return self._cache[key][1]
            # A tensor made in inference mode could never be used in training afterwards.
            with torch.inference_mode(False):
                self._cache[key] = version, compute()
        return self._cache[key][1]

    def bipartite_scales(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """D^-1/2 of the vertices [V] and of the hyperedges [M] as the two sides of a bipartite graph."""

        def compute() -> tuple[Tensor, Tensor]:
            user, item = (_power(degree, -0.5).to(dtype) for degree in (self.vertex_degree, self.hyperedge_degree))
            return user, item

        return self._cached(("bipartite", dtype), 0, compute)

    def _compute_scales(self, normalization: str, divide: bool, self_loops: bool, dtype: torch.dtype) -> Scales:
        size = self.hyperedge_degree
        weight = torch.ones_like(size) if self.hyperedge_weight is None else self.hyperedge_weight.double()
        if divide:
            weight = weight * _power(size, -1.0)
        edge_scale = None if self.hyperedge_weight is None and not divide else weight

        vertex, edge = _rows(self.vertex_indptr, self.num_incidences), self.vertex_edges.long()
        value = (
            torch.ones_like(edge, dtype=torch.float64) if self.vertex_values is None else self.vertex_values.double()
        )
        diagonal = None
        contribution = (weight * size)[edge] * value
        if not self_loops:
            # H[v, e] is the sum over repeats. Subtracting it from the degree inside the sum leaves an exact zero for a
            # vertex that is alone in its hyperedges.
            incidence = _pair_sum(vertex, edge, value, self.num_hyperedges)
            diagonal = _row_sum(weight[edge] * value * incidence, self.vertex_indptr, vertex)
            contribution = weight[edge] * value * (size[edge] - incidence)
        degree = _row_sum(contribution, self.vertex_indptr, vertex)
        if normalization == "symmetric":
            root = _power(degree, -0.5)
            scales = (root, edge_scale, root, diagonal)
        elif normalization == "row":
            scales = (None, edge_scale, _power(degree, -1.0), diagonal)
        else:
            scales = (None, edge_scale, None, diagonal)
        return Scales(*(None if scale is None else scale.to(dtype) for scale in scales))

    def __repr__(self) -> str:
        return (
            f"Hypergraph(num_vertices={self.num_vertices}, num_hyperedges={self.num_hyperedges}, "
            f"num_incidences={self.num_incidences})"
        )


def user_hypergraph(user_item_index: Tensor, num_users: int, num_items: int) -> Hypergraph:
    """Users as vertices, items as hyperedges: each item joins the users who share an interest in it.

    Repeated pairs count once. With `hypergraph_conv(..., normalization="row", hyperedge_degree=False,
    self_loops=False)` this is the published user graph D^-1 (R R^T - diag), which is never built.

    Args:
        user_item_index: [2, num_events] int32 or int64: users, then items.
        num_users: rows of the user table.
        num_items: rows of the item table.

    Raises:
        ValueError: an index out of range (which, where, the limit), or a wrong shape or dtype.
    """
    user, item = _checked_index(user_item_index, "user_item_index")
    _checked_size("num_users", num_users, user, row=0, name="user_item_index")
    _checked_size("num_items", num_items, item, row=1, name="user_item_index")
    pair = torch.unique(user.long() * num_items + item)
    index = torch.stack([pair // max(num_items, 1), pair % max(num_items, 1)])
    return Hypergraph(index, num_vertices=num_users, num_hyperedges=num_items)


def item_hypergraph(
    features: Mapping[str, Tensor],
    k: int = 10,
    *,
    masks: Mapping[str, Tensor] | None = None,
    keep_nonpositive: bool = False,
) -> Hypergraph:
    """Items as vertices; for each modality one hyperedge per item: the items that list it among their k nearest.

    Neighbours are by cosine similarity, the item itself included. An item that lacks a modality (mask False, or an
    all-zero row) has no neighbours there and is nobody's neighbour.

    Args:
        features: modality -> [num_items, dim] floating point, finite.
        k: neighbours per item and modality, itself included; 1 <= k <= num_items.
        masks: modality -> [num_items] bool, False where the item lacks that modality.
        keep_nonpositive: False drops neighbours with similarity <= 0; True keeps them with the similarity as the value
            of the incidence, as the published code does.

    Returns:
        Hypergraph with num_items vertices and num_items hyperedges per modality, modalities in the given order.

    Raises:
        ValueError: no modality, an unknown mask, differing numbers of items, k out of range, a feature that is not
            finite (modality and first row).
    """
    from hellm.ops import knn

    blocks = _checked_features(features, masks)
    num_items = next(iter(blocks.values())).shape[0]
    vertices, edges, values = [], [], []
    for block, (modality, x) in enumerate(blocks.items()):
        try:
            neighbour, similarity = knn(x, k)
        except ValueError as error:
            raise ValueError(f"features[{modality!r}]: {error}") from None
        kept = neighbour >= 0 if keep_nonpositive else (neighbour >= 0) & (similarity > 0)
        item = torch.arange(num_items, device=x.device).unsqueeze(1).expand_as(neighbour)
        vertices.append(item[kept])
        edges.append(neighbour[kept] + block * num_items)
        values.append(torch.where(similarity > 0, 1.0, similarity)[kept])
    value = torch.cat(values)
    return Hypergraph(
        torch.stack([torch.cat(vertices), torch.cat(edges)]),
        num_vertices=num_items,
        num_hyperedges=num_items * len(blocks),
        incidence_weight=None if bool((value == 1).all()) else value,
    )


def _checked_features(features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Features with the rows of absent items set to zero, which `knn` gives no neighbours."""
    if not features:
        raise ValueError("features must hold at least one modality, got none")
    unknown = set(masks or {}) - set(features)
    if unknown:
        raise ValueError(f"masks names modalities that features lacks: {sorted(unknown)}")
    blocks: dict[str, Tensor] = {}
    for modality, value in features.items():
        x = as_tensor(f"features[{modality!r}]", value)
        if x.ndim != 2:
            raise ValueError(f"features[{modality!r}] must be [num_items, dim], got shape {tuple(x.shape)}")
        first = next(iter(blocks.values()), x)
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"features[{modality!r}] must have {first.shape[0]} rows, got {x.shape[0]}")
        if x.device != first.device:
            raise ValueError(f"features[{modality!r}] must be on {first.device} like the first, got {x.device}")
        if masks is not None and modality in masks:
            mask = torch.as_tensor(masks[modality])
            if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
                raise ValueError(
                    f"masks[{modality!r}] must be [{x.shape[0]}] bool, got {tuple(mask.shape)} {mask.dtype}"
                )
            if mask.device != x.device:
                raise ValueError(f"masks[{modality!r}] must be on {x.device} like the features, got {mask.device}")
            x = torch.where(mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype))
        blocks[modality] = x
    return blocks


def _checked_index(index: Tensor, name: str = "hyperedge_index") -> tuple[Tensor, Tensor]:
    index = as_tensor(name, index)
    if index.ndim != 2 or index.shape[0] != 2:
        raise ValueError(f"{name} must be [2, nnz], got shape {tuple(index.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {index.dtype}")
    return index[0], index[1]


def _checked_size(size_name: str, size: int | None, index: Tensor, *, row: int, name: str = "hyperedge_index") -> int:
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
    if low < 0:
        position = int((index < 0).nonzero()[0])
        raise ValueError(f"{name}[{row}, {position}] must be >= 0, got {int(index[position])}")
    if size is None:
        return high + 1
    if size < 0:
        raise ValueError(f"{size_name} must be >= 0, got {size}")
    if high >= size:
        position = int((index >= size).nonzero()[0])
        raise ValueError(f"{name}[{row}, {position}] must be < {size_name} = {size}, got {int(index[position])}")
    return size


def _checked_weight(name: str, weight: Tensor | None, size: int, index: Tensor) -> Tensor | None:
    if weight is None:
        return None
    weight = as_tensor(name, weight)
    if weight.shape != (size,):
        raise ValueError(f"{name} must be [{size}], got shape {tuple(weight.shape)}")
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {weight.dtype}")
    if weight.device != index.device:
        raise ValueError(f"{name} must be on {index.device} like the incidence, got {weight.device}")
    return weight


def _csr(
    row: Tensor, column: Tensor, value: Tensor | None, num_rows: int, num_columns: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """CSR with columns ascending within a row: [num_rows + 1] int64, [nnz] int32, [nnz] float32 or None."""
    order = torch.argsort(row.long() * max(num_columns, 1) + column, stable=True)
    indptr = row.new_zeros(num_rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=num_rows), 0, out=indptr[1:])
    return indptr, column[order].to(torch.int32), None if value is None else value.detach()[order].float()


def _rows(indptr: Tensor, nnz: int) -> Tensor:
    """Row of each stored entry, [nnz] int64; nothing here has a shape that depends on values."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=nnz)


def _degree(indptr: Tensor, values: Tensor | None) -> Tensor:
    if values is None:
        return indptr.diff().double()
    return _row_sum(values.double(), indptr, _rows(indptr, values.numel()))


def _row_sum(value: Tensor, indptr: Tensor, row: Tensor) -> Tensor:
    """Sums of the entries of each row of a CSR matrix. Without a gradient in their order, on a GPU too.

    torch cannot differentiate that one twice, and on a GPU one thread has a row: fit for once, not for every step.
    """
    if torch.is_grad_enabled() and value.requires_grad:
        return value.new_zeros(indptr.numel() - 1).index_add(0, row, value)
    return torch.segment_reduce(value, "sum", offsets=indptr, initial=0, unsafe=True)


def _pair_sum(vertex: Tensor, edge: Tensor, value: Tensor, num_hyperedges: int) -> Tensor:
    """For each entry, the sum of the values of all entries of its (vertex, hyperedge) pair; entries are sorted.

    A few float32 numbers summed in float64: exact, in whatever order a GPU adds them.
    """
    key = vertex * max(num_hyperedges, 1) + edge
    starts = torch.cat([torch.zeros_like(key[:1]), (key[1:] != key[:-1]).long()])
    pair = starts.cumsum(0)
    return value.new_zeros(value.numel()).index_add(0, pair, value)[pair]


def _power(degree: Tensor, exponent: float) -> Tensor:
    """degree ** exponent where degree > 0, else 0; safe to differentiate."""
    positive = degree > 0
    return torch.where(positive, torch.where(positive, degree, 1.0) ** exponent, 0.0)
