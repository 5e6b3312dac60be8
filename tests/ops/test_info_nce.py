"""info_nce: every backend against float64, the published formula, and the numerics of sharp temperatures."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from op_cases import (
    DTYPES,
    INSTRUCTION_SETS,
    assert_same_bits,
    assert_within_budget,
    needs_native,
    outputs_and_gradients,
    results_for_threads,
    rows,
)

from hellm import ops
from hellm.ops import reference

SHAPES = [
    pytest.param(shape, id="x".join(map(str, shape)))
    for shape in ((1, 1), (1, 5), (2, 3), (3, 67), (63, 1), (63, 64), (97, 200), (257, 128), (300, 8))
]
TEMPERATURES = [0.01, 0.024, 0.05, 0.2, 1.0]


def views(shape, dtype=torch.float32, seed=0):
    return [rows(*shape, dtype=dtype, seed=seed), rows(*shape, dtype=dtype, seed=seed + 1)]


def plain(reduction="mean", chosen=None, intra=True, temperature=0.2):
    """The definition, differentiated by autograd; in float32 for 16-bit inputs."""

    def function(anchor, positive, temperature=temperature):
        compute = torch.float64 if anchor.dtype == torch.float64 else torch.float32
        row_loss = reference.info_nce(anchor.to(compute), positive.to(compute), temperature, chosen, intra)
        return row_loss if reduction == "none" else getattr(row_loss, reduction)()

    return function


def fused(reduction="mean", chosen=None, intra=True, temperature=0.2, precision="highest"):
    def function(anchor, positive, temperature=temperature):
        return ops.info_nce(
            anchor,
            positive,
            temperature,
            intra_view_negatives=intra,
            reduction=reduction,
            precision=precision,
            rows=chosen,
        )

    return function


def compare(inputs, *more, factor=4.0, baseline=None, **settings):
    """The operator within the budget of the definition; with more inputs of the same shapes, in one budget."""
    precision = settings.pop("precision", "highest")

    def values(function, dtype=None):
        draws = ([x.to(dtype or x.dtype) for x in draw] for draw in (inputs, *more))
        found = [outputs_and_gradients(function, draw) for draw in draws]
        return [torch.stack(one) for one in zip(*found, strict=True)]

    assert_within_budget(
        values(plain(**settings), torch.float64),
        values(baseline or plain(**settings)),
        values(fused(**settings, precision=precision)),
        factor=factor,
    )


def relative_error(truth, found):
    return max(float((t - f.double()).norm() / t.norm().clamp_min(1e-30)) for t, f in zip(truth, found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_info_nce_matches_reference(shape, dtype, kernel):
    inputs = views(shape, dtype)
    compare(inputs)
    compare(inputs, reduction="none", intra=False)
    compare(inputs, reduction="sum", intra=False, temperature=0.5)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("intra", [True, False], ids=["both-views", "cross-view"])
def test_info_nce_of_chosen_rows_matches_reference(intra, reduction, kernel):
    for chosen in (torch.tensor([0]), torch.tensor([5, 62, 5, 0], dtype=torch.int32), torch.randperm(63)[:40]):
        compare(views((63, 20)), reduction=reduction, intra=intra, chosen=chosen)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_temperature_learns(reduction, temperature, kernel):
    # The error of one sum may be small by chance, so that of the definition is taken over four.
    compare(*([*views((63, 16), seed=seed), torch.tensor(temperature)] for seed in range(0, 8, 2)), reduction=reduction)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_info_nce_of_16_bit_products_is_no_worse_than_bfloat16_rows(shape, precision, kernel):
    """Than float32 arithmetic on unit rows that were rounded to bfloat16, within a factor of 4."""
    inputs = views(shape)
    chosen = torch.arange(0, shape[0], 2)
    for settings in ({}, {"intra": False, "reduction": "none"}, {"chosen": chosen}, {"temperature": 0.02}):

        def baseline(anchor, positive, settings=settings):
            rounded = []
            for x in (anchor, positive):
                unit = F.normalize(x, dim=1)
                rounded.append(unit + (unit.bfloat16().float() - unit).detach())
            return plain(**settings)(*rounded)

        compare(inputs, precision=precision, baseline=baseline, **settings)


@pytest.mark.parametrize(("precision", "bound"), [("highest", 2e-5), ("high", 2e-3), ("medium", 2e-2)])
@pytest.mark.parametrize("chosen", [None, torch.arange(0, 1200, 3).repeat(2)])
def test_info_nce_of_aligned_views_keeps_its_gradients(precision, bound, chosen, kernel):
    """The positive pulls along its anchor, a hundred times as hard as across it, where the gradient is."""
    anchor, noise = views((1200, 64))
    inputs = [anchor, anchor + 0.01 * noise]
    truth = outputs_and_gradients(plain(chosen=chosen), [x.double() for x in inputs])
    found = outputs_and_gradients(fused(chosen=chosen, precision=precision), inputs)
    assert relative_error(truth, found) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 0.2, 0.5])
def test_info_nce_of_16_bit_products_keeps_three_digits(temperature, dtype, kernel):
    """At "medium" too, unless the processor has products of its own for it, of bfloat16."""
    inputs = views((1200, 72), dtype)
    truth = outputs_and_gradients(plain(temperature=temperature), [x.double() for x in inputs])
    high, medium = (
        outputs_and_gradients(fused(temperature=temperature, precision=precision), inputs)
        for precision in ("high", "medium")
    )
    assert relative_error(truth, high) < (1e-3 if dtype == torch.float32 else 4e-3)
    assert all(map(torch.equal, high, medium)) or relative_error(truth, medium) < 4e-3


@pytest.mark.parametrize("settings", [{}, {"intra": False}, {"temperature": 0.02}], ids=str)
@pytest.mark.parametrize("dim", [2, 32, 33])
@pytest.mark.parametrize("num_rows", [15, 16, 17, 33, 191, 193, 240, 257, 513])
def test_info_nce_of_16_bit_products_at_the_edges_of_tiles(num_rows, dim, settings, kernel):
    """Rows along an axis lose nothing in 16 bits, so that losses are those of float32, and weights lose half a unit."""
    draw = torch.Generator().manual_seed(0)
    inputs = [
        torch.eye(dim)[torch.randint(dim, (num_rows,), generator=draw)] * torch.randn(num_rows, 1, generator=draw)
        for _ in range(2)
    ]
    truth = outputs_and_gradients(plain(**settings), [x.double() for x in inputs])
    found = outputs_and_gradients(fused(**settings, precision="medium"), inputs)
    torch.testing.assert_close(found[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    assert relative_error(truth, found) < 2**-8


@needs_native
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_pairs_that_one_instruction_multiplies_and_adds_give_the_same_bits(instruction_set):
    extension = importlib.import_module("hellm._C")
    before = extension.instruction_set()
    inputs, found = views((301, 24)), []
    try:
        extension.use_instruction_set(instruction_set)
        for use in (True, False):
            extension.use_fused_pairs(use)
            found.append(outputs_and_gradients(fused(temperature=0.2, precision="high"), inputs))
    finally:
        extension.use_fused_pairs(True)
        extension.use_instruction_set(before)
    assert all(map(torch.equal, *found))


def test_info_nce_of_16_bit_products_does_not_overflow(kernel):
    """Rows along an axis have the largest factors there are, and equal rows the largest sums."""
    anchor = torch.zeros(1201, 16)
    anchor[torch.arange(1201), torch.arange(1201) % 3] = 1.0
    inputs = [anchor, anchor.roll(1, 0)]
    truth = outputs_and_gradients(plain(temperature=0.5), [x.double() for x in inputs])
    # Each of a block's 240 equal weights may lose half a unit of the 65,000 that they make up, all to the same side.
    found = outputs_and_gradients(fused(temperature=0.5, precision="medium"), inputs)
    assert relative_error(truth, found) < 240 / 2 / 65000
    same = [torch.ones(1201, 1), torch.full((1201, 1), 3.0)]
    loss = fused(temperature=0.5, precision="medium")(*same)
    torch.testing.assert_close(loss, plain(temperature=0.5)(*same), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_info_nce_of_16_bit_products_does_not_hide_what_is_not_finite(value, kernel):
    anchor, positive = views((40, 8))
    anchor[7, 3] = value
    inputs = [anchor.requires_grad_(), positive.requires_grad_()]
    loss = fused(precision="medium")(*inputs)
    loss.backward()
    assert loss.isnan() and inputs[0].grad.isnan().any() and inputs[1].grad.isnan().any()


def test_info_nce_is_the_published_formula(kernel):
    """-log(exp(s12_ii) / (sum_j exp(s11_ij) + sum_j exp(s12_ij) - exp(s11_ii))), s = cosine / 0.5, averaged."""
    inputs = views((63, 64), torch.float64)

    def published(z1, z2):
        u, v = F.normalize(z1), F.normalize(z2)
        refl, between = torch.exp(u @ u.T / 0.5), torch.exp(u @ v.T / 0.5)
        return -torch.log(between.diag() / (refl.sum(1) + between.sum(1) - refl.diag())).mean()

    for expected, found in zip(
        outputs_and_gradients(published, inputs), outputs_and_gradients(fused(temperature=0.5), inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_info_nce_is_cross_entropy_across_views(kernel):
    anchor, positive = views((40, 16), torch.float64)
    logits = F.normalize(anchor) @ F.normalize(positive).T / 0.1
    expected = F.cross_entropy(logits, torch.arange(40))
    found = ops.info_nce(anchor, positive, 0.1, intra_view_negatives=False)
    torch.testing.assert_close(found, expected)


def _geometry(name):
    anchor, positive = views((63, 32))
    if name == "aligned":
        positive = anchor.clone()
    elif name == "collapsed":
        anchor = anchor[:1] + 1e-3 * anchor
        positive = anchor + 1e-3 * positive
    elif name == "duplicate":
        anchor[1::2] = anchor[0]
        positive[1::2] = anchor[0]
    elif name == "opposite":
        positive = -anchor
    return [anchor, positive]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("geometry", ["random", "aligned", "collapsed", "duplicate", "opposite"])
def test_info_nce_is_accurate_for_sharp_temperatures(geometry, temperature, kernel):
    inputs = _geometry(geometry)
    compare(inputs, temperature=temperature, factor=16.0)
    compare(inputs, temperature=temperature, reduction="none", factor=16.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_info_nce_keeps_tiny_losses(dtype, kernel):
    """Orthogonal rows, aligned views, t = 0.05: each loss is log1p(2 (N - 1) exp(-20)), lost if inside one sum."""
    eye = torch.eye(9, dtype=dtype)
    found = ops.info_nce(eye, eye, 0.05, reduction="none")
    expected = torch.log1p(16 * torch.exp(torch.tensor(-20.0, dtype=torch.float64)))
    torch.testing.assert_close(found.double(), expected.expand(9), rtol=1e-5, atol=0.0)
    gradients = outputs_and_gradients(fused(temperature=0.05), [eye, eye])
    truth = outputs_and_gradients(plain(temperature=0.05), [eye.double(), eye.double()])
    assert relative_error(truth, gradients) < 1e-5


def test_info_nce_of_float16_is_scaled_before_it_is_rounded(kernel):
    """The mean's gradients are below the normal float16 numbers, those of the scaled loss are not."""
    inputs = views((300, 16), torch.float16)
    truth, found = (
        outputs_and_gradients(lambda *t, f=f: 2.0**13 * f()(*t), [x.to(d) for x in inputs])
        for f, d in ((plain, torch.float64), (fused, torch.float16))
    )
    for true, value in zip(truth[1:], found[1:], strict=True):
        near = (true - value.double()).abs() <= 2.0**-10 * true.abs() + 2e-6 * true.abs().max()
        assert near.all(), float((true - value.double()).abs().max())


