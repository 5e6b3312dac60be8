"""A language model that ranks a catalogue: items enter as tokens, the graph as prefix or as running context.

After HeLLM (arXiv 2504.10541, fine-tuning stage); what differs from it by default is said where it is set.

B = histories, T = items of the longest, I = items of the catalogue, F = width of all item embeddings side by side,
W = width of the language model, D = width of queries and item keys, S = tokens of the longest history.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

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
    save_trained,
    trained_tensors,
)
from hellm.models.llm.graph_prefix import RunningGraph
from hellm.models.llm.head import HEADS
from hellm.models.llm.item_tokens import ItemTokens, check_item_embeddings, last_hidden, shallow_copy
from hellm.models.llm.language_model import token_rms
from hellm.models.llm.prompt import title_tokens
from hellm.models.llm.prompted_model import PromptedModel, SharedContext
from hellm.models.llm.settings import SETTINGS, check_settings

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

    With `graph_context="prefix"` (as published) the Gram matrix of the history's graph embeddings becomes keys and
    values before every layer's own, and one history gives one query. With "causal" the Gram matrix of items 1..t is
    added to item token t, so that one pass over a history gives the query after each of its items; "none" does the
    same without the graph. In both the instruction is encoded once for the whole batch.

    Args:
        language_model: causal language model of transformers; it is taken over: frozen, and LoRA layers put into it.
        tokenizer: its tokenizer.
        item_embeddings: named float tables [I, d], in the order in which they enter the item token. "graph" holds the
            graph embeddings. They are not trained.
        item_titles: one text per item, for `titles`.
        sequence_model: a trained sequence model (`hellm.models.SASRec`), for `sequence_residual`; it is frozen.
        graph_context: "prefix", "causal" or "none".
        num_prefix_tokens: prefix keys/values per layer; positions 0 to this - 1 are theirs.
        learned_prefix: use a learned prefix, the same for all histories.
        prefix_gate: let layers attend to the prefix apart from the text, with a gate per layer and head that starts at
            0, so that the language model starts undisturbed; else in one softmax, as published.
        prefix_dropout: of the two MLPs from Gram matrix to prefix.
        gram_rank: width to which graph embeddings are compressed before their Gram matrix; None keeps them.
        head: "tied" (keys are the projected item tokens, so that a new item needs no training), "trained" or "frozen"
            (a random table [I, W]).
        titles: put each item's title after its token.
        max_title_tokens: tokens kept of a title.
        max_length: items kept of a history, the latest.
        sequence_residual: add the scores of `sequence_model`; the model's own start at 0.
        item_id_dim: width of a trained embedding per item, beside `item_embeddings`; 0 is none.
        item_dropout: of the item embeddings.
        lora_rank: of the LoRA updates; 0 trains none.
        lora_alpha: scale of the updates times `lora_rank`.
        lora_dropout: of their input.
        lora_targets: names of the matrices that get one.
        compat: "official" repeats the published model (prompt, unmasked Gram matrix, initialisation, raw embeddings).

    Raises:
        ValueError: arguments that do not fit each other, tables of different lengths, a prompt and `max_length`
            longer than the model's context, or a model without the projections that a prefix needs.
    """

    def __init__(
        self,
        language_model: nn.Module,
        tokenizer: Any,
        item_embeddings: Mapping[str, Tensor],
        *,
        item_titles: Sequence[str | None] | None = None,
        sequence_model: nn.Module | None = None,
        graph_context: str = "causal",
        num_prefix_tokens: int = 10,
        learned_prefix: bool = False,
        prefix_gate: bool = True,
        prefix_dropout: float = 0.3,
        gram_rank: int | None = 32,
        head: str = "tied",
        titles: bool = False,
        max_title_tokens: int = 16,
        max_length: int = 50,
        sequence_residual: bool = False,
        item_id_dim: int = 64,
        item_dropout: float = 0.2,
        lora_rank: int = 16,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.05,
        lora_targets: Sequence[str] = ("gate_proj", "up_proj", "down_proj"),
        compat: str | None = None,
    ) -> None:
        settings = {name: value for name, value in locals().items() if name in SETTINGS}
        super().__init__()
        self.settings = settings | {"lora_targets": list(lora_targets)}
        widths = check_item_embeddings(item_embeddings)
        check_settings(self.settings, widths, language_model.config.model_type)
        self.graph_context, self.max_length, self.compat = graph_context, max_length, compat
        self.tokenizer = tokenizer
        self.item_titles = list(item_titles) if titles and item_titles is not None else None
        self.prompted = PromptedModel(
            language_model,
            tokenizer,
            num_prefix_tokens=num_prefix_tokens,
            graph_width=widths["graph"] if graph_context == "prefix" else None,
            learned_prefix=learned_prefix,
            prefix_gate=prefix_gate,
            prefix_dropout=prefix_dropout,
            gram_rank=gram_rank,
            lora_rank=lora_rank,
            lora_alpha=lora_alpha,
            lora_dropout=lora_dropout,
            lora_targets=lora_targets,
            official=compat is not None,
        )
        self.width = width = self.prompted.width
        self.items = ItemTokens(
            item_embeddings,
            width,
            token_scale=1.0 if compat else token_rms(language_model),
            running_graph=RunningGraph(widths["graph"], width, rank=gram_rank) if graph_context == "causal" else None,
            titles=self._title_tokens(item_titles, len(next(iter(item_embeddings.values())))),
            normalise=compat is None,
            id_dim=item_id_dim,
            dropout=item_dropout,
        )
        self.head = HEADS[head](width, self.num_items)
        self._add_sequence_model(sequence_model)
        self.prompted.check_context(max_length * self.items.max_tokens_per_item, f"max_length {max_length}")

    # ---- construction

    def _title_tokens(self, titles: Sequence[str | None] | None, num_items: int) -> tuple[Tensor, Tensor] | None:
        if not self.settings["titles"]:
            return None
        if titles is None or len(titles) != num_items:
            given = "none" if titles is None else len(titles)
            raise ValueError(f"item_titles must be given for all {num_items} items, got {given}")
        return title_tokens(self.tokenizer, titles, self.settings["max_title_tokens"])

    def _add_sequence_model(self, model: nn.Module | None) -> None:
        self.sequence_model = self.residual_gate = None
        if self.settings["sequence_residual"]:
            self._check_sequence_model(model, self.num_items)
            self.sequence_model = model.requires_grad_(False).eval()
            self.residual_gate = nn.Parameter(torch.zeros(()))

    def _check_sequence_model(self, model: nn.Module | None, num_items: int) -> None:
        if not self.settings["sequence_residual"]:
            return
        if model is None:
            raise ValueError("sequence_residual needs a sequence_model, got None")
        if len(model.item_keys()) != num_items:
            raise ValueError(f"sequence_model must have {num_items} items, got {len(model.item_keys())}")
        longest = getattr(model, "max_length", self.max_length)
        if longest < self.max_length:
            raise ValueError(f"max_length must be at most {longest}, that of sequence_model, got {self.max_length}")

    # ---- properties

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

    def train(self, mode: bool = True) -> RecommenderLLM:
        """Training mode for all but the frozen sequence model."""
        super().train(mode)
        if self.sequence_model is not None:
            self.sequence_model.eval()
        return self

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
        return self._to_query(self.hidden_all(items, mask), self._sequence_hidden(items, mask))

    def hidden_all(self, items: Tensor, mask: Tensor) -> Tensor:
        """Final hidden states [B, T, W] after each item, as `all_queries` uses them."""
        if self.graph_context == "prefix":
            raise ValueError(
                'all positions at once need graph_context "causal" or "none": the prefix holds the whole history, '
                "so that earlier positions would see later items"
            )
        return self._hidden_all(items, mask, self.prompted.shared_context())

    def item_keys_trainable(self) -> Tensor:
        """[I, D] keys of all items, differentiable in the projector or head."""
        own = self.head.keys(self.items)
        if self.sequence_model is None:
            return own
        return torch.cat([own, self.sequence_model.item_keys().to(own)], dim=1)

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
            context = None if self.graph_context == "prefix" else self.prompted.shared_context()
            output = None
            for rows in batches_by_length(
                lengths,
                EMBED_TOKENS,
                tokens_around=self._tokens_around(),
                tokens_per_item=self.items.max_tokens_per_item,
                same_length=self.compat is not None,
            ):
                longest = int(lengths[rows].max())
                batch = (padded[rows, :longest].to(self.device), mask[rows, :longest].to(self.device))
                query = self._last_queries(*batch, context).float()
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
        sequence_model: nn.Module | None = None,
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
        self.items, self.item_titles, self.sequence_model = other.items, other.item_titles, other.sequence_model

    def extended(
        self,
        item_embeddings: Mapping[str, Tensor],
        item_titles: Sequence[str | None] | None = None,
        *,
        sequence_model: nn.Module | None = None,
        item_ids: Tensor | None = None,
    ) -> RecommenderLLM:
        """A model with more items, which shares all that is trained with this one; this one keeps its items.

        Args, Raises: as `add_items`.
        """
        if not self.head.ranks_new_items:
            raise ValueError(f'head must be "tied" for items that were not trained, got {self.settings["head"]!r}')
        check_item_embeddings(item_embeddings)
        added = len(next(iter(item_embeddings.values())))
        tokens = self._title_tokens(item_titles, added)
        self._check_sequence_model(sequence_model, self.num_items + added)
        other = shallow_copy(self)
        other.items = self.items.extended(item_embeddings, tokens, item_ids)
        if tokens is not None:
            other.item_titles = [*self.item_titles, *item_titles]
        if self.sequence_model is not None:
            other.sequence_model = sequence_model.requires_grad_(False).eval()
        return other

    # ---- saving

    def trainable_state_dict(self) -> dict[str, Tensor]:
        """What was trained (and a frozen head), by parameter name; shares memory with the parameters."""
        return trained_tensors(self)

    def load_trainable_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a `trainable_state_dict` in. Raises: ValueError, names or shapes of a model with other settings."""
        load_trained(self, state, "the state")

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write what was trained into `folder`, in place of what is there; see `hellm.models.llm.checkpoint`."""
        save_trained(self, folder)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        item_embeddings: Mapping[str, Tensor],
        *,
        language_model: nn.Module | str | os.PathLike[str] | None = None,
        tokenizer: Any = None,
        item_titles: Sequence[str | None] | None = None,
        sequence_model: nn.Module | None = None,
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
        extra = {"item_titles": item_titles, "sequence_model": sequence_model}
        with LOADING:
            model = cls(language_model, tokenizer, item_embeddings, **extra, **_BEFORE | config["settings"])
        check_base(folder, config["language_model"], base_identity(model))
        model.items.rescale(config["table_scales"])
        load_saved(model, folder)
        return model.eval()

    # ---- the pass through the language model

    def _tokens_around(self) -> int:
        return len(self.instruction) + len(self.response) if self.graph_context == "prefix" else 0

    def _last_queries(self, items: Tensor, mask: Tensor, context: SharedContext | None) -> Tensor:
        if self.graph_context == "prefix":
            hidden = self._hidden_with_prefix(items, mask)
        else:
            context = self.prompted.shared_context() if context is None else context
            hidden = last_hidden(
                self._hidden_all(items, mask, context), mask, context.hidden.to(self.items.features.dtype)
            )
        sequence = self._sequence_hidden(items, mask)
        if sequence is not None:
            sequence = last_hidden(sequence, mask, sequence.new_zeros(1, sequence.shape[2]))
        return self._to_query(hidden, sequence)

    def _to_query(self, hidden: Tensor, sequence: Tensor | None) -> Tensor:
        query = self.head.query(hidden)
        if sequence is None:
            return query
        return torch.cat([self.residual_gate * query, sequence.to(query)], dim=-1)

    @torch.no_grad()
    def _sequence_hidden(self, items: Tensor, mask: Tensor) -> Tensor | None:
        if self.sequence_model is None:
            return None
        if items.shape[1] == 0:
            return self.items.features.new_zeros(len(items), 0, self.sequence_model.item_keys().shape[1])
        return self.sequence_model(items, mask)

    def _hidden_all(self, items: Tensor, mask: Tensor, context: SharedContext) -> Tensor:
        if items.shape[1] == 0:
            return self.items.features.new_zeros(len(items), 0, self.width)
        tokens, _, last = self._tokens(items, mask)
        hidden = self.prompted.after_context(context, tokens).to(self.items.features.dtype)
        return hidden if last is None else hidden.gather(1, last.unsqueeze(2).expand(-1, -1, self.width))

    def _hidden_with_prefix(self, items: Tensor, mask: Tensor) -> Tensor:
        # The published Gram matrix takes padding for item 0.
        counted = mask if self.compat is None else torch.ones_like(mask)
        gram = self.prompted.prefix.gram(self.items.graph(items), counted)
        tokens, used, _ = self._tokens(items, mask)
        return self.prompted.after_response(gram, tokens, used).to(self.items.features.dtype)

    def _tokens(self, items: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, used, last = self.items(items, mask, self.prompted.embed_text)
        self.prompted.check_context(tokens.shape[1], f"a history of {items.shape[1]} items")
        return tokens, used, last
