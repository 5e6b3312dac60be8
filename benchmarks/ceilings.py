"""What a machine can do at most: cases of their own on a GPU, entries that take turns with the others on a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.entries import at_precision
from benchmarks.registry import DIM, LIMIT, Entry, Limit, Outputs, Setup, Workload, register
from hellm.hypergraph import Hypergraph
from hellm.ops.backends import loaders


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


def multiply_adds(setup: Setup) -> Entry:
    """Fused multiply-adds of float32 in the registers of the instruction set in use, on as many threads."""
    operations = 2.0 ** (20 if setup.tiny else 35)

    def run() -> Outputs:
        return (torch.tensor(loaders.extension().multiply_adds(operations, torch.get_num_threads())),)

    return Entry("multiply-adds in registers", run, LIMIT, note=_instruction_set(), work=operations)


class Gather(NamedTuple):
    """Rows of a table that are added up.

    Attributes:
        num_rows: of the table.
        index: [count] int32 rows that are read.
        num_sums: rows that they make.
    """

    num_rows: int
    index: Tensor
    num_sums: int


def gather_loop(gathers: Sequence[Gather], times: int = 1, *, written: bool = False) -> Entry:
    """The rows that an operator gathers, added up in registers: nothing is scaled.

    Args:
        gathers: what is read, each from a table of its own.
        times: that they are done.
        written: write as many sums as the operator does, each of equally many rows; else one sum a thread.
    """
    tables = []
    for num_rows, index, num_sums in gathers:
        out = torch.empty(num_sums if written else torch.get_num_threads(), DIM)
        tables.append((inputs.rows(num_rows, DIM), index, out))

    def run() -> Outputs:
        for _ in range(times):
            for x, index, out in tables:
                pointers = (part.data_ptr() for part in (x, index, out))
                loaders.extension().gathers(*pointers, index.numel(), DIM, len(out), torch.get_num_threads())
        return tuple(out for *_, out in tables)

    label, what = "gather loop", "the same rows, nothing else"
    if written:
        label, what = "gather loop, sums written", "the same rows read and as many written, of equal lengths"
    work = times * sum(index.numel() for _, index, _ in tables) * DIM * 4.0
    return Entry(label, run, LIMIT, note=f"{_instruction_set()}, {what}", work=work)


def gathers_of(graph: Hypergraph, passes: int = 1, layers: int = 1, ceiling: str = "sports") -> Limit:
    """The limit of an operator that goes from vertices to hyperedges and back in so many layers.

    A pass has tables of its own.
    """
    vertices, hyperedges = graph.num_vertices, graph.num_hyperedges
    back_and_forth = [
        Gather(vertices, graph.edge_vertices, hyperedges),
        Gather(hyperedges, graph.vertex_edges, vertices),
    ]
    loops = [partial(gather_loop, back_and_forth * passes, layers, written=written) for written in (False, True)]
    return Limit(lambda setup: [*(loop() for loop in loops), memory_copy(setup)], ("ceiling-gather", ceiling))


def _instruction_set() -> str:
    native = loaders.native()
    return "" if isinstance(native, ImportError) else native.instruction_set()


PRODUCT = Limit(lambda setup: [multiply_adds(setup), matrix_product(setup)], ("ceiling-matmul", "float16"))


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
