"""Every operator beside its definition in plain PyTorch: the same numbers, without the large matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hellm import Hypergraph, ops


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    num_vertices, num_hyperedges, num_incidences, dim = 300, 200, 4_000, 32
    x = torch.randn(num_vertices, dim, generator=generator)

    # A hypergraph is a list of (vertex, hyperedge) pairs.
    index = torch.stack(
        [torch.randint(size, (num_incidences,), generator=generator) for size in (num_vertices, num_hyperedges)]
    )
    hypergraph = Hypergraph(index, num_vertices=num_vertices, num_hyperedges=num_hyperedges)

    incidence = torch.zeros(num_vertices, num_hyperedges)
    incidence.index_put_(tuple(index), torch.ones(()), accumulate=True)
    operator = incidence @ torch.diag(1 / incidence.sum(0)) @ incidence.T  # [V, V], which hellm never builds
    root = operator.sum(1).rsqrt()
    dense = root[:, None] * operator * root
    compare("hypergraph_conv", ops.hypergraph_conv(x, hypergraph, num_layers=2), dense @ (dense @ x))

    positive = x + 0.5 * torch.randn(x.shape, generator=generator)
    a, p = F.normalize(x), F.normalize(positive)
    across = a @ p.T / 0.2  # [N, N], twice
    within = (a @ a.T / 0.2).fill_diagonal_(-torch.inf)
    expected = (torch.cat([across, within], 1).logsumexp(1) - across.diagonal()).mean()
    compare("info_nce", ops.info_nce(x, positive, temperature=0.2), expected)

    catalogue = torch.randn(5_000, dim, generator=generator)
    target = torch.randint(5_000, (num_vertices,), generator=generator)
    expected = F.cross_entropy(x @ catalogue.T, target)  # [N, I] logits
    compare("item_cross_entropy", ops.item_cross_entropy(x, catalogue, target), expected)

    indices, similarities = ops.knn(x, k=10)
    compare("knn", similarities, (a @ a.T).topk(10).values)
    print("nearest rows of row 0:", indices[0].tolist())


def compare(name: str, result: torch.Tensor, expected: torch.Tensor) -> None:
    """Print how far a result is from its definition; raise if it is further than rounding explains."""
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    print(f"{name:<20} largest difference {float((result - expected).abs().max()):.1e}")


if __name__ == "__main__":
    main()
