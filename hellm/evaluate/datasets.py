"""Targets and masks of a dataset, as a protocol asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .protocols import Protocol, get_protocol
from .ranking import Scorer, ranking_metrics
from .result import RankingResult

if TYPE_CHECKING:
    from hellm.data import Dataset


def evaluate_dataset(
    scorer: Scorer | Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    split: str = "test",
    protocol: str | Protocol = "standard",
    ks: Sequence[int] = (10, 20),
    **options,
) -> RankingResult:
    """`ranking_metrics` on one split of a dataset, masked as the protocol says.

    Args:
        scorer: See `ranking_metrics`.
        dataset: Gives the targets (`histories(split)`), the masked items and the train counts for novelty.
        split: "valid" or "test".
        protocol: Preset name or `Protocol`.
        ks: Cut-offs.
        **options: Passed on: `users`, `mask_seen`, `batch_size`, `max_memory`.

    Raises:
        ValueError: As `ranking_metrics`; or an empty split.
    """
    protocol = get_protocol(protocol)
    if split not in protocol.mask:
        raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
    targets = dataset.histories(split)
    if not len(targets[1]):
        raise ValueError(f"split {split!r} of data set {dataset.name!r} must have events, got none")
    masked = protocol.mask[split]
    _, train_items = dataset.pairs("train")
    return ranking_metrics(
        scorer,
        targets,
        seen=dataset.histories(*masked) if masked else None,
        ks=ks,
        protocol=protocol,
        split=split,
        item_counts=np.bincount(train_items, minlength=dataset.num_items) if len(train_items) else None,
        **options,
    )
