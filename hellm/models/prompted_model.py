"""A frozen language model behind its prompt: prefix, instruction, and what comes after the items.

B = histories, S = item tokens of the longest, W = width of the model, L = its layers, P = prefix tokens, d = width of
the graph embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hellm.models.graph_prefix import GraphPrefix
from hellm.models.item_tokens import right_align
from hellm.models.language_model import (
    add_lora,
    check_projections,
    context_limit,
    language_model_identity,
    prefix_key_values,
    run_decoder,
)
from hellm.models.prefix_attention import can_share_context, use_prefix_attention
from hellm.models.prompt import build_prompt

__all__ = ["PromptedModel", "SharedContext"]


class SharedContext(NamedTuple):
    """What all histories start with.

    Attributes:
        past: per layer keys and values [1, heads, P + instruction, head width].
        hidden: [1, W] final hidden state of the last token of the instruction.
    """

    past: list[tuple[Tensor, Tensor]]
    hidden: Tensor


class PromptedModel(nn.Module):
    """Item tokens in, final hidden states out; trained are LoRA updates, prefix and gate.

    Args:
        language_model: causal language model of transformers; frozen, and LoRA layers put into it.
        tokenizer: its tokenizer.
        num_prefix_tokens: P; positions 0 to P - 1 are theirs.
        graph_width: d of the graph prefix, or None for none; with it the prompt has a response part after the items.
        learned_prefix: use a learned prefix.
        prefix_gate: give the prefix a gate per layer and head that starts at 0.
        prefix_dropout: of the MLPs of the graph prefix.
        gram_rank: see `GraphPrefix`.
        lora_rank: of the LoRA updates; 0 trains none.
        lora_alpha: their scale times `lora_rank`.
        lora_dropout: of their input.
        lora_targets: names of the matrices that get one.
        official: the published prompt, and Gram matrices that are sums.
    Raises: ValueError, a model without the projections, attention or matrices that this needs.
    """

    def __init__(
        self,
        language_model: nn.Module,
        tokenizer: Any,
        *,
        num_prefix_tokens: int,
        graph_width: int | None,
        learned_prefix: bool,
        prefix_gate: bool,
        prefix_dropout: float,
        gram_rank: int | None,
        lora_rank: int,
        lora_alpha: float,
        lora_dropout: float,
        lora_targets: Sequence[str],
        official: bool,
    ) -> None:
        super().__init__()
        config = language_model.config.get_text_config()
        self.identity = language_model_identity(language_model)
        self.width = config.hidden_size
        self.limit = context_limit(language_model)
        self.has_response = graph_width is not None
        self.prefix = self.prefix_gate = None
        self.prefix_length = 0
        if learned_prefix or graph_width is not None:
            # A list keeps the language model's own layers from being registered twice.
            self._attentions = [check_projections(language_model)]
            self.prefix_length = num_prefix_tokens
            self.prefix = GraphPrefix(
                config.num_hidden_layers,
                self.width,
                num_prefix_tokens,
                graph_width=graph_width,
                learned=learned_prefix,
                rank=gram_rank,
                dropout=prefix_dropout,
                eps=getattr(config, "rms_norm_eps", 1e-5),
                mean=not official,
            )
            if prefix_gate:
                self.prefix_gate = nn.Parameter(torch.zeros(config.num_hidden_layers, config.num_attention_heads, 1, 1))
        if not official:
            use_prefix_attention(language_model, needed=self.prefix_gate is not None)
        prompt = build_prompt(tokenizer, official=official)
        self.register_buffer("instruction", prompt.instruction, persistent=False)
        self.register_buffer("response", prompt.response, persistent=False)
        self.language_model = add_lora(
            language_model, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=lora_targets
        )

    @property
    def base(self) -> nn.Module:
        """The language model inside its `peft.PeftModel`, or itself."""
        return (
            self.language_model.get_base_model() if hasattr(self.language_model, "peft_config") else self.language_model
        )

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., W] of ids [...]."""
        return self.base.get_input_embeddings()(ids)

    def check_context(self, item_tokens: int, what: str) -> None:
        """Raises: ValueError, a prompt with `item_tokens` of items is longer than the model can read."""
        total = self.prefix_length + len(self.instruction) + item_tokens
        total += len(self.response) if self.has_response else 0
        if total > self.limit:
            raise ValueError(
                f"{what} makes prompts of up to {total} tokens ({item_tokens} of items), longer than the context of "
                f"{self.limit} tokens of {self.identity['name']}"
            )

    def shared_context(self) -> SharedContext:
        """Learned prefix and instruction, once for all histories; differentiable."""
        prefix = None if self.prefix is None else prefix_key_values(self._attentions[0], *self.prefix())
        inputs = self.embed_text(self.instruction).unsqueeze(0)
        hidden, past = self._run(inputs, prefix, start=self.prefix_length)
        return SharedContext(past, hidden[:, -1])

    def after_context(self, context: SharedContext, tokens: Tensor) -> Tensor:
        """Hidden states [B, S, W] at left-aligned item tokens [B, S, W] behind the shared context."""
        # Padding is on the right, where no item before it looks: no mask is needed.
        start = context.past[0][0].shape[2]
        if can_share_context(self.base, start, tokens.shape[1]):
            return self._run(tokens, None, start=start, shared_context=context.past)[0]
        past = [tuple(x.expand(len(tokens), -1, -1, -1) for x in pair) for pair in context.past]
        return self._run(tokens, past, start=start)[0]

    def after_response(self, gram: Tensor, tokens: Tensor, used: Tensor) -> Tensor:
        """Hidden states [B, W] at the end of [instruction][padding][items][response], each behind a prefix of its own.

        Args:
            gram: [B, r, r] of the graph prefix.
            tokens: [B, S, W] left-aligned item tokens.
            used: [B, S] bool, which of them are no padding.
        """
        prefix = prefix_key_values(self._attentions[0], *self.prefix(gram))
        tokens, used = right_align(tokens, used)
        before, after = (self.embed_text(ids).expand(len(tokens), -1, -1) for ids in (self.instruction, self.response))
        inputs = torch.cat([before, tokens.to(before.dtype), after], dim=1)
        attend = nn.functional.pad(used.long(), (len(self.instruction), len(self.response)), value=1)
        position = (attend.cumsum(1) - 1).clamp(min=0) + self.prefix_length
        attend = nn.functional.pad(attend, (self.prefix_length, 0), value=1)
        return self._run(inputs, prefix, position=position, attend=attend)[0][:, -1]

    def _run(self, inputs: Tensor, past, **where: Any) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        gate = {}
        if self.prefix_gate is not None:
            gate = {"prefix_gate": self.prefix_gate, "prefix_length": self.prefix_length}
        return run_decoder(self.base, inputs, past, **where, **gate)
