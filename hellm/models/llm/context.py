"""What the language model is told of the graph around a history, and how item tokens are run with it.

B = histories, T = items of the longest, W = width of the language model. A new context is a subclass of
`NoContext` and a line in `CONTEXTS`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hellm.models.llm.graph_prefix import RunningGraph
from hellm.models.llm.item_tokens import ItemTokens, last_hidden
from hellm.models.llm.prompted_model import PromptedModel, SharedContext

__all__ = ["CONTEXTS", "CausalContext", "NoContext", "PrefixContext"]


class NoContext(nn.Module):
    """Nothing: one pass over a history gives the hidden state after each of its items.

    The instruction is encoded once for the whole batch.

    Args:
        widths: Of the item tables, by name; "graph" holds graph embeddings.
        width: W.
        rank: Width to which graph embeddings are compressed before their Gram matrix; None keeps them.
        official: As published.

    Attributes:
        needs_graph: Whether there must be a table "graph".
        every_position: Whether one pass gives the query after each item; else only after the last.
    """

    needs_graph = False
    every_position = True

    def __init__(self, widths: Mapping[str, int], width: int, *, rank: int | None, official: bool) -> None:
        super().__init__()

    @staticmethod
    def prefix_width(widths: Mapping[str, int]) -> int | None:
        """Width of the graph embeddings that become a prefix, see `PromptedModel`; None without one."""
        return None

    def of_items(self, tokens: ItemTokens, items: Tensor) -> Tensor | None:
        """[B, T, W], added to the tokens of `items` [B, T], or None for nothing."""
        return None

    def tokens_around(self, prompted: PromptedModel) -> int:
        """Tokens of the prompt that are run again with every history."""
        return 0

    def shared(self, prompted: PromptedModel) -> SharedContext | None:
        """What all histories start with."""
        return prompted.shared_context()

    def after_each(
        self, prompted: PromptedModel, tokens: ItemTokens, items: Tensor, mask: Tensor, shared: SharedContext | None
    ) -> Tensor:
        """Hidden states [B, T, W] after each of left-aligned `items`; arbitrary where `mask` is False.

        `shared` None makes it anew.
        """
        dtype = tokens.features.dtype
        if items.shape[1] == 0:
            return tokens.features.new_zeros(len(items), 0, prompted.width)
        shared = prompted.shared_context() if shared is None else shared
        found, _, last = tokens(items, mask, prompted.embed_text, self.of_items(tokens, items))
        prompted.check_context(found.shape[1], f"a history of {items.shape[1]} items")
        hidden = prompted.after_context(shared, found).to(dtype)
        return hidden if last is None else hidden.gather(1, last.unsqueeze(2).expand(-1, -1, prompted.width))

    def after_all(
        self, prompted: PromptedModel, tokens: ItemTokens, items: Tensor, mask: Tensor, shared: SharedContext | None
    ) -> Tensor:
        """Hidden states [B, W] after the whole of each history; `shared` None makes it anew."""
        shared = prompted.shared_context() if shared is None else shared
        hidden = self.after_each(prompted, tokens, items, mask, shared)
        return last_hidden(hidden, mask, shared.hidden.to(tokens.features.dtype))


class CausalContext(NoContext):
    """The Gram matrix of items 1..t, added to item token t; see `RunningGraph`."""

    needs_graph = True

    def __init__(self, widths: Mapping[str, int], width: int, *, rank: int | None, official: bool) -> None:
        super().__init__(widths, width, rank=rank, official=official)
        self.running_graph = RunningGraph(widths["graph"], width, rank=rank)

    def of_items(self, tokens: ItemTokens, items: Tensor) -> Tensor | None:
        return self.running_graph(tokens.graph(items))


class PrefixContext(NoContext):
    """The Gram matrix of the whole history as keys and values before every layer's own, as published.

    One history gives one query, at the end of a response part of the prompt.
    """

    needs_graph = True
    every_position = False

    def __init__(self, widths: Mapping[str, int], width: int, *, rank: int | None, official: bool) -> None:
        super().__init__(widths, width, rank=rank, official=official)
        self.official = official

    @staticmethod
    def prefix_width(widths: Mapping[str, int]) -> int | None:
        return widths["graph"]

    def tokens_around(self, prompted: PromptedModel) -> int:
        return len(prompted.instruction) + len(prompted.response)

    def shared(self, prompted: PromptedModel) -> SharedContext | None:
        return None

    def after_each(
        self, prompted: PromptedModel, tokens: ItemTokens, items: Tensor, mask: Tensor, shared: SharedContext | None
    ) -> Tensor:
        raise ValueError(
            'all positions at once need graph_context "causal" or "none": the prefix holds the whole history, '
            "so that earlier positions would see later items"
        )

    def after_all(
        self, prompted: PromptedModel, tokens: ItemTokens, items: Tensor, mask: Tensor, shared: SharedContext | None
    ) -> Tensor:
        # The published Gram matrix takes padding for item 0.
        counted = torch.ones_like(mask) if self.official else mask
        assert prompted.prefix is not None  # see `prefix_width`
        gram = prompted.prefix.gram(tokens.graph(items), counted)
        found, used, _ = tokens(items, mask, prompted.embed_text)
        prompted.check_context(found.shape[1], f"a history of {items.shape[1]} items")
        return prompted.after_response(gram, found, used).to(tokens.features.dtype)


CONTEXTS: dict[str, type[NoContext]] = {"prefix": PrefixContext, "causal": CausalContext, "none": NoContext}
"""Name -> context."""