def test_info_nce_rows_are_a_subset_of_all_rows(kernel):
    anchor, positive = views((63, 20), torch.float64)
    whole = ops.info_nce(anchor, positive, reduction="none")
    chosen = torch.tensor([60, 3, 3, 17])
    torch.testing.assert_close(ops.info_nce(anchor, positive, reduction="none", rows=chosen), whole[chosen])
    torch.testing.assert_close(ops.info_nce(anchor, positive, rows=chosen), whole[chosen].mean())


def test_info_nce_mean_over_all_folds_is_the_whole():
    """Every row is in one of equal folds, so the folds' losses and gradients average to the whole: no bias."""
    inputs = views((60, 12), torch.float64)
    folds = torch.randperm(60, generator=torch.Generator().manual_seed(0)).split(12)
    parts = [outputs_and_gradients(fused(chosen=fold), inputs) for fold in folds]
    for position, whole in enumerate(outputs_and_gradients(fused(), inputs)):
        torch.testing.assert_close(torch.stack([part[position] for part in parts]).mean(0), whole)


def test_info_nce_of_one_row_is_zero(kernel):
    for intra in (True, False):
        for value in outputs_and_gradients(fused(intra=intra), [*views((1, 8)), torch.tensor(0.3)]):
            assert torch.equal(value, torch.zeros_like(value))


