"""What the language model is told of the graph around a history (HeLLM, arXiv 2504.10541, graph-enhanced prefix).

B = histories, T = items of a history, d = width of the graph embeddings, r = width of their Gram matrix, W = width of
the language model, L = its layers, P = prefix tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hellm.models.dropout import Dropout

__all__ = ["GraphPrefix", "RunningGraph"]


class _GramInput(nn.Module):
    """Graph embeddings, compressed to `rank` where they are wider than that."""

    def __init__(self, width: int, rank: int | None) -> None:
        super().__init__()
        if rank is None or rank >= width:
            self.compress, self.width = nn.Identity(), width
        else:
            self.compress, self.width = nn.Linear(width, rank, bias=False), rank
            # Keeps the scale of the embeddings, on average.
            nn.init.normal_(self.compress.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.compress(x)


class RunningGraph(nn.Module):
    """The graph context of every position of a history at once: the Gram matrix of the items up to there.

        G_t = 1/t sum_{s<=t} z_s z_s^T,  z = compressed graph embedding,  output_t = MLP(G_t)

    The last layer starts at zero, so that the language model starts without it. Position t sees items 1..t only.

    Args:
        width: d.
        output_width: W.
        rank: r; None or >= d keeps the embeddings as they are.
    """

    def __init__(self, width: int, output_width: int, *, rank: int | None = 32) -> None:
        super().__init__()
        self.gram_input = _GramInput(width, rank)
        size = self.gram_input.width
        first, last = nn.Linear(size * size, output_width), nn.Linear(output_width, output_width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.mlp = nn.Sequential(first, nn.GELU(), last)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, W] of the graph embeddings x [B, T, d] of left-aligned histories."""
        z = self.gram_input(x)
        gram = (z.unsqueeze(3) * z.unsqueeze(2)).flatten(2).cumsum(1)
        count = torch.arange(1, x.shape[1] + 1, device=x.device, dtype=z.dtype)
        return self.mlp(gram / count[:, None])


class GraphPrefix(nn.Module):
    """Inputs of the per-layer prefix keys and values (HeLLM's bimap pooling and its learned prefix).

        key_input = norm(prefix_key + norm(MLP_key(vec(G)))),  G = E^T diag(mask) E of the history's embeddings E [T, d]

    and the same for values; the graph part is the same in all layers and at all prefix tokens. `prefix_key_values` of
    `hellm.models.llm.language_model` sends them through the model's own projections.

    Args:
        num_layers: L.
        output_width: W.
        num_prefix_tokens: P.
        graph_width: d; None leaves the graph part out, and the prefix is the same for all histories.
        learned: use the learned prefix, N(0, 1) at the start.
        rank: r of the Gram matrix; None keeps d.
        dropout: after each layer of the MLPs.
        eps: of the norms.
        mean: divide G by the number of items; False keeps the sum, as published.
    """

    gram_input: _GramInput | None
    prefix_key: Tensor | None
    prefix_value: Tensor | None

    def __init__(
        self,
        num_layers: int,
        output_width: int,
        num_prefix_tokens: int,
        *,
        graph_width: int | None,
        learned: bool = True,
        rank: int | None = None,
        dropout: float = 0.3,
        eps: float = 1e-5,
        mean: bool = True,
    ) -> None:
        super().__init__()
        self.shape = (num_layers, num_prefix_tokens, output_width)
        self.mean = mean
        self.gram_input = None
        if graph_width is not None:
            self.gram_input = _GramInput(graph_width, rank)
            size = self.gram_input.width
            self.key_mlp, self.value_mlp = (_mlp(size * size, output_width, dropout) for _ in range(2))
            self.key_graph_norm, self.value_graph_norm = (nn.RMSNorm(output_width, eps=eps) for _ in range(2))
        if learned:
            self.prefix_key, self.prefix_value = (nn.Parameter(torch.randn(self.shape)) for _ in range(2))
        else:
            self.prefix_key = self.prefix_value = None
        self.key_norm, self.value_norm = (nn.RMSNorm(output_width, eps=eps) for _ in range(2))

    def gram(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, r, r] Gram matrices of x [B, T, d] over the rows where mask [B, T] is True; zeros for none."""
        assert self.gram_input is not None  # only a prefix with a graph part is asked
        z = self.gram_input(x) * mask.unsqueeze(2)
        gram = z.transpose(1, 2) @ z
        return gram / mask.sum(1).clamp(min=1)[:, None, None] if self.mean else gram

    def forward(self, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Key and value inputs, each [B, L, P, W]; B is 1 without a graph part."""
        key, value = self.prefix_key, self.prefix_value
        if self.gram_input is None:
            assert key is not None and value is not None  # a prefix without a graph part is learned
            key, value = key.unsqueeze(0), value.unsqueeze(0)
        else:
            assert gram is not None  # a graph part wants one of each history
            graph_key, graph_value = (
                norm(mlp(gram.flatten(1)))[:, None, None].expand(-1, *self.shape)
                for norm, mlp in ((self.key_graph_norm, self.key_mlp), (self.value_graph_norm, self.value_mlp))
            )
            key = graph_key if key is None else graph_key + key
            value = graph_value if value is None else graph_value + value
        return self.key_norm(key), self.value_norm(value)


def _mlp(input_width: int, output_width: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(input_width, output_width),
        nn.GELU(),
        Dropout(dropout),
        nn.Linear(output_width, output_width),
        nn.GELU(),
        Dropout(dropout),
    )
