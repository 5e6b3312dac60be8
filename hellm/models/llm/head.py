"""What turns a hidden state into a query, and items into keys: the score of an item is <query, key>.

I = items, W = width of the language model. A new head is a subclass of `Head` and a line in `HEADS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm.models.llm.item_tokens import ItemTokens

__all__ = ["HEADS", "Head", "TableHead", "TiedHead"]


class Head(nn.Module):
    """What every head has.

    Attributes:
        ranks_new_items: Whether items that were not trained have keys.
    """

    ranks_new_items: bool

    def keys(self, items: ItemTokens, rows: Tensor | None = None) -> Tensor:
        """[I, W], or [n, W] of the items `rows` [n] int64."""
        raise NotImplementedError

    def query(self, hidden: Tensor) -> Tensor:
        """[..., W] of hidden states [..., W]."""
        raise NotImplementedError


class TiedHead(Head):
    """Keys are the projected item tokens, so that an item that was not trained ranks at once.

    Args:
        width: W.
        num_items: Not used; keys are as many as there are tokens.
    """

    ranks_new_items = True

    def __init__(self, width: int, num_items: int) -> None:
        super().__init__()
        self.width = width
        self.projector = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.zeros(1))

    def keys(self, items: ItemTokens, rows: Tensor | None = None) -> Tensor:
        return items.keys(rows)

    def query(self, hidden: Tensor) -> Tensor:
        scale = self.log_scale.exp() * self.width**-0.5
        return F.rms_norm(self.projector(hidden), (self.width,)) * scale


class TableHead(Head):
    """Keys are a table of their own; it is random unless trained, as published.

    Args:
        width: W.
        num_items: I.
        trained: Train the table.
    """

    ranks_new_items = False

    def __init__(self, width: int, num_items: int, *, trained: bool) -> None:
        super().__init__()
        self.weight = nn.Linear(width, num_items, bias=False).weight.requires_grad_(trained)

    def keys(self, items: ItemTokens, rows: Tensor | None = None) -> Tensor:
        return self.weight if rows is None else F.embedding(rows, self.weight)

    def query(self, hidden: Tensor) -> Tensor:
        """The hidden states themselves."""
        return hidden


HEADS: dict[str, Callable[[int, int], Head]] = {
    "tied": TiedHead,
    "trained": partial(TableHead, trained=True),
    "frozen": partial(TableHead, trained=False),
}
"""Name -> (width, number of items) -> head."""