def test_info_nce_of_no_rows(kernel):
    empty = torch.zeros(0, 4, requires_grad=True)
    assert ops.info_nce(empty, empty, reduction="none").shape == (0,)
    total = ops.info_nce(empty, empty, reduction="sum")
    total.backward()
    assert float(total.detach()) == 0
    assert empty.grad.shape == (0, 4)
    inputs = views((3, 4))
    none_chosen = outputs_and_gradients(fused(reduction="sum", chosen=torch.empty(0, dtype=torch.int64)), inputs)
    assert all(torch.equal(value, torch.zeros_like(value)) for value in none_chosen)


def test_info_nce_zero_rows_have_similarity_zero_and_no_gradient(kernel):
    inputs = views((20, 8), torch.float64)
    inputs[0][[0, 7]] = 0
    inputs[1][[7, 9]] = 0
    for reduction in ("mean", "none"):
        truth = outputs_and_gradients(plain(reduction), inputs)
        found = outputs_and_gradients(fused(reduction), inputs)
        for view in (0, 1):
            zero = (inputs[view] == 0).all(1)
            assert zero.sum() == 2
            assert torch.equal(found[1 + view][zero], torch.zeros(2, 8, dtype=torch.float64))
        assert_within_budget(truth, truth, found)


@pytest.mark.parametrize("scale", [1e-36, 1e-18, 1e18, 1e36])
def test_info_nce_does_not_depend_on_the_length_of_rows(scale, kernel):
    """Beyond 1e-19 and 1e19 the squares of entries are no float32 numbers."""
    anchor, positive = views((20, 8))
    expected = outputs_and_gradients(fused(), [anchor, positive])
    found = outputs_and_gradients(fused(), [anchor * scale, positive])
    found[1] = found[1].double() * scale
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6, check_dtype=False)


