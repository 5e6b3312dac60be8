"""Every mode of differentiation of every operator, against torch's own derivatives of dense float64 algebra."""

from __future__ import annotations

import itertools

import dense
import pytest
import torch
from op_cases import rows
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils._pytree import tree_leaves

from hellm import Hypergraph, nn, ops

INDEX = torch.tensor([[0, 1, 2, 2, 3, 4, 5, 5], [0, 0, 0, 1, 1, 2, 2, 2]])
V, M = 6, 3
GRAPH = Hypergraph(INDEX)
TARGET = torch.tensor([0, 1, 2, 2, 1, 0])
CHOSEN = torch.tensor([2, 0, 2])


def wide(*shape, seed=0):
    return rows(*shape, dtype=torch.float64, seed=seed)


def graph_of(weight, value):
    return Hypergraph(INDEX, hyperedge_weight=weight, incidence_weight=value)


def convolution(**settings):
    return (
        lambda x, w, v: ops.hypergraph_conv(x, graph_of(w, v), **settings),
        lambda x, w, v: dense.convolution(x, dense.incidence(INDEX, v, V, M), w, **settings),
        (wide(V, 2), wide(M, seed=1).abs() + 0.5, wide(8, seed=2).abs() + 0.5),
    )


def info_nce(reduction, chosen=None, both_views=True, zero_row=False):
    anchor = wide(V, 2)
    if zero_row:
        anchor[1] = 0
    return (
        lambda a, p, t: ops.info_nce(a, p, t, reduction=reduction, rows=chosen, intra_view_negatives=both_views),
        lambda a, p, t: dense.reduce(dense.info_nce(a, p, t, chosen, both_views), reduction),
        (anchor, wide(V, 2, seed=1), torch.tensor(0.3, dtype=torch.float64)),
    )


def cross_entropy(reduction, bias=True):
    inputs = (wide(V, 2), wide(M, 2, seed=1), wide(M, seed=2))
    return (
        lambda h, e, *b: ops.item_cross_entropy(h, e, TARGET, bias=b[0] if b else None, reduction=reduction),
        lambda h, e, *b: dense.reduce(dense.item_cross_entropy(h, e, TARGET, *b), reduction),
        inputs if bias else inputs[:2],
    )


ONES = dense.incidence(INDEX, None, V, M)
CASES = {
    "hypergraph_conv-rows": (
        lambda x: ops.hypergraph_conv(x, GRAPH, num_layers=2),
        lambda x: dense.convolution(x, ONES, num_layers=2),
        (wide(V, 2),),
    ),
    **{
        f"hypergraph_conv-{normalization}-{divide}-{loops}": convolution(
            normalization=normalization, hyperedge_degree=divide, self_loops=loops, num_layers=num_layers
        )
        for (normalization, divide, loops), num_layers in zip(
            itertools.product(("symmetric", "row", "none"), (True, False), (True, False)),
            itertools.cycle((1, 2, 2, 1)),
            strict=False,
        )
    },
    "incidence_product": (
        lambda y, v: ops.incidence_product(y, graph_of(None, v)),
        lambda y, v: dense.incidence(INDEX, v, V, M) @ y,
        (wide(M, 2), wide(8, seed=1)),
    ),
    "incidence_product-transposed": (
        lambda x, v: ops.incidence_product(x, graph_of(None, v), transpose=True),
        lambda x, v: dense.incidence(INDEX, v, V, M).T @ x,
        (wide(V, 2), wide(8, seed=1)),
    ),
    "bipartite_propagate": (
        lambda u, i: torch.cat(ops.bipartite_propagate(u, i, GRAPH)),
        lambda u, i: torch.cat(dense.propagation(u, i, ONES, 2)),
        (wide(V, 2), wide(M, 2, seed=1)),
    ),
    **{f"info_nce-{reduction}": info_nce(reduction) for reduction in ("mean", "sum", "none")},
    "info_nce-chosen": info_nce("mean", CHOSEN, both_views=False),
    "info_nce-chosen-none": info_nce("none", CHOSEN, zero_row=True),
    "info_nce-zero-row": info_nce("mean", zero_row=True),
    **{f"item_cross_entropy-{reduction}": cross_entropy(reduction) for reduction in ("mean", "sum", "none")},
    "item_cross_entropy-no-bias": cross_entropy("mean", bias=False),
}

