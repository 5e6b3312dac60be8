"""The operators as dense algebra in float64, written from their formulas; torch differentiates it in every mode."""

from __future__ import annotations

import torch
from torch import Tensor


def incidence(index: Tensor, value: Tensor | None, num_vertices: int, num_hyperedges: int) -> Tensor:
    """H [V, M] float64: repeats add up."""
    value = torch.ones(index.shape[1]) if value is None else value
    h = torch.zeros(num_vertices, num_hyperedges, dtype=torch.float64, device=value.device)
    return h.index_put((index[0].long(), index[1].long()), value.double(), accumulate=True)


def _power(degree: Tensor, exponent: float) -> Tensor:
    """Of 0 it is 0, of a negative degree that of its absolute value."""
    # What subtraction leaves of an exact zero.
    zero = degree.abs() < 1e-12
    return torch.where(zero, 0.0, torch.where(zero, 1.0, degree.abs()) ** exponent)


def operator(
    h: Tensor,
    weight: Tensor | None = None,
    *,
    normalization: str = "symmetric",
    hyperedge_degree: bool = True,
    self_loops: bool = True,
) -> Tensor:
    """The V x V matrix of a setting of `hypergraph_conv`."""
    weight = h.new_ones(h.shape[1]) if weight is None else weight.double()
    if hyperedge_degree:
        size = h.sum(0)
        weight = weight * _power(size, -1.0) * size.sign()
    a = h @ torch.diag(weight) @ h.T
    if not self_loops:
        a = a - torch.diag(a.diag())
    degree = a.sum(1)
    if normalization == "symmetric":
        root = _power(degree, -0.5)
        return root[:, None] * a * root
    return a if normalization == "none" else (_power(degree, -1.0) * degree.sign())[:, None] * a


def convolution(x: Tensor, h: Tensor, weight: Tensor | None = None, *, num_layers: int = 1, **settings) -> Tensor:
    matrix = operator(h, weight, **settings)
    for _ in range(num_layers):
        x = matrix @ x
    return x


def propagation(user_x: Tensor, item_x: Tensor, h: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Mean of layers 0..num_layers of D^-1/2 A D^-1/2, A = [[0, H], [H^T, 0]]."""
    scaled = _power(h.sum(1), -0.5)[:, None] * h * _power(h.sum(0), -0.5)
    users, items = [user_x], [item_x]
    for _ in range(num_layers):
        users, items = [*users, scaled @ items[-1]], [*items, scaled.T @ users[-1]]
    return torch.stack(users).mean(0), torch.stack(items).mean(0)


def _unit(x: Tensor) -> Tensor:
    zero = (x == 0).all(1, keepdim=True)
    safe = torch.where(zero, 1.0, x)
    return torch.where(zero, 0.0, safe / safe.square().sum(1, keepdim=True).sqrt())


def info_nce(anchor: Tensor, positive: Tensor, temperature: Tensor, rows: Tensor | None, both_views: bool) -> Tensor:
    """Loss of each row: log(exp(s_ii / t) + sum over its negatives of exp(s_ij / t)) - s_ii / t."""
    u, v = _unit(anchor), _unit(positive)
    across, within = u @ v.T / temperature, u @ u.T / temperature
    own = torch.eye(len(u), dtype=torch.bool)
    logits = torch.cat([across, within.masked_fill(own, float("-inf"))], 1) if both_views else across
    loss = torch.logsumexp(logits, 1) - across.diagonal()
    return loss if rows is None else loss[rows.long()]


def item_cross_entropy(hidden: Tensor, items: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = hidden @ items.T + (0 if bias is None else bias)
    return torch.logsumexp(logits, 1) - logits.gather(1, target.unsqueeze(1)).squeeze(1)


def reduce(row_loss: Tensor, reduction: str) -> Tensor:
    return row_loss if reduction == "none" else getattr(row_loss, reduction)()
