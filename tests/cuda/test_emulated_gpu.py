"""The CUDA kernels against the definitions, on the CPU: their text, their launch plans, their barriers and operands."""

from __future__ import annotations

import cuda_build
import pytest
import torch
from op_cases import DTYPES, GRAPH_CASES, Direct, GraphCase, assert_same_bits, assert_within_budget, random_index, rows

from hellm import Hypergraph
from hellm.ops import reference
from hellm.ops.backends.gpu import Gpu


def in_float64(*tensors):
    return [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors]


def accumulation(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def compare(gpu, name, *arguments):
    """Against float64, with what plain torch in the same dtype loses as the budget."""
    found, baseline = getattr(gpu, name)(*arguments), getattr(reference, name)(*arguments)
    truth = getattr(reference, name)(*in_float64(*arguments))
    pack = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    assert_within_budget(pack(truth), pack(baseline), pack(found))
    return found


def arguments_of(graph: Hypergraph, dtype: torch.dtype, **settings):
    """What a convolution takes after the rows: matrices, scales, "layers" of `settings`, schedules."""
    num_layers = settings.pop("num_layers", 1)
    scales = graph.scales(**settings, dtype=accumulation(dtype))
    return *graph.vertex_csr, *graph.edge_csr, *scales, num_layers, *graph.vertex_schedule, *graph.edge_schedule


def propagate_arguments(graph: Hypergraph, dtype: torch.dtype, num_layers: int):
    """What a propagation takes after the rows."""
    scales = graph.bipartite_scales(accumulation(dtype))
    csr = (*graph.vertex_csr[:2], *graph.edge_csr[:2])
    return *csr, *scales, num_layers, *graph.vertex_schedule, *graph.edge_schedule


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAPH_CASES)
def test_sparse_products_match_the_definitions(gpu, case: GraphCase, dtype):
    graph = case.build()
    x, y = rows(graph.num_vertices, case.dim, dtype=dtype), rows(graph.num_hyperedges, case.dim, dtype=dtype, seed=1)
    compare(gpu, "incidence_product", y, *graph.vertex_csr, *graph.vertex_schedule)
    for settings in ({"num_layers": 0}, {"self_loops": False}, {"normalization": "row", "num_layers": 3}):
        compare(gpu, "hypergraph_conv", x, *arguments_of(graph, dtype, **settings))
    if graph.vertex_values is None:
        for num_layers in (1, 2):
            compare(gpu, "bipartite_propagate", x, y, *propagate_arguments(graph, dtype, num_layers))


# Hyperedge 0 holds everything: 16 groups of threads sum rows over 64 entries, the grid those over 1,024 by chunks.
@pytest.mark.parametrize("num_vertices", [65, 1024, 1025, 1536, 7000])
@pytest.mark.parametrize("dim", [3, 12])
def test_long_rows_are_shared(gpu, num_vertices, dim):
    everything = torch.stack([torch.arange(num_vertices), torch.zeros(num_vertices, dtype=torch.int64)])
    index = torch.cat([random_index(num_vertices, 5, 300) + torch.tensor([[0], [1]]), everything], 1)
    graph = GraphCase(index, num_vertices, 6, dim).build()
    x = rows(num_vertices, dim)
    arguments = arguments_of(graph, x.dtype, num_layers=2)
    assert_same_bits([compare(gpu, "hypergraph_conv", x, *arguments)], [gpu.hypergraph_conv(x, *arguments)])
    compare(gpu, "bipartite_propagate", x, rows(6, dim, seed=1), *propagate_arguments(graph, x.dtype, 2))


def popular_items(num_users: int = 2600) -> Hypergraph:
    """Every group of rows of a schedule, several of each, on the side of the hyperedges: hubs, long, medium, short."""
    sizes = [5, 1030, 64, 8, 2600, 65, 9, 0, 1024, 1600, 300, 1, 70]
    vertex = torch.cat([torch.arange(size) * 7 % num_users for size in sizes])
    edge = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return Hypergraph(torch.stack([vertex, edge]), num_vertices=num_users, num_hyperedges=len(sizes))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_every_length_side_by_side(gpu, dtype):
    graph = popular_items()
    for dim in (1, 5, 64, 72):
        compare(gpu, "incidence_product", rows(2600, dim, dtype=dtype), *graph.edge_csr, *graph.edge_schedule)


