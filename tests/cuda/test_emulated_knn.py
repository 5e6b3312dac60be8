"""Nearest neighbours on the emulated GPU: by scan and by panels, exact, the same bits each time."""

from __future__ import annotations

import cuda_build
import pytest
import torch
from op_cases import assert_same_bits, rows

from hellm.ops import reference
from hellm.ops._rows import unit_rows


def by_scan(gpu):
    return gpu._knn_by_scan


def by_panels(gpu):
    return gpu._knn_by_panels


def by_small_panels(gpu):
    return lambda x, k: gpu._knn_by_panels(x, k, panel_bytes=0, fewest_rows=64)


WAYS = pytest.mark.parametrize("way", [by_scan, by_panels, by_small_panels])


def assert_nearest(knn, x, k):
    """As in float64; two neighbours may change places only where float32 cannot tell their similarities apart."""
    index, similarity = knn(x, k)
    expected_index, expected = reference.knn(x.double(), k)
    assert torch.equal(index < 0, expected_index < 0)
    assert torch.allclose(similarity.double(), expected, rtol=0, atol=1.2e-7)
    apart = index != expected_index
    cosine = unit_rows(x.double()) @ unit_rows(x.double()).T
    assert torch.allclose(cosine.gather(1, index.clamp_min(0))[apart], expected[apart], rtol=0, atol=1.2e-7)
    assert all(len(set(row)) == len(row) for row in (r[r >= 0].tolist() for r in index))
    return index


@WAYS
@pytest.mark.parametrize(
    ("num_rows", "dim", "k", "dtype"),
    [
        (1, 1, 1, torch.float32),
        (3, 2, 3, torch.float32),
        (63, 67, 32, torch.bfloat16),
        (97, 9, 5, torch.float16),
        (257, 33, 17, torch.float32),
        (600, 64, 10, torch.float32),
        (300, 200, 31, torch.float32),
    ],
)
def test_knn_is_exact(gpu, way, num_rows, dim, k, dtype):
    assert_nearest(way(gpu), rows(num_rows, dim, dtype=dtype), k)


@pytest.mark.parametrize(("dim", "k", "dtype"), [(67, 62, torch.bfloat16), (260, 4, torch.float32)])
def test_knn_of_many_or_wide_goes_by_panels(gpu, dim, k, dtype, monkeypatch):
    monkeypatch.setattr(gpu, "_knn_by_scan", None)
    assert_nearest(gpu.knn, rows(63, dim, dtype=dtype), k)


def test_knn_of_narrow_rows_is_a_scan(gpu, monkeypatch):
    monkeypatch.setattr(gpu, "_knn_by_panels", None)
    assert_nearest(gpu.knn, rows(63, 256), 32)


@WAYS
def test_knn_with_ties_and_zero_rows(gpu, way):
    knn = way(gpu)
    x = rows(150, 6)
    x[[0, 77, 149]] = 0
    x[[3, 20, 141, 90]] = x[10].clone()
    x[50] = x[10] * 1e-18
    index, similarity = knn(x, 4)
    assert (index[[0, 77, 149]] == -1).all() and (similarity[[0, 77, 149]] == 0).all()
    assert (index[[3, 10, 20, 50, 90, 141]] == torch.tensor([3, 10, 20, 50])).all()
    assert_nearest(knn, x, 31)
    # Signs: lengths and products are exact, and most similarities tie.
    x = rows(130, 4).sign()
    x[::37] = 0
    for k in (1, 9, 32):
        assert torch.equal(knn(x, k)[0], reference.knn(x.double(), k)[0])
    x[5:] = 0  # fewer rows than neighbours
    assert torch.equal(knn(x, 9)[0], reference.knn(x.double(), 9)[0])


def test_knn_of_as_many_neighbours_as_panels_take(gpu):
    x = rows(150, 6)
    x[[0, 77, 149]] = 0
    assert_nearest(by_small_panels(gpu), x, 100)
    x = rows(130, 4).sign()
    x[::37] = 0
    assert torch.equal(gpu.knn(x, 128)[0], reference.knn(x.double(), 128)[0])


@pytest.mark.parametrize("descending", [False, True])
def test_knn_finds_the_near_wherever_they_come(gpu, descending):
    """Similarities that rise or fall all along: every tile brings better rows, or none after the first."""
    angle = torch.linspace(0.01, 3.1, 400)
    angle = angle.flip(0) if descending else angle
    x = torch.stack([angle.cos(), angle.sin()], 1)
    x[200] = torch.tensor([1.0, 0.0])
    index = assert_nearest(gpu._knn_by_scan, x, 5)
    assert index[200].tolist() == ([200, 399, 398, 397, 396] if descending else [200, 0, 1, 2, 3])


def crowded_rows(num_rows: int = 1030) -> torch.Tensor:
    """Row 9 is orthogonal to all but two: more rows than there is room for, within what halves can tell apart."""
    x = rows(num_rows, 6)
    x[:, 0] = 0
    x[9] = torch.tensor([3.0, 0, 0, 0, 0, 0])
    x[-330, 0], x[-230, 0] = 5e-4, -5e-4
    return x


@WAYS
def test_knn_compares_a_crowded_row_with_all(gpu, way):
    index = assert_nearest(way(gpu), crowded_rows(), 4)
    assert index[9].tolist() == [9, 700, 0, 1]


def test_every_order_of_threads_gives_the_same_neighbours(gpu, set_order):
    scan, panels = gpu._knn_by_scan, gpu._knn_by_panels
    calls = [(way, *one) for way in (scan, panels) for one in ((rows(120, 20), 11), (crowded_rows(400), 4))]
    for call, *arguments in (*calls, (scan, rows(90, 200), 11)):
        assert_same_bits(*cuda_build.in_two_orders(set_order, call, *arguments))


def test_knn_repeats_bit_by_bit(gpu):
    x = rows(120, 20)
    expected = gpu._knn_by_panels(x, 11)
    for way in (by_panels, by_small_panels, by_scan, by_scan):
        assert_same_bits(way(gpu)(x, 11), expected)
    for processors in (1, 5):
        assert_same_bits(cuda_build.of_processors(gpu, processors)._knn_by_scan(x, 11), expected)


@pytest.mark.parametrize(("dtype", "k"), [(torch.float64, 4), (torch.float32, 150)])
def test_knn_by_torch_is_exact_with_ties_by_index(gpu, dtype, k):
    x = rows(150, 6, dtype=dtype)
    x[7] = 0
    x[[3, 20, 41]] = x[10].clone()
    index, similarity = gpu.knn(x, k)
    expected_index, expected = reference.knn(x, k)
    assert torch.equal(index, expected_index)
    assert torch.allclose(similarity, expected, atol=1e-6)
