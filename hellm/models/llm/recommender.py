"""A language model that ranks a catalogue: items enter as tokens, the graph as prefix or as running context.

After HeLLM (arXiv 2504.10541, fine-tuning stage); what differs from it by default is said where it is set.

B = histories, T = items of the longest, I = items of the catalogue, F = width of all item embeddings side by side,
W = width of the language model, D = width of queries and item keys.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hellm._pretrained import LOADING
from hellm.models.histories import batches_by_length, check_histories, pad_histories
from hellm.models.llm.checkpoint import (
    base_identity,
    check_base,
    load_saved,
    load_trained,
    open_saved,
    renamed,
    save_trained,
    trained_tensors,
)
from hellm.models.llm.context import CONTEXTS
from hellm.models.llm.head import HEADS
from hellm.models.llm.item_tokens import ItemTokens, check_item_embeddings
from hellm.models.llm.language_model import token_rms
from hellm.models.llm.prompt import title_tokens
from hellm.models.llm.prompted_model import PromptedModel, SharedContext
from hellm.models.llm.residual import NoResidual, SequenceModel, SequenceResidual
from hellm.models.llm.settings import checked_settings
from hellm.models.shallow_copy import shallow_copy

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["RecommenderLLM"]

# What settings were before a saved model knew of them.
_BEFORE = {"item_id_dim": 0, "item_dropout": 0.0}
# Tokens per batch of `embed`. Larger ones leave the CPU's cache: 8,192 take three times as long a token.
EMBED_TOKENS = 512


class RecommenderLLM(nn.Module):
    """Scores items by <query of a history, key of an item>; the query comes from a language model.

    An item is the token  MLP(concat of its embeddings);  the prompt is instruction, items (and a response part with
    `graph_context="prefix"`). The language model stays frozen but for LoRA updates. Trained parts are float32 whatever
    the dtype of the language model.

    Its parts are swapped by name: how the graph enters (`hellm.models.llm.context`), what makes queries and keys
    (`hellm.models.llm.head`), and what scores it starts from (`hellm.models.llm.residual`).

    Args:
        language_model: causal language model of transformers; it is taken over: frozen, and LoRA layers put into it.
        tokenizer: its tokenizer.
        item_embeddings: named float tables [I, d], in the order in which they enter the item token. "graph" holds the
            graph embeddings. They are not trained.
        item_titles: one text per item, for `titles`.
        sequence_model: a trained sequence model (`hellm.models.SASRec`), for `sequence_residual`; it is frozen.
        settings: those of `hellm.config.LLMConfig`, by name.

    Raises:
        ValueError: arguments that do not fit each other, tables of different lengths, a prompt and `max_length`
            longer than the model's context, or a model without the projections that a prefix needs.
    """

    def __init__(
        self,
        language_model: PreTrainedModel,
        tokenizer: Any,
        item_embeddings: Mapping[str, Tensor],
        *,
        item_titles: Sequence[str | None] | None = None,
        sequence_model: SequenceModel | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        widths = check_item_embeddings(item_embeddings)
        self.config = config = checked_settings(settings, widths, language_model.config.model_type)
        official, num_items = config.compat == "official", len(next(iter(item_embeddings.values())))
        self.tokenizer = tokenizer
        self.item_titles = list(item_titles) if config.titles and item_titles is not None else None
        if config.sequence_residual:
            self.residual = SequenceResidual(sequence_model, num_items, config.max_length)
        else:
            self.residual = NoResidual()
        context = CONTEXTS[config.graph_context]
        self.prompted = PromptedModel(language_model, tokenizer, config, graph_width=context.prefix_width(widths))
        self.width = width = self.prompted.width
        token_scale = 1.0 if official else token_rms(language_model)
        self.context = context(widths, width, rank=config.gram_rank, official=official)
        self.items = ItemTokens(
            item_embeddings,
            width,
            token_scale=token_scale,
            titles=self._title_tokens(item_titles, num_items),
            normalise=not official,
            id_dim=config.item_id_dim,
            dropout=config.item_dropout,
        )
        self.head = HEADS[config.head](width, self.num_items)
        self.prompted.check_context(self.max_length * self.items.max_tokens_per_item, f"max_length {self.max_length}")

    def _title_tokens(self, titles: Sequence[str | None] | None, num_items: int) -> tuple[Tensor, Tensor] | None:
        if not self.config.titles:
            return None
        if titles is None or len(titles) != num_items:
            given = "none" if titles is None else len(titles)
            raise ValueError(f"item_titles must be given for all {num_items} items, got {given}")
        return title_tokens(self.tokenizer, titles, self.config.max_title_tokens)

    # ---- properties

    @property
    def settings(self) -> dict[str, Any]:
        """`config` as plain values."""
        return asdict(self.config) | {"lora_targets": list(self.config.lora_targets)}

    @property
    def max_length(self) -> int:
        """Items kept of a history, the latest."""
        return self.config.max_length

    @property
    def sequence_model(self) -> SequenceModel | None:
        """The frozen sequence model whose scores it starts from; None without one."""
        return self.residual.sequence_model

    @property
    def instruction(self) -> Tensor:
        """Token ids before the items, [n] int64."""
        return self.prompted.instruction

    @property
    def response(self) -> Tensor:
        """Token ids after the items, [n] int64; used with `graph_context="prefix"` only."""
        return self.prompted.response

    @property
    def num_items(self) -> int:
        """I."""
        return self.items.num_items

    @property
    def device(self) -> torch.device:
        """Device of the trained parts."""
        return self.items.features.device

    # ---- training interface

    def queries(self, items: Tensor, mask: Tensor) -> Tensor:
        """The query after the whole of each history, differentiable.

        Args:
            items: [B, T] int64, left-aligned (`pad_histories`).
            mask: [B, T] bool, True at items; a row may be empty.
        Returns: [B, D].
        """
        return self._last_queries(items, mask, None)

    def all_queries(self, items: Tensor, mask: Tensor) -> Tensor:
        """The query after each item of each history, from that item and those before it; differentiable.

        Args: as `queries`.
        Returns: [B, T, D]; arbitrary where `mask` is False.
        Raises: ValueError with `graph_context="prefix"`, whose prefix holds the whole history.
        """
        return self.residual.after_each(self.head.query(self.hidden_all(items, mask)), items, mask)

    def hidden_all(self, items: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states [B, T, W] after each item, as `all_queries` uses them."""
        return self.context.after_each(self.prompted, self.items, items, mask, None)

    def item_keys_trainable(self, rows: Tensor | None = None) -> Tensor:
        """[I, D] keys of all items, or [n, D] of `rows` [n] int64, differentiable in the projector or head."""
        return self.residual.keys(self.head.keys(self.items, rows), rows)

    # ---- serving interface

    @torch.no_grad()
    def item_keys(self) -> Tensor:
        """[I, D] float32 keys of all items."""
        return self.item_keys_trainable().float()

    @torch.no_grad()
    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries of histories of any lengths, in evaluation mode; each is what it would be alone.

        Args:
            indptr: [B + 1] int64, where each history starts in `items`.
            items: [indptr[-1]] int64 item rows in time order; the last `max_length` of each history count.
        Returns: [B, D] float32. An empty history gives the query of the bare prompt.
        Raises: ValueError, an item outside [0, I) or offsets that do not fit.
        """
        indptr, items = (torch.as_tensor(value).long().cpu() for value in (indptr, items))
        check_histories(indptr, items, self.num_items)
        padded, mask = pad_histories(indptr, items, max_length=self.max_length)
        lengths = mask.sum(1)
        was_training = self.training
        if was_training:  # else nothing is written, as other threads may read
            self.eval()
        try:
            shared = self.context.shared(self.prompted)
            output = None
            for rows in batches_by_length(
                lengths,
                EMBED_TOKENS,
                tokens_around=self.context.tokens_around(self.prompted),
                tokens_per_item=self.items.max_tokens_per_item,
                same_length=self.config.compat is not None,
            ):
                longest = int(lengths[rows].max())
                batch = (padded[rows, :longest].to(self.device), mask[rows, :longest].to(self.device))
                query = self._last_queries(*batch, shared).float()
                output = query.new_empty(len(lengths), query.shape[1]) if output is None else output
                output[rows.to(self.device)] = query
            return self.item_keys()[:0] if output is None else output
        finally:
            if was_training:
                self.train()

    def add_items(
        self,
        item_embeddings: Mapping[str, Tensor],
        item_titles: Sequence[str | None] | None = None,
        *,
        sequence_model: SequenceModel | None = None,
        item_ids: Tensor | None = None,
    ) -> None:
        """More items, numbered after those there are, which rank at once and may stand in histories.

        Args:
            item_embeddings: tables [new, d] of the names and widths that the model has.
            item_titles: one text per new item, where the model uses titles.
            sequence_model: the sequence model with the new items as well, where the model has a residual on it.
            item_ids: [new, item_id_dim] in place of embeddings that were not trained; None is zeros.
        Raises: ValueError, a head that is not "tied", or tables, titles or a sequence model that do not fit.
        """
        other = self.extended(item_embeddings, item_titles, sequence_model=sequence_model, item_ids=item_ids)
        self.items, self.item_titles, self.residual = other.items, other.item_titles, other.residual

    def extended(
        self,
        item_embeddings: Mapping[str, Tensor],
        item_titles: Sequence[str | None] | None = None,
        *,
        sequence_model: SequenceModel | None = None,
        item_ids: Tensor | None = None,
    ) -> RecommenderLLM:
        """A model with more items, which shares all that is trained with this one; this one keeps its items.

        Args, Raises: as `add_items`.
        """
        if not self.head.ranks_new_items:
            raise ValueError(f'head must be "tied" for items that were not trained, got {self.config.head!r}')
        check_item_embeddings(item_embeddings)
        added = len(next(iter(item_embeddings.values())))
        tokens = self._title_tokens(item_titles, added)
        residual = self.residual.extended(sequence_model, self.num_items + added, self.max_length)
        other = shallow_copy(self)
        other.residual = residual
        other.items = self.items.extended(item_embeddings, tokens, item_ids)
        if self.item_titles is not None and item_titles is not None:
            other.item_titles = [*self.item_titles, *item_titles]
        return other

    # ---- saving

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What was trained (and a frozen head), by parameter name; shares memory with the parameters."""
        return trained_tensors(self)

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `trainable_state_dict` in. Raises: ValueError, names or shapes of a model with other settings."""
        load_trained(self, state, "the state")

    def renamed_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state that was saved before, by the names that its parameters have now."""
        return renamed(state)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what was trained into `folder`, in place of what is there; see `hellm.models.llm.checkpoint`."""
        save_trained(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        item_embeddings: Mapping[str, Tensor],
        *,
        language_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        item_titles: Sequence[str | None] | None = None,
        sequence_model: SequenceModel | None = None,
    ) -> RecommenderLLM:
        """The model that `save_pretrained` wrote, in evaluation mode, with the same scores.

        Args:
            folder: where it was saved.
            item_embeddings: the tables that it was trained with.
            language_model: the model that it was trained on, or where that is now (as `load_language_model` takes it);
                None loads it by the name in config.json. A model that is loaded is on the CPU.
            tokenizer: its tokenizer, together with a model.
            item_titles: as in training.
            sequence_model: as in training.
        Raises: FileNotFoundError, ValueError: no such model, or one of another catalogue or language model (both are
            named); and what `load_language_model` raises.
        """
        config, language_model, tokenizer = open_saved(
            folder,
            item_embeddings,
            language_model=language_model,
            tokenizer=tokenizer,
            item_titles=item_titles,
            sequence_model=sequence_model,
        )
        with LOADING:
            model = cls(
                language_model,
                tokenizer,
                item_embeddings,
                item_titles=item_titles,
                sequence_model=sequence_model,
                **_BEFORE | config["settings"],
            )
        check_base(folder, config["language_model"], base_identity(model))
        model.items.rescale(config["table_scales"])
        load_saved(model, folder)
        return model.eval()

    # ---- the pass through the language model

    def _last_queries(self, items: Tensor, mask: Tensor, shared: SharedContext | None) -> Tensor:
        hidden = self.context.after_all(self.prompted, self.items, items, mask, shared)
        return self.residual.after_all(self.head.query(hidden), items, mask)
