"""What a machine can do at most: cases of their own on a GPU, entries that take turns with the others on a CPU."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import inputs
from benchmarks.entries import at_precision
from benchmarks.registry import DIM, LIMIT, Entry, Limit, Outputs, Setup, Workload, register


def _product(size: int, device: torch.device, dtype: torch.dtype = torch.float32):
    """Runs a product of square matrices, its output allocated beforehand."""
    left, right = (torch.rand(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return lambda: (torch.mm(left, right, out=out),)


def _copy(num_bytes: int, device: torch.device, times: int = 1):
    """Runs that many copies of so many bytes."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)

    def run() -> Outputs:
        for _ in range(times):
            target.copy_(source)
        return (target[:1],)

    return run


def matrix_product(setup: Setup) -> Entry:
    """4096 x 4096 x 4096 float32 through torch.mm."""
    size = setup.small(4096, 64)
    run, note = _product(size, setup.device), f"torch.mm, float32, {size}^3"
    return Entry("matrix product", run, LIMIT, note=note, work=2.0 * size**3)


def memory_copy(setup: Setup) -> Entry:
    """A copy of 256 MiB, far beyond the caches."""
    num_bytes = setup.small(2**28, 2**16)
    run, note = _copy(num_bytes, setup.device), "torch copy_, bytes read + written"
    return Entry("memory copy", run, LIMIT, note=note, work=2.0 * num_bytes)


PRODUCT = Limit(matrix_product, ("ceiling-matmul", "float16"))
GATHER = Limit(memory_copy, ("ceiling-gather", "sports"))
LARGE_GATHER = Limit(memory_copy, ("ceiling-gather", "large"))


def _copies(setup: Setup) -> Workload:
    """A gigabyte through memory; 8 MiB over and over, which stay in the second-level cache."""
    num_bytes = setup.small(2**30, 2**16)
    part = min(num_bytes, 2**23)
    runs = {"copy_": _copy(num_bytes, setup.device), "copy_ in L2": _copy(part, setup.device, num_bytes // part)}
    return Workload([Entry(label, run) for label, run in runs.items()], 2.0 * num_bytes, "byte", graph=False)


def _products(setup: Setup) -> Workload:
    size = setup.small(8192, 64)
    entries = []
    for label, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("TF32", torch.float32)):
        entries.append(Entry(label, at_precision("high", _product(size, setup.device, dtype))))
    entries.append(Entry("float32", at_precision("highest", _product(size, setup.device))))
    return Workload(entries, 2.0 * size**3, parameters={"size": size}, graph=False)


def _gathers(setup: Setup) -> Workload:
    """Rows read in random order and written in a row: what the convolutions cannot do without."""
    entries, count = [], setup.small(2**22, 300)
    for label, num_rows in (("sports", 35_598), ("large", 10**6)):
        x = inputs.rows(min(num_rows, count), DIM).to(setup.device)
        index = inputs.indices(count, len(x)).to(setup.device)
        out = x.new_empty(count, DIM)
        entries.append(Entry(label, lambda x=x, i=index, out=out: (torch.index_select(x, 0, i, out=out)[:1],)))
    parameters = {"rows": count, "D": DIM}
    return Workload(entries, 2.0 * count * DIM * 4, "byte", parameters, graph=False)


_add = partial(register, "Ceilings", rank=0)
_add(_copies, "ceiling-copy")
_add(_products, "ceiling-matmul")
_add(_gathers, "ceiling-gather")
