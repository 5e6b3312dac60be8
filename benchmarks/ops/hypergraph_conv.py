"""Hypergraph convolution beside sparse products of stock libraries, the published clique and PyTorch Geometric.

V = vertices, M = hyperedges, D = columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.ceilings import gathers_of
from benchmarks.entries import by_torch, candidates, compiled, gradients
from benchmarks.registry import CPU, DIM, GPU, LIMIT, TARGETS, Entry, Setup, Target, Workload, register
from hellm import ops
from hellm.graphs import item_hypergraph, user_hypergraph
from hellm.hypergraph import Hypergraph

# What `hellm.ops.hypergraph_conv` is told to compute the same.
PUBLISHED_USERS = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
PUBLISHED_ITEMS = {"normalization": "symmetric", "hyperedge_degree": False}


def incidence(index: np.ndarray, shape: tuple[int, int], values: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
    """H [V, M] in float64 from [2, nnz] vertices and hyperedges."""
    ones = np.ones(index.shape[1]) if values is None else values
    return scipy.sparse.csr_matrix((ones, (index[0], index[1])), shape=shape)


def clique_row(h: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """The published user matrix D^-1 (H H^T - diag), D its row sums: [V, V]."""
    square = (h @ h.T).tocsr()
    square.setdiag(0)
    square.eliminate_zeros()
    return scipy.sparse.diags(inverse_or_zero(square.sum(1))) @ square


def clique_symmetric(h: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """The published item matrix D^-1/2 H H^T D^-1/2, D the row sums of H H^T: [V, V]."""
    square = (h @ h.T).tocsr()
    scale = scipy.sparse.diags(np.sqrt(inverse_or_zero(square.sum(1))))
    return scale @ square @ scale


def coo_tensor(matrix: scipy.sparse.spmatrix) -> Tensor:
    """Coalesced float32 COO with int64 indices, as torch makes it from a dense matrix."""
    coo = matrix.tocoo()
    index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(index, values, coo.shape, check_invariants=True).coalesce()


def csr_tensor(matrix: scipy.sparse.spmatrix, index_dtype: torch.dtype = torch.int32) -> Tensor:
    """Float32 CSR with sorted columns."""
    csr = matrix.tocsr().sorted_indices()
    index = (torch.from_numpy(part).to(index_dtype) for part in (csr.indptr, csr.indices))
    values = torch.from_numpy(csr.data.astype(np.float32))
    return torch.sparse_csr_tensor(*index, values, size=csr.shape, check_invariants=True)


class TwoProducts:
    """D^-1 (H H^T - diag) x as two cached CSR products, everything that can be folded in beforehand folded in.

    With `symmetric` the published item form, D^-1/2 H H^T D^-1/2 x. The transpose of each factor is cached too, so that
    backward converts nothing: the strongest form stock torch has.
    """

    def __init__(
        self,
        h: scipy.sparse.csr_matrix,
        *,
        symmetric: bool = False,
        index_dtype: torch.dtype = torch.int32,
        product=torch.mm,
        device: torch.device | str = "cpu",
    ) -> None:
        reached, diagonal = h @ np.asarray(h.sum(0)).ravel(), np.asarray(h.multiply(h).sum(1)).ravel()
        if symmetric:
            first = scipy.sparse.diags(np.sqrt(inverse_or_zero(reached))) @ h
            last = first
            self.diagonal = None
        else:
            inverse = inverse_or_zero(reached - diagonal)
            first, last = h, scipy.sparse.diags(inverse) @ h
            self.diagonal = torch.from_numpy((diagonal * inverse).astype(np.float32)).unsqueeze(1).to(device)
        self.scaled, self.gather, self.spread, self.gather_scaled = (
            csr_tensor(part, index_dtype).to(device) for part in (last, first.T, first, last.T)
        )
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._apart(self.product(self.scaled, self.product(self.gather, x)), x)

    def backward(self, grad: Tensor) -> Tensor:
        return self._apart(self.product(self.spread, self.product(self.gather_scaled, grad)), grad)

    def _apart(self, out: Tensor, x: Tensor) -> Tensor:
        return out if self.diagonal is None else out.addcmul_(x, self.diagonal, value=-1)

    def __call__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)


class CachedProduct:
    """A CSR product, its transpose cached for backward."""

    def __init__(self, matrix: scipy.sparse.spmatrix) -> None:
        self.matrix, self.transpose = csr_tensor(matrix), csr_tensor(matrix.T)

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(self.matrix, x)

    def backward(self, grad: Tensor) -> Tensor:
        return torch.mm(self.transpose, grad)

    def __call__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, operator: TwoProducts | CachedProduct) -> Tensor:
        ctx.operator = operator
        return operator.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.operator.backward(grad), None


def reduce_product(matrix: Tensor, x: Tensor) -> Tensor:
    """torch.sparse.mm with its reduction kernel (CSR, CPU only)."""
    return torch.sparse.mm(matrix, x, "sum")


class ScipyTwoProducts:
    """The same with scipy, which runs on one core; forward only."""

    def __init__(self, h: scipy.sparse.csr_matrix) -> None:
        diagonal = np.asarray(h.multiply(h).sum(1)).ravel()
        inverse = inverse_or_zero(h @ np.asarray(h.sum(0)).ravel() - diagonal)
        self.scaled = (scipy.sparse.diags(inverse) @ h).tocsr().astype(np.float32)
        self.gather = h.T.tocsr().astype(np.float32)
        self.diagonal = (diagonal * inverse).astype(np.float32)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.numpy()
        return torch.from_numpy(self.scaled @ (self.gather @ x) - self.diagonal * x)


def pyg_conv(index: Tensor, dim: int, num_hyperedges: int):
    """PyTorch Geometric's HypergraphConv with the identity in place of its linear layer.

    Raises:
        ImportError: torch_geometric is not installed.
    """
    from torch_geometric.nn import HypergraphConv

    conv = HypergraphConv(dim, dim, bias=False)
    conv.lin = torch.nn.Identity()
    return lambda x: conv(x, index, num_edges=num_hyperedges)


def index_add(graph: Hypergraph, settings: dict[str, object], layers: int) -> Callable[[Tensor], Tensor]:
    """Gathering and index_add, twice a layer: PyG's formula, and what torch.compile is given."""
    vertex, edge = graph.hyperedge_index
    in_scale, edge_scale, out_scale, diagonal = (
        None if scale is None else scale.unsqueeze(1) for scale in graph.scales(**settings)
    )

    def run(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = x if in_scale is None else in_scale * x
            joined = x.new_zeros(graph.num_hyperedges, x.shape[1]).index_add(0, edge, x[vertex])
            joined = joined if edge_scale is None else edge_scale * joined
            out = x.new_zeros(x.shape).index_add(0, vertex, joined[edge])
            x = out_scale * (out if diagonal is None else out - diagonal * x)
        return x

    return run


def inverse_or_zero(values) -> np.ndarray:
    """1 / values, 0 where they are 0."""
    values = np.asarray(values, dtype=np.float64).ravel()
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


# ------------------------------------------------------------------------------------------------------- graphs


class Graph(NamedTuple):
    """A hypergraph on a device, and the settings of the published convolution over it."""

    hypergraph: Hypergraph
    settings: dict[str, object]

    def incidence(self) -> scipy.sparse.csr_matrix:
        """H [V, M] in float64."""
        graph = self.hypergraph
        return incidence(graph.hyperedge_index.cpu().numpy(), (graph.num_vertices, graph.num_hyperedges))


class Sizes(NamedTuple):
    """Of a synthetic hypergraph: `empty` is the share of hyperedges without vertices, `hub` how many one more has."""

    num_vertices: int
    num_hyperedges: int
    num_incidences: int
    empty: float = 0.0
    hub: int = 0


SYNTHETIC = {
    "large": Sizes(10**6, 5 * 10**5, 2 * 10**7, hub=50_000),
    "middle": Sizes(10**5, 5 * 10**4, 2 * 10**6),
    "empty": Sizes(10**5, 5 * 10**4, 10**6, empty=0.3),
    "singletons": Sizes(10**5, 10**5, 10**5),
}
_TINY = Sizes(300, 50, 900, empty=0.3, hub=200)


@functools.lru_cache(maxsize=1)
def named_graph(name: str, device: torch.device, tiny: bool) -> Graph:
    """User graphs of the sizes of data sets, kNN item graphs "items-K", and the synthetic ones."""
    if name in SYNTHETIC:
        return Graph(synthetic(name, _TINY if tiny else SYNTHETIC[name]).to(device), PUBLISHED_ITEMS)
    if name.startswith("items-"):
        num_items = 50 if tiny else inputs.SIZES["tiktok"].num_items
        graph = item_hypergraph(inputs.item_features(num_items), int(name.removeprefix("items-")))
        return Graph(graph.to(device), PUBLISHED_ITEMS)
    size = inputs.SIZES["tiny" if tiny else name]
    index = torch.from_numpy(inputs.interactions(size))
    return Graph(user_hypergraph(index, size.num_users, size.num_items).to(device), PUBLISHED_USERS)


def synthetic(name: str, sizes: Sizes) -> Hypergraph:
    """Uniform vertices in hyperedges of a power law; "singletons": vertex v alone in hyperedge v."""
    if name == "singletons":
        alone = torch.arange(min(sizes.num_vertices, sizes.num_hyperedges))
        return Hypergraph(
            torch.stack([alone, alone]), num_vertices=sizes.num_vertices, num_hyperedges=sizes.num_hyperedges
        )
    generator = torch.Generator().manual_seed(0)
    occupied = int(sizes.num_hyperedges * (1 - sizes.empty))
    vertex = torch.randint(sizes.num_vertices, (sizes.num_incidences,), generator=generator)
    edge = (torch.rand(sizes.num_incidences, generator=generator) ** 2 * occupied).long()
    # The hyperedges that are empty lie among the others.
    edge = torch.randperm(sizes.num_hyperedges, generator=generator)[edge]
    hub = torch.arange(sizes.hub)
    index = torch.stack([torch.cat([vertex, hub]), torch.cat([edge, torch.zeros_like(hub)])])
    return Hypergraph(index, num_vertices=sizes.num_vertices, num_hyperedges=sizes.num_hyperedges)


# -------------------------------------------------------------------------------------------------------- cases


def _conv(
    setup: Setup,
    *,
    graph: str = "sports",
    layers: int = 1,
    passes: int = 1,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    pyg: bool = False,
    with_compile: bool = False,
    nvrtc: bool = False,
) -> Workload:
    """One pass is forward alone, two are forward and backward. With `pyg` what PyG's layer computes, beside it."""
    name, (graph, settings) = graph, named_graph(graph, setup.device, setup.tiny)
    settings = {"normalization": "row"} if pyg else settings
    x = inputs.rows(graph.num_vertices, dim).to(setup.device, dtype).requires_grad_(passes == 2)
    cotangent = inputs.rows(graph.num_vertices, dim, seed=1).to(setup.device, dtype)

    def run(function: Callable[[Tensor], Tensor]):
        return gradients(function, (x,), (cotangent,))

    conv = partial(ops.hypergraph_conv, hypergraph=graph, num_layers=layers, **settings)
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    entries = candidates(setup, lambda precision: run(conv), {"": tolerance}, nvrtc=nvrtc)
    if pyg:
        entries.append(Entry("gather and index_add", run(index_add(graph, settings, layers))))
        # Made where it runs, so that a library that is missing costs its entry alone.
        layer = functools.cache(lambda: pyg_conv(graph.hyperedge_index, dim, graph.num_hyperedges))
        note = "identity in place of its linear layer"
        entries.append(Entry("torch_geometric HypergraphConv", run(lambda x: layer()(x)), note=note))
    elif dtype == torch.float32:
        entries += [Entry(label, run(f), note=note) for label, f, note in _peers(setup, name, layers, passes)]
    if with_compile:
        by_index_add = compiled(index_add(graph, settings, layers))
        entries.append(Entry("two index_add, torch.compile", run(by_index_add), "compile"))
    return Workload(
        entries,
        # Bytes of the rows that are gathered.
        2.0 * passes * layers * graph.num_incidences * dim * x.element_size(),
        "byte",
        {
            **graph_sizes(graph),
            "layers": layers,
            "D": dim,
            "passes": passes,
            "dtype": str(dtype).removeprefix("torch."),
        },
        truth=by_torch(conv, (x,), (cotangent,)),
        limit=gathers_of(graph, passes, layers, "large" if name == "large" else "sports"),
    )


def graph_sizes(graph: Hypergraph) -> dict[str, object]:
    """For the record."""
    return {"V": graph.num_vertices, "M": graph.num_hyperedges, "incidences": graph.num_incidences}


@functools.lru_cache(maxsize=1)
def _peers(setup: Setup, name: str, layers: int, passes: int) -> list[tuple[str, Callable[[Tensor], Tensor], str]]:
    """Label, convolution and note: cached CSR products, and of real sizes the published clique."""
    graph = named_graph(name, setup.device, setup.tiny)
    h, symmetric, device = graph.incidence(), graph.settings is PUBLISHED_ITEMS, setup.device
    two = partial(TwoProducts, h, symmetric=symmetric, device=device)
    cached = "cached, scales folded in"
    peers = [("two cached CSR products, int32", two(), cached)]
    if name not in SYNTHETIC:
        clique = (clique_symmetric if symmetric else clique_row)(h)
        note, coo = f"{clique.nnz:,} non-zeros", coo_tensor(clique).to(device)
        peers.append(("two cached CSR products, int64", two(index_dtype=torch.int64), cached))
        if not setup.gpu and passes == 1 and not symmetric:
            peers.append(("two torch.sparse.mm(reduce)", two(product=reduce_product), cached))
            peers.append(("two scipy products", ScipyTwoProducts(h), "one core"))
        if not setup.gpu:
            peers.append(("clique expansion, torch CSR", CachedProduct(clique), note))
        peers.append(("published, clique COO", partial(torch.sparse.mm, coo), note))

    def repeated(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: functools.reduce(lambda x, _: layer(x), range(layers), x)

    return [(label, repeated(layer), note) for label, layer, note in peers]


_add = partial(register, "Hypergraph convolution", _conv)
_title = "hypergraph_conv, user graph of the Sports size, forward"
_add("conv-forward", _title, devices=(CPU,))
_add("conv-backward", f"{_title} + backward", devices=(CPU,), passes=2)
_title = "PyG's HypergraphConv formula on the same graph, forward + backward"
_add("conv-pyg", _title, devices=(CPU, GPU), rank=0, passes=2, pyg=True)
_title = "hypergraph_conv, kNN item graph (k = 5, two modalities), both passes"
_add("conv-items", _title, devices=(CPU,), graph="items-5", passes=2)
_add("conv-sports-1", rank=0, with_compile=True, nvrtc=True)
_add("conv-sports-2", rank=0, layers=2, passes=2, with_compile=True)
_add("conv-large", rank=0, graph="large")
_add("conv-sports-bfloat16", dtype=torch.bfloat16)
_add("conv-tiktok-3", graph="tiktok", layers=3)
for _name in ("items-5", "items-10"):
    _add(f"conv-{_name}", graph=_name, layers=2, passes=2)
for _name in ("middle", "empty", "singletons"):
    _add(f"conv-{_name}", graph=_name)
for _dim in (1, 60, 128, 256):
    _add(f"conv-sports-d{_dim}", dim=_dim)

TARGETS += [
    Target("conv-forward", "hellm", "two cached CSR", 2.5, device=CPU),
    Target("conv-forward", "hellm", LIMIT, 0.8, device=CPU),
    Target("conv-forward", "hellm", "sums written", 0.8, device=CPU),
    Target("conv-backward", "hellm", "published", 100.0, device=CPU),
    Target("conv-backward", "hellm", LIMIT, 0.8, device=CPU),
    Target("conv-backward", "hellm", "sums written", 0.8, device=CPU),
    Target("conv-sports-1", milliseconds=0.028),
    Target("conv-sports-2", milliseconds=0.110),
    Target("conv-sports-2", peer="published", factor=40),
    Target("conv-sports-2", peer="two cached CSR", factor=2),
    Target("conv-pyg", peer="torch_geometric", factor=5),
    Target("conv-large", milliseconds=2.6),
    Target("conv-sports-1", "triton", "hellm cuda", 1 / 1.5),
]
