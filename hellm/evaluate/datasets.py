"""Targets, masks and item content of a dataset, as a protocol asks for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from .protocols import Protocol, get_protocol
from .ranking import Scorer, rank_by_protocols
from .result import RankingResult
from .slices import popularity_groups

if TYPE_CHECKING:
    from hellm.data import Dataset

# What is known of a user when an event of that split is to be found.
KNOWN_SPLITS = {"valid": ("train",), "test": ("train", "valid")}


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
        **options: As `evaluate_protocols`.

    Raises:
        ValueError: As `ranking_metrics`; or an empty split.
    """
    (result,) = evaluate_protocols(scorer, dataset, split, [protocol], ks, **options)
    return result


def evaluate_protocols(
    scorer: Scorer | Callable[[torch.Tensor], torch.Tensor],
    dataset: Dataset,
    split: str = "test",
    protocols: Sequence[str | Protocol] = ("standard",),
    ks: Sequence[int] = (10, 20),
    *,
    by_target: bool = False,
    diversity: bool = False,
    **options,
) -> list[RankingResult]:
    """`evaluate_dataset` by several protocols at once: every user is scored once.

    Args:
        scorer, dataset, split, ks: As `evaluate_dataset`.
        protocols: Preset names or `Protocol`s.
        by_target: Whether each result has its accuracy by popularity of the targets (`popularity_groups`).
        diversity: Whether to measure it, by the item features of the data set; see `content_vectors`.
        **options: Passed on: `users`, `mask_seen`, `batch_size`, `max_memory`.
    Returns: One result for each of `protocols`.
    Raises: ValueError, as `evaluate_dataset`; or diversity of a data set without item features.
    """
    protocols = [get_protocol(one) for one in protocols]
    if split not in KNOWN_SPLITS:
        raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
    targets = dataset.histories(split)
    if not len(targets[1]):
        raise ValueError(f"split {split!r} of data set {dataset.name!r} must have events, got none")
    masks = {one.mask[split] for one in protocols}
    seen = {splits: dataset.histories(*splits) if splits else None for splits in masks}
    counts = item_counts(dataset)
    return rank_by_protocols(
        scorer,
        targets,
        [(one, seen[one.mask[split]]) for one in protocols],
        ks=ks,
        split=split,
        item_counts=counts if counts.any() else None,
        item_vectors=content_vectors(dataset) if diversity else None,
        item_groups=popularity_groups(counts) if by_target else None,
        **options,
    )


def item_counts(dataset: Dataset) -> np.ndarray:
    """[num_items] train events of each item."""
    return np.bincount(dataset.pairs("train")[1], minlength=dataset.num_items)


def history_lengths(dataset: Dataset, split: str) -> np.ndarray:
    """[num_users] events that a user is known by when an event of `split` is to be found."""
    return np.diff(dataset.histories(*KNOWN_SPLITS[split])[0])


def content_vectors(dataset: Dataset) -> np.ndarray:
    """[num_items, D] float32 item features of all modalities side by side, each of length 1 where an item has it.

    The cosine of two items that have all modalities is so the mean of their cosines by modality.

    Raises: ValueError, a data set without item features.
    """
    if not dataset.item_features:
        raise ValueError(f"diversity needs item features, and data set {dataset.name!r} has none")
    parts = []
    for features in dataset.item_features.values():
        length = np.linalg.norm(features.values, axis=1, keepdims=True)
        parts.append(features.values / np.where(length > 0, length, 1))
    return np.concatenate(parts, axis=1, dtype=np.float32)
