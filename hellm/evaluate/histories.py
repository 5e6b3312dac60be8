"""Scoring of users by what they did: any model that embeds histories, as a scorer of `hellm.evaluate`.

B = users in a batch, I = items, D = embedding width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast
from typing import Protocol as TypingProtocol

import numpy as np
import torch
from torch import Tensor

from hellm._rows import dot_products
from hellm.data import Histories

from .datasets import KNOWN_SPLITS, evaluate_dataset
from .result import RankingResult

if TYPE_CHECKING:
    from hellm.data import Dataset


class HistoryModel(TypingProtocol):
    """A model whose score of an item is <query of the history, key of the item>."""

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries [B, D] of histories in time order, given as CSR."""
        ...

    def item_keys(self) -> Tensor:
        """[I, D]."""
        ...


class HistoryRanker(TypingProtocol):
    """A model whose scores of items are no dot product."""

    def history_scores(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Scores [B, num_items] of histories in time order, given as CSR."""
        ...

    def item_keys(self) -> Tensor:
        """[I, D], for comparing items."""
        ...


class HistoryScorer:
    """Scores of every item for users of known histories.

    Users without a history get the prior: how often each item is in the histories. The item keys are computed once, so
    a model that has trained further needs a new scorer.

    Args:
        model: `embed` and `item_keys`, e.g. `hellm.models.SASRec`.
        indptr: [num_users + 1] int64, where each user's history starts in `items`.
        items: [indptr[-1]] int64 item rows in time order.
    Raises: ValueError, offsets that do not fit `items`.
    """

    def __init__(
        self, model: HistoryModel | HistoryRanker, indptr: Tensor | np.ndarray, items: Tensor | np.ndarray
    ) -> None:
        self.model, self.histories = model, Histories.checked((indptr, items), "histories")
        with torch.no_grad():
            self._keys = model.item_keys()
        self.num_items = len(self._keys)
        counts = torch.from_numpy(np.bincount(self.histories.items, minlength=self.num_items))
        self._popularity = counts.to(self._keys.device, self._keys.dtype)

    @classmethod
    def of(cls, model: HistoryModel | HistoryRanker, dataset: Dataset, split: str) -> HistoryScorer:
        """A scorer for one split of a data set: "valid" knows the train events, "test" train and validation events.

        Raises: ValueError, another split.
        """
        if split not in KNOWN_SPLITS:
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        return cls(model, *dataset.histories(*KNOWN_SPLITS[split]))

    @torch.no_grad()
    def scores(self, users: Tensor) -> Tensor:
        """[B] int64 users -> [B, I] float32, on the device of the model."""
        asked = self.histories.take(torch.as_tensor(users).cpu().numpy())
        device = self._keys.device
        scores = history_scores(self.model, self._keys, *(torch.from_numpy(part).to(device) for part in asked))
        personal = torch.from_numpy(asked.lengths > 0).to(device)
        return torch.where(personal.unsqueeze(1), scores, self._popularity)


def history_scores(
    model: HistoryModel | HistoryRanker, keys: Tensor, indptr: Tensor, items: Tensor, queries: Tensor | None = None
) -> Tensor:
    """Scores [B, I] of all items after histories in time order, given as CSR.

    Args:
        keys: [I, D] of the model.
        queries: [B, D] of the histories, where somebody else has them; None takes those of the model.
    """
    by_itself = getattr(model, "history_scores", None)
    if by_itself is not None:
        return by_itself(indptr, items, **({} if queries is None else {"queries": queries}))
    embedding = cast("HistoryModel", model)
    return dot_products(embedding.embed(indptr, items) if queries is None else queries, keys)


def evaluate_histories(
    model: HistoryModel | HistoryRanker, dataset: Dataset, split: str = "test", **options
) -> RankingResult:
    """`evaluate_dataset` of a model that embeds histories: `HistoryScorer.of(model, dataset, split)` is scored."""
    return evaluate_dataset(HistoryScorer.of(model, dataset, split), dataset, split=split, **options)
