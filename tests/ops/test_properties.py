"""Random graphs, rows and settings: every operator is its dense definition in float64, whatever it is given.

HELLM_SLOW=1 tries 10,000 of each; otherwise the examples are few and always the same. The program fuzzed_operators.py
takes one kernel through as many as it is told, and says how near to the tolerance the errors came.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict

import dense
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hellm import Hypergraph, ops

COUNT = int(os.environ.get("HELLM_EXAMPLES", "10000" if os.environ.get("HELLM_SLOW") == "1" else "0"))
LONG = COUNT > 0
examples = settings(
    max_examples=COUNT or 60,
    derandomize=not LONG,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
    print_blob=True,
)
BACKENDS = st.sampled_from([os.environ["HELLM_BACKEND"]] if "HELLM_BACKEND" in os.environ else ["native", "torch"])
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = st.sampled_from(
    [
        lambda x: x,
        lambda x: x.T.contiguous().T,
        lambda x: torch.stack([x, -x], 2)[..., 0],
        lambda x: torch.cat([x, x])[: len(x)],
        lambda x: x[:1].expand_as(x) if len(x) else x,
    ]
)
SEEDS = st.integers(0, 2**31)
# Of each operator: examples that were compared, and the largest error in units of what is allowed.
_compared: Counter[str] = Counter()
_worst: defaultdict[str, float] = defaultdict(float)


def figures() -> dict[str, dict[str, float]]:
    """Operator -> "compared" and "worst"."""
    return {name: {"compared": count, "worst": float(f"{_worst[name]:.3g}")} for name, count in _compared.items()}


def assert_near(name, found, expected, atol):
    """Within `atol` everywhere; notes how near to it."""
    if found.numel():
        _worst[name] = max(_worst[name], float((found - expected).abs().max()) / atol)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@st.composite
def graphs(draw):
    """An incidence with repeats, empty hyperedges and isolated vertices, and weights of either sign or zero."""
    num_vertices, num_hyperedges = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    count = draw(st.integers(0, 30))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    index = torch.stack([torch.randint(n, (count,), generator=generator) for n in (num_vertices, num_hyperedges)])

    def weights(size):
        kind = draw(st.sampled_from(["none", "positive", "any sign", "zeros"]))
        if kind == "none":
            return None
        # Eighths, exact in every dtype: what cancels, cancels exactly.
        low, high = {"positive": (1, 17), "any sign": (-16, 17), "zeros": (0, 2)}[kind]
        return torch.randint(low, high, (size,), generator=generator).double() / 8

    index = index.to(draw(st.sampled_from([torch.int32, torch.int64])))
    return index, num_vertices, num_hyperedges, weights(num_hyperedges), weights(count)


def matrix(seed, num_rows, dim, dtype, layout):
    x = torch.randn(num_rows, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[torch.arange(num_rows) % 7 == 5] = 0
    return layout(x.to(dtype))


def with_gradients(function, inputs):
    """Outputs and gradients in float64, under a cotangent that is the same for every dtype."""
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    found = function(*leaves)
    found = found if isinstance(found, tuple) else (found,)
    cotangents = [torch.cos(torch.arange(out.numel())).reshape(out.shape).to(out.dtype) for out in found]
    needed = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad(found, needed, cotangents, allow_unused=True, materialize_grads=True)
    return [t.detach().double() for t in (*found, *gradients)]


def check(name, function, definition, inputs, dtype, *, scale=1.0):
    """Within the rounding of the dtype, of the largest number that the definition meets."""
    _compared[name] += 1
    wide = [None if x is None else x.double() for x in inputs]
    unit = max(torch.finfo(dtype).eps, 1e-13)
    for found, expected in zip(with_gradients(function, inputs), with_gradients(definition, wide), strict=True):
        assert found.shape == expected.shape
        # What the dtype cannot hold is infinite, as it must be.
        held = expected.abs() < torch.finfo(dtype).max / 2
        found, expected = found[held], expected[held]
        assert found.isfinite().all(), found
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        assert_near(name, found, expected, 64 * unit * scale * (1 + largest))


@examples
@given(
    graph=graphs(),
    normalization=st.sampled_from(["symmetric", "row", "none"]),
    flags=st.tuples(st.booleans(), st.booleans()),
    num_layers=st.integers(0, 3),
    dim=st.integers(1, 9),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_hypergraph_conv(graph, normalization, flags, num_layers, dim, dtype, layout, backend, seed):
    index, num_vertices, num_hyperedges, weight, value = graph
    chosen = {"normalization": normalization, "hyperedge_degree": flags[0], "self_loops": flags[1]}
    x = matrix(seed, num_vertices, dim, dtype, layout)
    # A degree that is small beside its terms makes any error large: by as much as the operator is. Loops are among the
    # terms where they are taken away again.
    h = dense.incidence(index, value, num_vertices, num_hyperedges)
    parts = dense.operator(h, weight, **(chosen | {"normalization": "none", "self_loops": True})).abs().sum(1)
    degree = dense.operator(h, weight, **(chosen | {"normalization": "none"})).sum(1).abs()
    # Terms that cancel to rounding leave nothing to divide by: neither 0 nor its reciprocal would be wrong.
    assume(normalization == "none" or not bool(((degree < 1e-6 * parts) & (degree > 0)).any()))
    assume(normalization == "none" or not flags[0] or not bool(((degree == 0) & (parts > 0)).any()))
    small = degree[degree > 1e-12]
    cancelled = float((parts[degree > 1e-12] / small).max()) if small.numel() else 1.0
    size, sizes = h.sum(0).abs(), h.abs().sum(0)
    if flags[0] and bool((size > 0).any()):
        cancelled *= float((sizes[size > 0] / size[size > 0]).max())
    # So do the parts of a gradient in a weight, terms over the square of a degree.
    if small.numel():
        cancelled *= max(1.0, float(1 / small.min())) * max(1.0, float(parts.max()))
    # Loops are added up and taken away again, so their rounding counts also where they leave nothing.
    largest = max(
        float(dense.operator(h, weight, **(chosen | {"self_loops": loops})).abs().sum(1).max())
        for loops in (False, True)
    )
    norm = max(1.0, largest) ** max(num_layers, 1)

    def function(x, w, v):
        built = Hypergraph(
            index,
            num_vertices=num_vertices,
            num_hyperedges=num_hyperedges,
            hyperedge_weight=w,
            incidence_weight=v,
        )
        return ops.hypergraph_conv(x, built, num_layers=num_layers, **chosen)

    def definition(x, w, v):
        h = dense.incidence(index, v, num_vertices, num_hyperedges)
        return dense.convolution(x, h, w, num_layers=num_layers, **chosen)

    with ops.backend(backend):
        check("hypergraph_conv", function, definition, [x, weight, value], dtype, scale=norm * cancelled**3)


@examples
@given(
    graph=graphs(),
    transpose=st.booleans(),
    dim=st.integers(1, 9),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_incidence_product(graph, transpose, dim, dtype, layout, backend, seed):
    index, num_vertices, num_hyperedges, _, value = graph
    x = matrix(seed, num_vertices if transpose else num_hyperedges, dim, dtype, layout)

    def function(x, v):
        built = Hypergraph(index, num_vertices=num_vertices, num_hyperedges=num_hyperedges, incidence_weight=v)
        return ops.incidence_product(x, built, transpose=transpose)

    def definition(x, v):
        h = dense.incidence(index, v, num_vertices, num_hyperedges)
        return (h.T if transpose else h) @ x

    with ops.backend(backend):
        check("incidence_product", function, definition, [x, value], dtype, scale=4.0)


@examples
@given(
    graph=graphs(),
    num_layers=st.integers(0, 3),
    dim=st.integers(1, 9),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_bipartite_propagate(graph, num_layers, dim, dtype, layout, backend, seed):
    index, num_vertices, num_hyperedges, _, _ = graph
    built = Hypergraph(index, num_vertices=num_vertices, num_hyperedges=num_hyperedges)
    h = dense.incidence(index, None, num_vertices, num_hyperedges)
    inputs = [matrix(seed + i, n, dim, dtype, layout) for i, n in enumerate((num_vertices, num_hyperedges))]
    with ops.backend(backend):
        check(
            "bipartite_propagate",
            lambda u, i: ops.bipartite_propagate(u, i, built, num_layers=num_layers),
            lambda u, i: dense.propagation(u, i, h, num_layers),
            inputs,
            dtype,
        )


@examples
@given(
    num_rows=st.integers(1, 20),
    dim=st.integers(1, 9),
    temperature=st.floats(0.05, 2.0),
    both_views=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    chosen=st.lists(st.integers(0, 19), min_size=1, max_size=25) | st.none(),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_info_nce(num_rows, dim, temperature, both_views, reduction, chosen, dtype, layout, backend, seed):
    rows = None if chosen is None else torch.tensor(chosen) % num_rows
    inputs = [matrix(seed + i, num_rows, dim, dtype, layout) for i in range(2)]
    t = torch.tensor(temperature, dtype=torch.float64)
    # Gradients are divided by the length of a row.
    shortest = min(float(x.double().norm(dim=1)[(x != 0).any(1)].min()) if (x != 0).any() else 1.0 for x in inputs)
    with ops.backend(backend):
        check(
            "info_nce",
            lambda a, p, t: ops.info_nce(
                a, p, t, rows=rows, intra_view_negatives=both_views, reduction=reduction, precision="highest"
            ),
            lambda a, p, t: dense.reduce(dense.info_nce(a, p, t, rows, both_views), reduction),
            [*inputs, t],
            dtype,
            scale=(1 / temperature) ** 2 / min(shortest, 1.0),
        )


@examples
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 30), st.integers(1, 9)),
    bias=st.booleans(),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    scale=st.sampled_from([0.01, 1.0, 30.0]),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_item_cross_entropy(sizes, bias, reduction, scale, dtype, layout, backend, seed):
    num_rows, num_items, dim = sizes
    hidden, items = scale * matrix(seed, num_rows, dim, dtype, layout), matrix(seed + 1, num_items, dim, dtype, layout)
    target = torch.randint(num_items, (num_rows,), generator=torch.Generator().manual_seed(seed))
    bias = matrix(seed + 2, num_items, 1, dtype, lambda x: x)[:, 0] if bias else None
    with ops.backend(backend):
        check(
            "item_cross_entropy",
            lambda h, e, b: ops.item_cross_entropy(h, e, target, bias=b, reduction=reduction),
            lambda h, e, b: dense.reduce(dense.item_cross_entropy(h, e, target, b), reduction),
            [hidden, items, bias],
            dtype,
            scale=max(scale, 1.0) * math.sqrt(dim) * 4,
        )


@examples
@given(
    num_rows=st.integers(1, 30),
    dim=st.integers(1, 9),
    k=st.integers(1, 30),
    dtype=DTYPES,
    layout=LAYOUTS,
    backend=BACKENDS,
    seed=SEEDS,
)
def test_knn(num_rows, dim, k, dtype, layout, backend, seed):
    """The similarities are the k largest; the neighbours have them; a zero row has none and is none."""
    x, k = matrix(seed, num_rows, dim, dtype, layout), min(k, num_rows)
    with ops.backend(backend):
        index, similarity = ops.knn(x, k)
    present = (x != 0).any(1)
    unit = torch.nn.functional.normalize(x.double(), dim=1, eps=1e-300)
    cosine = (unit @ unit.T).masked_fill(~present, float("-inf")).masked_fill(~present[:, None], float("-inf"))
    best = cosine.sort(1, descending=True).values[:, :k]
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    _compared["knn"] += 1
    assert torch.equal(index < 0, best.isinf())
    assert similarity.abs().max() <= 1
    chosen = cosine.gather(1, index.clamp_min(0)).masked_fill(index < 0, 0.0)
    for found in (similarity.double(), chosen):
        assert_near("knn", found, best.masked_fill(best.isinf(), 0.0), tolerance)
    for row in index.tolist():
        neighbours = [i for i in row if i >= 0]
        assert len(set(neighbours)) == len(neighbours)


@examples
@given(
    name=st.sampled_from(
        ["num_vertices", "num_hyperedges", "num_layers", "temperature", "k", "reduction", "precision", "rows"]
    ),
    value=st.none()
    | st.booleans()
    | st.floats()
    | st.integers()
    | st.text(max_size=3)
    | st.lists(st.integers(), max_size=2),
)
def test_a_wrong_argument_is_named(name, value):
    index, x = torch.tensor([[0, 1, 2], [0, 0, 1]]), torch.ones(3, 2)
    calls = {
        "num_vertices": lambda: Hypergraph(index, num_vertices=value),
        "num_hyperedges": lambda: Hypergraph(index, num_hyperedges=value),
        "num_layers": lambda: ops.hypergraph_conv(
            x, Hypergraph(index), num_layers=min(value, 9) if type(value) is int else value
        ),
        "temperature": lambda: ops.info_nce(x, x, value),
        "k": lambda: ops.knn(x, value),
        "reduction": lambda: ops.info_nce(x, x, reduction=value),
        "precision": lambda: ops.info_nce(x, x, precision=value),
        "rows": lambda: ops.info_nce(x, x, rows=value),
    }
    if name.startswith("num_v") or name.startswith("num_h"):
        value = min(value, 2**40) if type(value) is int and value > 10_000 else value
        if type(value) is int and 10_000 < value < 2**31:
            return  # right, and large
    try:
        calls[name]()
    except ValueError as error:
        assert name in str(error)


def test_examples_are_fixed_unless_long():
    assert LONG or (examples.derandomize and examples.max_examples < 100)


pytestmark = pytest.mark.filterwarnings("error::UserWarning")
