"""Attention behind a context: a prefix with a softmax and a gate of its own, and a context that all rows share.

With a gate the prefix is no part of the softmax over the text:

    output = softmax(Q K^T / sqrt(d)) V + gate * softmax(Q K_prefix^T / sqrt(d)) V_prefix

A gate of zero leaves the language model exactly as it was (zero-init attention, LLaMA-Adapter, arXiv:2303.16199), where
in one common softmax even a prefix with values of zero takes attention away from the text.

A context shared by all rows is multiplied once for all of them instead of being copied to each.

B = rows, T = their tokens, h = heads, k = key/value heads, g = h / k, S = tokens of the context, d = head width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Attention", "attention_window", "can_share_context", "decoder_arguments", "use_prefix_attention"]

NAME = "hellm_prefix"
# What families call the tokens that a layer looks back to, and the kind of layer that does, where kinds are listed.
_WINDOWS = {"sliding_window": "sliding_attention", "attention_chunk_size": "chunked_attention"}

# Beyond this a row's own T^2 weights cost more than the copies of the context that they save.
_MOST_SHARED_TOKENS = 128


class Attention(nn.Module):
    """What is used of the attention of a layer: families have their own classes, so this one only describes them.

    Attributes:
        layer_idx: Number of the layer.
        head_dim: d.
        k_proj: Keys [B, T, k * d] of hidden states.
        v_proj: Values [B, T, k * d] of hidden states.
    """

    layer_idx: int
    head_dim: int
    k_proj: nn.Linear
    v_proj: nn.Linear


class _Arguments(NamedTuple):
    prefix_gate: Tensor | None
    prefix_length: int
    shared_context: list[tuple[Tensor, Tensor]] | None


# Not arguments of the decoder's forward: some families do not hand them on to their attention.
_ARGUMENTS: ContextVar[_Arguments | None] = ContextVar("hellm_decoder_arguments", default=None)


@contextlib.contextmanager
def decoder_arguments(
    *,
    prefix_gate: Tensor | None = None,
    prefix_length: int = 0,
    shared_context: list[tuple[Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """A block in which calls of a decoder, in this thread, have these arguments (see `use_prefix_attention`).

    Args:
        prefix_gate: [layers, h, 1, 1]; the first `prefix_length` keys and values are those of a prefix with this gate.
        prefix_length: tokens of the prefix, counted among the keys.
        shared_context: per layer keys and values [1, k, S, d] that stand before those of every row (the prefix first).
            The decoder must then be called with neither cache nor mask.
    """
    token = _ARGUMENTS.set(_Arguments(prefix_gate, prefix_length, shared_context))
    try:
        yield
    finally:
        _ARGUMENTS.reset(token)


def use_prefix_attention(model: PreTrainedModel, *, needed: bool = True) -> None:
    """Let the attention of `model` follow `decoder_arguments`; without them it computes what it did before.

    Raises: ValueError, a model whose attention is not torch's scaled_dot_product_attention; it is left as it is where
        this is not `needed`.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    plain = config._attn_implementation == "sdpa" and not getattr(config, "attn_logit_softcapping", None)
    if config._attn_implementation == NAME or not (plain or needed):
        return
    if not plain:
        raise ValueError(
            f'prefix_gate needs a model with attn_implementation "sdpa" and no soft-capping, '
            f"got {config._attn_implementation!r} in {type(model).__name__}; set prefix_gate to False"
        )
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def attention_window(config: Any) -> int | None:
    """Tokens that the layers of the shortest sight look back to; None where all see everything."""
    layer_types = getattr(config, "layer_types", None)
    windows = [getattr(config, name, None) for name, kind in _WINDOWS.items() if kind in (layer_types or [kind])]
    return min((one for one in windows if isinstance(one, int) and one > 0), default=None)


def can_share_context(model: PreTrainedModel, num_shared: int, num_tokens: int) -> bool:
    """Whether rows of T = `num_tokens` behind S = `num_shared` can, and should, use `shared_context`."""
    config = model.config.get_text_config()
    window = attention_window(config)
    fits = window is None or num_shared + num_tokens <= window
    return config._attn_implementation == NAME and fits and num_tokens <= _MOST_SHARED_TOKENS


def _attention(
    module: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    prefix_gate, prefix_length, shared_context = _ARGUMENTS.get() or (None, 0, None)
    gate = None if prefix_gate is None else prefix_gate[module.layer_idx].to(query.dtype)
    if shared_context is not None:
        scale = kwargs.get("scaling")
        query = query * (query.shape[3] ** -0.5 if scale is None else scale)
        return _behind_shared(query, key, value, *shared_context[module.layer_idx], gate, prefix_length), None
    if gate is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    prefix_key, key = key.tensor_split([prefix_length], dim=2)
    prefix_value, value = value.tensor_split([prefix_length], dim=2)
    mask = None if attention_mask is None else attention_mask[..., prefix_length:]
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    prefix_key, prefix_value = (x.repeat_interleave(groups, dim=1) for x in (prefix_key, prefix_value))
    prefix = F.scaled_dot_product_attention(query, prefix_key, prefix_value, scale=kwargs.get("scaling"))
    return output + (gate * prefix).transpose(1, 2), None


def _behind_shared(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    shared_key: Tensor,
    shared_value: Tensor,
    gate: Tensor | None,
    prefix_length: int,
) -> Tensor:
    """[B, T, h, dv] of causal attention of scaled queries [B, h, T, d] to a shared context and to the row's own tokens.

    Args:
        key: [B, k, T, d].
        value: [B, k, T, dv]; in most families dv is d.
        shared_key: [1, k, S, d].
        shared_value: [1, k, S, dv].
        gate: [h, 1, 1] of the first `prefix_length` tokens of the context; None has all in one softmax.
    """
    rows, heads, tokens, width = query.shape
    kv_heads, context = key.shape[1], shared_key.shape[2]
    in_rows = (rows, kv_heads, -1)
    # The queries of a group of heads meet the same keys, so they stand below each other.
    query = query.reshape(*in_rows, width)
    own = query @ key.transpose(2, 3)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=own.device).triu(1)
    own = own.view(rows, heads, tokens, tokens).masked_fill(later, float("-inf")).view(*own.shape)
    shared = query.transpose(0, 1).flatten(1, 2) @ shared_key[0].transpose(1, 2)
    shared = shared.view(kv_heads, rows, -1, context).transpose(0, 1)
    gated = 0 if gate is None else prefix_length
    weight = torch.cat([shared[..., gated:], own], dim=3).softmax(3, dtype=torch.float32).to(query.dtype)
    shared_weight, own_weight = weight.tensor_split([context - gated], dim=3)
    if gate is not None and gated:
        prefix_weight = shared[..., :gated].softmax(3, dtype=torch.float32).to(query.dtype)
        prefix_weight = gate * prefix_weight.reshape(rows, heads, tokens, gated)
        shared_weight = torch.cat([prefix_weight.view(*in_rows, gated), shared_weight], dim=3)
    behind = shared_weight.transpose(0, 1).reshape(kv_heads, -1, context) @ shared_value[0]
    output = own_weight @ value + behind.view(kv_heads, rows, -1, value.shape[3]).transpose(0, 1)
    return output.view(rows, heads, tokens, value.shape[3]).transpose(1, 2).contiguous()
