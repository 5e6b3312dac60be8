"""A contrastive training loop: embeddings of vertices from the hypergraph alone, without labels or an N x N matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm import Hypergraph, ops
from hellm.nn import InfoNCELoss


class Encoder(nn.Module):
    """One embedding a vertex, smoothed over the hypergraph."""

    def __init__(self, num_vertices: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_vertices, dim)

    def forward(self, hypergraph: Hypergraph) -> Tensor:
        """[V, D]."""
        return ops.hypergraph_conv(self.embedding.weight, hypergraph, num_layers=2)


def communities(num_vertices: int = 600, num_hyperedges: int = 300, num_groups: int = 6) -> tuple[Hypergraph, Tensor]:
    """Hyperedges of 6 vertices, five of them from one group; and the group of each vertex [V]."""
    generator = torch.Generator().manual_seed(0)
    group = torch.arange(num_vertices) % num_groups
    vertex = torch.randint(num_vertices // num_groups, (num_hyperedges, 6), generator=generator) * num_groups
    vertex += torch.arange(num_hyperedges)[:, None] % num_groups
    vertex[:, 0] = torch.randint(num_vertices, (num_hyperedges,), generator=generator)
    edge = torch.arange(num_hyperedges)[:, None].expand_as(vertex)
    index = torch.stack([vertex.reshape(-1), edge.reshape(-1)])
    return Hypergraph(index, num_vertices=num_vertices, num_hyperedges=num_hyperedges), group


def without_some(hypergraph: Hypergraph, share: float) -> Hypergraph:
    """A view of the hypergraph: a share of its incidences left out at random."""
    index = hypergraph.hyperedge_index
    kept = index[:, torch.rand(index.shape[1]) >= share]
    return Hypergraph(kept, num_vertices=hypergraph.num_vertices, num_hyperedges=hypergraph.num_hyperedges)


def agreement(x: Tensor, group: Tensor) -> float:
    """Share of the five nearest other vertices that are of the same group."""
    nearest, _ = ops.knn(x.detach(), k=6)
    same = (group[nearest] == group[:, None]) & (nearest >= 0)
    return float((same.sum(1) - 1).clip(min=0).sum() / (5 * len(group)))


def main() -> None:
    torch.manual_seed(0)
    hypergraph, group = communities()
    encoder, loss_function = Encoder(hypergraph.num_vertices, 32), InfoNCELoss(temperature=0.3)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.01)
    print(f"before: {agreement(encoder.embedding.weight, group):.2f} of the nearest vertices are of the same group")
    for step in range(60):
        first, second = (encoder(without_some(hypergraph, 0.3)) for _ in range(2))
        loss = loss_function(F.normalize(first), F.normalize(second))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step:>3}  loss {loss.item():.3f}")
    print(f"after:  {agreement(encoder(hypergraph), group):.2f}")


if __name__ == "__main__":
    main()