# Each takes a function, its arguments, a tangent of each and a cotangent of the output.
MODES = {
    "jvp": lambda f, args, t, ct: jvp(f, args, t)[1],
    "vjp": lambda f, args, t, ct: vjp(f, *args)[1](ct),
    "grad": lambda f, args, t, ct: grad(lambda *a: (f(*a) * ct).sum(), tuple(range(len(args))))(*args),
    "jacrev": lambda f, args, t, ct: jacrev(f, tuple(range(len(args))))(*args),
    "jacfwd": lambda f, args, t, ct: jacfwd(f, tuple(range(len(args))))(*args),
    "hessian": lambda f, args, t, ct: hessian(lambda *a: (f(*a) * ct).sum(), tuple(range(len(args))))(*args),
    "forward over reverse": lambda f, args, t, ct: jvp(lambda *a: vjp(f, *a)[1](ct), args, t)[1],
    "reverse over forward": lambda f, args, t, ct: vjp(lambda *a: jvp(f, a, t)[1], *args)[1](ct),
    "reverse over reverse": lambda f, args, t, ct: vjp(lambda *a: vjp(f, *a)[1](ct), *args)[1](t),
    "forward over forward": lambda f, args, t, ct: jvp(lambda *a: jvp(f, a, t)[1], args, t)[1],
    "third order": lambda f, args, t, ct: jvp(
        lambda *a: vjp(lambda *b: vjp(f, *b)[1](ct), *a)[1](t), args, t
    )[1],
    "vmap": lambda f, args, t, ct: torch.vmap(f)(*batch(args)),
    "vmap of one": lambda f, args, t, ct: torch.vmap(f, (1, *[None] * (len(args) - 1)))(
        batch(args)[0].movedim(0, 1), *args[1:]
    ),
    "vmap of grad": lambda f, args, t, ct: torch.vmap(grad(lambda *a: (f(*a) * ct).sum(), tuple(range(len(args)))))(
        *batch(args)
    ),
    "grad of vmap": lambda f, args, t, ct: grad(lambda *a: torch.vmap(f)(*a).square().sum(), tuple(range(len(args))))(
        *batch(args)
    ),
}  # fmt: skip


def batch(args):
    return tuple(torch.stack([a, 1.5 * a, a.abs() + 0.1]) for a in args)


def dual(f, args, t, ct):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(*map(forward_ad.make_dual, args, t))).tangent


def reverse_under_dual(f, args, t, ct):
    with forward_ad.dual_level():
        inputs = [forward_ad.make_dual(a.clone().requires_grad_(), d) for a, d in zip(args, t, strict=True)]
        return [forward_ad.unpack_dual(g).tangent for g in torch.autograd.grad(f(*inputs), inputs, ct)]


MODES |= {"dual numbers": dual, "reverse under dual numbers": reverse_under_dual}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_derivative_is_that_of_the_definition(case, mode):
    function, definition, args = CASES[case]
    tangents = tuple(wide(*a.shape, seed=10 + i) for i, a in enumerate(args))
    cotangent = wide(*definition(*args).shape, seed=20)
    found, expected = (
        tree_leaves(MODES[mode](f, args, tangents, cotangent)) for f in (function, definition)
    )  # fmt: skip
    vanishes = case in LINEAR or (mode == "third order" and case.startswith("incidence_product"))
    assert vanishes or any(e is not None and e.abs().sum() > 0 for e in expected)
    for f, e in zip(found, expected, strict=True):
        # A derivative that is zero by its form may be left out.
        zero = torch.zeros(()) if f is None and e is None else torch.zeros_like(e if f is None else f)
        torch.testing.assert_close(zero if f is None else f, zero if e is None else e, rtol=1e-7, atol=1e-8)


