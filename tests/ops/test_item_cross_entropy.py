"""item_cross_entropy: every backend against torch's cross-entropy in float64, and its numerics at the extremes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    assert_same_bits,
    assert_within_budget,
    outputs_and_gradients,
    results_for_threads,
    rows,
)

from hellm import ops
from hellm.ops import reference

# Rows, items, columns. Blocks of items are 240 long, strips of rows up to 96.
SHAPES = [
    pytest.param(shape, id="x".join(map(str, shape)))
    for shape in ((1, 1, 1), (1, 2, 5), (5, 1, 3), (3, 241, 67), (63, 17, 1), (97, 257, 64), (200, 700, 33))
]


def inputs_of(shape, dtype=torch.float32, bias=True, seed=0):
    """[hidden, items] or [hidden, items, bias], and targets."""
    num_rows, num_items, dim = shape
    tensors = [rows(num_rows, dim, dtype=dtype, seed=seed), rows(num_items, dim, dtype=dtype, seed=seed + 1)]
    if bias:
        tensors.append(rows(num_items, dtype=dtype, seed=seed + 2))
    return tensors, torch.randint(num_items, (num_rows,), generator=torch.Generator().manual_seed(seed))


def plain(target, reduction="mean"):
    """torch's cross-entropy over all logits, in float32 for 16-bit inputs."""

    def function(hidden, items, bias=None):
        compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        hidden, items, bias = (None if t is None else t.to(compute) for t in (hidden, items, bias))
        return F.cross_entropy(F.linear(hidden, items, bias), target, reduction=reduction)

    return function


def fused(target, reduction="mean"):
    def function(hidden, items, bias=None):
        return ops.item_cross_entropy(hidden, items, target, bias=bias, reduction=reduction)

    return function