def test_info_nce_takes_any_strides(kernel):
    anchor, positive = views((40, 6))
    expected = outputs_and_gradients(fused(), [anchor, positive])
    wide = torch.stack([anchor, anchor], 2)

    def strided(anchor, positive):
        assert not anchor.T.contiguous().T.is_contiguous()
        return ops.info_nce(anchor.T.contiguous().T, torch.stack([positive, positive], 2)[..., 1], precision="highest")

    for found, wanted in zip(outputs_and_gradients(strided, [anchor, positive]), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ops.info_nce(wide[..., 0], positive, precision="highest"), expected[0])
    same = anchor[:1].expand(40, 6)
    assert torch.equal(ops.info_nce(same, positive), ops.info_nce(same.contiguous(), positive))
    learned = anchor.clone().requires_grad_()
    ops.info_nce(learned, positive, reduction="none").sum().backward()  # an expanded gradient
    found = outputs_and_gradients(lambda a: ops.info_nce(a, positive, reduction="sum").unsqueeze(0), [anchor])
    cotangent = rows(1, seed=7)
    torch.testing.assert_close(learned.grad * cotangent, found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [0.02, 0.2])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_same_bits_for_any_number_of_threads(reduction, temperature, kernel):
    inputs = [*views((257, 33)), torch.tensor(temperature)]
    chosen = torch.arange(0, 257, 2)
    for settings in ({}, {"precision": "medium"}, {"chosen": chosen, "precision": "medium"}):
        first, *others = results_for_threads(
            lambda s=settings: outputs_and_gradients(fused(reduction, **s), inputs),
            # How the matrix products of plain torch are summed depends on the number of threads.
            (1, 1, 2, 3) if kernel == "native" else (2, 2),
        )
        for other in others:
            assert_same_bits(first, other)


