"""Every usable backend on a GPU against float64: outputs, gradients, bits, large sizes, bad devices."""

from __future__ import annotations

import os

import pytest
import torch
import torch.nn.functional as F
from op_cases import DTYPES, GRAPH_CASES, GraphCase, assert_same_bits, assert_within_budget, outputs_and_gradients, rows

from hellm import Hypergraph, ops
from hellm.ops import backends

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"),
]

# benchmarks.gpu checks one backend a process.
ASKED = os.environ.get("HELLM_TEST_BACKEND")
BACKENDS = [name for name in backends.BACKENDS if name != "native" and ASKED in (None, name)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest):
    """Asked for by name, as what was never verified is not chosen automatically."""
    reason = backends.BACKENDS[request.param].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(reason)
    with ops.backend(request.param):
        yield request.param


def check(function, inputs, *, factor=4.0, slack=0.0):
    """On the device against float64 on the CPU, with what plain torch loses in the same dtype as the budget."""

    def run(device, dtype, name):
        leaves = [x.to(device=device, dtype=dtype or x.dtype) for x in inputs]
        with ops.backend(name):
            return [t.cpu() for t in outputs_and_gradients(lambda *given: function(device, *given), leaves)]

    explicit = backends._explicit.get()
    truth, baseline = run("cpu", torch.float64, "torch"), run("cpu", None, "torch")
    found, again = run("cuda", None, explicit), run("cuda", None, explicit)
    if explicit != "torch":
        assert_same_bits(found, again)
    if slack:
        for true, value in zip(truth, found, strict=True):
            assert float((true - value.double()).abs().max()) <= slack * float(true.abs().max())
    else:
        assert_within_budget(truth, baseline, found, factor=factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAPH_CASES)
def test_sparse_products(backend, case: GraphCase, dtype):
    graphs = {device: case.build().to(device) for device in ("cpu", "cuda")}
    x = rows(graphs["cpu"].num_vertices, case.dim, dtype=dtype)
    y = rows(graphs["cpu"].num_hyperedges, case.dim, dtype=dtype, seed=1)
    check(lambda device, y: ops.incidence_product(y, graphs[device]), [y])
    for layers in (1, 3):
        check(lambda device, x, n=layers: ops.hypergraph_conv(x, graphs[device], self_loops=False, num_layers=n), [x])
    if graphs["cpu"].vertex_values is None:
        check(lambda device, x, y: ops.bipartite_propagate(x, y, graphs[device], num_layers=2), [x, y])


def test_hubs(backend):
    vertex = torch.cat([torch.arange(60_000), torch.arange(500), torch.randint(60_000, (5000,))])
    edge = torch.cat([torch.zeros(60_000), torch.ones(500), torch.randint(2, 900, (5000,)).float()]).long()
    graph = Hypergraph(torch.stack([vertex, edge]), num_vertices=60_000, num_hyperedges=900)
    graphs = {"cpu": graph, "cuda": graph.to("cuda")}
    # A sum of 60,000 terms in another order.
    check(lambda device, x: ops.hypergraph_conv(x, graphs[device]), [rows(60_000, 64)], factor=16.0)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("intra", [True, False], ids=["both-views", "one-view"])
@pytest.mark.parametrize(
    ("num_rows", "dim", "temperature"), [(1, 3, 0.2), (63, 64, 0.05), (257, 67, 0.2), (1000, 128, 0.5), (300, 200, 0.2)]
)
def test_info_nce(backend, precision, reduction, intra, num_rows, dim, temperature):
    anchor = rows(num_rows, dim)
    positive = anchor + rows(num_rows, dim, seed=1)
    t = torch.tensor(temperature)
    tolerance = {"highest": 0.0, "high": 2**-9 / temperature, "medium": 2**-6 / temperature}[precision]
    check(
        lambda device, a, p, t: ops.info_nce(
            a, p, t, intra_view_negatives=intra, reduction=reduction, precision=precision
        ),
        [anchor, positive, t],
        factor=8.0,
        slack=0.0 if num_rows == 1 else tolerance,
    )


def test_info_nce_of_chosen_rows_that_repeat(backend):
    chosen = torch.tensor([5, 1, 5, 80, 99, 5, 0])
    anchor = rows(100, 64)
    check(
        lambda device, a, p: ops.info_nce(a, p, rows=chosen.to(device), precision="highest"),
        [anchor, rows(100, 64, seed=1)],
        factor=8.0,
    )