LINEAR = {"hypergraph_conv-rows", "bipartite_propagate"}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck_in_every_mode(case, backend):
    function, _, args = CASES[case]
    inputs = [a.clone().requires_grad_() for a in args]
    if "zero" in case or "chosen-none" in case:  # the length of a row has a corner at zero
        inputs[0] = wide(V, 2, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(
        function,
        inputs,
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
        fast_mode=True,
    )
    assert torch.autograd.gradgradcheck(
        function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True
    )


def test_knn_under_vmap_and_without_gradient():
    x = rows(3, 7, 4)
    index, similarity = torch.vmap(lambda x: ops.knn(x, 3))(x)
    for i in range(3):
        assert torch.equal(index[i], ops.knn(x[i], 3)[0])
        assert torch.equal(similarity[i], ops.knn(x[i], 3)[1])
    assert torch.equal(grad(lambda x: ops.knn(x, 3)[1].sum() + x.sum())(x[0]), torch.ones(7, 4))
    assert torch.equal(jvp(lambda x: ops.knn(x, 3)[1], (x[0],), (x[0],))[1], torch.zeros(7, 3))


def test_modules_under_functional_call():
    layer, x = nn.HypergraphConv(4, 2), rows(V, 4)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return functional_call(layer, parameters, (x, GRAPH)).square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for found, wanted in zip(grad(loss)(parameters).values(), expected, strict=True):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    "case", ["hypergraph_conv-rows", "incidence_product", "info_nce-mean", "item_cross_entropy-none"]
)
@pytest.mark.parametrize("mode", ["jvp", "grad", "vmap"])
def test_transforms_compile_to_one_graph(case, mode):
    torch.compiler.reset()
    function, _, args = CASES[case]
    tangents, cotangent = tuple(torch.ones_like(a) for a in args), torch.ones(())
    if case.startswith("incidence_product"):
        values, args, tangents = args[1], args[:1], tangents[:1]
        graph = graph_of(None, values)
        function = lambda y: ops.incidence_product(y, graph)  # noqa: E731

    def transformed(*args):
        return MODES[mode](function, args, tangents, cotangent)

    compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
    for found, expected in zip(tree_leaves(compiled(*args)), tree_leaves(transformed(*args)), strict=True):
        torch.testing.assert_close(found, expected)


def test_transforms_under_autocast_take_its_dtype():
    x, target = rows(V, 4), TARGET
    items = rows(M, 4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        found = grad(lambda h, e: ops.item_cross_entropy(h, e, target), (0, 1))(x.bfloat16(), items)
        inputs = x.bfloat16().requires_grad_(), items.clone().requires_grad_()
        expected = torch.autograd.grad(ops.item_cross_entropy(*inputs, target), inputs)
        assert torch.func.vjp(lambda x: ops.hypergraph_conv(x, GRAPH), x)[0].dtype == torch.bfloat16
    for f, e in zip(found, expected, strict=True):
        assert f.dtype == e.dtype
        torch.testing.assert_close(f, e, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["weight", "value"])
def test_gradients_of_weights_are_summed_in_float32(name, dtype, backend):
    """Two hyperedges of thousands of vertices: their sums have no room in 16 bits."""
    index = torch.stack([torch.arange(4000).repeat(2), torch.arange(2).repeat_interleave(4000)])[:, :6000]
    x, cotangent = rows(4000, 16, seed=1).abs().to(dtype), rows(4000, 16, seed=2).to(dtype)
    learned = {"weight": torch.tensor([1.0, 0.5]), "value": rows(6000, seed=3).abs() + 0.5}[name]
    found = []
    for compute in (dtype, torch.float64):
        leaf = learned.clone().requires_grad_()
        graph = Hypergraph(index, **{"hyperedge_weight" if name == "weight" else "incidence_weight": leaf})
        ops.hypergraph_conv(x.to(compute), graph).backward(cotangent.to(compute))
        found.append(leaf.grad.double())
    assert (found[0] - found[1]).norm() < 2e-3 * found[1].norm()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scaled_gradients_of_bfloat16_rows_are_rounded_once(reduction):
    """0.3 is no bfloat16 number: a factor rounded to it shifts every gradient the same way."""
    anchor, positive = rows(40, 8, dtype=torch.bfloat16), rows(40, 8, dtype=torch.bfloat16, seed=1)
    found = []
    for factor in (1.0, 0.3):
        leaf = anchor.clone().requires_grad_()
        (factor * ops.info_nce(leaf, positive, reduction=reduction)).backward()
        found.append(leaf.grad.double())
    assert abs(float((found[1] / found[0]).mean()) - 0.3) < 2e-4
