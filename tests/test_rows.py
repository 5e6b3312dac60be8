"""Rows of products keep their bits, whatever is computed beside them."""

from __future__ import annotations

import pytest
import torch

from hellm._rows import row_products


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("depth", [3, 12, 64, 240])
@pytest.mark.parametrize("width", [1, 5, 7, 11, 16, 229, 1003])
def test_a_row_has_the_same_bits_alone_and_in_every_place(one_thread, depth, width):
    draw = torch.Generator().manual_seed(depth * width)
    rows, matrix = torch.randn(40, depth, generator=draw), torch.randn(depth, width, generator=draw)
    alone = torch.cat([row_products(row.clone(), matrix) for row in rows.split(1)])
    torch.testing.assert_close(alone, rows @ matrix, atol=1e-4, rtol=1e-4)
    for parts in ([40], [7, 33], [17, 23], [13, 14, 13]):
        assert torch.equal(torch.cat([row_products(part.clone(), matrix) for part in rows.split(parts)]), alone)
    assert row_products(rows[:0], matrix).shape == (0, width)
