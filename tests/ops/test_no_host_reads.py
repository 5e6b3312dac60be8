"""What is captured in a CUDA graph may look at no value: on the meta device, where there is none to look at."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPH_CASES, GraphCase, needs_native

from hellm.ops import _gpu, reference


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("case", GRAPH_CASES)
def test_sparse_definitions_read_no_value(case: GraphCase):
    graph = case.build()
    scales = graph.scales(self_loops=False)
    tensors = [*graph.vertex_csr, *graph.edge_csr, *scales]
    tensors = [None if t is None else t.to("meta") for t in tensors]
    x = meta(graph.num_vertices, 4)
    assert reference.hypergraph_conv(x, *tensors, 2).shape == x.shape


@pytest.mark.parametrize("rows", [None, 5])
@pytest.mark.parametrize("gradients", [True, False])
def test_info_nce_definition_reads_no_value(rows, gradients):
    row_grad = meta(rows or 1100) if gradients else None
    chosen = None if rows is None else meta(rows, dtype=torch.int64)
    inputs = (meta(1100, 4), meta(1100, 4), meta())
    loss, *grads = reference.info_nce_with_gradients(*inputs, chosen, row_grad, True, "highest")
    assert loss.shape == (rows or 1100,)
    assert [g.shape for g in grads] == [t.shape if gradients else (0,) for t in inputs]


def test_item_cross_entropy_definition_reads_no_value():
    inputs = (meta(9, 4), meta(30, 4), meta(9, dtype=torch.int64), meta(30))
    loss, *grads = reference.item_cross_entropy_with_gradients(*inputs, meta(9), True, True, block_elements=64)
    assert [t.shape for t in (loss, *grads)] == [(9,), (9, 4), (30, 4), (30,)]


@needs_native
@pytest.mark.parametrize("rows", [None, 5])
def test_gpu_launches_read_no_value(rows):
    launched = []
    gpu = _gpu.Gpu(lambda name, arguments, device: launched.append(name), processors=lambda device: 4)
    graph = GRAPH_CASES[3].values[0].build()
    scales = [None if t is None else t.to("meta") for t in graph.scales(self_loops=False)]
    csr = [None if t is None else t.to("meta") for t in (*graph.vertex_csr, *graph.edge_csr)]
    # Never seen before: the counts are those of the hypergraph, wherever its tensors are.
    schedules = [schedule.to("meta")._replace(num_long=1) for schedule in (graph.vertex_schedule, graph.edge_schedule)]
    x, y = meta(graph.num_vertices, 4), meta(graph.num_hyperedges, 4)
    assert gpu.hypergraph_conv(x, *csr, *scales, 2, *schedules).shape == x.shape
    found = gpu.bipartite_propagate(x, y, *csr[:2], *csr[3:5], meta(len(x)), meta(len(y)), 2, *schedules)
    assert [t.shape for t in found] == [x.shape, y.shape]
    chosen = None if rows is None else meta(rows, dtype=torch.int64)
    inputs = (meta(1100, 64), meta(1100, 64), meta())
    loss, *grads = gpu.info_nce(*inputs, chosen, meta(rows or 1100), True, "high")
    assert loss.shape == (rows or 1100,) and [g.shape for g in grads] == [t.shape for t in inputs]
    assert launched == ["hypergraph_conv", "bipartite_propagate", "info_nce"]