def test_popular_rows_get_blocks_of_their_own():
    launches = []
    plan = cuda_build.planner(launches)
    graph = popular_items()
    plan.incidence_product(rows(2600, 64), *graph.edge_csr, *graph.edge_schedule)
    (gather, grid), (store, store_grid) = launches
    assert (gather, store) == ("gather_kernel<float, float, 4>", "hub_store_kernel<float, 4>")
    # 3 + 6 + 4 chunks of three hubs and four long rows have a block each, six short rows one together.
    assert grid[0] == 13 + 4 + 1 and store_grid[0] == 3
    launches.clear()
    plan.incidence_product(rows(13, 64), *graph.vertex_csr, *graph.vertex_schedule)
    ((_, grid),) = launches
    assert grid[0] == -(-2600 // 16)


def test_sums_do_not_depend_on_width_or_alignment(gpu):
    graph = popular_items()
    x = rows(2600, 76)
    whole = gpu.incidence_product(x, *graph.edge_csr, *graph.edge_schedule)
    for first, last in ((0, 1), (3, 70), (8, 24), (0, 64)):
        part = gpu.incidence_product(x[:, first:last].contiguous(), *graph.edge_csr, *graph.edge_schedule)
        assert_same_bits([part], [whole[:, first:last]])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [6, 12, 41, 72])
def test_slabs_of_columns_give_the_same_bits(gpu, dim, dtype):
    graph = popular_items()
    x, y = rows(2600, dim, dtype=dtype), rows(13, dim, dtype=dtype, seed=1)
    row_bytes = 2613 * accumulation(dtype).itemsize
    for settings in ({"num_layers": 1}, {"num_layers": 3, "self_loops": False}):
        whole = compare(gpu, "hypergraph_conv", x, *arguments_of(graph, dtype, **settings))
        for columns in (1, 16, 40):
            slabs = Direct(Gpu(gpu._launch, gpu._processors, columns * row_bytes))
            assert_same_bits([slabs.hypergraph_conv(x, *arguments_of(graph, dtype, **settings))], [whole])
    arguments = propagate_arguments(graph, dtype, 2)
    whole = compare(gpu, "bipartite_propagate", x, y, *arguments)
    assert_same_bits(Direct(Gpu(gpu._launch, gpu._processors, 1)).bipartite_propagate(x, y, *arguments), whole)


def test_slabs_are_as_wide_as_the_cache_takes_and_save_memory():
    launches = []
    graph = popular_items()
    x = rows(2600, 72)
    arguments = arguments_of(graph, x.dtype, num_layers=2)
    per_layer = {}
    for columns in (72, 71, 32, 31, 16, 15, 1):
        launches.clear()
        cuda_build.planner(launches, cache_bytes=columns * 2600 * 4).hypergraph_conv(x, *arguments)
        packs = sum(name.startswith("pack_kernel") for name, _ in launches)
        gathers = sum(name.startswith("gather_kernel") for name, _ in launches)
        assert gathers == 4 * max(packs, 1)
        per_layer[columns] = packs
    assert per_layer == {72: 0, 71: 3, 32: 3, 31: 5, 16: 5, 15: 9, 1: 9}
    extension = cuda_build.extension_with_plans()
    schedule = (0, 0, 0, 0, 0)
    whole, slabs = (
        extension.hypergraph_conv_workspace(schedule, schedule, limit, 10**6, 5 * 10**5, 64, 3, 0)
        for limit in (2**60, 24 * 2**20)
    )
    # Edges and vertices of 64 columns; edges, vertices and packed rows of 8.
    assert whole == pytest.approx(1.5e6 * 64 * 4, rel=1e-4) and slabs == pytest.approx(2.5e6 * 8 * 4, rel=1e-4)


