"""The CUDA kernels against the definitions, on the CPU: their text, their launch plans, their barriers and operands."""

from __future__ import annotations

import cuda_build
import pytest
import torch
from op_cases import DTYPES, GRAPH_CASES, GraphCase, assert_same_bits, assert_within_budget, random_index, rows

from hellm.ops import reference
from hellm.ops._gpu import Gpu


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return cuda_build.emulated_gpu()


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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAPH_CASES)
def test_sparse_products_match_the_definitions(gpu, case: GraphCase, dtype):
    graph = case.build()
    csr = (*graph.vertex_csr, *graph.edge_csr)
    x, y = rows(graph.num_vertices, case.dim, dtype=dtype), rows(graph.num_hyperedges, case.dim, dtype=dtype, seed=1)
    compare(gpu, "incidence_product", y, *graph.vertex_csr)
    for num_layers, settings in ((0, {}), (1, {"self_loops": False}), (3, {"normalization": "row"})):
        scales = graph.scales(**settings, dtype=accumulation(dtype))
        compare(gpu, "hypergraph_conv", x, *csr, *scales, num_layers)
    if graph.vertex_values is None:
        scales = graph.bipartite_scales(accumulation(dtype))
        for num_layers in (1, 2):
            compare(gpu, "bipartite_propagate", x, y, *csr[:2], *csr[3:5], *scales, num_layers)


# Hyperedge 0 holds everything: the block sums rows over 64 entries, the grid those over 4,096, in chunks of 2,048.
@pytest.mark.parametrize("num_vertices", [65, 4096, 4097, 7000])
@pytest.mark.parametrize("dim", [3, 12])
def test_long_rows_are_shared(gpu, num_vertices, dim):
    everything = torch.stack([torch.arange(num_vertices), torch.zeros(num_vertices, dtype=torch.int64)])
    index = torch.cat([random_index(num_vertices, 5, 300) + torch.tensor([[0], [1]]), everything], 1)
    graph = GraphCase(index, num_vertices, 6, dim).build()
    x = rows(num_vertices, dim)
    csr = (*graph.vertex_csr, *graph.edge_csr)
    found = compare(gpu, "hypergraph_conv", x, *csr, *graph.scales(dtype=torch.float32), 2)
    again = gpu.hypergraph_conv(x, *csr, *graph.scales(dtype=torch.float32), 2)
    assert_same_bits([found], [again])


def test_two_hubs_may_meet_in_one_chunk(gpu):
    vertex = torch.cat([torch.arange(5000), torch.arange(6000), torch.arange(7)])
    edge = torch.cat([torch.full((5000,), 1), torch.full((6000,), 2), torch.full((7,), 3)])
    graph = GraphCase(torch.stack([vertex, edge]), 6000, 5, 4).build()
    compare(gpu, "incidence_product", rows(6000, 4), *graph.edge_csr)


def test_rows_off_the_16_byte_grid_are_read_one_by_one(gpu):
    graph = GraphCase(random_index(40, 9, 100), 40, 9, 8).build()
    storage = rows(9 * 8 + 1)
    x = storage[1:].view(9, 8)
    assert x.is_contiguous() and x.data_ptr() % 16
    compare(gpu, "incidence_product", x, *graph.vertex_csr)


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
        other = Gpu(gpu._launch, lambda device, count=processors: count).info_nce(*arguments)
        for left, right in zip(found, other, strict=True):
            assert torch.allclose(left, right, rtol=2e-5, atol=2e-6)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_kernels_do_not_take_goes_to_plain_torch(gpu, dtype):
    dim = 300 if dtype == torch.float32 else 8
    anchor, positive, _, row_grad = info_nce_inputs(20, dim, dtype)
    t = torch.tensor(0.2, dtype=torch.float64)
    arguments = (anchor, positive, t, None, row_grad.to(dtype), True, "high")
    assert_same_bits(gpu.info_nce(*arguments), reference.info_nce_with_gradients(*arguments))


def test_knn_of_panels_is_exact_with_ties_by_index(gpu):
    x = rows(50, 6)
    x[7] = 0
    x[[3, 20, 41]] = x[10].clone()
    index, similarity = gpu.knn(x, 4, panel_bytes=50 * 4 * 7)
    expected_index, expected = reference.knn(x, 4)
    assert torch.equal(index, expected_index)
    assert torch.allclose(similarity, expected, atol=1e-6)
