"""Hypergraphs as sparse incidence: construction, degrees and the scales of every normalisation.

V = vertices, M = hyperedges, nnz = incidences. Nothing of size V x V, V x M or M x M is ever built.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

from hellm._arrays import as_count, as_tensor, check_flag
from hellm._degrees import any_repeated, csr, inverse, inverse_root, pair_sum, rows
from hellm._interchange import Interchange, Labels
from hellm.ops.incidence import RowSchedule, Scales

KeptT = TypeVar("KeptT", bound=tuple)

NORMALIZATIONS = ("symmetric", "row", "none")
# Indices are stored as int32.
MOST_ROWS = 2**31 - 1
# Without a given size, larger ids than these many, and than this many for each incidence, are taken for a mistake.
MANY_ROWS, MOST_UNUSED = 10_000_000, 100


class Hypergraph(Interchange):
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
        vertex_indptr: [V + 1] int64; with the next two CSR of H, the hyperedges of each vertex, ascending.
        vertex_edges: [nnz] int32.
        vertex_values: [nnz] float32 (float64 for float64), or None for all ones.
        edge_indptr: [M + 1] int64; with the next two CSR of H^T, the vertices of each hyperedge, ascending.
        edge_vertices: [nnz] int32.
        edge_values: [nnz], like `vertex_values`.
        vertex_schedule: how a GPU shares out the rows of H.
        edge_schedule: how a GPU shares out the rows of H^T.
        labels: ids and attributes of the file that `from_hif` read; None of any other.

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
        vertex, edge = checked_index(hyperedge_index)
        self.num_vertices = checked_size("num_vertices", num_vertices, vertex, row=0)
        self.num_hyperedges = checked_size("num_hyperedges", num_hyperedges, edge, row=1)
        self._hyperedge_weight = _checked_weight("hyperedge_weight", hyperedge_weight, self.num_hyperedges, vertex)
        value = _checked_weight("incidence_weight", incidence_weight, vertex.numel(), vertex)
        self.edge_indptr, self.edge_vertices, edge_order = csr(edge, vertex, self.num_hyperedges, self.num_vertices)
        if value is None:
            del edge_order
        self.vertex_indptr, self.vertex_edges, vertex_order = csr(vertex, edge, self.num_vertices, self.num_hyperedges)
        self._repeated = any_repeated(self.vertex_indptr, self.vertex_edges)
        self.vertex_schedule, self.edge_schedule = map(RowSchedule.of, (self.vertex_indptr, self.edge_indptr))
        # Values in both orders, or the learned ones as given and where both orders find them.
        self._values: tuple[Tensor, Tensor] | None = None
        self._learned_values: Tensor | None = None
        self._value_orders: tuple[Tensor, Tensor] | None = None
        if value is not None and _learned(value):
            self._learned_values, self._value_orders = value, (vertex_order, edge_order)
        elif value is not None:
            self._values = _as_values(value[vertex_order]), _as_values(value[edge_order])
        self._cache: dict[tuple, Any] = {}
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
        if self._learned_values is not None and self._value_orders is not None:
            return _as_values(self._learned_values[self._value_orders[direction]])
        return None if self._values is None else self._values[direction]

    @property
    def hyperedge_index(self) -> Tensor:
        """[2, nnz] int64 in order of vertex, then hyperedge."""
        return torch.stack([rows(self.vertex_indptr, self.num_incidences), self.vertex_edges.long()])

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
        if self._learned_values is not None and self._value_orders is not None:
            # As given, so that what it is shared with stays shared.
            order, values = self._value_orders[0], self._learned_values
            index = torch.empty_like(index).index_copy_(1, order, index)
        sizes = {"num_vertices": self.num_vertices, "num_hyperedges": self.num_hyperedges}
        weights = {"hyperedge_weight": self.hyperedge_weight, "incidence_weight": values}
        labels = {} if self.labels is None else {"labels": self.labels}
        return {"hyperedge_index": index, **sizes, **weights, **labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        labels = state.pop("labels", None)
        self.__init__(**state)
        self.labels = labels

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
            user, item = (inverse_root(degree).to(dtype) for degree in (self.vertex_degree, self.hyperedge_degree))
            return user, item

        return compute() if self._learned_values is not None else self._kept(("bipartite", dtype), compute)

    def _kept(self, key: tuple, compute: Callable[[], KeptT]) -> KeptT:
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
        kept = self._weighted_cache.get(arguments)
        if kept is None or kept[0].dtype != weight.dtype or not torch.equal(kept[0], weight):
            with torch.inference_mode(False):
                then = weight.detach().clone()
                kept = then, self.with_weight(then)._compute_scales(*arguments)
            self._weighted_cache[arguments] = kept
        return kept[1]

    def _compute_scales(self, normalization: str, divide: bool, self_loops: bool, dtype: torch.dtype) -> Scales:
        size = self.hyperedge_degree
        weight = torch.ones_like(size) if self.hyperedge_weight is None else self.hyperedge_weight.double()
        if divide:
            weight = weight * inverse(size)
        edge_scale = None if self.hyperedge_weight is None and not divide else weight
        if self_loops:
            degree, diagonal = self._incidence_sum(weight * size), None
        else:
            degree, diagonal = self._without_self_loops(weight, size)
        if normalization == "symmetric":
            root = inverse_root(degree)
            scales = (root, edge_scale, root, diagonal)
        elif normalization == "row":
            scales = (None, edge_scale, inverse(degree), diagonal)
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
        incidence = pair_sum(rows(self.vertex_indptr, self.num_incidences), edge, value, self.num_hyperedges)
        weighted = weight[edge] * value
        everywhere = torch.ones_like(self.edge_indptr[1:], dtype=torch.float64)
        return (
            self._incidence_sum(everywhere, values=weighted * (size[edge] - incidence)),
            self._incidence_sum(everywhere, values=weighted * incidence),
        )

    def _incidence_sum(self, x: Tensor, *, transpose: bool = False, values: Tensor | None = None) -> Tensor:
        """H x, or H^T x, of a float64 vector; with other `values` of H, in which it is differentiable then."""
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


def checked_index(index: Tensor, name: str = "hyperedge_index") -> tuple[Tensor, Tensor]:
    index = as_tensor(name, index)
    if index.ndim != 2 or index.shape[0] != 2:
        raise ValueError(f"{name} must be [2, nnz], got shape {tuple(index.shape)}")
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {index.dtype}")
    if index.is_meta:
        raise ValueError(f"{name} must hold numbers, got a tensor on the meta device")
    return index[0], index[1]


def checked_size(size_name: str, size: int | None, index: Tensor, *, row: int, name: str = "hyperedge_index") -> int:
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


def _as_values(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()


def _learned(value: Tensor) -> bool:
    """Whether a derivative of any kind may be asked for."""
    wrapped = is_functorch_wrapped_tensor(value)
    return value.requires_grad or wrapped or forward_ad.unpack_dual(value).tangent is not None


def _eager() -> bool:
    """Whether torch computes what it is told, now: nothing is traced, faked or transformed."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    return not (torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active())


# Its state is tensors and numbers, and is checked like arguments.
torch.serialization.add_safe_globals([Hypergraph, Labels])
