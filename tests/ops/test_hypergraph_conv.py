"""hypergraph_conv and incidence_product: every backend against float64, and the settings against dense algebra."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_cases import (
    DTYPES,
    GRAPH_CASES,
    GRAPHS,
    GraphCase,
    assert_same_bits,
    assert_within_budget,
    dense_incidence,
    needs_native,
    outputs_and_gradients,
    random_index,
    results_for_threads,
    rows,
)

from hellm import Hypergraph, ops, user_hypergraph
from hellm.ops import reference

SETTINGS = [
    pytest.param(
        {"normalization": normalization, "hyperedge_degree": divide, "self_loops": loops},
        id=f"{normalization}-{'hgnn' if divide else 'clique'}-{'loops' if loops else 'noloops'}",
    )
    for normalization, divide, loops in itertools.product(("symmetric", "row", "none"), (True, False), (True, False))
]


def _reciprocal(degree, exponent=-1.0):
    return torch.where(degree > 0, degree.clamp_min(1e-300) ** exponent, torch.zeros_like(degree))


def dense_operator(h, weight=None, *, normalization="symmetric", hyperedge_degree=True, self_loops=True):
    """The V x V matrix of a setting, float64, differentiable in the weight."""
    weight = h.new_ones(h.shape[1]) if weight is None else weight
    if hyperedge_degree:
        weight = weight * _reciprocal(h.sum(0))
    a = h @ torch.diag(weight) @ h.T
    if not self_loops:
        a = a - torch.diag(a.diag())
    degree = a.sum(1)
    # What subtraction leaves of an exact zero.
    degree = torch.where(degree.abs() < 1e-12, torch.zeros_like(degree), degree)
    if normalization == "symmetric":
        root = _reciprocal(degree, -0.5)
        return root[:, None] * a * root
    return a if normalization == "none" else _reciprocal(degree)[:, None] * a


def _power(matrix, x, num_layers):
    for _ in range(num_layers):
        x = matrix @ x
    return x


def _reference(x, graph, num_layers=1, **settings):
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    scales = graph.scales(**settings, dtype=accumulate)
    return reference.hypergraph_conv(x, *graph.vertex_csr, *graph.edge_csr, *scales, num_layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAPH_CASES)
def test_hypergraph_conv_matches_reference(case: GraphCase, dtype, kernel):
    graph = case.build()
    x = rows(graph.num_vertices, case.dim, dtype=dtype)
    for settings in (
        {"num_layers": 2},
        {"normalization": "row", "hyperedge_degree": False, "self_loops": False},
        {"normalization": "none", "self_loops": False, "num_layers": 3},
    ):
        truth = outputs_and_gradients(lambda x, s=settings: _reference(x, graph, **s), [x.double()])
        baseline = outputs_and_gradients(lambda x, s=settings: _reference(x, graph, **s), [x])
        candidate = outputs_and_gradients(lambda x, s=settings: ops.hypergraph_conv(x, graph, **s), [x])
        assert_within_budget(truth, baseline, candidate)


@pytest.mark.parametrize("transpose", [False, True], ids=["H", "H^T"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", GRAPH_CASES)
def test_incidence_product_matches_dense(case: GraphCase, dtype, transpose, kernel):
    graph = case.build()
    h = dense_incidence(case).T if transpose else dense_incidence(case)
    x = rows(h.shape[1], case.dim, dtype=dtype)
    csr = graph.edge_csr if transpose else graph.vertex_csr
    truth = outputs_and_gradients(lambda x: h @ x, [x.double()])
    baseline = outputs_and_gradients(lambda x: reference.incidence_product(x, *csr), [x])
    candidate = outputs_and_gradients(lambda x: ops.incidence_product(x, graph, transpose=transpose), [x])
    assert_within_budget(truth, baseline, candidate)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["odd-63", "repeated", "valued", "empty-hyperedge", "isolated-vertex", "no-incidence"])
def test_hypergraph_conv_setting_is_its_dense_matrix(name, settings):
    case = GRAPHS[name]
    operator = dense_operator(dense_incidence(case), **settings)
    x = rows(operator.shape[0], 5, dtype=torch.float64)
    for num_layers in (0, 1, 3):
        found = ops.hypergraph_conv(x, case.build(), num_layers=num_layers, **settings)
        torch.testing.assert_close(found, _power(operator, x, num_layers), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", ["odd-63", "repeated", "valued", "empty-hyperedge"])
def test_hypergraph_conv_hyperedge_weight_acts_and_learns(name, settings, num_layers):
    case = GRAPHS[name]
    h = dense_incidence(case)
    x = rows(h.shape[0], 4, dtype=torch.float64)
    weight = rows(h.shape[1], dtype=torch.float64, seed=3).abs() + 0.1

    expected = outputs_and_gradients(lambda x, w: _power(dense_operator(h, w, **settings), x, num_layers), [x, weight])
    found = outputs_and_gradients(
        lambda x, w: ops.hypergraph_conv(x, case.build(w), num_layers=num_layers, **settings), [x, weight]
    )
    for e, f in zip(expected, found, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)
    if name == "odd-63":  # where no weight cancels
        assert not torch.allclose(found[0], ops.hypergraph_conv(x, case.build(), num_layers=num_layers, **settings))


@pytest.mark.parametrize("dtype", DTYPES)
def test_hypergraph_conv_weight_gradient_in_low_precision(dtype, kernel):
    case = GRAPHS["odd-257"]
    x, weight = rows(257, 32, dtype=dtype), rows(63, seed=3).abs() + 0.1
    settings = {"normalization": "row", "num_layers": 2}

    def run(function):
        return lambda x, w: function(x, case.build(w), **settings)

    truth = outputs_and_gradients(run(_reference), [x.double(), weight.double()])
    baseline = outputs_and_gradients(run(_reference), [x, weight])
    candidate = outputs_and_gradients(run(ops.hypergraph_conv), [x, weight])
    assert_within_budget(truth, baseline, candidate)


def test_hypergraph_conv_is_hgnn_by_default():
    """HGNN (Feng et al. 2019, equation 10): Dv^-1/2 H W De^-1 H^T Dv^-1/2 x, Dv the weighted vertex degrees."""
    case, weight = GRAPHS["odd-63"], rows(17, dtype=torch.float64, seed=1).abs() + 0.5
    h = dense_incidence(case)
    dv, de = _reciprocal((h * weight).sum(1), -0.5), _reciprocal(h.sum(0))
    x = rows(63, 6, dtype=torch.float64)
    expected = dv[:, None] * (h @ ((weight * de)[:, None] * (h.T @ (dv[:, None] * x))))
    torch.testing.assert_close(ops.hypergraph_conv(x, case.build(weight)), expected)


def test_hypergraph_conv_row_is_the_pyg_formula():
    """D^-1 H W B^-1 H^T x."""
    case, weight = GRAPHS["odd-63"], rows(17, dtype=torch.float64, seed=1).abs() + 0.5
    h = dense_incidence(case)
    d, b = _reciprocal((h * weight).sum(1)), _reciprocal(h.sum(0))
    x = rows(63, 6, dtype=torch.float64)
    expected = d[:, None] * (h @ ((weight * b)[:, None] * (h.T @ x)))
    torch.testing.assert_close(ops.hypergraph_conv(x, case.build(weight), normalization="row"), expected)


def test_hypergraph_conv_is_the_published_user_branch():
    """D^-1 (R R^T - diag) x, D its row sums; users alone with their items get zero."""
    events = random_index(40, 25, 160)
    r = torch.zeros(40, 25, dtype=torch.float64)
    r[events[0], events[1]] = 1.0
    clique = r @ r.T
    clique.fill_diagonal_(0.0)
    x = rows(40, 8)
    graph = user_hypergraph(events, 40, 25)
    found = ops.hypergraph_conv(x, graph, normalization="row", hyperedge_degree=False, self_loops=False, num_layers=2)
    expected = _power(_reciprocal(clique.sum(1))[:, None] * clique, x.double(), 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_hypergraph_conv_without_self_loops_is_exactly_zero_for_a_lonely_vertex(kernel):
    for name, weight in itertools.product(("alone-in-hyperedges", "one-vertex"), (None, 0.1)):
        case = GRAPHS[name]
        graph = case.build(None if weight is None else torch.full((case.num_hyperedges,), weight))
        for normalization, divide in itertools.product(("symmetric", "row"), (True, False)):
            out = ops.hypergraph_conv(
                rows(graph.num_vertices, 5),
                graph,
                normalization=normalization,
                hyperedge_degree=divide,
                self_loops=False,
            )
            assert torch.equal(out, torch.zeros_like(out))


def test_hypergraph_conv_layers_compose(kernel):
    case = GRAPHS["odd-63"]
    x = rows(63, 67, dtype=torch.float64)
    twice = ops.hypergraph_conv(ops.hypergraph_conv(x, case.build()), case.build())
    torch.testing.assert_close(ops.hypergraph_conv(x, case.build(), num_layers=2), twice)


def test_hypergraph_conv_of_no_layers_is_a_copy(kernel):
    x = rows(3, 4)
    out = ops.hypergraph_conv(x, GRAPHS["three"].build(), num_layers=0)
    assert torch.equal(out, x)
    assert out.data_ptr() != x.data_ptr()


def test_hypergraph_conv_takes_any_strides(kernel):
    graph = GRAPHS["odd-63"].build()
    x = rows(63, 8)
    expected = ops.hypergraph_conv(x, graph)
    assert torch.equal(ops.hypergraph_conv(x.T.contiguous().T, graph), expected)
    assert torch.equal(ops.hypergraph_conv(torch.stack([x, -x], 2)[..., 0], graph), expected)
    row = x[:1].expand(63, 8)
    assert torch.equal(ops.hypergraph_conv(row, graph), ops.hypergraph_conv(row.contiguous(), graph))


def test_hypergraph_conv_takes_an_expanded_gradient(kernel):
    graph = GRAPHS["odd-63"].build()
    x = rows(63, 8, dtype=torch.float64).requires_grad_()
    ops.hypergraph_conv(x, graph).sum().backward()
    expected = dense_operator(dense_incidence(GRAPHS["odd-63"])).T @ torch.ones(63, 8, dtype=torch.float64)
    torch.testing.assert_close(x.grad, expected)


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hypergraph_conv_accumulates_in_float32(dtype):
    """The native result is the float32 result of the same inputs, rounded once."""
    graph = GRAPHS["odd-257"].build()
    x = rows(257, 64, dtype=dtype)
    with ops.backend("native"):
        found = ops.hypergraph_conv(x, graph, num_layers=3)
        assert torch.equal(found, ops.hypergraph_conv(x.float(), graph, num_layers=3).to(dtype))


@pytest.mark.parametrize("weighted", [False, True])
def test_hypergraph_conv_same_bits_for_any_number_of_threads(weighted, kernel):
    x, weight = rows(257, 67), rows(63).abs()

    def run():
        graph = GRAPHS["odd-257"].build(weight.clone().requires_grad_() if weighted else None)
        return outputs_and_gradients(
            lambda x: ops.hypergraph_conv(x, graph, normalization="row", self_loops=False, num_layers=2), [x]
        )

    first, *others = results_for_threads(run, (1, 1, 2, 3))
    for other in others:
        assert_same_bits(first, other)


def test_hypergraph_conv_gives_gradients_only_where_required():
    graph = GRAPHS["three"].build(torch.rand(2, requires_grad=True))
    assert ops.hypergraph_conv(rows(3, 2), graph.with_weight(None)).requires_grad is False
    ops.hypergraph_conv(rows(3, 2), graph).square().sum().backward()
    assert graph.hyperedge_weight.grad is not None

    weight, x = torch.rand(2), rows(3, 2).requires_grad_()
    ops.hypergraph_conv(x, graph.with_weight(weight)).sum().backward()
    assert x.grad is not None
    assert weight.grad is None


@pytest.mark.parametrize("settings", [{}, {"normalization": "row", "self_loops": False}])
def test_hypergraph_conv_gradcheck(settings, backend):
    case = GRAPHS["repeated"]
    x = rows(3, 2, dtype=torch.float64).requires_grad_()
    weight = (rows(2, dtype=torch.float64).abs() + 0.5).requires_grad_()

    def plain(x):
        return ops.hypergraph_conv(x, case.build(), num_layers=2, **settings)

    def weighted(x, w):
        return ops.hypergraph_conv(x, case.build(w), num_layers=2, **settings)

    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(plain, (x,), fast_mode=True)
        assert check(weighted, (x, weight), fast_mode=True)


@pytest.mark.parametrize("transpose", [False, True])
def test_incidence_product_gradcheck(transpose, backend):
    graph = GRAPHS["valued"].build()
    x = rows(graph.num_vertices if transpose else graph.num_hyperedges, 2, dtype=torch.float64).requires_grad_()
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: ops.incidence_product(x, graph, transpose=transpose), (x,), fast_mode=True)


@pytest.mark.parametrize("name", ["valued", "no-incidence"])
def test_hypergraph_conv_opcheck(name, backend):
    graph = GRAPHS[name].build()
    csr = (*graph.vertex_csr, *graph.edge_csr)
    for settings in ({}, {"normalization": "row", "self_loops": False}):
        x = rows(graph.num_vertices, 5).requires_grad_()
        scales = graph.scales(**settings)
        arguments = (x, *csr, *scales, len(settings), *graph.vertex_schedule, *graph.edge_schedule)
        torch.library.opcheck(torch.ops.hellm.hypergraph_conv.default, arguments)
    matrices = (*graph.vertex_csr, *graph.vertex_schedule, *graph.edge_csr, *graph.edge_schedule)
    product = torch.ops.hellm.incidence_product.default
    torch.library.opcheck(product, (rows(graph.num_hyperedges, 5).requires_grad_(), *matrices))


@pytest.mark.parametrize("settings", [{}, {"normalization": "row", "self_loops": False, "num_layers": 2}])
@pytest.mark.parametrize("weighted", [False, "constant", "learned"])
def test_hypergraph_conv_compiles_to_one_graph(weighted, settings):
    torch.compiler.reset()
    weight = (rows(17).abs() + 0.1).requires_grad_(weighted == "learned") if weighted else None
    graph = GRAPHS["odd-63"].build(weight)

    def step(x):
        return ops.hypergraph_conv(x.tanh(), graph, **settings)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for dim in (4, 6, 9):
        x = rows(63, dim)
        assert_same_bits(outputs_and_gradients(compiled, [x]), outputs_and_gradients(step, [x]))
    if weighted == "learned":
        gradients = [torch.autograd.grad(f(x).square().sum(), weight)[0] for f in (compiled, step)]
        torch.testing.assert_close(*gradients)


def test_hypergraph_conv_compiled_follows_a_changed_weight():
    torch.compiler.reset()
    weight = rows(2).abs() + 0.5
    graph = GRAPHS["three"].build(weight)
    compiled = torch.compile(lambda x: ops.hypergraph_conv(x, graph), fullgraph=True, backend="aot_eager")
    x = rows(3, 4)
    before = compiled(x)
    weight[0] *= 3
    assert torch.equal(compiled(x), ops.hypergraph_conv(x, graph))
    assert not torch.equal(compiled(x), before)


def test_hypergraph_conv_under_autocast(backend):
    graph = GRAPHS["odd-63"].build()
    x = rows(63, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.hypergraph_conv(x, graph)
        half = ops.incidence_product(x, graph, transpose=True)
    assert out.dtype == half.dtype == torch.bfloat16
    assert torch.equal(out, ops.hypergraph_conv(x.bfloat16(), graph))
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.float32


def test_hypergraph_conv_trains_after_inference_mode():
    graph = GRAPHS["odd-63"].build()
    x = rows(63, 4)
    with torch.inference_mode():
        expected = ops.hypergraph_conv(x, graph, self_loops=False).clone()
    parameter = x.clone().requires_grad_()
    out = ops.hypergraph_conv(parameter, graph, self_loops=False)
    out.square().sum().backward()
    assert torch.equal(out, expected)
    assert parameter.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": [1.0]}, "x must be a tensor or an array with __dlpack__, got list"),
        ({"x": torch.zeros(3)}, r"x must be \[rows, columns\], got shape \(3,\)"),
        (
            {"x": torch.zeros(3, 2, dtype=torch.int64)},
            "x must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ({"x": torch.zeros(4, 2)}, "x must have hypergraph.num_vertices = 3 rows, got 4"),
        ({"x": torch.zeros(3, 2, device="meta")}, "hypergraph must be on meta like x, got cpu"),
        ({"num_layers": -1}, "num_layers must be >= 0, got -1"),
        ({"normalization": "sym"}, r"normalization must be one of \('symmetric', 'row', 'none'\), got 'sym'"),
    ],
)
def test_hypergraph_conv_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.hypergraph_conv(**{"x": torch.zeros(3, 2), "hypergraph": GRAPHS["three"].build(), **change})


def test_incidence_product_refuses():
    graph = GRAPHS["three"].build()
    with pytest.raises(ValueError, match=r"x must have hypergraph.num_hyperedges = 2 rows, got 3"):
        ops.incidence_product(torch.zeros(3, 2), graph)
    with pytest.raises(ValueError, match=r"x must have hypergraph.num_vertices = 3 rows, got 2"):
        ops.incidence_product(torch.zeros(2, 2), graph, transpose=True)
    with pytest.raises(ValueError, match="hypergraph must be on meta like x, got cpu"):
        ops.incidence_product(torch.zeros(2, 2, device="meta"), graph)


def test_hypergraph_conv_of_no_columns(kernel):
    graph = Hypergraph(torch.tensor([[0, 1], [0, 0]]))
    assert ops.hypergraph_conv(torch.zeros(2, 0), graph).shape == (2, 0)


@needs_native
def test_results_too_large_for_the_caches_have_the_same_bits(kernel):
    """They are written past them; half the columns are not."""
    num_vertices = 25_000
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randint(size, (60_000,), generator=generator) for size in (num_vertices, 9_000)])
    graph, x = Hypergraph(index, num_vertices=num_vertices, num_hyperedges=9_000), rows(num_vertices, 64)
    for num_layers in (1, 2):
        whole = ops.hypergraph_conv(x, graph, num_layers=num_layers)
        halves = [ops.hypergraph_conv(half, graph, num_layers=num_layers) for half in x.chunk(2, 1)]
        assert_same_bits([whole], [torch.cat(halves, 1)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_of_16_bits_are_rounded_to_even(dtype, kernel):
    """Each vertex is alone in a hyperedge, so what comes out is its row times a weight, rounded once."""
    special = [0.0, -0.0, 1.0, 1e-8, 6e-5, 65_000.0, 3e38, float("inf"), -float("inf"), float("nan")]
    values = torch.tensor(special).to(dtype)
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([values, torch.randn(203 * 40 - len(values), generator=generator).to(dtype)]).reshape(-1, 203)
    # Ties lie half way: an odd number of units times 1.5.
    weight = torch.cat([torch.full((20,), 1.5), torch.rand(20, generator=generator) + 0.5])
    alone = torch.arange(len(x))
    graph = Hypergraph(torch.stack([alone, alone]), hyperedge_weight=weight)
    found = ops.hypergraph_conv(x, graph, normalization="none", hyperedge_degree=False)
    torch.testing.assert_close(found, (x.float() * weight[:, None]).to(dtype), rtol=0, atol=0, equal_nan=True)
