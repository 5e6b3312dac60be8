"""The items that a softmax is over: all that training knows of, or a few drawn anew for every step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm.data import Dataset
from hellm.ops import item_cross_entropy

__all__ = ["CandidateItems", "Candidates", "next_item_loss"]


class Candidates(NamedTuple):
    """Items of one softmax.

    Attributes:
        rows: [C] int64 items, ascending.
        log_weight: [C] float32, the logarithm of the number of items that each stands for; None is one each.
    """

    rows: Tensor
    log_weight: Tensor | None = None

    def places(self, targets: Tensor) -> Tensor:
        """[N] int64 places of items [N] among the candidates, which have all of them."""
        return torch.searchsorted(self.rows, targets)


class CandidateItems:
    """The items with training events, and those of them that a step's softmax is over.

    An item without any is never a target, so as a candidate it would only be learned to be wrong, and with it all that
    it is like. It is what comes new after training, which knows nothing of it.

    Where only `count` items are drawn, the targets of the step stand for themselves, and the others for those that are
    no targets: each weighs how often it was drawn by how often it is expected to be, so that the sum over all items
    that a softmax divides by is estimated without bias (sampled softmax with its logQ correction, Bengio and Senecal
    2008). Half of the draws are even over the items, half over their events: popular items make most of that sum, and
    no weight is more than twice that of an even draw. Draws are stratified, which leaves each item's expectation.

    Args:
        events: [I] int, the training events of every item.
        count: Items drawn for every step, >= 1; None, or as many as have events, is all of them.
        seed: Of the draws, >= 0; a draw depends on it, the epoch and the step alone.
        device: Where candidates are wanted.
    Raises: ValueError, a count that is not >= 1.
    """

    def __init__(
        self,
        events: np.ndarray,
        *,
        count: int | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if count is not None and count < 1:
            raise ValueError(f"count must be None or >= 1, got {count}")
        trained = np.flatnonzero(events)
        self.device, self._seed = torch.device(device), seed
        self.count = None if count is None or count >= len(trained) else count
        self._all = None if len(trained) == len(events) else Candidates(torch.from_numpy(trained).to(device))
        if self.count is not None:
            self._trained = trained
            self._probability = 0.5 / len(trained) + 0.5 * events[trained] / events.sum()
            self._stop = self._probability.cumsum()

    @classmethod
    def of(
        cls, dataset: Dataset, device: torch.device | str = "cpu", *, count: int | None = None, seed: int = 0
    ) -> CandidateItems:
        """Those of a data set."""
        events = np.bincount(dataset.pairs("train")[1], minlength=dataset.num_items)
        return cls(events, count=count, seed=seed, device=device)

    def of_step(self, epoch: int, step: int, targets: np.ndarray | Tensor) -> Candidates | None:
        """The candidates of a step, its targets [N] int64 among them. None is all items there are."""
        if self.count is None:
            return self._all
        # A stream of its own beside those of samplers and contrastive anchors.
        rng = np.random.default_rng((self._seed, epoch, step, 2))
        drawn = (np.arange(self.count) + rng.random(self.count)) / self.count * self._stop[-1]
        place, times = np.unique(np.searchsorted(self._stop, drawn, side="right"), return_counts=True)
        place = np.minimum(place, len(self._trained) - 1)
        targets = np.unique(np.asarray(targets))
        other = ~np.isin(self._trained[place], targets)
        weight = times[other] / (self.count * self._probability[place[other]])
        rows = np.concatenate([targets, self._trained[place[other]]])
        log_weight = np.concatenate([np.zeros(len(targets)), np.log(weight)])
        order = np.argsort(rows)
        return Candidates(*(torch.from_numpy(one[order]).to(self.device) for one in (rows, log_weight.astype("f4"))))


def next_item_loss(query: Tensor, keys: Tensor, targets: Tensor, candidates: Candidates | None = None) -> Tensor:
    """Mean of -log softmax(<query, key> of all candidates)[target].

    Args:
        query: [N, D].
        keys: [C, D] of the candidates.
        targets: [N] int64 items, among the candidates.
        candidates: None is all items.
    """
    if candidates is None:
        return item_cross_entropy(query, keys, targets)
    return item_cross_entropy(query, keys, candidates.places(targets), bias=candidates.log_weight)
