"""What is captured in a CUDA graph may look at no value: on the meta device, where there is none to look at."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPH_CASES, GraphCase

from hellm.ops import reference


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
