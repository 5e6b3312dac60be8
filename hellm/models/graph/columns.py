"""Columns of embeddings, shared out over processes.

N = rows, D = columns, P = processes; the p-th has the p-th part of the columns, W of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = ["Columns"]

# That of torch.nn.functional.normalize.
_SMALLEST_LENGTH = 1e-12


class Columns:
    """What mixes no columns, as propagation over a graph, every process does for its own, and nothing is sent.

    A loss that needs whole rows asks for them by `whole`. Losses of the processes add up to that of one process, and so
    gradients that come back are summed.

    Args:
        mesh: The processes, in one dimension.
        dim: D, at least one column for each process.
    Raises: ValueError, fewer columns than processes.
    """

    def __init__(self, mesh: DeviceMesh, dim: int) -> None:
        if dim < mesh.size():
            raise ValueError(f"embedding_dim must be at least 1 for each of {mesh.size()} processes, got {dim}")
        self._mesh, self._dim = mesh, dim

    def shared_out(self, table: Tensor) -> nn.Parameter:
        """Of a table [N, D] that is the same in every process: a `DTensor` parameter of its columns."""
        from torch.distributed.tensor import Shard, distribute_tensor

        return nn.Parameter(distribute_tensor(table.detach(), self._mesh, [Shard(1)]))

    def own(self, table: Tensor) -> Tensor:
        """[N, W] of what `shared_out` gave, differentiable."""
        return cast("DTensor", table).to_local()

    def unit(self, x: Tensor) -> Tensor:
        """[N, W] of rows that have unit length, all their columns counted; N numbers are sent."""
        from torch.distributed.tensor import DTensor, Partial

        squares = DTensor.from_local(x.square().sum(1, keepdim=True), self._mesh, [Partial()], run_check=False)
        return x / _in_all(squares).clamp(min=_SMALLEST_LENGTH**2).sqrt()

    def whole(self, x: Tensor) -> Tensor:
        """[R, D] of [R, W], the same in every process; rows are sent whole, and so are their gradients."""
        return _in_all(self._tensor(x))

    def _tensor(self, own: Tensor) -> DTensor:
        from torch.distributed.tensor import DTensor, Shard

        shape = torch.Size((len(own), self._dim))
        return DTensor.from_local(own, self._mesh, [Shard(1)], run_check=False, shape=shape, stride=(self._dim, 1))


def _in_all(x: DTensor) -> Tensor:
    """A `DTensor` as every process has it whole; what they send back is summed."""
    from torch.distributed.tensor import Partial, Replicate

    return x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