def compare(inputs, target, reduction="mean", factor=4.0):
    assert_within_budget(
        outputs_and_gradients(plain(target, reduction), [x.double() for x in inputs]),
        outputs_and_gradients(plain(target, reduction), inputs),
        outputs_and_gradients(fused(target, reduction), inputs),
        factor=factor,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_item_cross_entropy_matches_torch(shape, dtype, kernel):
    for bias in (False, True):
        inputs, target = inputs_of(shape, dtype, bias)
        for reduction in ("mean", "sum", "none"):
            compare(inputs, target, reduction, factor=8.0)


def test_item_cross_entropy_definition_is_the_formula():
    (hidden, items, bias), target = inputs_of((4, 5, 3), torch.float64)
    logits = hidden @ items.T + bias
    expected = torch.log(torch.exp(logits).sum(1)) - logits[torch.arange(4), target]
    torch.testing.assert_close(reference.item_cross_entropy(hidden, items, target, bias), expected)
    by_blocks = reference.item_cross_entropy_with_gradients(
        hidden, items, target, bias, torch.ones(4), True, True, block_elements=10
    )
    torch.testing.assert_close(by_blocks[0], expected)
    whole = outputs_and_gradients(lambda *t: plain(target, "sum")(*t), [hidden, items, bias])
    cotangent = rows(1, dtype=torch.float64, seed=7)
    for found, wanted in zip(by_blocks[1:], whole[1:], strict=True):
        torch.testing.assert_close(found * cotangent, wanted)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_item_cross_entropy_of_large_logits(scale, kernel):
    """One logit of +-10,000 among small ones: the loss is their difference, and softmax is one-hot or absent."""
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    items = torch.tensor([[scale, 0.0], [1.0, 1.0], [1.0, -1.0]])
    target = torch.tensor([0, 1])
    loss, grad_hidden, grad_items = (
        t.double() for t in outputs_and_gradients(lambda h, e: fused(target, "none")(h, e), [hidden, items])
    )
    small = torch.log(torch.tensor(2.0, dtype=torch.float64))
    expected = [0.0, 9_999.0] if scale > 0 else [10_001.0 + small, small]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    truth = outputs_and_gradients(plain(target, "none"), [hidden.double(), items.double()])
    torch.testing.assert_close(grad_hidden, truth[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_items, truth[2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_items", [3, 600], ids=["one-block", "three-blocks"])
def test_item_cross_entropy_is_accurate_at_large_scale(num_items, kernel):
    (hidden, items), target = inputs_of((40, num_items, 16), bias=False)
    for scale in (30.0, 1000.0):
        compare([hidden * scale, items], target, factor=8.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_item_cross_entropy_keeps_tiny_losses(dtype, kernel):
    """Nine orthogonal items, the target 20 above the others: each loss is log1p(8 exp(-20)), lost if inside one sum."""
    eye, target = torch.eye(9, dtype=dtype), torch.arange(9)
    found = ops.item_cross_entropy(20 * eye, eye, target, reduction="none")
    expected = torch.log1p(8 * torch.exp(torch.tensor(-20.0, dtype=torch.float64)))
    torch.testing.assert_close(found.double(), expected.expand(9), rtol=1e-5, atol=0.0)
    gradients = outputs_and_gradients(fused(target), [20 * eye, eye])
    truth = outputs_and_gradients(plain(target), [20 * eye.double(), eye.double()])
    for t, f in zip(truth[1:], gradients[1:], strict=True):
        assert float((t - f.double()).norm() / t.norm()) < 1e-5


def test_item_cross_entropy_of_one_item_is_zero(kernel):
    inputs, target = inputs_of((7, 1, 5))
    for reduction in ("mean", "none"):
        for value in outputs_and_gradients(fused(target, reduction), inputs):
            assert torch.equal(value, torch.zeros_like(value))


def test_item_cross_entropy_bias_of_minus_infinity_leaves_an_item_out(kernel):
    (hidden, items, bias), _ = inputs_of((20, 500, 9), torch.float64)
    keep = torch.arange(500) % 3 != 0
    keep[240:480] = False  # a whole block of items
    target = torch.randint(int(keep.sum()), (20,))
    expected = outputs_and_gradients(plain(target), [hidden, items[keep], bias[keep]])
    found = outputs_and_gradients(
        fused(keep.nonzero().squeeze(1)[target]), [hidden, items, bias.masked_fill(~keep, float("-inf"))]
    )
    for position in (2, 3):
        assert torch.equal(found[position][~keep], torch.zeros_like(found[position][~keep]))
        found[position] = found[position][keep]
    assert_within_budget(expected, expected, found)


def test_item_cross_entropy_does_not_hide_nan(kernel):
    (hidden, items), target = inputs_of((5, 300, 8), bias=False)
    items[250, 3] = float("nan")
    assert ops.item_cross_entropy(hidden, items, target, reduction="none").isnan().all()
    hidden[2, 1] = float("nan")
    clean = items.nan_to_num()
    found = ops.item_cross_entropy(hidden, clean, target, reduction="none").isnan()
    assert found.tolist() == [False, False, True, False, False]


def test_item_cross_entropy_of_no_rows(kernel):
    for bias in (False, True):
        inputs, target = inputs_of((0, 6, 4), bias=bias)
        assert ops.item_cross_entropy(*inputs[:2], target, reduction="none").shape == (0,)
        for reduction in ("sum", "none"):
            values = outputs_and_gradients(fused(target, reduction), inputs)
            assert [tuple(v.shape) for v in values[1:]] == [tuple(t.shape) for t in inputs]
            assert all(torch.equal(value, torch.zeros_like(value)) for value in values)


def test_item_cross_entropy_takes_any_strides(kernel):
    (hidden, items, bias), target = inputs_of((40, 30, 6))
    expected = outputs_and_gradients(fused(target), [hidden, items, bias])

    def strided(hidden, items, bias):
        wide = torch.stack([items, items], 2)[..., 1]
        assert not wide.is_contiguous()
        assert not hidden.T.contiguous().T.is_contiguous()
        every_second = torch.stack([target, target], 1)[:, 0]
        return ops.item_cross_entropy(
            hidden.T.contiguous().T, wide, every_second, bias=torch.stack([bias] * 2, 1)[:, 1]
        )

    for found, wanted in zip(outputs_and_gradients(strided, [hidden, items, bias]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    same = hidden[:1].expand(40, 6)
    assert torch.equal(
        ops.item_cross_entropy(same, items, target), ops.item_cross_entropy(same.contiguous(), items, target)
    )
    learned = items.clone().requires_grad_()
    ops.item_cross_entropy(hidden, learned, target, reduction="none").sum().backward()  # an expanded gradient
    wanted = items.clone().requires_grad_()
    ops.item_cross_entropy(hidden, wanted, target, reduction="sum").backward()
    torch.testing.assert_close(learned.grad, wanted.grad, rtol=1e-5, atol=1e-6)


def test_item_cross_entropy_repeated_targets_add_up(kernel):
    inputs, _ = inputs_of((150, 300, 8))
    compare(inputs, torch.full((150,), 299), "sum", factor=8.0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_item_cross_entropy_same_bits_for_any_number_of_threads(reduction, kernel):
    for shape, bias in (((200, 1_500, 33), True), ((150, 2_500, 64), False)):
        inputs, target = inputs_of(shape, bias=bias)
        first, *others = results_for_threads(
            lambda t=target, i=inputs: outputs_and_gradients(fused(t, reduction), i),
            # How the matrix products of plain torch are summed depends on the number of threads.
            (1, 1, 2, 3) if kernel == "native" else (2, 2),
        )
        for other in others:
            assert_same_bits(first, other)


def test_item_cross_entropy_gives_gradients_only_where_required(kernel):
    for reduction in ("mean", "none"):
        for needed in ((True, False, False), (False, True, False), (False, False, True), (True, True, False)):
            inputs, target = inputs_of((9, 6, 4))
            total = fused(target, reduction)
            everything = outputs_and_gradients(lambda *t, f=total: f(*t).sum(), inputs)[1:]
            for x, need in zip(inputs, needed, strict=True):
                x.requires_grad_(need)
            (total(*inputs).sum() * rows(seed=7)).backward()
            for x, need, wanted in zip(inputs, needed, everything, strict=True):
                assert (x.grad is not None) == need
                if need:
                    torch.testing.assert_close(x.grad, wanted)
    inputs, target = inputs_of((9, 6, 4))
    assert not fused(target)(*inputs).requires_grad
    with torch.no_grad():
        assert not fused(target)(*(x.requires_grad_() for x in inputs)).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_item_cross_entropy_gradcheck(reduction, backend):
    inputs, target = inputs_of((4, 6, 3), torch.float64)
    for chosen in (inputs, inputs[:2]):
        chosen = [x.requires_grad_() for x in chosen]
        assert torch.autograd.gradcheck(fused(target, reduction), chosen, fast_mode=True)
        assert torch.autograd.gradgradcheck(fused(target, reduction), chosen, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_item_cross_entropy_opcheck(reduction, backend):
    for dtype in (torch.float32, torch.bfloat16):
        for bias in (False, True):
            inputs, target = inputs_of((6, 5, 4), dtype, bias)
            for needed in ((True, True), (True, False), (False, True), (False, False)):
                hidden, items = (x.detach().requires_grad_(n) for x, n in zip(inputs, needed, strict=False))
                b = inputs[2].detach().requires_grad_(needed[1]) if bias else None
                arguments = (hidden, items, target, b, reduction, *needed)
                tests = ("test_schema", "test_faketensor") if dtype == torch.bfloat16 else opcheck_tests
                torch.library.opcheck(torch.ops.hellm.item_cross_entropy.default, arguments, test_utils=tests)
            torch.library.opcheck(
                torch.ops.hellm.item_cross_entropy_backward.default,
                (*inputs[:2], target, inputs[2] if bias else None, rows(6), True, True),
            )


opcheck_tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_item_cross_entropy_compiles_to_one_graph(reduction):
    torch.compiler.reset()
    graphs = []

    def inspect(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    def step(hidden, items, bias, target):
        return ops.item_cross_entropy(hidden.tanh(), items.tanh(), target, bias=bias, reduction=reduction)

    compiled = torch.compile(step, fullgraph=True, backend=inspect, dynamic=True)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((12, 20, 5), (31, 40, 7), (40, 9, 9)):
        inputs, target = inputs_of(shape)
        expected = outputs_and_gradients(lambda *t, y=target: step(*t, y), inputs)
        assert_same_bits(outputs_and_gradients(lambda *t, y=target: compiled(*t, y), inputs), expected)
        assert_same_bits(outputs_and_gradients(lambda *t, y=target: traced(*t, y), inputs), expected)
    assert len(graphs) == 1
    assert sum("hellm.item_cross_entropy" in target for target in graphs[0]) == 1


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_item_cross_entropy_of_float16_is_scaled_before_it_is_rounded(reduction, kernel):
    """The mean's gradients are below the normal float16 numbers, those of the scaled loss are not."""
    inputs, target = inputs_of((1_000, 50, 8), torch.float16)
    scale = 2.0**13 if reduction == "mean" else 2.0**3
    truth, found = (
        outputs_and_gradients(lambda *t, f=f: scale * f(target, reduction)(*t), [x.to(d) for x in inputs])
        for f, d in ((plain, torch.float64), (fused, torch.float16))
    )
    for true, value in zip(truth[1:], found[1:], strict=True):
        near = (true - value.double()).abs() <= 2.0**-10 * true.abs() + 2e-6 * true.abs().max()
        assert near.all(), float((true - value.double()).abs().max())


def test_item_cross_entropy_compiled_still_looks_at_the_targets(backend):
    (hidden, items), target = inputs_of((4, 5, 3), bias=False)
    compiled = torch.compile(ops.item_cross_entropy, fullgraph=True, backend="aot_eager")
    compiled(hidden, items, target)
    with pytest.raises(ValueError, match=r"target must be in \[0, 5\), got 5 first at position 3"):
        compiled(hidden, items, target.index_fill(0, torch.tensor([3]), 5))


def test_item_cross_entropy_under_autocast_runs_in_its_dtype(backend):
    (hidden, items), target = inputs_of((20, 30, 8), bias=False)
    inputs = [x.requires_grad_() for x in (hidden, items)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.item_cross_entropy(*inputs, target)
        mixed = ops.item_cross_entropy(hidden.bfloat16(), items, target)
        wide = ops.item_cross_entropy(hidden.double(), items.double(), target)
    assert found.dtype == mixed.dtype == torch.float32
    assert wide.dtype == torch.float64
    assert torch.equal(found, ops.item_cross_entropy(hidden.bfloat16(), items.bfloat16(), target))
    assert torch.equal(mixed, found)
    found.backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)
    compiled = torch.compile(lambda h, e: ops.item_cross_entropy(h, e, target), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(hidden.bfloat16(), items), found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": None}, "hidden must be a tensor or an array with __dlpack__, got NoneType"),
        ({"item_embedding": 3}, "item_embedding must be a tensor or an array with __dlpack__, got int"),
        ({"hidden": torch.zeros(4)}, r"hidden must be \[rows, columns\], got shape \(4,\)"),
        (
            {"item_embedding": torch.zeros(5, 2).long()},
            "item_embedding must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ({"item_embedding": torch.zeros(5, 3)}, "item_embedding must have 2 columns like hidden, got 3"),
        (
            {"item_embedding": torch.zeros(5, 2).double()},
            "item_embedding must be torch.float32 like hidden, got torch.float64",
        ),
        ({"item_embedding": torch.zeros(5, 2, device="meta")}, "item_embedding must be on cpu like hidden, got meta"),
        ({"item_embedding": torch.zeros(0, 2)}, "item_embedding must have at least one row, got 0"),
        ({"reduction": "max"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'max'"),
        (
            {"hidden": torch.zeros(0, 2), "target": torch.zeros(0).long()},
            "hidden must have at least one row for the mean, got 0",
        ),
        ({"target": [0, 1, 2, 3]}, "target must be a tensor or an array with __dlpack__, got list"),
        ({"target": torch.zeros(3).long()}, r"target must be \[4\] int64, got \(3,\) torch.int64"),
        ({"target": torch.zeros(4).int()}, r"target must be \[4\] int64, got \(4,\) torch.int32"),
        ({"target": torch.zeros(4, device="meta").long()}, "target must be on cpu like hidden, got meta"),
        ({"target": torch.tensor([0, 4, 5, 7])}, r"target must be in \[0, 5\), got 5 first at position 2"),
        ({"target": torch.tensor([0, -1, 5, 7])}, r"target must be in \[0, 5\), got -1 first at position 1"),
        ({"bias": 0.5}, "bias must be a tensor or an array with __dlpack__, got float"),
        ({"bias": torch.zeros(4)}, r"bias must be \[5\] of a floating dtype, got \(4,\) torch.float32"),
        ({"bias": torch.zeros(5).long()}, r"bias must be \[5\] of a floating dtype, got \(5,\) torch.int64"),
        ({"bias": torch.zeros(5, device="meta")}, "bias must be on cpu like item_embedding, got meta"),
    ],
)
def test_item_cross_entropy_refuses(change, message):
    arguments = {"hidden": torch.zeros(4, 2), "item_embedding": torch.zeros(5, 2), "target": torch.arange(4)}
    with pytest.raises(ValueError, match=message):
        ops.item_cross_entropy(**{**arguments, **change})
