"""Items that training knows of: those with training events."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm.data import Dataset
from hellm.ops import item_cross_entropy

__all__ = ["TrainedItems", "next_item_loss"]


class TrainedItems(NamedTuple):
    """The items with training events, where there are others as well.

    An item without any is never a target, so as a candidate it would only be learned to be wrong, and with it all that
    it is like. It is what comes new after training, which knows nothing of it.

    Attributes:
        rows: [W] int64, ascending.
        place: [I] int64 place of an item among `rows`; of the others, anything.
    """

    rows: Tensor
    place: Tensor

    @classmethod
    def of(cls, dataset: Dataset, device: torch.device | str = "cpu") -> TrainedItems | None:
        """None where all items have training events."""
        has_events = np.bincount(dataset.pairs("train")[1], minlength=dataset.num_items) > 0
        if has_events.all():
            return None
        rows = torch.from_numpy(np.flatnonzero(has_events)).to(device)
        return cls(rows, torch.from_numpy(has_events.cumsum() - 1).clamp(min=0).to(device))


def next_item_loss(query: Tensor, keys: Tensor, targets: Tensor, trained: TrainedItems | None = None) -> Tensor:
    """Mean of -log softmax(<query, key> of all candidates)[target].

    Args:
        query: [N, D].
        keys: [I, D] of all items.
        targets: [N] int64 items, with training events.
        trained: The candidates; None is all items.
    """
    if trained is not None:
        # F.embedding sums gradients in a fixed order, plain indexing does not on CUDA.
        keys, targets = F.embedding(trained.rows, keys), trained.place[targets]
    return item_cross_entropy(query, keys, targets)
