"""A PyTorch Geometric model with its HypergraphConv replaced by ours: same call, same parameters, same results."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import HypergraphConv as PyGHypergraphConv

from hellm import Hypergraph
from hellm.nn import HypergraphConv


class Classifier(nn.Module):
    """Two hypergraph convolutions; `layer` is the only thing that changes."""

    def __init__(self, layer: type[nn.Module], in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.first, self.second = layer(in_channels, 32), layer(32, num_classes)

    def forward(self, x: Tensor, hyperedge_index: Tensor | Hypergraph) -> Tensor:
        """[V, num_classes] logits."""
        return self.second(self.first(x, hyperedge_index).relu(), hyperedge_index)


def communities(
    num_vertices: int = 1_000, num_hyperedges: int = 500, num_classes: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy features [V, 16], hyperedges that mostly stay within a class [2, nnz], and the classes [V]."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(num_vertices) % num_classes
    x = torch.randn(num_vertices, 16, generator=generator) + F.one_hot(label, 16)
    vertex = torch.randint(num_vertices // num_classes, (num_hyperedges, 8), generator=generator) * num_classes
    vertex += torch.arange(num_hyperedges)[:, None] % num_classes
    vertex[:, 0] = torch.randint(num_vertices, (num_hyperedges,), generator=generator)
    edge = torch.arange(num_hyperedges)[:, None].expand_as(vertex)
    return x, torch.stack([vertex.reshape(-1), edge.reshape(-1)]), label


def train(model: Classifier, x: Tensor, hyperedges: Tensor | Hypergraph, label: Tensor) -> float:
    """Train on every ninth vertex; the accuracy on the others."""
    known = torch.arange(len(label)) % 9 == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x, hyperedges)[known], label[known]).backward()
        optimizer.step()
    return float((model(x, hyperedges).argmax(1) == label)[~known].float().mean())


def main() -> None:
    torch.manual_seed(0)
    x, index, label = communities()
    theirs, ours = (Classifier(layer, 16, 4) for layer in (PyGHypergraphConv, HypergraphConv))
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(x, index), theirs(x, index), rtol=1e-4, atol=1e-5)
    print("the same output from the same weights")

    # A Hypergraph sorts its incidence once; a plain index is sorted at every call.
    hypergraph = Hypergraph(index, num_vertices=len(x))
    for name, model, hyperedges in (
        ("PyTorch Geometric", theirs, index),
        ("hellm", ours, index),
        ("hellm, Hypergraph", Classifier(HypergraphConv, 16, 4), hypergraph),
    ):
        started = time.perf_counter()
        accuracy = train(model, x, hyperedges, label)
        print(f"{name:<18} accuracy {accuracy:.3f} in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    main()