def test_info_nce_gives_gradients_only_where_required(kernel):
    for reduction in ("mean", "none"):
        for needed in ((True, False, False), (False, True, False), (False, False, True)):
            inputs = [*views((9, 4)), torch.tensor(0.2)]
            for x, need in zip(inputs, needed, strict=True):
                x.requires_grad_(need)
            ops.info_nce(*inputs, reduction=reduction).sum().backward()
            assert tuple(x.grad is not None for x in inputs) == needed
    assert not ops.info_nce(*views((9, 4))).requires_grad
    with torch.no_grad():
        assert not ops.info_nce(*(x.requires_grad_() for x in views((9, 4)))).requires_grad


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_gradcheck(reduction, backend):
    inputs = [x.requires_grad_() for x in (*views((4, 3), torch.float64), torch.tensor(0.4, dtype=torch.float64))]
    for settings in ({}, {"intra": False}, {"chosen": torch.tensor([2, 0, 2])}):
        function = fused(reduction, **settings)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_opcheck(reduction, backend):
    temperature = torch.tensor(0.3)
    for chosen, needed in ((None, True), (torch.tensor([1, 4]), True), (None, False)):
        anchor, positive = (x.requires_grad_(needed) for x in views((6, 4)))
        torch.library.opcheck(
            torch.ops.hellm.info_nce.default,
            (anchor, positive, temperature, chosen, True, reduction, "highest", needed),
        )
    torch.library.opcheck(
        torch.ops.hellm.info_nce_backward.default,
        (*views((6, 4)), temperature, torch.tensor([1, 4]), rows(2), False, "highest"),
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_info_nce_compiles_to_one_graph(reduction):
    torch.compiler.reset()
    graphs = []

    def inspect(module, example_inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    def step(anchor, positive, temperature):
        return ops.info_nce(anchor.tanh(), positive.tanh(), temperature.exp(), reduction=reduction)

    compiled = torch.compile(step, fullgraph=True, backend=inspect, dynamic=True)
    traced = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows, dim in ((12, 5), (31, 7), (40, 9)):
        inputs = [*views((num_rows, dim)), torch.tensor(-1.0)]
        expected = outputs_and_gradients(step, inputs)
        assert_same_bits(outputs_and_gradients(compiled, inputs), expected)
        assert_same_bits(outputs_and_gradients(traced, inputs), expected)
    assert len(graphs) == 1
    assert sum("hellm.info_nce" in target for target in graphs[0]) == 1


def test_info_nce_compiles_with_chosen_rows_and_a_number_for_temperature():
    torch.compiler.reset()
    compiled = torch.compile(lambda a, p, r: ops.info_nce(a, p, 0.1, rows=r), fullgraph=True, backend="aot_eager")
    chosen = torch.tensor([3, 1])
    assert torch.equal(compiled(*views((9, 4)), chosen), ops.info_nce(*views((9, 4)), 0.1, rows=chosen))


def test_info_nce_under_autocast_runs_in_float32(backend):
    inputs = [x.requires_grad_() for x in views((20, 8))]
    expected = ops.info_nce(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = ops.info_nce(*inputs)
        from_bfloat16 = ops.info_nce(*(x.bfloat16() for x in inputs))
    assert torch.equal(found, expected)
    assert from_bfloat16.dtype == torch.float32
    from_bfloat16.backward()
    assert inputs[0].grad.dtype == torch.float32


def test_info_nce_reads_the_global_precision(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: seen.append(1) or "medium")
    found = ops.info_nce(*views((9, 4)))
    assert seen == [1]
    assert torch.equal(found, ops.info_nce(*views((9, 4)), precision="medium"))
    assert seen == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"anchor": None}, "anchor must be a tensor or an array with __dlpack__, got NoneType"),
        ({"positive": 3}, "positive must be a tensor or an array with __dlpack__, got int"),
        ({"anchor": torch.zeros(4)}, r"anchor must be \[rows, columns\], got shape \(4,\)"),
        (
            {"positive": torch.zeros(4, 2).long()},
            "positive must be float32, float64, bfloat16 or float16, got torch.int64",
        ),
        ({"positive": torch.zeros(5, 2)}, r"positive must have the shape of anchor \(4, 2\), got \(5, 2\)"),
        ({"positive": torch.zeros(4, 2).double()}, "positive must be torch.float32 like anchor, got torch.float64"),
        ({"positive": torch.zeros(4, 2, device="meta")}, "positive must be on cpu like anchor, got meta"),
        ({"temperature": 0.0}, "temperature must be > 0, got 0.0"),
        ({"temperature": -0.1}, "temperature must be > 0, got -0.1"),
        ({"temperature": float("nan")}, "temperature must be > 0, got nan"),
        ({"temperature": torch.ones(2)}, r"temperature must be a number or a 0-d tensor, got shape \(2,\)"),
        ({"temperature": torch.tensor(1)}, "temperature must be floating point, got torch.int64"),
        ({"temperature": torch.ones((), device="meta")}, "temperature must be on cpu like anchor, got meta"),
        ({"reduction": "max"}, r"reduction must be one of \('mean', 'sum', 'none'\), got 'max'"),
        ({"precision": "low"}, r"precision must be None or one of \('highest', 'high', 'medium'\), got 'low'"),
        (
            {"anchor": torch.zeros(0, 2), "positive": torch.zeros(0, 2)},
            "anchor must have at least one row for the mean",
        ),
        ({"rows": [0, 1]}, "rows must be a tensor or an array with __dlpack__, got list"),
        ({"rows": torch.zeros(2)}, r"rows must be \[R\] int32 or int64, got \(2,\) torch.float32"),
        ({"rows": torch.zeros(1, 2).long()}, r"rows must be \[R\] int32 or int64, got \(1, 2\) torch.int64"),
        ({"rows": torch.zeros(2, device="meta").long()}, "rows must be on cpu like anchor, got meta"),
        ({"rows": torch.tensor([0, 4])}, r"rows must be in \[0, 4\), got 4 first at position 1"),
        ({"rows": torch.tensor([-1, 2])}, r"rows must be in \[0, 4\), got -1 first at position 0"),
        ({"rows": torch.zeros(0).long()}, "rows must have at least one row for the mean, got 0"),
    ],
)
def test_info_nce_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        ops.info_nce(**{"anchor": torch.zeros(4, 2), "positive": torch.zeros(4, 2), **change})
