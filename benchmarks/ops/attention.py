"""InfoNCE by torch's own attention kernels: the strongest form that stock torch has on a GPU.

N = rows, D = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

# The largest pads that they take: width 256.
WIDEST = 256


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 in float16: [Q, D], [K, D], [K, D] -> output [Q, D] float32, log-sum-exp [Q] float32."""
    parts = (t.half()[None, None] for t in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*parts, 0.0, False, False, scale=scale)
    return out[0, 0].float(), lse[0, 0]


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by cuDNN, which has a kernel for Hopper."""
    parts = (t.half()[None, None] for t in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, True, 0.0, False, scale=scale)
    return out[0, 0].float(), lse.reshape(-1)


def composite(anchor: Tensor, positive: Tensor, temperature: float, attend: Callable) -> Sequence[Tensor]:
    """Loss and gradients from two calls of torch's own attention: the strongest stock form.

    Attention of the anchors over [u; v] with log-sum-exp gives the row side; a second one with a bias for each key,
    folded into extra columns, the key side. Its sums hold the diagonal, which is taken out again afterwards.
    """
    with torch.no_grad():
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        u, v = anchor / norms[0], positive / norms[1]
        count, scale = len(u), 1.0 / temperature
        keys = torch.cat([u, v])
        mean, lse = attend(u, keys, keys, scale)
        aligned = (u * v).sum(1)
        # Out with the two diagonals: share of the own anchor (similarity 1) and of the positive.
        own, other = torch.exp(scale - lse), torch.exp(aligned * scale - lse)
        rest = (1 - own - other).clamp_min(1e-12)
        mean = (mean - own[:, None] * u - other[:, None] * v) / rest[:, None]
        lse = lse + rest.log()
        margin = lse - aligned * scale
        weight = torch.sigmoid(margin) / count
        # Un-normalised weights exp(s / t) w_j / exp(lse_j): the bias is two columns of the keys against ones, its
        # float16 value and what that leaves.
        bias = (weight.log() - lse) * temperature
        high = bias.half().float()
        keys_and_bias = torch.cat([u, torch.stack([high, bias - high], 1), u.new_zeros(count, 6)], 1)
        queries = torch.cat([keys, keys.new_ones(2 * count, 2), keys.new_zeros(2 * count, 6)], 1)
        spread, total = attend(queries, keys_and_bias, F.pad(u, (0, 8)), scale)
        spread = spread[:, : u.shape[1]] * torch.exp(total)[:, None]
        spread[:count] -= (torch.exp(scale - lse) * weight)[:, None] * u
        spread[count:] -= (torch.exp(aligned * scale - lse) * weight)[:, None] * u
        return _loss_and_gradients((u, v), norms, scale, margin, weight, mean, spread)


def flex_composite(anchor: Tensor, positive: Tensor, temperature: float) -> Sequence[Tensor]:
    """The same by FlexAttention, which leaves the diagonals out and adds the bias itself; for torch.compile."""
    with torch.no_grad():
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        u, v = anchor / norms[0], positive / norms[1]
        count, scale = len(u), 1.0 / temperature
        keys = torch.cat([u, v])
        half_u, half_keys = (t.half()[None, None] for t in (u, keys))

        def apart(score, batch, head, query, key):
            return torch.where(key % count == query, float("-inf"), score)

        mean, lse = flex_attention(half_u, half_keys, half_keys, score_mod=apart, scale=scale, return_lse=True)
        mean, lse = mean[0, 0].float(), lse[0, 0]
        margin = lse - (u * v).sum(1) * scale
        weight = torch.sigmoid(margin) / count
        bias = weight.log() - lse

        def apart_with_bias(score, batch, head, query, key):
            return torch.where(query % count == key, float("-inf"), score + bias[key])

        spread, total = flex_attention(
            half_keys, half_u, half_u, score_mod=apart_with_bias, scale=scale, return_lse=True
        )
        spread = spread[0, 0].float() * torch.exp(total[0, 0])[:, None]
        return _loss_and_gradients((u, v), norms, scale, margin, weight, mean, spread)


def _loss_and_gradients(units, norms, scale, margin, weight, mean, spread) -> Sequence[Tensor]:
    """From the mean key of each anchor and what every anchor spreads over each key [2N, D]."""
    (u, v), count = units, len(units[0])
    grads = []
    for grad, unit, norm in (
        (weight[:, None] * (mean - v) + spread[:count], u, norms[0]),
        (spread[count:] - weight[:, None] * u, v, norms[1]),
    ):
        grads.append((grad - (grad * unit).sum(1, keepdim=True) * unit) * scale / norm)
    return [F.softplus(margin).mean(), *grads]
