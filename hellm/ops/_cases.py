"""The inputs on which operators are held against their definitions, wherever they run: what the self-test goes through.

The file of an operator makes its cases, from samples that are the same for all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hellm.ops.incidence import Incidence

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# What float32 may lose in sums of hundreds of terms and in logits of some tens.
LONG_SUMS = 2e-5

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


@dataclass(frozen=True)
class Case:
    """An operator on some float64 inputs, its definition, and the least error budget of float32 rows."""

    op: str
    name: str
    inputs: list[Tensor]
    function: Function
    definition: Function
    precision: str = "highest"
    budget: float = 0.0
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class SampleGraph:
    """A random hypergraph, one hyperedge of which may have many vertices, and rows for its vertices and hyperedges.

    Two layers over long rows leave little but rounding: all rows of the result are nearly the same.
    """

    name: str
    at: Callable[[torch.device], Incidence]
    vertices: Tensor
    hyperedges: Tensor
    num_layers: int
    settings: dict[str, Any]


@dataclass(frozen=True)
class SampleTable:
    """How many rows of how many columns a loss is computed on, and with what products of float32 rows."""

    num_rows: int
    dim: int
    precision: str
    dtypes: tuple[torch.dtype, ...]

    @property
    def name(self) -> str:
        return f"N {self.num_rows}, D {self.dim}, {self.precision}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"precision": self.precision, "dtypes": self.dtypes}


class Samples:
    """Random inputs, the same in every process.

    Args:
        hypergraph: from [2, nnz] incidences and the numbers of vertices and hyperedges; `hellm.Hypergraph` is made of
            operators, so it is handed in.
        large: many rows, hubs and the wide ones in every dtype as well.
    """

    def __init__(self, hypergraph: Callable[[Tensor, int, int], Incidence], *, large: bool) -> None:
        self.large = large
        self._hypergraph = hypergraph
        self._generator = torch.Generator().manual_seed(0)

    def rows(self, count: int, dim: int) -> Tensor:
        return torch.randn(count, dim, generator=self._generator, dtype=torch.float64)

    def integers(self, high: int, count: int) -> Tensor:
        return torch.randint(high, (count,), generator=self._generator)

    @functools.cached_property
    def graphs(self) -> list[SampleGraph]:
        # Vertices, hyperedges, incidences besides those of a hub, its vertices, columns.
        shapes = [(97, 31, 400, 0, 67), (97, 31, 4000, 0, 64)]
        if self.large:
            shapes += [(1500, 200, 20_000, 0, 200), (6000, 300, 9000, 5000, 64)]
        return [self._graph(*shape) for shape in shapes]

    def _graph(self, num_vertices: int, num_hyperedges: int, count: int, hub: int, dim: int) -> SampleGraph:
        vertex = torch.cat([torch.arange(hub), self.integers(num_vertices, count)])
        edge = torch.cat([torch.zeros(hub, dtype=torch.int64), self.integers(num_hyperedges, count)])
        graph = self._hypergraph(torch.stack([vertex, edge]), num_vertices, num_hyperedges)
        return SampleGraph(
            name=f"{num_vertices} x {num_hyperedges}, D {dim}" + (f", hub of {hub}" if hub else ""),
            at=functools.cache(graph.to),
            vertices=self.rows(num_vertices, dim),
            hyperedges=self.rows(num_hyperedges, dim),
            num_layers=2 if count < 1000 else 1,
            # Plain torch adds 16-bit numbers up in 16 bits.
            settings={"dtypes": DTYPES[:2] if hub else DTYPES, "budget": LONG_SUMS},
        )

    def tables(self) -> Iterator[SampleTable]:
        many = 1500 if self.large else 300
        for num_rows, dim, precision in itertools.product((97, many), (64, 67, 200), ("highest", "high")):
            if num_rows == 300 and dim != 64:
                continue
            # Every variant of the kernels in float32; 16-bit rows differ only in how they are loaded.
            every = (num_rows, dim) == (97, 67) or (self.large and num_rows == 97)
            yield SampleTable(num_rows, dim, precision, DTYPES if every else DTYPES[:1])
