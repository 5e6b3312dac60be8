"""The published language model stage in plain torch, one history at a time: the definition that the tests compare with.

Llama only. `weights` are the frozen ones under transformers' names, `trained` the trained ones under those of
`RecommenderLLM`. T = items of the longest history of the batch, n = tokens of the prompt, P = prefix tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LORA = "prompted.language_model.base_model.model.model.layers."


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Rotary embedding of x [heads, n, d] in the half-split layout of transformers."""
    half = x.shape[-1] // 2
    angle = position[:, None] * theta ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def graph_prefix(gram: Tensor, trained: dict[str, Tensor], which: str, eps: float) -> Tensor:
    """Inputs [layers, P, W] of the prefix keys or values."""
    name = f"prompted.prefix.{which}_mlp"
    x = gram.flatten()
    for layer in (0, 3):
        x = F.gelu(F.linear(x, trained[f"{name}.{layer}.weight"], trained[f"{name}.{layer}.bias"]))
    x = rms_norm(x, trained[f"prompted.prefix.{which}_graph_norm.weight"], eps)
    learned = trained[f"prompted.prefix.prefix_{which}"]
    return rms_norm(x.expand_as(learned) + learned, trained[f"prompted.prefix.{which}_norm.weight"], eps)


def attention(x, weights, layer: str, config, prefix, position, allow) -> Tensor:
    """Causal attention of x [n, W] behind `prefix` (keys and values [P, kv heads * d], not rotated); allow [n] bool."""
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = (F.linear(x, weights[f"{layer}.self_attn.{name}_proj.weight"]) for name in "qkv")
    q, k, v = (y.unflatten(1, (-1, d)).transpose(0, 1) for y in (q, k, v))
    q, k = (rotate(y, position, config.rope_parameters["rope_theta"]) for y in (q, k))
    size, reserved = len(x), 0
    visible = torch.ones(size, size, dtype=torch.bool).tril() & allow
    if prefix is not None:
        prefix_key, prefix_value = (y.unflatten(1, (-1, d)).transpose(0, 1) for y in prefix)
        reserved = prefix_key.shape[1]
        k, v = torch.cat([prefix_key, k], dim=1), torch.cat([prefix_value, v], dim=1)
    visible = torch.cat([torch.ones(size, reserved, dtype=torch.bool), visible], dim=1)
    k, v = (y.repeat_interleave(heads // kv_heads, dim=0) for y in (k, v))
    score = (q @ k.transpose(1, 2) / d**0.5).masked_fill(~visible, -torch.inf)
    output = (score.softmax(-1) @ v).transpose(0, 1).flatten(1)
    return F.linear(output, weights[f"{layer}.self_attn.o_proj.weight"])


def feed_forward(x: Tensor, weights, trained, layer: str, index: int, lora_scale: float) -> Tensor:
    def linear(y: Tensor, name: str) -> Tensor:
        result = F.linear(y, weights[f"{layer}.mlp.{name}_proj.weight"])
        lora = [trained.get(f"{LORA}{index}.mlp.{name}_proj.lora_{part}.default.weight") for part in "AB"]
        return result if lora[0] is None else result + lora_scale * F.linear(F.linear(y, lora[0]), lora[1])

    return linear(F.silu(linear(x, "gate")) * linear(x, "up"), "down")


def llama(x, weights, trained, config, *, prefix, position, allow, lora_scale=1.0) -> Tensor:
    """Final hidden states [n, W] of embeddings x [n, W]; prefix: inputs of keys and values [layers, P, W], or None."""
    eps = config.rms_norm_eps
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        pair = None
        if prefix is not None:
            pair = [
                F.linear(p[i], weights[f"{layer}.self_attn.{n}_proj.weight"]) for p, n in zip(prefix, "kv", strict=True)
            ]
        normed = rms_norm(x, weights[f"{layer}.input_layernorm.weight"], eps)
        x = x + attention(normed, weights, layer, config, pair, position, allow)
        normed = rms_norm(x, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        x = x + feed_forward(normed, weights, trained, layer, i, lora_scale)
    return rms_norm(x, weights["model.norm.weight"], eps)


def item_token(items: Tensor, trained, graph: Tensor, sequence: Tensor) -> Tensor:
    x = torch.cat([graph[items], sequence[items]], dim=1)
    x = F.gelu(F.linear(x, trained["items.projector.0.weight"], trained["items.projector.0.bias"]))
    return F.linear(x, trained["items.projector.2.weight"], trained["items.projector.2.bias"])


def official_scores(weights, trained, config, tables, instruction, response, items, mask, *, lora_scale=1.0) -> Tensor:
    """Scores [B, I] of histories items [B, T] (left-aligned, mask [B, T]) by the published model without dropout."""
    graph, sequence = tables
    reserved = trained["prompted.prefix.prefix_key"].shape[1]
    embed = weights["model.embed_tokens.weight"]
    rows = []
    for row, used in zip(items, mask, strict=True):
        history = row[used]
        # Padding stands between instruction and items, and is item 0 for the Gram matrix.
        padded = torch.cat([history.new_zeros(len(row) - len(history)), history])
        x = torch.cat([embed[instruction], item_token(padded, trained, graph, sequence), embed[response]])
        allow = torch.ones(len(x), dtype=torch.bool)
        allow[len(instruction) : len(instruction) + len(row) - len(history)] = False
        position = (allow.cumsum(0) - 1) * allow + reserved
        gram = graph[padded].T @ graph[padded]
        prefix = [graph_prefix(gram, trained, which, config.rms_norm_eps) for which in ("key", "value")]
        where = {"prefix": prefix, "position": position, "allow": allow, "lora_scale": lora_scale}
        hidden = llama(x, weights, trained, config, **where)
        rows.append(trained["head.weight"] @ hidden[-1])
    return torch.stack(rows)
