"""What benchmarks hold the kernels against: loops of multiply-adds and of gathers, for each instruction set."""

from __future__ import annotations

import time

import pytest
import torch
from op_cases import INSTRUCTION_SETS, needs_native, rows

from hellm.ops.backends import loaders

FLOATS = {"portable": 4, "avx2": 8, "avx512": 16}


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    extension = loaders.extension()
    before = extension.instruction_set()
    extension.use_instruction_set(request.param)
    yield request.param
    extension.use_instruction_set(before)


@needs_native
def test_multiply_adds_are_done(instruction_set):
    """Two units at 7 GHz cannot do more: a loop that the compiler saw through would."""
    operations, extension = 2.0**28, loaders.extension()
    started = time.perf_counter()
    assert extension.multiply_adds(operations, 1) == pytest.approx(extension.multiply_adds(operations / 2, 1))
    seconds = time.perf_counter() - started
    assert 1.5 * operations / seconds < 2 * 2 * FLOATS[instruction_set] * 7e9


@needs_native
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dim", [1, 5, 64, 203])
def test_gathers_add_up_rows(dim, threads, instruction_set):
    x = rows(50, dim).round()  # integers, whose sums are exact
    for count, num_rows in ((0, 1), (1, 3), (30, 7), (5_000, 900), (70_000, 1)):
        index, out = (torch.arange(count) * 7 % 50).int(), torch.empty(num_rows, dim)
        loaders.extension().gathers(x.data_ptr(), index.data_ptr(), out.data_ptr(), count, dim, num_rows, threads)
        expected = [x[part.long()].sum(0) for part in index.tensor_split(num_rows)]
        assert torch.equal(out, torch.stack(expected))
