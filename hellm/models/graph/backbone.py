"""What of stage 1 users and items are before the hypergraphs: their tables, propagated over the interactions.

U = users, I = items, D = embedding width. A new backbone is a class with the interface of `MF`, a line in `BACKBONES`
and its name in `hellm.config.ModelConfig.backbone`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm import ops
from hellm.hypergraph import Hypergraph
from hellm.models.dropout import Dropout

__all__ = ["BACKBONES", "MF", "NGCF", "LightGCN"]


class MF(nn.Module):
    """Matrix factorisation: the tables themselves.

    Args:
        dim: D.
        num_layers: Propagation layers, >= 1.
        dropout: Message dropout probability.

    Attributes:
        mixes_columns: Whether a column of what comes out depends on the others.
    """

    mixes_columns = False

    def __init__(self, dim: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.num_layers = num_layers

    def forward(self, user: Tensor, item: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, Tensor]:
        """[U, D] and [I, D] of such tables and the training interactions, users as vertices and items as hyperedges."""
        return user, item

    @property
    def num_plain_layers(self) -> int | None:
        """Layers of the `hellm.ops.bipartite_propagate` that `forward` is; None where it is something else."""
        return 0

    def fold_in(self, user: Tensor, item: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, float] | None:
        """What an item passes to a user who has no row [I, D], and the exponent, see `FoldIn`.

        None is the mean of what the backbone makes of the items.
        """
        return None


class LightGCN(MF):
    """The mean of the layers 0..L of propagation without weights, He et al. 2020."""

    def forward(self, user: Tensor, item: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, Tensor]:
        return ops.bipartite_propagate(user, item, hypergraph, num_layers=self.num_layers)

    @property
    def num_plain_layers(self) -> int:
        return self.num_layers

    def fold_in(self, user: Tensor, item: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, float]:
        """The sum over layers 0..L-1 of an item, over L + 1 and the root of how many users it has."""
        if self.num_layers > 1:
            _, item = ops.bipartite_propagate(user, item, hypergraph, num_layers=self.num_layers - 1)
        degree = hypergraph.edge_indptr.diff().clamp(min=1)
        return item * (degree.rsqrt() * (self.num_layers / (self.num_layers + 1))).unsqueeze(1), 0.5


class NGCF(MF):
    """NGCF with the mean over layers 0..L in place of their concatenation; layers > 0 are L2-normalised."""

    mixes_columns = True

    def __init__(self, dim: int, num_layers: int, dropout: float) -> None:
        super().__init__(dim, num_layers, dropout)
        self.aggregate = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))
        self.interact = nn.ModuleList(nn.Linear(dim, dim) for _ in range(num_layers))
        self.dropout = Dropout(dropout)

    @property
    def num_plain_layers(self) -> None:
        return None

    def forward(self, user: Tensor, item: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, Tensor]:
        sizes = [len(user), len(item)]
        x = torch.cat([user, item])
        total = x
        for aggregate, interact in zip(self.aggregate, self.interact, strict=True):
            side = _neighbour_sum(x, sizes, hypergraph)
            x = self.dropout(F.leaky_relu(aggregate(side)) + F.leaky_relu(interact(x * side)))
            total = total + F.normalize(x, dim=1)
        user, item = (total / (self.num_layers + 1)).split(sizes)
        return user, item


def _neighbour_sum(x: Tensor, sizes: list[int], hypergraph: Hypergraph) -> Tensor:
    """D^-1/2 A D^-1/2 x of the user-item graph, A = [[0, R], [R^T, 0]]."""
    scale = torch.cat(hypergraph.bipartite_scales(x.dtype)).unsqueeze(1)
    user, item = (x * scale).split(sizes)
    user_sum = ops.incidence_product(item, hypergraph)
    item_sum = ops.incidence_product(user, hypergraph, transpose=True)
    return torch.cat([user_sum, item_sum]) * scale


BACKBONES: dict[str, type[MF]] = {"lightgcn": LightGCN, "ngcf": NGCF, "mf": MF}
"""Name -> (dim, num_layers, dropout) -> backbone."""