def test_rows_off_the_16_byte_grid_are_read_one_by_one(gpu):
    graph = GraphCase(random_index(40, 9, 100), 40, 9, 8).build()
    storage = rows(9 * 8 + 1)
    x = storage[1:].view(9, 8)
    assert x.is_contiguous() and x.data_ptr() % 16
    compare(gpu, "incidence_product", x, *graph.vertex_csr, *graph.vertex_schedule)


def info_nce_inputs(num_keys, dim, dtype, *, subset=False):
    """Two views; a row of the anchor is all zero where there are enough, a row of the subset comes twice."""
    anchor = rows(num_keys, dim, dtype=dtype)
    positive = (anchor.double() + rows(num_keys, dim, dtype=torch.float64, seed=1)).to(dtype)
    if num_keys > 3:
        anchor[2] = 0
    chosen = torch.cat([torch.randperm(num_keys)[: num_keys // 2], torch.tensor([1, 1])]) if subset else None
    num_rows = num_keys if chosen is None else chosen.numel()
    return anchor, positive, chosen, rows(num_rows, seed=5)


def temperature_terms(anchor, positive, t, chosen, row_grad, intra) -> float:
    """Sum over the rows of the sizes of what each adds to the gradient of the temperature."""
    rows = torch.arange(len(anchor)) if chosen is None else chosen
    both = anchor.double(), positive.double()
    each = [
        reference.info_nce_with_gradients(*both, t, rows[i : i + 1], row_grad[i : i + 1].double(), intra, "highest")[3]
        for i in range(len(rows))
    ]
    return float(torch.stack(each).abs().sum())


# Tiles hold 64 or 128 queries and 32 or 64 keys; widths are padded to 64, 128, 256.
@pytest.mark.parametrize(
    ("num_keys", "dim", "temperature", "intra", "dtype", "subset"),
    [
        (1, 8, 0.2, True, torch.float32, False),
        (2, 8, 0.2, True, torch.float32, False),
        (37, 20, 0.05, True, torch.float32, False),
        (150, 64, 0.2, True, torch.float32, False),
        (150, 64, 0.2, False, torch.bfloat16, False),
        (131, 100, 0.5, True, torch.float16, False),
        (90, 128, 0.2, False, torch.float32, True),
        (200, 64, 0.1, True, torch.float32, True),
        (70, 200, 0.2, True, torch.float16, False),
    ],
)
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_info_nce_matches_the_definition(gpu, num_keys, dim, temperature, intra, dtype, subset, precision):
    anchor, positive, chosen, row_grad = info_nce_inputs(num_keys, dim, dtype, subset=subset)
    t = torch.tensor(temperature, dtype=torch.float64)
    truth = reference.info_nce_with_gradients(
        anchor.double(), positive.double(), t, chosen, row_grad.double(), intra, "highest"
    )
    found = gpu.info_nce(anchor, positive, t, chosen, row_grad, intra, precision)
    baseline = reference.info_nce_with_gradients(anchor, positive, t, chosen, row_grad, intra, "highest")
    # float16 products: 2^-11 of a similarity, over the temperature.
    slack = 0.0 if precision == "highest" else 2.0**-11 / temperature
    for position, (true, plain, value) in enumerate(zip(truth, baseline, found, strict=True)):
        assert value.shape == true.shape and torch.isfinite(value).all()
        size, eps = float(true.abs().max()), torch.finfo(value.dtype).eps
        if position == 3:
            # The temperature is float64 here, but its gradient is a float32 sum of rows of either sign.
            size, eps = temperature_terms(anchor, positive, t, chosen, row_grad, intra), torch.finfo(torch.float32).eps
        budget = 4 * float((true - plain.double()).abs().max()) + (slack + 4 * eps) * size + 1e-6
        error = float((true - value.double()).abs().max())
        assert error <= budget, f"tensor {position}: error {error:.3g} > {budget:.3g}"
    alone = gpu.info_nce(anchor, positive, t, chosen, None, intra, precision)
    assert [part.numel() for part in alone[1:]] == [0, 0, 0]
    assert torch.allclose(alone[0], found[0], rtol=1e-5, atol=1e-6)


def test_info_nce_repeats_bit_by_bit_and_hardly_depends_on_the_processors(gpu):
    anchor, positive, _, row_grad = info_nce_inputs(210, 64, torch.float32)
    t = torch.tensor(0.2, dtype=torch.float64)
    arguments = (anchor, positive, t, None, row_grad, True, "highest")
    found = gpu.info_nce(*arguments)
    assert_same_bits(found, gpu.info_nce(*arguments))
    for processors in (1, 7, 100):  # one piece, odd pieces, a piece for each tile
        other = cuda_build.of_processors(gpu, processors).info_nce(*arguments)
        for left, right in zip(found, other, strict=True):
            assert torch.allclose(left, right, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_info_nce_does_not_depend_on_the_length_of_rows(gpu, scale):
    anchor, positive, _, row_grad = info_nce_inputs(40, 20, torch.float32)
    t = torch.tensor(0.2, dtype=torch.float64)
    expected = gpu.info_nce(anchor, positive, t, None, row_grad, True, "highest")
    found = list(gpu.info_nce(anchor, positive * scale, t, None, row_grad, True, "highest"))
    found[2] = found[2].double() * scale
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, check_dtype=False)
    # Subnormal rows are shorter than their inverse lengths can say, and still finite.
    assert gpu.info_nce(anchor * 1e-41, positive, t, None, None, True, "highest")[0].isfinite().all()


# Up to 64 rows of a key are summed by its warp, more by the warps of its block.
@pytest.mark.parametrize("repeats", [64, 65, 150])
def test_long_lists_of_rows_are_shared(gpu, repeats):
    chosen = torch.cat([torch.arange(9), torch.full((repeats - 1,), 4), torch.full((99,), 7), torch.full((67,), 20)])
    chosen = chosen[torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))]
    anchor, positive, _, _ = info_nce_inputs(21, 40, torch.float32)
    t, bias = torch.tensor(0.2, dtype=torch.float64), rows(21, seed=3)
    hidden = rows(len(chosen), 40, seed=2)
    # What plain torch loses in the gradient of t, one number, is chance: several weights make a budget of it.
    weights = [rows(len(chosen), seed=seed) for seed in range(5, 9)]
    for name, first, last in (
        ("info_nce", (anchor, positive, t, chosen), (True, "highest")),
        ("item_cross_entropy", (hidden, anchor, chosen, bias), (True, True)),
    ):
        results = []
        for row_grad in weights:
            arguments = (*first, row_grad, *last)
            found, baseline = getattr(gpu, name)(*arguments), getattr(reference, f"{name}_with_gradients")(*arguments)
            assert_same_bits(found, getattr(gpu, name)(*arguments))
            truth = getattr(reference, f"{name}_with_gradients")(*in_float64(*arguments))
            results.append((truth, baseline, found))
        assert_within_budget(*(list(map(torch.stack, zip(*kind, strict=True))) for kind in zip(*results, strict=True)))


def calls_of_every_kernel(gpu, family: str) -> list:
    if family == "sparse products":
        graph = popular_items()
        x, y = rows(2600, 20), rows(13, 20, seed=1)
        slabs = Direct(Gpu(gpu._launch, gpu._processors, cache_bytes=1))
        layers, sides = arguments_of(graph, x.dtype, num_layers=2), propagate_arguments(graph, x.dtype, 1)
        return [(slabs.hypergraph_conv, x, *layers), (gpu.bipartite_propagate, x, y, *sides)]
    chosen = torch.cat([torch.arange(40), torch.full((70,), 4)])  # a list of rows that the warps of a block share
    t, highest = torch.tensor(0.2, dtype=torch.float64), family.endswith("highest")
    calls = []
    for dim in (64, 100) if highest else (20, 100, 200):
        anchor, positive, _, _ = info_nce_inputs(90, dim, torch.float32)
        hidden, bias, row_grad = rows(110, dim, seed=2), rows(90, seed=3), rows(110, seed=5)
        if family.startswith("info_nce"):
            precision = "highest" if highest else "high"
            calls.append((gpu.info_nce, anchor, positive, t, chosen, row_grad, True, precision))
        else:
            calls.append((gpu.item_cross_entropy, hidden, anchor, chosen, bias, row_grad, True, True))
    return calls


@pytest.mark.parametrize(
    "family",
    [
        "sparse products",
        "info_nce high",
        "info_nce highest",
        "item_cross_entropy high",
        "item_cross_entropy highest",
    ],
)
def test_every_order_of_threads_gives_the_same_bits(gpu, set_order, family, monkeypatch):
    """Threads that run in the order of their numbers would hide a wait that is missing."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: family.split()[-1])
    for call, *arguments in calls_of_every_kernel(gpu, family):
        assert_same_bits(*cuda_build.in_two_orders(set_order, call, *arguments))


def test_info_nce_with_no_weight_has_no_gradient(gpu):
    anchor, positive, _, _ = info_nce_inputs(70, 16, torch.float32)
    t = torch.tensor(0.2, dtype=torch.float64)
    loss, *grads = gpu.info_nce(anchor, positive, t, None, torch.zeros(70), True, "high")
    assert (loss > 0).all()
    assert all((grad == 0).all() for grad in grads)


def test_info_nce_hands_on_nan(gpu):
    anchor, positive, _, row_grad = info_nce_inputs(70, 16, torch.float32)
    anchor[5, 3] = float("nan")
    found = gpu.info_nce(anchor, positive, torch.tensor(0.2, dtype=torch.float64), None, row_grad, True, "high")
    assert found[0].isnan().all()
    assert found[1].isnan().any()


@pytest.mark.parametrize("intra", [True, False])
def test_info_nce_of_rows_that_do_not_exist_is_nan(gpu, intra):
    """Nobody looks at the rows on the host: no address may come of them, and no silent gradient."""
    anchor, positive, _, row_grad = info_nce_inputs(70, 64, torch.float32)
    t = torch.tensor(0.2, dtype=torch.float64)
    chosen = torch.tensor([3, -1, 69, 70, 2**40, -(2**62), 3])
    wrong = (chosen < 0) | (chosen >= 70)
    found = gpu.info_nce(anchor, positive, t, chosen, row_grad[:7], intra, "highest")
    expected = gpu.info_nce(anchor, positive, t, chosen.masked_fill(wrong, 0), row_grad[:7], intra, "highest")
    assert torch.equal(found[0].isnan(), wrong)
    assert torch.equal(found[0][~wrong], expected[0][~wrong])
    assert found[2].isnan().all() and found[3].isnan()
    assert gpu.info_nce(anchor[:1], positive[:1], t, chosen[1:2], None, intra, "high")[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_kernels_do_not_take_goes_to_plain_torch(gpu, dtype):
    dim = 300 if dtype == torch.float32 else 8
    anchor, positive, _, row_grad = info_nce_inputs(20, dim, dtype)
    t = torch.tensor(0.2, dtype=torch.float64)
    arguments = (anchor, positive, t, None, row_grad.to(dtype), True, "high")
    assert_same_bits(gpu.info_nce(*arguments), reference.info_nce_with_gradients(*arguments))


@pytest.fixture(params=["highest", "high"])
def precision(request: pytest.FixtureRequest):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision(before)


def item_inputs(num_rows, num_items, dim, dtype=torch.float32, *, bias=True, scale=1.0):
    """Hidden, items, targets that repeat, bias, row gradients of either sign."""
    hidden, items = scale * rows(num_rows, dim, dtype=dtype), rows(num_items, dim, dtype=dtype, seed=1)
    target = torch.randint(max(1, num_items // 3), (num_rows,), generator=torch.Generator().manual_seed(0))
    return hidden, items, target, rows(num_items, seed=2) if bias else None, rows(num_rows, seed=5)


@pytest.mark.parametrize(
    ("num_rows", "num_items", "dim", "dtype", "bias", "scale"),
    [
        (1, 5, 3, torch.float32, True, 1.0),
        (63, 70, 20, torch.float32, True, 1.0),
        (70, 257, 64, torch.float32, False, 1.0),
        (257, 63, 33, torch.bfloat16, True, 1.0),
        (131, 90, 100, torch.float16, True, 0.3),
        (66, 131, 128, torch.float32, True, 0.1),
        (70, 130, 200, torch.float16, False, 0.1),
        (40, 150, 16, torch.float32, True, 30.0),
        (40, 150, 16, torch.float32, True, 1000.0),
    ],
)
def test_item_cross_entropy_matches_the_definition(gpu, num_rows, num_items, dim, dtype, bias, scale, precision):
    arguments = item_inputs(num_rows, num_items, dim, dtype, bias=bias, scale=scale)
    found = gpu.item_cross_entropy(*arguments, True, True)
    baseline = reference.item_cross_entropy_with_gradients(*arguments, True, True)
    truth = reference.item_cross_entropy_with_gradients(*in_float64(*arguments), True, True)
    if precision == "highest" or dtype != torch.float32:
        # 16-bit rows are exact operands, so only their weights are rounded, to float16.
        assert_within_budget(truth[:1], baseline[:1], found[:1], factor=8.0)
        factor, slack = 8.0, 0.0 if dtype == torch.float32 else 2.0**-11
    else:
        # float16 products: 2^-10 of the sum of what each column may add to a logit.
        factor, slack = 8.0, min(1.0, 2.0**-10 * scale * dim)
    for true, plain, value in zip(truth, baseline, found, strict=True):
        assert value.shape == true.shape and torch.isfinite(value).all()
        if not true.numel():
            continue
        budget = factor * float((true - plain.double()).abs().max()) + 1e-6
        budget += (slack + 4 * torch.finfo(value.dtype).eps) * float(true.abs().max())
        error = float((true - value.double()).abs().max())
        assert error <= budget, f"error {error:.3g} > {budget:.3g}"


def test_item_cross_entropy_gives_what_is_asked_for(gpu):
    arguments = item_inputs(70, 90, 16)
    everything = gpu.item_cross_entropy(*arguments, True, True)
    assert_same_bits(everything, gpu.item_cross_entropy(*arguments, True, True))
    for hidden_grad, items_grad in ((True, False), (False, True), (False, False)):
        found = gpu.item_cross_entropy(*arguments, hidden_grad, items_grad)
        wanted = (True, hidden_grad, items_grad, items_grad)
        for value, whole, want in zip(found, everything, wanted, strict=True):
            # Losses alone come from fewer products, but from the same ones.
            assert torch.equal(value, whole) if want else value.numel() == 0
    assert [t.numel() for t in gpu.item_cross_entropy(*arguments[:4], None, True, True)] == [70, 0, 0, 0]


def test_item_cross_entropy_hardly_depends_on_the_processors(gpu):
    arguments = item_inputs(210, 150, 64)
    found = gpu.item_cross_entropy(*arguments, True, True)
    for processors in (1, 7, 100):  # one piece, odd pieces, a piece for each tile
        other = cuda_build.of_processors(gpu, processors).item_cross_entropy(*arguments, True, True)
        for left, right in zip(found, other, strict=True):
            assert torch.allclose(left, right, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("place", [0, 32_767, 32_768, 3 * 32_768 + 5, 139_999])
def test_the_largest_entry_of_a_table_is_found_wherever_it_is(gpu, place):
    """Warps stride over 32,768 entries, four strides at a time: one that they missed would overflow a half."""
    items = rows(2000, 70)
    items.view(-1)[place] = 1e3
    hidden, target, row_grad = 1e-3 * rows(3, 70, seed=1), torch.tensor([0, 7, 1999]), torch.ones(3)
    found = gpu.item_cross_entropy(hidden, items, target, None, row_grad, True, True)
    truth = reference.item_cross_entropy_with_gradients(*in_float64(hidden, items, target, None, row_grad), True, True)
    for true, value in zip(truth[:2], found[:2], strict=True):
        assert float((true - value.double()).abs().max()) <= 2e-6 * float(true.abs().max())


@pytest.fixture
def coarse_tensor_cores(gpu):
    """What tensor cores truncate when they add is visible in short sums."""
    library = cuda_build.emulated_library()
    yield library.set_accumulator_bits
    library.set_accumulator_bits(24)


@pytest.mark.parametrize("dim", [8, 80, 200])
def test_truncation_does_not_add_up_over_the_keys(gpu, coarse_tensor_cores, dim, monkeypatch):
    """All terms have one sign: over 125 products in one accumulator the sums would lose 2e-3, over a tile 1e-4."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    hidden, items = 1e-3 * rows(5, dim), rows(2000, dim, seed=1).abs()
    arguments = (hidden, items, torch.arange(5), None, torch.ones(5), True, True)
    alone = cuda_build.of_processors(gpu, 1)
    exact = alone.item_cross_entropy(*arguments)[1]
    coarse_tensor_cores(14)
    coarse = alone.item_cross_entropy(*arguments)[1]
    mean = items.mean(0)
    assert float(((exact - coarse).abs() / mean).max()) < 5e-4


def test_item_cross_entropy_at_the_extremes(gpu):
    hidden, items, target, bias, row_grad = item_inputs(40, 90, 8)
    # One item, and the target alone present: nothing to lose.
    for item, wanted in ((items[:1], bias[:1]), (items, torch.full_like(bias, -torch.inf).index_fill(0, target, 1.0))):
        found = gpu.item_cross_entropy(hidden[:1], item, target[:1] * (len(item) > 1), wanted, row_grad[:1], True, True)
        if len(item) == 1:
            assert all((value == 0).all() for value in found)
    # Items with bias -inf take no part; rows a millionth as long as the longest keep their digits.
    bias[50:] = -torch.inf
    hidden[1::2] *= 1e-6
    found = gpu.item_cross_entropy(hidden, items, target, bias, row_grad, True, True)
    truth = reference.item_cross_entropy_with_gradients(
        *in_float64(hidden, items[:50], target, bias[:50], row_grad), True, True
    )
    assert all((part[50:] == 0).all() for part in found[2:])
    for true, value in zip(truth, (*found[:2], found[2][:50], found[3][:50]), strict=True):
        assert float((true - value.double()).abs().max()) <= 2e-6 * float(true.abs().max())
    # Without any weight there is no gradient; NaN stays in its row.
    assert all(
        (grad == 0).all() for grad in gpu.item_cross_entropy(hidden, items, target, bias, 0 * row_grad, True, True)[1:]
    )
    hidden[3, 2] = torch.nan
    loss, grad_hidden, *_ = gpu.item_cross_entropy(hidden, items, target, bias, row_grad, True, True)
    assert loss.isnan().nonzero().flatten().tolist() == [3]
    assert grad_hidden.isnan().any(1).nonzero().flatten().tolist() == [3]


def test_item_cross_entropy_of_targets_that_do_not_exist_is_nan(gpu):
    hidden, items, target, bias, row_grad = item_inputs(40, 90, 8)
    wrong = torch.tensor([1, 5, 17, 39])
    outside = target.index_put((wrong,), torch.tensor([-1, 90, 2**40, -(2**62)]))
    loss, grad_hidden, *rest = gpu.item_cross_entropy(hidden, items, outside, bias, row_grad, True, True)
    expected = gpu.item_cross_entropy(hidden, items, target, bias, row_grad, True, True)
    right = torch.ones(40, dtype=torch.bool).index_fill(0, wrong, False)
    for found, wanted in ((loss, expected[0]), (grad_hidden, expected[1])):
        assert torch.equal(found[right], wanted[right]) and found[wrong].isnan().all()
    assert all(grad.isnan().all() for grad in rest)


@pytest.mark.parametrize(("num_rows", "dim", "dtype"), [(20, 300, torch.float32), (20, 8, torch.float64), (0, 8, None)])
def test_item_cross_entropy_that_the_kernels_do_not_take_goes_to_plain_torch(gpu, num_rows, dim, dtype):
    arguments = item_inputs(num_rows, 30, dim, dtype or torch.float32)
    plain = reference.item_cross_entropy_with_gradients(*arguments, True, True)
    assert_same_bits(gpu.item_cross_entropy(*arguments, True, True), plain)
