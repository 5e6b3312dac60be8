"""bipartite_propagate: every backend against float64, and LightGCN's dense algebra."""

from __future__ import annotations

import pytest
import torch
from op_cases import (
    DTYPES,
    GRAPH_CASES,
    GRAPHS,
    GraphCase,
    assert_same_bits,
    assert_within_budget,
    outputs_and_gradients,
    random_index,
    results_for_threads,
    rows,
)

from hellm import ops, user_hypergraph
from hellm.ops import reference

CASES = [case for case in GRAPH_CASES if case.id != "valued"]


def inputs_of(case: GraphCase, dtype=torch.float32):
    graph = case.build()
    users, items = (rows(n, case.dim, dtype=dtype, seed=n) for n in (graph.num_vertices, graph.num_hyperedges))
    return graph, [users, items]


def _reference(graph, num_layers):
    def function(user_x, item_x):
        scales = graph.bipartite_scales(torch.float64 if user_x.dtype == torch.float64 else torch.float32)
        csr = (*graph.vertex_csr[:2], *graph.edge_csr[:2])
        return reference.bipartite_propagate(user_x, item_x, *csr, *scales, num_layers)

    return function


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_bipartite_propagate_matches_reference(case, dtype, kernel):
    graph, inputs = inputs_of(case, dtype)
    for num_layers in (1, 3):
        truth = outputs_and_gradients(_reference(graph, num_layers), [x.double() for x in inputs])
        baseline = outputs_and_gradients(_reference(graph, num_layers), inputs)
        candidate = outputs_and_gradients(
            lambda u, i, n=num_layers: ops.bipartite_propagate(u, i, graph, num_layers=n), inputs
        )
        assert_within_budget(truth, baseline, candidate)


@pytest.mark.parametrize("num_layers", [0, 1, 2, 4])
def test_bipartite_propagate_is_lightgcn(num_layers, kernel):
    """Mean over layers 0..L of (D^-1/2 A D^-1/2)^l, A = [[0, R], [R^T, 0]]; some users and items have no events."""
    events = random_index(30, 20, 70)
    events = events[:, (events[0] != 4) & (events[1] != 7)]
    r = torch.zeros(30, 20, dtype=torch.float64)
    r[events[0], events[1]] = 1.0
    a = torch.zeros(50, 50, dtype=torch.float64)
    a[:30, 30:], a[30:, :30] = r, r.T
    root = a.sum(1).pow(-0.5)
    root[root.isinf()] = 0.0
    operator = root[:, None] * a * root
    users, items = rows(30, 64), rows(20, 64, seed=1)
    layer = total = torch.cat([users, items]).double()
    for _ in range(num_layers):
        layer = operator @ layer
        total = total + layer
    found = ops.bipartite_propagate(users, items, user_hypergraph(events, 30, 20), num_layers=num_layers)
    torch.testing.assert_close(torch.cat(found).double(), total / (num_layers + 1), rtol=1e-5, atol=1e-5)


def test_bipartite_propagate_of_no_layers_is_a_copy(kernel):
    graph, inputs = inputs_of(GRAPHS["three"])
    for given, out in zip(inputs, ops.bipartite_propagate(*inputs, graph, num_layers=0), strict=True):
        assert torch.equal(given, out)
        assert given.data_ptr() != out.data_ptr()


def test_bipartite_propagate_gradient_of_one_side_only(kernel):
    """A loss on the users alone reaches the items, and an input that needs no gradient gets none."""
    graph, (users, items) = inputs_of(GRAPHS["odd-63"], torch.float64)
    items.requires_grad_()
    user_out, item_out = ops.bipartite_propagate(users, items, graph)
    assert item_out.requires_grad
    cotangent = rows(*user_out.shape, dtype=torch.float64, seed=9)
    user_out.backward(cotangent)
    (expected,) = torch.autograd.grad(_reference(graph, 2)(users, items)[0], items, cotangent)
    torch.testing.assert_close(items.grad, expected)
    assert users.grad is None


