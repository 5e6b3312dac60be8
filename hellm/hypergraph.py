"""Hypergraphs as sparse incidence: construction, degrees and the scales of every normalisation.

V = vertices, M = hyperedges, nnz = incidences. Nothing of size V x V, V x M or M x M is ever built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hellm._arrays import as_count, as_tensor, check_flag

NORMALIZATIONS = ("symmetric", "row", "none")
# Indices are stored as int32.
MOST_ROWS = 2**31 - 1
# Without a given size, larger ids than these many, and than this many for each incidence, are taken for a mistake.
MANY_ROWS, MOST_UNUSED = 10_000_000, 100


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

    The incidence is copied; `hyperedge_weight` is not and may change in any way: what was computed from it is used
    again only on the CPU and while all its numbers are the same. What depends on the incidence alone is kept once it
    was computed eagerly. A hypergraph may be used from many threads, copied and pickled; `torch.load` reads one with
    `weights_only=True`.

    Args:
        hyperedge_index: [2, nnz] int32 or int64; row 0 the vertex, row 1 the hyperedge (PyTorch Geometric's order).
        num_vertices: V < 2^31; default: the largest vertex + 1.
        num_hyperedges: M < 2^31; default: the largest hyperedge + 1. Give it when trailing hyperedges are empty.
        hyperedge_weight: [M] floating point; may require a gradient. None is all ones.
        incidence_weight: [nnz] floating point, the values of H in the order of `hyperedge_index`. None is all ones.
            One that requires a gradient, such as attention coefficients, gets it and may change; any other is copied.

    Attributes:
        vertex_indptr, vertex_edges, vertex_values: CSR of H: [V + 1] int64, [nnz] int32, [nnz] float32 (float64 for
            float64) or None; the hyperedges of each vertex, ascending.
        edge_indptr, edge_vertices, edge_values: CSR of H^T, likewise: the vertices of each hyperedge.
        vertex_schedule, edge_schedule: how a GPU shares out the rows of each.

    Raises:
        ValueError: an index out of range (which, where, the limit), one so large that the ids should be relabelled, or
            a wrong shape, dtype, size or device.
    """

    @torch.inference_mode(False)  # a tensor made in inference mode could never be used in training afterwards
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
        self._hyperedge_weight = _checked_weight("hyperedge_weight", hyperedge_weight, self.num_hyperedges, vertex)
        value = _checked_weight("incidence_weight", incidence_weight, vertex.numel(), vertex)
        self.edge_indptr, self.edge_vertices, edge_order = _csr(edge, vertex, self.num_hyperedges, self.num_vertices)
        self.vertex_indptr, self.vertex_edges, vertex_order = _csr(vertex, edge, self.num_vertices, self.num_hyperedges)
        self._repeated = _any_repeated(self.vertex_indptr, self.vertex_edges)
        self.vertex_schedule, self.edge_schedule = map(RowSchedule.of, (self.vertex_indptr, self.edge_indptr))
        # Values in both orders, or the learned ones as given and where both orders find them.
        self._values = self._learned_values = self._value_orders = None
        if value is not None and _learned(value):
            self._learned_values, self._value_orders = value, (vertex_order, edge_order)
        elif value is not None:
            self._values = _as_values(value[vertex_order]), _as_values(value[edge_order])
        self._cache: dict[tuple, tuple] = {}
        self._weighted_cache: dict[tuple, tuple[Tensor, Scales]] = {}

    @property
    def num_incidences(self) -> int:
        """nnz, repeated incidences counted."""
        return self.edge_vertices.numel()

    @property
    def device(self) -> torch.device:
        """Device of the incidence."""
        return self.edge_vertices.device

    @property
    def hyperedge_weight(self) -> Tensor | None:
        """[M] or None; the tensor that was given. Assign to it for another one, checked as by the constructor."""
        return self._hyperedge_weight

    @hyperedge_weight.setter
    def hyperedge_weight(self, weight: Tensor | None) -> None:
        self._hyperedge_weight = _checked_weight("hyperedge_weight", weight, self.num_hyperedges, self.edge_vertices)

    @property
    def vertex_values(self) -> Tensor | None:
        """[nnz] in the order of `vertex_edges`."""
        return self._values_in_order(0)

    @property
    def edge_values(self) -> Tensor | None:
        """[nnz] in the order of `edge_vertices`."""
        return self._values_in_order(1)

    def _values_in_order(self, direction: int) -> Tensor | None:
        if self._learned_values is not None:
            return _as_values(self._learned_values[self._value_orders[direction]])
        return None if self._values is None else self._values[direction]

    @property
    def hyperedge_index(self) -> Tensor:
        """[2, nnz] int64 in order of vertex, then hyperedge."""
        return torch.stack([_rows(self.vertex_indptr, self.num_incidences), self.vertex_edges.long()])

    @property
    def hyperedge_degree(self) -> Tensor:
        """[M] float64: sum of the incidence values of each hyperedge, the number of its vertices when they are ones."""
        if not self._valued:
            return self.edge_indptr.diff().double()
        return self._incidence_sum(torch.ones_like(self.vertex_indptr[1:], dtype=torch.float64), transpose=True)

    @property
    def vertex_degree(self) -> Tensor:
        """[V] float64: sum of the incidence values of each vertex."""
        if not self._valued:
            return self.vertex_indptr.diff().double()
        return self._incidence_sum(torch.ones_like(self.edge_indptr[1:], dtype=torch.float64))

    @property
    def vertex_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H as (indptr, indices, values)."""
        return self.vertex_indptr, self.vertex_edges, self.vertex_values

    @property
    def edge_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H^T as (indptr, indices, values)."""
        return self.edge_indptr, self.edge_vertices, self.edge_values

    @property
    def _valued(self) -> bool:
        return self._values is not None or self._learned_values is not None

    def to(self, device: torch.device | str) -> Hypergraph:
        """The same hypergraph on `device`; itself if it is there already."""
        try:
            device = torch.empty(0, device=torch.device(device)).device  # "cuda" is the current one, "cpu:0" is "cpu"
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be one that torch has here, got {device!r}: {error}") from error
        if self.device == device:
            return self

        def there(value: Any) -> Any:
            if isinstance(value, (Tensor, RowSchedule)):
                return value.to(device)
            return tuple(map(there, value)) if type(value) is tuple else value

        moved = object.__new__(Hypergraph)
        moved.__dict__.update({name: there(value) for name, value in self._without_kept().items()})
        return moved

    def _without_kept(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_weighted_cache": {}}

    def with_weight(self, hyperedge_weight: Tensor | None) -> Hypergraph:
        """The same incidence with other hyperedge weights [M]; shares the index tensors."""
        weighted = object.__new__(Hypergraph)
        weighted.__dict__.update(self.__dict__)
        weighted.hyperedge_weight, weighted._weighted_cache = hyperedge_weight, {}
        return weighted

    def __deepcopy__(self, memo: dict) -> Hypergraph:
        copied = object.__new__(Hypergraph)
        copied.__dict__.update(copy.deepcopy(self._without_kept(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """The arguments of the constructor, which checks them again: a file may hold any index."""
        if self.device.type == "meta":
            raise ValueError("a Hypergraph on the meta device has no incidence to save")
        index, values = self.hyperedge_index, self.vertex_values
        if self._learned_values is not None:  # as given, so that what it is shared with stays shared
            order, values = self._value_orders[0], self._learned_values
            index = torch.empty_like(index).index_copy_(1, order, index)
        sizes = {"num_vertices": self.num_vertices, "num_hyperedges": self.num_hyperedges}
        weights = {"hyperedge_weight": self.hyperedge_weight, "incidence_weight": values}
        return {"hyperedge_index": index, **sizes, **weights}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

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
        `self_loops=False`; D = A 1. "symmetric" is D^-1/2 A D^-1/2, "row" D^-1 A, "none" A; 0/0 is 0. Weights may be
        negative: the root of a negative degree is that of its absolute value.

        Computed in float64, differentiable in the weights. Kept as the class says; under `torch.compile` what is not
        kept yet is computed at every call.
        """
        if not isinstance(normalization, str) or normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization must be one of {NORMALIZATIONS}, got {normalization!r}")
        check_flag("hyperedge_degree", hyperedge_degree)
        check_flag("self_loops", self_loops)
        _check_floating(dtype)
        arguments, weight = (normalization, hyperedge_degree, self_loops, dtype), self.hyperedge_weight
        if self._learned_values is not None:
            return self._compute_scales(*arguments)
        if weight is None:
            return self._kept(arguments, lambda: self._compute_scales(*arguments))
        if not _eager() or not weight.is_cpu or _learned(weight):
            return self._compute_scales(*arguments)
        return self._kept_for(weight, arguments)

    def bipartite_scales(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """D^-1/2 of the vertices [V] and of the hyperedges [M] as the two sides of a bipartite graph."""
        _check_floating(dtype)

        def compute() -> tuple[Tensor, Tensor]:
            user, item = (_inverse_root(degree).to(dtype) for degree in (self.vertex_degree, self.hyperedge_degree))
            return user, item

        return compute() if self._learned_values is not None else self._kept(("bipartite", dtype), compute)

    def _kept(self, key: tuple, compute: Callable[[], tuple]) -> tuple:
        """What depends on constant incidence alone. Only plain tensors are kept: nothing that was traced or faked."""
        found = self._cache.get(key)
        if found is not None:
            return found
        if not _eager():
            return compute()
        # A tensor made in inference mode could never be used in training afterwards.
        with torch.inference_mode(False):
            return self._cache.setdefault(key, compute())

    def _kept_for(self, weight: Tensor, arguments: tuple) -> Scales:
        """Scales for a plain weight on the CPU, kept for as long as its numbers are what they were."""
        then, found = self._weighted_cache.get(arguments, (None, None))
        if then is None or then.dtype != weight.dtype or not torch.equal(then, weight):
            with torch.inference_mode(False):
                then = weight.detach().clone()
                found = self.with_weight(then)._compute_scales(*arguments)
            self._weighted_cache[arguments] = then, found
        return found

    def _compute_scales(self, normalization: str, divide: bool, self_loops: bool, dtype: torch.dtype) -> Scales:
        size = self.hyperedge_degree
        weight = torch.ones_like(size) if self.hyperedge_weight is None else self.hyperedge_weight.double()
        if divide:
            weight = weight * _inverse(size)
        edge_scale = None if self.hyperedge_weight is None and not divide else weight
        if self_loops:
            degree, diagonal = self._incidence_sum(weight * size), None
        else:
            degree, diagonal = self._without_self_loops(weight, size)
        if normalization == "symmetric":
            root = _inverse_root(degree)
            scales = (root, edge_scale, root, diagonal)
        elif normalization == "row":
            scales = (None, edge_scale, _inverse(degree), diagonal)
        else:
            scales = (None, edge_scale, None, diagonal)
        # One conversion where one tensor stands twice.
        converted = {id(scale): scale.to(dtype) for scale in scales if scale is not None}
        return Scales(*(None if scale is None else converted[id(scale)] for scale in scales))

    def _without_self_loops(self, weight: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Degrees without the diagonal of A, and that diagonal.

        Its part is left out of each entry and not of the sum, so that a vertex that is alone in its hyperedges has
        degree exactly zero. H[v, e] is the sum over repeats.
        """
        if not self._valued and not self._repeated:
            return self._incidence_sum(weight * (size - 1)), self._incidence_sum(weight)
        edge, value = self.vertex_edges.long(), self.vertex_values
        value = torch.ones_like(edge, dtype=torch.float64) if value is None else value.double()
        incidence = _pair_sum(_rows(self.vertex_indptr, self.num_incidences), edge, value, self.num_hyperedges)
        weighted = weight[edge] * value
        everywhere = torch.ones_like(self.edge_indptr[1:], dtype=torch.float64)
        return (
            self._incidence_sum(everywhere, values=weighted * (size[edge] - incidence)),
            self._incidence_sum(everywhere, values=weighted * incidence),
        )

    def _incidence_sum(self, x: Tensor, *, transpose: bool = False, values: Tensor | None = None) -> Tensor:
        """H x, or H^T x, of a float64 vector; with other `values` of H, in which it is differentiable then."""
        from hellm.ops import _products  # noqa: F401  (registers the operator)

        vertex, edge = [*self.vertex_csr, *self.vertex_schedule], [*self.edge_csr, *self.edge_schedule]
        if values is not None:
            vertex[2] = values
        matrices = (*edge, *vertex) if transpose else (*vertex, *edge)
        return torch.ops.hellm.incidence_product(x.unsqueeze(1), *matrices).squeeze(1)

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
    for name, size in (("num_users", num_users), ("num_items", num_items)):
        as_count(name, size)
    num_users = _checked_size("num_users", num_users, user, row=0, name="user_item_index")
    num_items = _checked_size("num_items", num_items, item, row=1, name="user_item_index")
    pair = torch.unique(user.long() * num_items + item)
    index = torch.stack([pair // max(num_items, 1), pair % max(num_items, 1)])
    return Hypergraph(index, num_vertices=num_users, num_hyperedges=num_items)


def item_hypergraph(
    features: Mapping[str, Tensor],
    k: int = 10,
    *,
    masks: Mapping[str, Tensor] | None = None,
    attributes: Mapping[str, Tensor] | None = None,
    num_items: int | None = None,
    keep_nonpositive: bool = False,
) -> Hypergraph:
    """Items as vertices; for each modality one hyperedge per item: the items that list it among their k nearest.

    Neighbours are by cosine similarity, the item itself included. An item that lacks a modality (mask False, or an
    all-zero row) has no neighbours there and is nobody's neighbour.

    For each attribute there is one hyperedge per value: the items that have it, with the weight k / size. So without
    `hyperedge_degree` it counts in an item's degree as much as a hyperedge of k neighbours, however large it is.

    Args:
        features: modality -> [num_items, dim] floating point, finite.
        k: neighbours per item and modality, itself included; 1 <= k <= num_items.
        masks: modality -> [num_items] bool, False where the item lacks that modality.
        attributes: attribute -> [2, n] int32 or int64, items and values that they have; values are 0, 1, 2, ...
        num_items: needed where there are no features.
        keep_nonpositive: False drops neighbours with similarity <= 0; True keeps them with the similarity as the value
            of the incidence, as the published code does.

    Returns:
        Hypergraph with num_items vertices and num_items hyperedges per modality, modalities in the given order; then
        the values of each attribute.

    Raises:
        ValueError: neither features nor attributes, an unknown mask, differing numbers of items, k out of range, a
            feature that is not finite (modality and first row), an item of an attribute out of range.
    """
    from hellm.ops import knn

    check_flag("keep_nonpositive", keep_nonpositive)
    attributes = attributes or {}
    blocks = _checked_features(features, masks) if features or not attributes else {}
    if blocks:
        num_items = next(iter(blocks.values())).shape[0]
    vertices, edges, values, weights = [], [], [], []
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
        weights.append(torch.ones(num_items, device=x.device))
    for name, index in attributes.items():
        index_name = f"attributes[{name!r}]"
        item, column = _checked_index(index, index_name)
        device = next((x.device for x in vertices), item.device)
        if item.device != device:
            raise ValueError(f"{index_name} must be on {device} like the first, got {item.device}")
        num_items = _checked_size("num_items", num_items, item, row=0, name=index_name)
        size = torch.bincount(column, minlength=_checked_size("values", None, column, row=1, name=index_name))
        vertices.append(item.long())
        edges.append(column.long() + sum(map(len, weights)))
        values.append(torch.ones(len(item), device=item.device))
        weights.append(k / size.clamp(min=1).float())
    value, weight = torch.cat(values), torch.cat(weights)
    return Hypergraph(
        torch.stack([torch.cat(vertices), torch.cat(edges)]),
        num_vertices=num_items,
        num_hyperedges=len(weight),
        hyperedge_weight=weight if attributes else None,
        incidence_weight=None if bool((value == 1).all()) else value,
    )


def _checked_features(features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Features with the rows of absent items set to zero, which `knn` gives no neighbours."""
    for name, given in (("features", features), ("masks", {} if masks is None else masks)):
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} must map modalities to tensors, got {type(given).__name__}")
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
        if x.is_meta:
            raise ValueError(f"features[{modality!r}] must hold numbers, got a tensor on the meta device")
        first = next(iter(blocks.values()), x)
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"features[{modality!r}] must have {first.shape[0]} rows, got {x.shape[0]}")
        if x.device != first.device:
            raise ValueError(f"features[{modality!r}] must be on {first.device} like the first, got {x.device}")
        if masks is not None and modality in masks:
            mask = as_tensor(f"masks[{modality!r}]", masks[modality])
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
    if index.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    return index[0], index[1]


def _checked_size(size_name: str, size: int | None, index: Tensor, *, row: int, name: str = "hyperedge_index") -> int:
    low, high = (int(index.min()), int(index.max())) if index.numel() else (0, -1)
    if low < 0:
        position = int((index < 0).nonzero()[0])
        raise ValueError(f"{name}[{row}, {position}] must be >= 0, got {int(index[position])}")
    if size is not None:
        size = as_count(size_name, size)
        if size > MOST_ROWS:
            raise ValueError(f"{size_name} must be < 2**31, got {size}")
        if high >= size:
            position = int((index >= size).nonzero()[0])
            raise ValueError(f"{name}[{row}, {position}] must be < {size_name} = {size}, got {int(index[position])}")
        return size
    # One huge id would take all memory, 30 bytes for each number that is not in use.
    if high >= max(MOST_UNUSED * index.numel(), MANY_ROWS) or high >= MOST_ROWS:
        position = int(index.argmax())
        raise ValueError(
            f"{name}[{row}, {position}] = {high} makes {size_name} {high + 1} for {index.numel()} incidences: "
            f"relabel the ids to 0, 1, 2, ..." + (f", or give {size_name}" if high < MOST_ROWS else "")
        )
    return high + 1


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


def _check_floating(dtype: torch.dtype) -> None:
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating torch.dtype, got {dtype!r}")


def _csr(row: Tensor, column: Tensor, num_rows: int, num_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """CSR with columns ascending within a row, [num_rows + 1] int64 and [nnz] int32, and the order of its entries."""
    order = torch.argsort(row.long() * max(num_columns, 1) + column, stable=True)
    indptr = row.new_zeros(num_rows + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(row, minlength=num_rows), 0, out=indptr[1:])
    return indptr, column[order].to(torch.int32), order


def _any_repeated(indptr: Tensor, columns: Tensor) -> bool:
    """Whether a row of a CSR matrix with ascending columns has a column twice."""
    equal = columns[1:] == columns[:-1]
    begin = indptr[(indptr > 0) & (indptr < columns.numel())]
    return bool(equal.index_fill(0, begin - 1, False).any())


def _as_values(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _learned(value: Tensor) -> bool:
    """Whether a derivative of any kind may be asked for."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return value.requires_grad or wrapped or forward_ad.unpack_dual(value).tangent is not None


def _eager() -> bool:
    """Whether torch computes what it is told, now: nothing is traced, faked or transformed."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


def _rows(indptr: Tensor, nnz: int) -> Tensor:
    """Row of each stored entry, [nnz] int64; nothing here has a shape that depends on values."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=nnz)


def _pair_sum(vertex: Tensor, edge: Tensor, value: Tensor, num_hyperedges: int) -> Tensor:
    """For each entry, the sum of the values of all entries of its (vertex, hyperedge) pair; entries are sorted.

    A few float32 numbers summed in float64: exact, in whatever order a GPU adds them.
    """
    key = vertex * max(num_hyperedges, 1) + edge
    starts = torch.cat([torch.zeros_like(key[:1]), (key[1:] != key[:-1]).long()])
    pair = starts.cumsum(0)
    return value.new_zeros(value.numel()).index_add(0, pair, value)[pair]


def _inverse(degree: Tensor) -> Tensor:
    """1 / degree, 0 for 0; safe to differentiate."""
    zero = degree == 0
    return torch.where(zero, 0.0, 1.0 / torch.where(zero, 1.0, degree))


def _inverse_root(degree: Tensor) -> Tensor:
    """|degree|^-1/2, 0 for 0; safe to differentiate."""
    zero = degree == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, degree.abs()) ** -0.5)


# Its state is tensors and numbers, and is checked like arguments.
torch.serialization.add_safe_globals([Hypergraph])
