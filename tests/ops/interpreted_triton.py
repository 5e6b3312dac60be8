"""The Triton kernels under Triton's interpreter, against the definitions in float64.

test_triton.py runs this file in a process of its own: TRITON_INTERPRET=1 must be set before Triton is imported.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import triton.language as tl
from op_cases import GRAPHS, Direct, GraphCase, assert_same_bits, assert_within_budget, outputs_and_gradients, rows
from test_info_nce import fused, plain, relative_error, views
from triton.runtime import interpreter

from hellm import Hypergraph, ops
from hellm.ops import backends, reference

# Rows of 75 and 1,100 neighbours, two hubs next to each other in the schedule, and short rows beside them.
HUB_SIZES = [75, 1100, 45, 1030]
HUB = GraphCase(
    torch.stack(
        [
            torch.cat([torch.arange(size) for size in HUB_SIZES]),
            torch.repeat_interleave(torch.arange(4), torch.tensor(HUB_SIZES)),
        ]
    ),
    1100,
    5,
    20,
)
# Fewer rows than a block has: a hub of three whole chunks, an empty row, and the smallest hub there is.
_MEMBERS = torch.cat(
    [torch.stack([torch.full((size,), row), torch.arange(size)]) for row, size in ((0, 1536), (2, 1025))], 1
)
FEW_VERTICES = GraphCase(_MEMBERS, 3, 1537, 3)
FEW_HYPEREDGES = GraphCase(_MEMBERS.flip(0), 1537, 3, 3)
ONE_VERTEX = GraphCase(torch.stack([torch.zeros(1100, dtype=torch.int64), torch.arange(1100)]), 1, 1100, 1)
GRAPH_NAMES = ["three", "one-column", "empty-hyperedge", "alone-in-hyperedges", "repeated", "more-hyperedges"]
GRAPH_NAMES += ["no-incidence", "no-vertex", "no-hyperedge", "valued"]
CASES = [pytest.param(GRAPHS[name], id=name) for name in GRAPH_NAMES] + [pytest.param(HUB, id="hub")]
FEW = {"few-vertices": FEW_VERTICES, "few-hyperedges": FEW_HYPEREDGES, "one-vertex-hub": ONE_VERTEX}
CASES += [pytest.param(case, id=name) for name, case in FEW.items()]


@pytest.fixture(autouse=True)
def use_triton(monkeypatch):
    """The interpreter multiplies the bits of bfloat16 numbers as if they were integers: give it their values."""
    product = interpreter.InterpreterBuilder.create_dot

    def values(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, *rest):
        return product(self, values(a), values(b), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    with ops.backend("triton"):
        yield


def test_outputs_are_contiguous_whatever_the_inputs():
    graph, target = GRAPHS["odd-63"].build(), torch.arange(63) % 17
    x, items = rows(6, 63).T, rows(6, 17, seed=1).T
    found = [
        ops.hypergraph_conv(x, graph, num_layers=0),
        ops.hypergraph_conv(x, graph),
        *ops.bipartite_propagate(x, items, graph),
        *torch.ops.hellm.info_nce(x, x * 2, torch.tensor(0.3), None, True, "mean", "highest", True),
        *torch.ops.hellm.info_nce(x.double(), x.double(), torch.tensor(0.3), None, True, "mean", "highest", True),
        *torch.ops.hellm.item_cross_entropy(x, items, target, None, "mean", True, True),
        *torch.ops.hellm.item_cross_entropy(x.double(), items.double(), target, None, "mean", True, True),
        *ops.knn(x, 3),
    ]
    assert all(t.is_contiguous() for t in found)


def compare(function, definition, inputs, *, compute=None, factor=4.0):
    """Budget: what plain torch in the tested dtype loses, or in `compute` where the kernel accumulates in that."""
    compute = compute or inputs[0].dtype
    assert_within_budget(
        outputs_and_gradients(definition, [x.double() for x in inputs]),
        outputs_and_gradients(lambda *args: definition(*(x.to(compute) for x in args)), inputs),
        outputs_and_gradients(function, inputs),
        factor=factor,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_hypergraph_conv_matches_reference(case, dtype):
    graph = case.build()
    for settings in ({"num_layers": 2}, {"normalization": "row", "hyperedge_degree": False, "self_loops": False}):

        def definition(x, settings=settings):
            scales = graph.scales(
                **{k: v for k, v in settings.items() if k != "num_layers"},
                dtype=torch.promote_types(x.dtype, torch.float32),
            )
            csr = (*graph.vertex_csr, *graph.edge_csr)
            return reference.hypergraph_conv(x, *csr, *scales, settings.get("num_layers", 1))

        x = rows(graph.num_vertices, case.dim, dtype=dtype)
        compare(lambda x, s=settings: ops.hypergraph_conv(x, graph, **s), definition, [x])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_incidence_product_matches_reference(dtype):
    for case in (GRAPHS["valued"], HUB, *FEW.values()):
        graph = case.build()
        for transpose, csr in ((False, graph.vertex_csr), (True, graph.edge_csr)):
            x = rows(graph.num_vertices if transpose else graph.num_hyperedges, case.dim, dtype=dtype)
            compare(
                lambda x, g=graph, t=transpose: ops.incidence_product(x, g, transpose=t),
                lambda x, c=csr: reference.incidence_product(x, *c),
                [x],
            )


@pytest.mark.parametrize("num_layers", [0, 1, 3])
@pytest.mark.parametrize("name", ["three", "more-hyperedges", "no-hyperedge", "hub"])
def test_bipartite_propagate_matches_reference(name, num_layers):
    graph = (GRAPHS | {"hub": HUB})[name].build()
    csr = (*graph.vertex_csr[:2], *graph.edge_csr[:2])
    compare(
        lambda u, i: ops.bipartite_propagate(u, i, graph, num_layers=num_layers),
        lambda u, i: reference.bipartite_propagate(u, i, *csr, *graph.bipartite_scales(u.dtype), num_layers),
        [rows(graph.num_vertices, 5), rows(graph.num_hyperedges, 5, seed=1)],
    )


@pytest.mark.parametrize("intra", [True, False], ids=["both-views", "cross-view"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1, 5), (3, 67), (70, 16)], ids=str)
def test_info_nce_matches_reference(shape, reduction, intra):
    settings = {"reduction": reduction, "intra": intra}
    compare(fused(**settings), plain(**settings), views(shape), factor=8)


def test_info_nce_temperature_learns():
    inputs = [*views((40, 16)), torch.tensor(0.1)]
    for reduction in ("mean", "none"):
        truth = outputs_and_gradients(plain(reduction), [x.double() for x in inputs])
        assert relative_error(truth, outputs_and_gradients(fused(reduction), inputs)) < 3e-6


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_info_nce_of_chosen_rows_matches_reference(reduction):
    for chosen in (torch.tensor([0]), torch.tensor([5, 62, 5, 0], dtype=torch.int32)):
        settings = {"reduction": reduction, "chosen": chosen}
        compare(fused(**settings), plain(**settings), views((63, 20)), factor=8)


def test_info_nce_of_16_bit_rows_and_sharp_temperatures():
    compare(fused(), plain(), views((63, 20), torch.bfloat16), compute=torch.float32)
    compare(fused(temperature=0.01), plain(temperature=0.01), views((63, 20)), factor=8)


def test_info_nce_keeps_the_digits_of_a_tiny_loss():
    anchor = rows(40, 16)
    inputs = [anchor, anchor + 0.01 * rows(40, 16, seed=1)]
    truth = outputs_and_gradients(plain(temperature=0.05), [x.double() for x in inputs])
    assert truth[0] < 1e-3
    assert relative_error(truth, outputs_and_gradients(fused(temperature=0.05), inputs)) < 1e-4


def test_info_nce_zero_rows_and_padding():
    anchor, positive = views((35, 12))
    anchor[3], positive[7] = 0, 0
    compare(fused(), plain(), [anchor, positive], factor=8)


@pytest.mark.parametrize("scale", [1e-36, 1e36])
def test_info_nce_does_not_depend_on_the_length_of_rows(scale):
    anchor, positive = views((20, 12))
    expected = outputs_and_gradients(fused(), [anchor, positive])
    found = outputs_and_gradients(fused(), [anchor, positive * scale])
    found[2] = found[2].double() * scale
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(
    ("precision", "dtype", "budget"),
    [("high", torch.float16, 3e-4), ("medium", torch.bfloat16, 3e-3)],
)
def test_info_nce_precision_is_that_of_its_operands(precision, dtype, budget):
    inputs = views((70, 24))
    truth = outputs_and_gradients(plain(), [x.double() for x in inputs])
    error = relative_error(truth, outputs_and_gradients(fused(precision=precision), inputs))
    assert torch.finfo(dtype).eps / 64 < error < budget


def test_losses_give_the_same_bits_twice():
    chosen = torch.tensor([3, 9, 3, 44])
    first, second = (outputs_and_gradients(fused(chosen=chosen), views((45, 20))) for _ in range(2))
    assert_same_bits(first, second)


def item_inputs(num_rows, num_items, dim, bias, dtype=torch.float32):
    inputs = [rows(num_rows, dim, dtype=dtype), rows(num_items, dim, seed=1, dtype=dtype)]
    return inputs + [rows(num_items, seed=2)] * bias


def both_cross_entropies(target, reduction):
    def function(hidden, items, bias=None):
        return ops.item_cross_entropy(hidden, items, target, bias=bias, reduction=reduction)

    def definition(hidden, items, bias=None):
        bias = None if bias is None else bias.to(hidden.dtype)
        return F.cross_entropy(F.linear(hidden, items, bias), target, reduction=reduction)

    return function, definition


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 3, 20), (40, 70, 16), (70, 5, 67)], ids=str)
def test_item_cross_entropy_matches_reference(shape, reduction, bias):
    target = torch.arange(shape[0]) * 7 % shape[1]
    compare(*both_cross_entropies(target, reduction), item_inputs(*shape, bias), factor=8)


def test_item_cross_entropy_of_16_bit_rows():
    target = torch.arange(30) * 7 % 41
    for dtype in (torch.float16, torch.bfloat16):
        inputs = item_inputs(30, 41, 16, False, dtype)
        truth, found = (
            outputs_and_gradients(f, [x.to(d) for x in inputs])
            for f, d in zip(both_cross_entropies(target, "mean")[::-1], (torch.float64, dtype), strict=True)
        )
        assert relative_error(truth, found) < 2 * torch.finfo(dtype).eps


def test_item_cross_entropy_of_large_logits_and_absent_items():
    hidden, items, bias = item_inputs(9, 20, 16, True)
    bias[4] = float("-inf")
    target = torch.arange(9) + 6
    function, definition = both_cross_entropies(target, "mean")
    inputs = [hidden * 1e3, items]
    truth = outputs_and_gradients(lambda h, e: definition(h, e, bias), [x.double() for x in inputs])
    # A float32 logit of 1e4 is known to 1e-3, and so are the shares of two items that are nearly equal.
    assert relative_error(truth, outputs_and_gradients(lambda h, e: function(h, e, bias), inputs)) < 2e-3


def test_rows_and_targets_that_do_not_exist_give_nan():
    """On a GPU nobody looks at them on the host: no address may come of them, and no silent gradient."""
    triton, (anchor, positive) = Direct(backends.BACKENDS["triton"]), views((20, 16))
    chosen = torch.tensor([3, -1, 20, 2**40, 19])
    t = torch.tensor(0.2)
    loss, _, grad_positive, slope = triton.info_nce(anchor, positive, t, chosen, torch.ones(5), True, "high")
    assert loss.isnan().tolist() == [False, True, True, True, False]
    assert grad_positive.isnan().all() and slope.isnan()
    hidden, items, bias = item_inputs(5, 20, 16, True)
    loss, grad_hidden, *grads = triton.item_cross_entropy(hidden, items, chosen, bias, torch.ones(5), True, True)
    assert loss.isnan().tolist() == grad_hidden.isnan().any(1).tolist() == [False, True, True, True, False]
    assert all(grad.isnan().all() for grad in grads)


def test_what_the_kernels_do_not_take_is_computed_in_plain_torch():
    for shape, dtype in (((4, 200), torch.float32), ((5, 3), torch.float64), ((3, 0), torch.float32)):
        compare(fused(), plain(), views(shape, dtype))
    compare(*both_cross_entropies(torch.tensor([0, 2]), "sum"), item_inputs(2, 3, 8, True, torch.float64)[:2])
    assert torch.equal(ops.knn(rows(4, 2), 1)[0].flatten(), torch.arange(4))


def test_backend_is_usable_but_never_automatic():
    assert backends.BACKENDS["triton"].unavailable(torch.device("cpu")) is None
    assert backends.BACKENDS["triton"].unverified(torch.device("cpu")) == "on the CPU it serves tests"
    graph = Hypergraph(torch.tensor([[0, 1], [0, 0]]))
    assert backends.select(torch.device("cpu")).name == "triton"
    assert torch.equal(ops.incidence_product(torch.ones(2, 1), graph, transpose=True), torch.tensor([[2.0]]))
