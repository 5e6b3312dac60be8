"""What is captured in a CUDA graph may look at no value: on the meta device, where there is none to look at."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPH_CASES, Direct, GraphCase, needs_native
from torch._subclasses.fake_tensor import FakeTensorMode

from hellm import ops
from hellm.ops import reference
from hellm.ops.backends import loaders
from hellm.ops.backends.gpu import Gpu
from hellm.ops.info_nce import OPERATORS as INFO_NCE
from hellm.ops.info_nce import InfoNCEArguments
from hellm.ops.item_cross_entropy import OPERATORS as ITEM_CROSS_ENTROPY
from hellm.ops.item_cross_entropy import CrossEntropyArguments


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
    launch = lambda name, arguments, device: launched.append(name)  # noqa: E731
    gpu = Direct(Gpu(launch, lambda device: 4, lambda device: 2**17))
    graph = GRAPH_CASES[3].values[0].build()
    scales = [None if t is None else t.to("meta") for t in graph.scales(self_loops=False)]
    csr = [None if t is None else t.to("meta") for t in (*graph.vertex_csr, *graph.edge_csr)]
    # Never seen before: the counts are those of the hypergraph, wherever its tensors are.
    schedules = [schedule.to("meta")._replace(num_long=1) for schedule in (graph.vertex_schedule, graph.edge_schedule)]
    x, y = meta(graph.num_vertices, 4), meta(graph.num_hyperedges, 4)
    assert gpu.hypergraph_conv(x, *csr, *scales, 2, *schedules[0], *schedules[1]).shape == x.shape
    found = gpu.bipartite_propagate(
        x, y, *csr[:2], *csr[3:5], meta(len(x)), meta(len(y)), 2, *schedules[0], *schedules[1]
    )
    assert [t.shape for t in found] == [x.shape, y.shape]
    chosen = None if rows is None else meta(rows, dtype=torch.int64)
    inputs = (meta(1100, 64), meta(1100, 64), meta())
    loss, *grads = gpu.info_nce(*inputs, chosen, meta(rows or 1100), True, "high")
    assert loss.shape == (rows or 1100,) and [g.shape for g in grads] == [t.shape for t in inputs]
    assert launched == ["hypergraph_conv", "bipartite_propagate", "info_nce"]


def test_losses_of_tensors_on_a_gpu_read_no_value():
    with FakeTensorMode():
        x, index = torch.empty(30, 4, device="cuda"), torch.empty(9, dtype=torch.int64, device="cuda")
        hidden = torch.empty(9, 4, device="cuda")
        assert ops.item_cross_entropy(hidden, x, index, reduction="none").shape == (9,)
        assert ops.info_nce(x, x, rows=index, reduction="none").shape == (9,)
    x, index = meta(30, 4), meta(9, dtype=torch.int64)
    items, contrast = ITEM_CROSS_ENTROPY[0], INFO_NCE[0]
    arguments = CrossEntropyArguments(x[:9], x, index, None, "mean", True, True)
    assert items.run(items.plain, arguments)[0].shape == ()
    arguments = InfoNCEArguments(x, x, meta(), index, True, "mean", "high", True)
    assert contrast.run(contrast.plain, arguments)[0].shape == ()


@pytest.fixture
def float16_sums():
    """The caller allows float16 accumulation in matrix products."""
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "allow_fp16_accumulation"):
        pytest.skip("torch before 2.7 has no float16 accumulation")
    settings.allow_fp16_accumulation = True
    yield settings
    settings.allow_fp16_accumulation = False


@needs_native
def test_knn_has_panels_of_512_rows_and_float32_sums(monkeypatch, float16_sums):
    panels, widened = [], []

    def launch(name, arguments, device):
        if name == "knn_select":
            panels.append((arguments[-2], float16_sums.allow_fp16_accumulation))

    monkeypatch.setattr(torch.Tensor, "float", lambda x: widened.append(x.shape) or x.to(torch.float32))
    index, _ = Direct(Gpu(launch)).knn(meta(100_000, 304), 10)
    assert index.shape == (100_000, 10)
    assert panels == [(512, False)] * 195 + [(160, False)]
    assert widened == [(100_000, 304)]
    assert float16_sums.allow_fp16_accumulation


@needs_native
def test_knn_of_narrow_rows_is_one_launch_and_stores_no_similarities():
    launches, h100 = [], (lambda device: 132, lambda device: 228 * 1024)
    gpu = Direct(Gpu(lambda name, arguments, device: launches.append((name, arguments)), *h100))
    index, _ = gpu.knn(meta(100_000, 128), 10)
    assert index.shape == (100_000, 10) and [name for name, _ in launches] == ["knn_scan"]
    settings = (100_000, 128, 10, 132, 228 * 1024, 0)
    assert launches[0][1][-6:] == settings
    # The rows as halves, 64 candidates of each, and what is held of the tiles.
    extra = 100_000 * (2 * 128 + 4 * 64) + 3 * 132 * 128 * 96 * 8
    assert extra < loaders.native().knn_scan_workspace(*settings) < extra + 2**21
