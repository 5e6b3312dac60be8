"""knn against brute force in float64: exactness, ties, zero rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from op_cases import DTYPES, assert_same_bits, needs_native, results_for_threads, rows

from hellm import ops
from hellm.ops import reference

SHAPES = [
    pytest.param(shape, id="x".join(map(str, shape)))
    for shape in ((1, 1, 1), (3, 1, 2), (3, 2, 3), (63, 67, 10), (97, 200, 5), (257, 1, 4), (257, 128, 17), (500, 8, 9))
]


def oracle(x, k):
    """Neighbours by sorted float64 cosines, lower index first among equals."""
    x = x.double()
    present = (x != 0).any(1)
    unit = torch.where(present[:, None], x / x.norm(dim=1, keepdim=True), torch.zeros_like(x))
    cosine = unit @ unit.T
    key = np.where(present.numpy(), -cosine.numpy(), np.inf)
    index = torch.from_numpy(np.argsort(key, axis=1, kind="stable")[:, :k].copy())
    index[~present] = -1
    index[:, int(present.sum()) :] = -1
    return index, cosine


def check(x, k):
    """The similarities are the oracle's, and so are the neighbours wherever rounding cannot swap two of them."""
    index, similarity = ops.knn(x, k)
    expected, cosine = oracle(x, k)
    tolerance = 1e-12 if x.dtype == torch.float64 else 2e-6
    assert index.dtype == torch.int64
    assert similarity.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    assert index.shape == similarity.shape == (x.shape[0], k)
    assert torch.equal(index < 0, expected < 0)
    found = torch.where(index < 0, 0.0, cosine.gather(1, index.clamp_min(0)))
    best = torch.where(expected < 0, 0.0, cosine.gather(1, expected.clamp_min(0)))
    torch.testing.assert_close(found, best, rtol=0, atol=tolerance)
    torch.testing.assert_close(similarity.double(), best, rtol=0, atol=tolerance)
    assert (similarity[:, 1:] <= similarity[:, :-1])[index[:, 1:] >= 0].all()
    for row in index.tolist():
        chosen = [c for c in row if c >= 0]
        assert len(set(chosen)) == len(chosen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_knn_matches_brute_force(shape, dtype, kernel):
    num_rows, dim, k = shape
    check(rows(num_rows, dim, dtype=dtype), k)


def test_knn_is_identical_to_brute_force_in_float64(kernel):
    x = rows(120, 16, dtype=torch.float64)
    for k in (1, 7, 120):
        assert torch.equal(ops.knn(x, k)[0], oracle(x, k)[0])


def test_knn_lists_the_row_itself_first(kernel):
    x = rows(257, 24)
    assert torch.equal(ops.knn(x, 1)[0].flatten(), torch.arange(257))


@pytest.mark.parametrize("dim", [1, 4, 16])
def test_knn_takes_the_lower_index_among_equals(dim, kernel):
    """Signs in 1, 4 or 16 columns: lengths and products are exact, so most similarities tie."""
    x = rows(300, dim).sign()
    x[::37] = 0
    for k in (1, 9, 300):
        assert torch.equal(ops.knn(x, k)[0], oracle(x, k)[0])


@needs_native
@pytest.mark.parametrize("dim", [5, 33])
@pytest.mark.parametrize("dtype", DTYPES)
def test_knn_of_copies_ties_exactly(dtype, dim, kernel):
    """Copies of a row lie in different blocks and tiles of the kernel; rounding must not tell them apart."""
    if kernel == "torch":
        pytest.skip("a matrix product of plain torch may round equal columns differently")
    x = rows(500, dim, dtype=dtype)
    copies = torch.tensor([2, 7, 96, 239, 240, 243, 251, 491, 499])
    x[copies] = x[2].clone()
    index, similarity = ops.knn(x, 6)
    assert torch.equal(index[copies], copies[:6].expand(len(copies), 6))
    assert (similarity[copies] == similarity[copies, :1]).all()


@pytest.mark.parametrize("panel_bytes", [1, 8 * 300 * 7, 2**28])
def test_panels_of_plain_torch_are_the_definition(panel_bytes):
    x = rows(300, 4, dtype=torch.float64).sign()
    x[::37] = 0
    for k in (1, 9, 300):
        expected = reference.knn(x, k)
        found = reference.knn_by_panels(x, k, panel_bytes)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_knn_sees_nothing_in_zero_rows(kernel):
    x = rows(9, 4)
    x[[0, 4]] = 0
    index, similarity = ops.knn(x, 9)
    check(x, 9)
    assert (index[[0, 4]] == -1).all()
    assert (similarity[[0, 4]] == 0).all()
    others = [1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(index[others].sort(1).values, torch.tensor([-1, -1, *others]).expand(7, 9))


def test_knn_of_only_zero_rows(kernel):
    index, similarity = ops.knn(torch.zeros(3, 2), 2)
    assert torch.equal(index, torch.full((3, 2), -1))
    assert torch.equal(similarity, torch.zeros(3, 2))


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_knn_does_not_depend_on_the_length_of_rows(scale, kernel):
    x = rows(30, 6)
    lengths = torch.where(torch.arange(30) % 2 == 0, scale, 1.0)[:, None]
    assert torch.equal(ops.knn(x * lengths, 5)[0], ops.knn(x, 5)[0])


def test_knn_takes_any_strides(kernel):
    x = rows(40, 6)
    expected = ops.knn(x, 4)
    for strided in (x.T.contiguous().T, torch.stack([x, -x], 2)[..., 0]):
        index, similarity = ops.knn(strided, 4)
        assert torch.equal(index, expected[0])
        torch.testing.assert_close(similarity, expected[1])
    assert torch.equal(ops.knn(torch.ones(1, 4).expand(5, 4), 2)[0], torch.tensor([[0, 1]]).expand(5, 2))


def test_knn_same_bits_for_any_number_of_threads(kernel):
    x = rows(300, 20)
    first, *others = results_for_threads(lambda: list(ops.knn(x, 11)), (1, 1, 2, 3) if kernel == "native" else (2, 2))
    for other in others:
        assert_same_bits(first, other)


def test_knn_takes_the_lower_index_among_equals_for_any_number_of_threads(kernel):
    """Threads meet the candidates of a row in an order of their own."""
    x = rows(700, 3).sign()
    expected = oracle(x, 9)[0]
    for index, _ in results_for_threads(lambda: list(ops.knn(x, 9)), (1, 2, 5)):
        assert torch.equal(index, expected)


def test_knn_has_no_gradient(kernel):
    assert not ops.knn(rows(5, 3).requires_grad_(), 2)[1].requires_grad


def test_knn_opcheck(backend):
    torch.library.opcheck(torch.ops.hellm.knn.default, (rows(7, 3), 4))


def test_knn_compiles_to_one_graph():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.knn(x * 2, 3), fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (7, 12, 30):
        x = rows(num_rows, 5)
        assert_same_bits(compiled(x), ops.knn(x * 2, 3))


def test_knn_under_autocast_runs_in_float32(backend):
    x = rows(20, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_bits(ops.knn(x, 3), ops.knn(x.clone(), 3))
        found = ops.knn(x, 3)
    assert_same_bits(found, ops.knn(x, 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": 5}, "x must be a tensor or an array with __dlpack__, got int"),
        ({"x": torch.zeros(3)}, r"x must be \[rows, columns\], got shape \(3,\)"),
        ({"x": torch.zeros(3, 2).int()}, "x must be float32, float64, bfloat16 or float16, got torch.int32"),
        ({"metric": "euclidean"}, "metric must be 'cosine', got 'euclidean'"),
        ({"k": 0}, "k must be between 1 and the number of rows 3, got 0"),
        ({"k": 4}, "k must be between 1 and the number of rows 3, got 4"),
        (
            {"x": torch.tensor([[1.0], [float("nan")], [float("inf")]])},
            "x must be finite, got NaN or infinity first in row 1",
        ),
    ],
)
def test_knn_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.knn(**{"x": torch.ones(3, 2), "k": 2, **arguments})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (9, 3), (63, 67)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_knn_sees_a_value_that_is_not_finite_anywhere(shape, dtype, value):
    for position in range(0, shape[0] * shape[1], 7):
        x = rows(*shape, dtype=dtype)
        x.view(-1)[position] = value
        with pytest.raises(ValueError, match=f"NaN or infinity first in row {position // shape[1]}$"):
            ops.knn(x, 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_knn_takes_the_largest_numbers_of_a_dtype(dtype):
    x = torch.full((3, 4), torch.finfo(dtype).max, dtype=dtype) * torch.tensor([1, -1, 1, 1], dtype=dtype)
    assert ops.knn(x, 1)[0].flatten().tolist() == [0, 0, 0]
