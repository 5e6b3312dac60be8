"""The incidence of a hypergraph as the operators read it.

`hellm.Hypergraph` stands on the operators, for its degrees are products with its incidence; so what they read of it is
named here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Entries of a row, as in csrc/cuda/hypergraph_conv.cuh and kernels/hypergraph_conv.py.
MEDIUM_ROW, LONG_ROW, HUB_ENTRIES, HUB_CHUNK = 8, 64, 1024, 512


class RowSchedule(NamedTuple):
    """How a GPU shares out the rows of a CSR matrix. The counts size the launches: nothing asks the device for them.

    Attributes:
        row_order: [R] int32, all rows: hubs (over 1,024 entries), long rows (over 64), those over 8, the others; each
            group in the order of the matrix, so that rows that a block takes together are about equally long.
        hub_chunk_begin: [hubs + 1] int32, where the chunks of each hub begin; a chunk is 512 entries.
        num_long: rows over 64 entries, hubs included.
        num_hub_chunks: chunks of all hubs.
    """

    row_order: Tensor
    hub_chunk_begin: Tensor
    num_long: int
    num_hub_chunks: int

    @classmethod
    def of(cls, indptr: Tensor) -> RowSchedule:
        """From [R + 1] int64; reads the device once."""
        count = indptr.diff()
        group = (count <= HUB_ENTRIES).int() + (count <= LONG_ROW).int() + (count <= MEDIUM_ROW).int()
        chunks = torch.where(group == 0, (count + HUB_CHUNK - 1) // HUB_CHUNK, 0)
        totals = torch.stack([(group == 0).sum(), (group <= 1).sum(), chunks.sum()])
        num_hubs, num_long, num_hub_chunks = totals.tolist()
        row_order = torch.argsort(group, stable=True)
        hub_chunk_begin = torch.zeros(num_hubs + 1, dtype=torch.int32, device=indptr.device)
        torch.cumsum(chunks[row_order[:num_hubs]], 0, dtype=torch.int32, out=hub_chunk_begin[1:])
        return cls(row_order.int(), hub_chunk_begin, num_long, num_hub_chunks)

    def to(self, device: torch.device | str) -> RowSchedule:
        """The same schedule on `device`."""
        return self._replace(row_order=self.row_order.to(device), hub_chunk_begin=self.hub_chunk_begin.to(device))


class Csr(NamedTuple):
    """A sparse matrix and how a GPU shares out its rows, in the order in which operators take them."""

    indptr: Tensor
    indices: Tensor
    values: Tensor | None
    row_order: Tensor
    hub_chunk_begin: Tensor
    num_long: int
    num_hub_chunks: int

    @property
    def schedule(self) -> RowSchedule:
        return RowSchedule(self.row_order, self.hub_chunk_begin, self.num_long, self.num_hub_chunks)


class Scales(NamedTuple):
    """Diagonal factors of one convolution y = out * (H (edge * H^T (in * x)) - diagonal * in * x); None is all ones."""

    in_scale: Tensor | None
    edge_scale: Tensor | None
    out_scale: Tensor | None
    diagonal: Tensor | None


class Incidence:
    """What the operators read of a `hellm.Hypergraph`, the only class of this kind; documented there."""

    num_vertices: int
    num_hyperedges: int
    vertex_indptr: Tensor
    vertex_edges: Tensor
    vertex_schedule: RowSchedule
    edge_indptr: Tensor
    edge_vertices: Tensor
    edge_schedule: RowSchedule

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def to(self, device: torch.device | str) -> Incidence:
        raise NotImplementedError

    @property
    def hyperedge_weight(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def vertex_values(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def edge_values(self) -> Tensor | None:
        raise NotImplementedError

    @property
    def vertex_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H as (indptr, indices, values)."""
        return self.vertex_indptr, self.vertex_edges, self.vertex_values

    @property
    def edge_csr(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """H^T as (indptr, indices, values)."""
        return self.edge_indptr, self.edge_vertices, self.edge_values

    def scales(
        self,
        normalization: str = "symmetric",
        *,
        hyperedge_degree: bool = True,
        self_loops: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> Scales:
        raise NotImplementedError

    def bipartite_scales(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        raise NotImplementedError
