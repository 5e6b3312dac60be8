"""A frozen language model behind its prompt: prefix, instruction, and what comes after the items.

B = histories, S = item tokens of the longest, W = width of the model, L = its layers, P = prefix tokens, d = width of
the graph embeddings.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from hellm.config import LLMConfig
from hellm.models.llm.decoder_check import choose_way, probe_decoder
from hellm.models.llm.graph_prefix import GraphPrefix
from hellm.models.llm.item_tokens import right_align
from hellm.models.llm.language_model import (
    add_lora,
    check_projections,
    context_limit,
    has_lora,
    language_model_identity,
    prefix_key_values,
    run_decoder,
    run_without_cache,
    token_embedding,
    weights_digest,
)
from hellm.models.llm.prefix_attention import can_share_context, use_prefix_attention
from hellm.models.llm.prompt import build_prompt, ids_digest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

__all__ = ["PromptedModel", "SharedContext"]

# Language model -> the PromptedModel that has taken it over.
_OWNERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref] = weakref.WeakKeyDictionary()


class SharedContext(NamedTuple):
    """What all histories start with.

    Attributes:
        past: per layer keys and values [1, heads, P + instruction, head width]; None on the way "whole".
        hidden: [1, W] final hidden state of the last token of the instruction.
    """

    past: list[tuple[Tensor, Tensor]] | None
    hidden: Tensor

    @property
    def num_cached(self) -> int:
        """Tokens whose keys and values are in `past`."""
        return self.past[0][0].shape[2] if self.past else 0


class PromptedModel(nn.Module):
    """Item tokens in, final hidden states out; trained are LoRA updates, prefix and gate.

    `way` is how item tokens follow what all histories start with: "shared" (its keys and values are multiplied once for
    all rows), "cached" (they are copied to every row) or "whole" (the instruction is run again in every row, for
    families that keep other things than keys and values). It is the first that gives this model's own numbers.

    Args:
        language_model: causal language model of transformers; frozen, and LoRA layers put into it.
        tokenizer: its tokenizer.
        config: settings of prefix and LoRA updates; with compat="official" the published prompt, and Gram matrices that
            are sums.
        graph_width: d of the graph prefix, or None for none; with it the prompt has a response part after the items.
    Raises: ValueError, a model that cannot rank items (see `hellm.models.llm.decoder_check`), that another recommender
        has, or without the projections, attention or matrices that this needs.
    """

    instruction: Tensor
    response: Tensor
    language_model: PreTrainedModel | PeftModel
    prefix: GraphPrefix | None
    prefix_gate: Tensor | None

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: Any,
        config: LLMConfig,
        *,
        graph_width: int | None,
    ) -> None:
        super().__init__()
        _take_over(language_model, self)
        sizes, official = language_model.config.get_text_config(), config.compat == "official"
        prompt = build_prompt(tokenizer, official=official)
        self.register_buffer("instruction", prompt.instruction, persistent=False)
        self.register_buffer("response", prompt.response, persistent=False)
        self.identity = language_model_identity(language_model)
        self.identity |= {"all_weights": weights_digest(language_model), "prompt": ids_digest(*prompt)}
        self.width = token_embedding(language_model).weight.shape[1]
        self.limit = context_limit(language_model)
        self.way = "shared"
        probe = probe_decoder(language_model, self.instruction)
        self.has_response = graph_width is not None
        self.prefix = self.prefix_gate = None
        self.prefix_length = 0
        if config.learned_prefix or graph_width is not None:
            # A list keeps the language model's own layers from being registered twice.
            self._attentions = [check_projections(language_model)]
            self.prefix_length = config.num_prefix_tokens
            self.prefix = GraphPrefix(
                sizes.num_hidden_layers,
                sizes.hidden_size,
                config.num_prefix_tokens,
                graph_width=graph_width,
                learned=config.learned_prefix,
                rank=config.gram_rank,
                dropout=config.prefix_dropout,
                eps=getattr(sizes, "rms_norm_eps", 1e-5),
                mean=not official,
            )
            if config.prefix_gate:
                self.prefix_gate = nn.Parameter(torch.zeros(sizes.num_hidden_layers, sizes.num_attention_heads, 1, 1))
        if not official:
            use_prefix_attention(language_model, needed=self.prefix_gate is not None)
        self.language_model = add_lora(
            language_model,
            rank=config.lora_rank,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            targets=config.lora_targets,
        )
        if probe is not None:
            self.way = choose_way(self, probe)

    @property
    def base(self) -> PreTrainedModel:
        """The language model inside its `peft.PeftModel`, or itself."""
        if has_lora(self.language_model):
            # peft takes any module, and has the one that was put into it.
            return cast("PreTrainedModel", self.language_model.get_base_model())
        return self.language_model

    def embed_text(self, ids: Tensor) -> Tensor:
        """Token embeddings [..., W] of ids [...]."""
        return token_embedding(self.base)(ids)

    def check_context(self, item_tokens: int, what: str) -> None:
        """Raises: ValueError, a prompt with `item_tokens` of items is longer than the model can read."""
        total = self.prefix_length + len(self.instruction) + item_tokens
        total += len(self.response) if self.has_response else 0
        if total > self.limit:
            raise ValueError(
                f"{what} makes prompts of up to {total} tokens ({item_tokens} of items), longer than the context of "
                f"{self.limit} tokens of {self.identity['name']}"
            )

    def shared_context(self, *, with_prefix: bool = True) -> SharedContext:
        """Learned prefix and instruction, once for all histories; differentiable."""
        inputs = self.embed_text(self.instruction).unsqueeze(0)
        if self.way == "whole":
            return SharedContext(None, run_without_cache(self.base, inputs)[:, -1])
        prefix = prefix_key_values(self._attentions[0], *self.prefix()) if self.prefix and with_prefix else None
        start = self.prefix_length if with_prefix else 0
        hidden, past = self._run(inputs, prefix, start=start, with_prefix=with_prefix)
        return SharedContext(past, hidden[:, -1])

    def after_context(self, context: SharedContext, tokens: Tensor, *, with_prefix: bool = True) -> Tensor:
        """Hidden states [B, S, W] at left-aligned item tokens [B, S, W] behind the shared context."""
        # Padding is on the right, where no item before it looks: no mask is needed.
        if context.past is None:
            text = self.embed_text(self.instruction).expand(len(tokens), -1, -1)
            return run_without_cache(self.base, torch.cat([text, tokens.to(text.dtype)], dim=1))[:, text.shape[1] :]
        where = {"start": context.num_cached, "with_prefix": with_prefix}
        if self.way == "shared" and can_share_context(self.base, where["start"], tokens.shape[1]):
            return self._run(tokens, None, shared_context=context.past, **where)[0]
        rows = (len(tokens), -1, -1, -1)
        past = [(key.expand(rows), value.expand(rows)) for key, value in context.past]
        return self._run(tokens, past, **where)[0]

    def after_response(self, gram: Tensor, tokens: Tensor, used: Tensor) -> Tensor:
        """Hidden states [B, W] at the end of [instruction][padding][items][response], each behind a prefix of its own.

        Args:
            gram: [B, r, r] of the graph prefix.
            tokens: [B, S, W] left-aligned item tokens.
            used: [B, S] bool, which of them are no padding.
        """
        assert self.prefix is not None  # there is one where there is a response
        prefix = prefix_key_values(self._attentions[0], *self.prefix(gram))
        tokens, used = right_align(tokens, used)
        before, after = (self.embed_text(ids).expand(len(tokens), -1, -1) for ids in (self.instruction, self.response))
        inputs = torch.cat([before, tokens.to(before.dtype), after], dim=1)
        attend = nn.functional.pad(used.long(), (len(self.instruction), len(self.response)), value=1)
        position = (attend.cumsum(1) - 1).clamp(min=0) + self.prefix_length
        attend = nn.functional.pad(attend, (self.prefix_length, 0), value=1)
        return self._run(inputs, prefix, position=position, attend=attend)[0][:, -1]

    def _run(
        self, inputs: Tensor, past: list[tuple[Tensor, Tensor]] | None, *, with_prefix: bool = True, **where: Any
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        gate: dict[str, Any] = {}
        if self.prefix_gate is not None and with_prefix:
            gate = {"prefix_gate": self.prefix_gate, "prefix_length": self.prefix_length}
        return run_decoder(self.base, inputs, past, **where, **gate)


def _take_over(language_model: PreTrainedModel, owner: PromptedModel) -> None:
    """Note who has the model. Raises: ValueError, another that is still there, or one that left its LoRA layers."""
    before = _OWNERS.get(language_model, lambda: None)()
    if before is not None or any(hasattr(part, "lora_A") for part in language_model.modules()):
        raise ValueError(
            f"language_model must belong to one recommender, but {type(language_model).__name__} is part of another, "
            "whose LoRA layers are in it; load it again, or give a copy.deepcopy made before"
        )
    _OWNERS[language_model] = weakref.ref(owner)
