"""Attention in which the prefix has a softmax and a gate of its own.

    output = softmax(Q K^T / sqrt(d)) V + gate * softmax(Q K_prefix^T / sqrt(d)) V_prefix

A gate of zero leaves the language model exactly as it was (zero-init attention, LLaMA-Adapter, arXiv:2303.16199), where
in one common softmax even a prefix with values of zero takes attention away from the text.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["use_gated_prefix"]

NAME = "hellm_gated_prefix"


def use_gated_prefix(model: nn.Module) -> None:
    """Let the attention of `model` take `prefix_gate` and `prefix_length` as further arguments of its decoder.

    Without them it computes what it did before. The first `prefix_length` keys and values are those of the prefix;
    `prefix_gate` is [layers, heads, 1, 1].

    Raises: ValueError, a model whose attention is not torch's scaled_dot_product_attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = model.config.get_text_config()
    if config._attn_implementation == NAME:
        return
    if config._attn_implementation != "sdpa" or getattr(config, "attn_logit_softcapping", None):
        raise ValueError(
            f'prefix_gate needs a model with attn_implementation "sdpa" and no soft-capping, '
            f"got {config._attn_implementation!r} in {type(model).__name__}; set prefix_gate to False"
        )
    AttentionInterface.register(NAME, _gated_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)


def _gated_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    prefix_gate: Tensor | None = None,
    prefix_length: int = 0,
    **kwargs,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if prefix_gate is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    prefix_key, key = key.tensor_split([prefix_length], dim=2)
    prefix_value, value = value.tensor_split([prefix_length], dim=2)
    mask = None if attention_mask is None else attention_mask[..., prefix_length:]
    output, _ = sdpa_attention_forward(module, query, key, value, mask, **kwargs)
    groups = query.shape[1] // key.shape[1]
    prefix_key, prefix_value = (x.repeat_interleave(groups, dim=1) for x in (prefix_key, prefix_value))
    prefix = F.scaled_dot_product_attention(query, prefix_key, prefix_value, scale=kwargs.get("scaling"))
    gate = prefix_gate[module.layer_idx].to(prefix.dtype)
    return output + (gate * prefix).transpose(1, 2), None
