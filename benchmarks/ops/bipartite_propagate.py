"""LightGCN's propagation beside sparse products of the bipartite matrix."""

from __future__ import annotations

from functools import partial

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.ceilings import gathers_of
from benchmarks.entries import by_torch, candidates, gradients
from benchmarks.ops.hypergraph_conv import coo_tensor, csr_tensor, graph_sizes, inverse_or_zero, named_graph
from benchmarks.registry import CPU, DIM, Entry, Outputs, Setup, Workload, register
from hellm import ops


def bipartite(r: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """D^-1/2 [[0, R], [R^T, 0]] D^-1/2: [U + I, U + I]."""
    adjacency = scipy.sparse.bmat([[None, r], [r.T, None]], format="csr")
    scale = scipy.sparse.diags(np.sqrt(inverse_or_zero(adjacency.sum(1))))
    return scale @ adjacency @ scale


def light_gcn(matrix: Tensor, user: Tensor, item: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Mean of layers 0..num_layers of a sparse bipartite matrix product."""
    layers = [torch.cat([user, item])]
    for _ in range(num_layers):
        layers.append(torch.sparse.mm(matrix, layers[-1]))
    user_out, item_out = torch.stack(layers).mean(0).split([len(user), len(item)])
    return user_out, item_out


# -------------------------------------------------------------------------------------------------------- cases


def _propagate(setup: Setup) -> Workload:
    """Two layers at the Sports size, forward and backward."""
    named = named_graph("sports", setup.device, setup.tiny)
    graph, device = named.hypergraph, setup.device
    counts = (graph.num_vertices, graph.num_hyperedges)
    tables = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate(counts)]
    cotangents = [inputs.rows(n, DIM, seed + 2).to(device) for seed, n in enumerate(counts)]
    matrix = bipartite(named.incidence())
    coo, csr = coo_tensor(matrix).to(device), csr_tensor(matrix).to(device)

    def propagate(user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return ops.bipartite_propagate(user, item, graph, num_layers=2)

    def cached() -> Outputs:
        with torch.no_grad():
            return *light_gcn(csr, *tables, 2), *light_gcn(csr, *cotangents, 2)

    published = gradients(lambda user, item: light_gcn(coo, user, item, 2), tables, cotangents)
    entries = [
        *candidates(setup, lambda _: gradients(propagate, tables, cotangents), {"": 1e-4}, nvrtc=True),
        # The matrix is symmetric, so backward is the same mean over layers of the cotangents.
        Entry("cached CSR products, int32", cached, note="backward by symmetry"),
        Entry("published, COO", published),
    ]
    return Workload(
        entries,
        # Two products a layer and direction; bytes of the rows that are gathered.
        8.0 * graph.num_incidences * DIM * 4,
        "byte",
        {**graph_sizes(graph), "layers": 2, "D": DIM, "dtype": "float32"},
        truth=by_torch(propagate, tables, cotangents),
        limit=gathers_of(graph, passes=2, layers=2),
    )


_add = partial(register, "Hypergraph convolution", _propagate)
_add("propagate", "bipartite_propagate, 2 layers at the Sports size, forward + backward", devices=(CPU,))
_add("propagate-sports", rank=0)