def test_bipartite_propagate_takes_any_strides(kernel):
    graph, (users, items) = inputs_of(GRAPHS["odd-63"])
    expected = ops.bipartite_propagate(users, items, graph)
    assert_same_bits(
        ops.bipartite_propagate(users.T.contiguous().T, torch.stack([items, users[:17]], 2)[..., 0], graph), expected
    )
    same = items[:1].expand_as(items)
    assert_same_bits(
        ops.bipartite_propagate(users, same, graph), ops.bipartite_propagate(users, same.contiguous(), graph)
    )


def test_bipartite_propagate_same_bits_for_any_number_of_threads(kernel):
    graph, inputs = inputs_of(GRAPHS["odd-257"])
    first, *others = results_for_threads(
        lambda: outputs_and_gradients(lambda u, i: ops.bipartite_propagate(u, i, graph, num_layers=3), inputs),
        (1, 1, 2, 3),
    )
    for other in others:
        assert_same_bits(first, other)


def test_bipartite_propagate_gradcheck(backend):
    graph, _ = inputs_of(GRAPHS["repeated"])
    inputs = [rows(3, 2, dtype=torch.float64).requires_grad_(), rows(2, 2, dtype=torch.float64).requires_grad_()]
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda u, i: ops.bipartite_propagate(u, i, graph), inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["three", "no-incidence"])
def test_bipartite_propagate_opcheck(name, backend):
    graph, inputs = inputs_of(GRAPHS[name])
    csr = (*graph.vertex_csr[:2], *graph.edge_csr[:2])
    schedules = (*graph.vertex_schedule, *graph.edge_schedule)
    for num_layers in (0, 2):
        torch.library.opcheck(
            torch.ops.hellm.bipartite_propagate.default,
            (*(x.requires_grad_() for x in inputs), *csr, *graph.bipartite_scales(), num_layers, *schedules),
        )


def test_bipartite_propagate_compiles_to_one_graph():
    torch.compiler.reset()
    graph, _ = inputs_of(GRAPHS["odd-63"])

    def step(users, items):
        return ops.bipartite_propagate(users.tanh(), items, graph)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for dim in (4, 6, 9):
        inputs = [rows(63, dim), rows(17, dim, seed=1)]
        assert_same_bits(outputs_and_gradients(compiled, inputs), outputs_and_gradients(step, inputs))


def test_bipartite_propagate_under_autocast(backend):
    graph, inputs = inputs_of(GRAPHS["odd-63"])
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.bipartite_propagate(*inputs, graph)
    assert_same_bits(found, ops.bipartite_propagate(*(x.bfloat16() for x in inputs), graph))


def test_bipartite_propagate_trains_after_inference_mode():
    graph, (users, items) = inputs_of(GRAPHS["three"])
    with torch.inference_mode():
        ops.bipartite_propagate(users, items, graph)
    users.requires_grad_()
    ops.bipartite_propagate(users, items, graph)[0].square().sum().backward()
    assert users.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"user_x": 1}, "user_x must be a tensor or an array with __dlpack__, got int"),
        ({"user_x": torch.zeros(2, 4)}, "user_x must have hypergraph.num_vertices = 3 rows, got 2"),
        ({"item_x": torch.zeros(3, 4)}, "item_x must have hypergraph.num_hyperedges = 2 rows, got 3"),
        ({"item_x": torch.zeros(2, 5)}, "item_x must have 4 columns like user_x, got 5"),
        ({"item_x": torch.zeros(2, 4).double()}, "item_x must be torch.float32 like user_x, got torch.float64"),
        ({"item_x": torch.zeros(2, 4, device="meta")}, "item_x must be on cpu like user_x, got meta"),
        (
            {"user_x": torch.zeros(3, 4, device="meta"), "item_x": torch.zeros(2, 4, device="meta")},
            "hypergraph must be on meta like x, got cpu",
        ),
        ({"num_layers": -2}, "num_layers must be >= 0, got -2"),
        (
            {"hypergraph": GRAPHS["three"]._replace(incidence_weight=torch.ones(4)).build()},
            "hypergraph must have no incidence_weight here, got one",
        ),
    ],
)
def test_bipartite_propagate_refuses(change, message):
    good = {"user_x": torch.zeros(3, 4), "item_x": torch.zeros(2, 4), "hypergraph": GRAPHS["three"].build()}
    with pytest.raises(ValueError, match=message):
        ops.bipartite_propagate(**{**good, **change})