@pytest.fixture(params=["highest", "high"])
def matmul_precision(request: pytest.FixtureRequest):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("num_rows", "num_items", "dim"), [(1, 5, 3), (63, 257, 64), (257, 63, 67), (1000, 3000, 128), (130, 257, 200)]
)
def test_item_cross_entropy(backend, matmul_precision, dtype, bias, reduction, num_rows, num_items, dim):
    """Under "none" the cotangents have either sign; targets repeat."""
    inputs = [rows(num_rows, dim, dtype=dtype), rows(num_items, dim, dtype=dtype, seed=1)]
    if bias:
        inputs.append(rows(num_items, seed=2))
    target = torch.randint(num_items // 2, (num_rows,), generator=torch.Generator().manual_seed(0))
    exact = matmul_precision == "highest"
    check(
        lambda device, h, e, b=None: ops.item_cross_entropy(h, e, target.to(device), bias=b, reduction=reduction),
        inputs,
        factor=8.0,
        slack={torch.float32: 0.0 if exact else 2e-2, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype],
    )


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_item_cross_entropy_of_large_logits(backend, scale):
    target = torch.randint(300, (257,), generator=torch.Generator().manual_seed(0))
    check(
        lambda device, h, e: ops.item_cross_entropy(h, e, target.to(device)),
        [scale * rows(257, 64), rows(300, 64, seed=1)],
        factor=16.0,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("num_rows", "dim", "k"),
    [(1, 3, 1), (63, 5, 62), (257, 33, 17), (5000, 64, 10), (20_000, 128, 32), (900, 200, 5), (900, 700, 64)],
)
def test_knn(backend, dtype, num_rows, dim, k):
    x = rows(num_rows, dim, dtype=dtype)
    if num_rows > 60:
        x[[3, 50]], x[11] = x[7].clone(), 0
    index, similarity = (t.cpu() for t in ops.knn(x.cuda(), k))
    with ops.backend("torch"):
        expected_index, expected = ops.knn(x.double(), k)
    assert torch.equal(index < 0, expected_index < 0)
    assert torch.allclose(similarity.double(), expected, atol=2e-6)
    unit = torch.nn.functional.normalize(x.double())
    found = (unit @ unit.T).gather(1, index.clamp_min(0)).masked_fill(index < 0, 0.0)
    assert torch.allclose(found, expected, atol=2e-6)


def test_knn_of_clusters_that_halves_cannot_tell_apart(backend):
    x = rows(30, 128, seed=1)[torch.arange(6000) % 30] + 0.02 * rows(6000, 128)
    unit = torch.nn.functional.normalize(x.double())
    expected = (unit @ unit.T).topk(10).values
    assert torch.allclose(ops.knn(x.cuda(), 10)[1].cpu().double(), expected, rtol=0, atol=2e-6)


def test_knn_breaks_ties_by_index(backend):
    if backend in ("torch", "triton"):
        pytest.skip("a matrix product of plain torch may round equal columns differently")
    x = rows(3000, 40)
    copies = torch.tensor([2, 7, 96, 1240, 2999])
    x[copies] = x[2].clone()
    index, similarity = (t.cpu() for t in ops.knn(x.cuda(), 4))
    assert torch.equal(index[copies], copies[:4].expand(5, 4))
    assert (similarity[copies] == similarity[copies, :1]).all()
    # All rows nearly the same: more candidates than there is room for.
    x = rows(1, 40) + 1e-4 * rows(3000, 40)
    unit = torch.nn.functional.normalize(x.double())
    expected = (unit @ unit.T).topk(4).values
    assert torch.allclose(ops.knn(x.cuda(), 4)[1].cpu().double(), expected, rtol=0, atol=1.2e-7)


def test_offsets_beyond_32_bits(backend):
    """2^31 elements and more: the last rows must be those that were meant."""
    dim, num_vertices = 64, 2**31 // 64 + 1000
    if torch.cuda.get_device_properties(0).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    if backend == "torch":
        pytest.skip("the definition gathers into more memory than there is")
    vertex = torch.tensor([0, num_vertices - 1, num_vertices - 3])
    graph = Hypergraph(torch.stack([vertex, torch.zeros(3, dtype=torch.int64)]), num_vertices=num_vertices)
    x = torch.zeros(num_vertices, dim, device="cuda")
    x[vertex.cuda()] = rows(3, dim).cuda()
    out = ops.hypergraph_conv(x, graph.to("cuda"), normalization="none", hyperedge_degree=False)
    assert torch.allclose(out[vertex.cuda()].cpu(), rows(3, dim).sum(0).expand(3, dim), atol=1e-5)
    assert int((out != 0).any(1).sum()) == 3


def test_another_stream_and_a_graph(backend):
    anchor, positive = rows(300, 64).cuda(), rows(300, 64, seed=1).cuda()
    expected = ops.info_nce(anchor, positive, precision="high")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(ops.info_nce(anchor, positive, precision="high"), expected)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.info_nce(anchor, positive, precision="high")
    graph.replay()
    assert torch.equal(captured, expected)


def test_a_hypergraph_may_be_used_first_in_a_capture(backend):
    """Once the kernels are compiled and the scales are there: nothing else is asked of the device."""
    popular = torch.stack([torch.arange(3000), torch.zeros(3000, dtype=torch.int64)])
    known, new = (Hypergraph(popular, num_hyperedges=size).to("cuda") for size in (3, 2))
    x = rows(3000, 64).cuda()
    ops.hypergraph_conv(x, known)
    new.scales()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.hypergraph_conv(x, new)
    graph.replay()
    assert torch.allclose(captured, ops.hypergraph_conv(x, known), atol=1e-6)


def test_too_little_memory_says_how_much_was_asked_for(backend):
    """And what was there before is there afterwards."""
    x = rows(100_000, 64).cuda()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    most = torch.cuda.memory_reserved() + 4 * 2**20
    torch.cuda.set_per_process_memory_fraction(most / torch.cuda.get_device_properties(0).total_memory)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate [\d.]+ [MG]iB"):
            ops.info_nce(x, x)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.equal(x.cpu(), rows(100_000, 64)) and torch.isfinite(ops.info_nce(x[:100], x[:100]))


def test_devices_may_not_be_mixed(backend):
    graph = GraphCase(torch.tensor([[0, 1], [0, 0]]), 2, 1, 4).build()
    with pytest.raises(ValueError, match="hypergraph must be on cuda:0 like x, got cpu"):
        ops.hypergraph_conv(rows(2, 4).cuda(), graph)
    with pytest.raises(ValueError, match="positive must be on cuda:0 like anchor, got cpu"):
        ops.info_nce(rows(2, 4).cuda(), rows(2, 4))


def test_what_was_not_verified_here_is_not_chosen_automatically():
    chosen = backends.select(torch.device("cuda")).name
    assert chosen == "torch" or backends.BACKENDS[chosen].unverified(torch.device("cuda")) is None


def test_info_nce_of_keys_beyond_32_bits(backend):
    """2^31 elements in each view: chosen rows at their end against all keys."""
    num_keys, dim, t = 2**31 // 64 + 1000, 64, 0.2
    if backend == "torch":
        pytest.skip("the definition joins the views in memory")
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("needs 60 GiB of free device memory")
    generator = torch.Generator("cuda").manual_seed(0)
    anchor, positive = (torch.randn(num_keys, dim, device="cuda", generator=generator) for _ in range(2))
    chosen = torch.tensor([num_keys - 1, 5, num_keys - 700], device="cuda")
    with torch.no_grad():
        found = ops.info_nce(anchor, positive, t, rows=chosen, reduction="none", precision="high")
    query = F.normalize(anchor[chosen].double())
    sums = torch.zeros(len(chosen), dtype=torch.float64, device="cuda")
    for view in (anchor, positive):
        for part in view.split(2**20):
            sums += torch.exp(query @ F.normalize(part.double()).T / t).sum(1)
        sums -= torch.exp((query * F.normalize(view[chosen].double())).sum(1) / t)
    aligned = (query * F.normalize(positive[chosen].double())).sum(1) / t
    expected = F.softplus(sums.log() - aligned)
    assert torch.allclose(found.double(), expected, rtol=2**-9 / t)


def test_knn_of_elements_beyond_32_bits(backend):
    num_rows, dim, k = 2**31 // 4096 + 8, 4096, 3
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of free device memory")
    x = torch.randn(num_rows, dim, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    index, similarity = ops.knn(x, k)
    last = F.normalize(x[-4:].double())
    expected = torch.cat([last @ F.normalize(part.double()).T for part in x.split(2**14)], 1).topk(k)
    assert torch.equal(index[-4:, 0], torch.arange(num_rows - 4, num_rows, device="cuda"))
    assert torch.allclose(similarity[-4:].double(), expected.values, rtol=0, atol=2e-6)
