"""The transition model: counted from data to a finished run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hellm.artifact.run_directory import environment, peak_memory_bytes
from hellm.config import TransitionsConfig
from hellm.data import Dataset
from hellm.evaluate import RankingResult, evaluate_histories
from hellm.models import ItemContent
from hellm.models.sequence import ItemPairs, TransitionModel
from hellm.training.stage import OpenedRun, open_run, resolve_common, tested, write_tables

__all__ = ["content_pairs", "fit_transitions", "resolve_transitions_config"]


def fit_transitions(
    config: TransitionsConfig,
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Count transitions, choose settings by validation, score the test split once, and leave a run directory.

    Args:
        config: Settings; see `hellm.config`.
        data: A data set, or a path for `hellm.data.load_dataset`.
        out: Run directory.
        resume: A finished run in `out` is returned as it is; an unfinished one is made again.
        overwrite: Replace a run in `out`.
    Returns: What result.json holds: "chosen" are the settings that validation took, "tried" each of them with its value
        of the monitored metric.
    Raises: FileExistsError, FolderInUseError, ValueError: as `open_run` and `resolve_transitions_config`.
    """
    with open_run(config, data, out, resolve_transitions_config, resume=resume, overwrite=overwrite) as opened:
        return _fit(opened) if opened.finished is None else opened.finished


def resolve_transitions_config(config: TransitionsConfig, dataset: Dataset) -> tuple[TransitionsConfig, list[str]]:
    """Settings as they will run on this data, with a note for each that had to give way.

    Raises: ValueError, a modality that the data have not, and as `resolve_common`.
    """
    config, notes = resolve_common(config, dataset)
    there = tuple(sorted(dataset.item_features))
    for modality in config.content or ():
        if modality not in there:
            known = ", ".join(there) or "none"
            raise ValueError(
                f"content must be among the features of data set {dataset.name!r} ({known}), got {modality!r}"
            )
    config = replace(config, content=there if config.content is None else config.content)
    if not config.content and any(config.content_weight):
        notes.append("no content: items are alike in nothing, and content_weight is 0")
        config = replace(config, content_weight=(0.0,))
    if not (dataset.split == 1).any() and len(config.decay) + len(config.content_weight) > 2:
        notes.append("no validation events: the first of decay and content_weight are taken")
        config = replace(config, decay=config.decay[:1], content_weight=config.content_weight[:1])
    return config, notes


def content_pairs(content: ItemContent) -> ItemPairs:
    """Each item with those that are nearest by content, itself left out.

    The weights of an item sum to 1: over the modalities that it has evenly, and within one in proportion to the cosine.
    """
    parts = []
    for modality, rows in content.neighbours.items():
        item = torch.arange(len(rows)).unsqueeze(1).expand_as(rows)
        near = (rows >= 0) & (rows != item)
        source, target = item[near], rows[near]
        x = content.features[modality].float()
        parts.append(_shares(source, target, (x[source] * x[target]).sum(1).clamp(min=0), len(rows)))
    source, target, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    return _shares(source, target, weight, content.num_items)


def _shares(source: Tensor, target: Tensor, weight: Tensor, num_items: int) -> ItemPairs:
    total = torch.zeros(num_items).index_add_(0, source, weight)[source]
    kept = weight > 0
    return ItemPairs(source[kept], target[kept], (weight / total)[kept])


def _fit(opened: OpenedRun) -> dict[str, Any]:
    config, dataset, run = opened.config, opened.dataset, opened.run
    started = time.perf_counter()
    pairs = None
    if config.content:
        features = {name: dataset.item_features[name] for name in config.content}
        pairs = content_pairs(ItemContent.of(features, config.content_neighbours, config.device))
    model, chosen, tried, valid = _chosen(config, dataset, pairs)
    seconds = time.perf_counter() - started
    test = _evaluate(model, dataset, config, "test")
    model.save(run.path)
    write_tables(run, dataset, modalities=config.content or None, k=config.content_neighbours, device=config.device)
    result = {
        "stage": "transitions",
        "test": tested(run, test, dataset),
        "valid": {"metrics": {} if valid is None else valid.metrics},
        "chosen": chosen,
        "tried": tried,
        "num_transitions": len(model.transitions.weight),
        "seconds": seconds,
        "notes": opened.notes,
        "dataset": dataset.summary(),
        "peak_memory_bytes": peak_memory_bytes(config.device),
        "environment": environment(config.device),
    }
    run.write_result(result)
    return result


def _chosen(
    config: TransitionsConfig, dataset: Dataset, pairs: ItemPairs | None
) -> tuple[TransitionModel, dict[str, float], list[dict[str, float]], RankingResult | None]:
    """The model that validation prefers: one setting after the other, the first values where it has no say."""
    settings = {"decay": config.decay[0], "content_weight": config.content_weight[0]}
    model, tried = _counted(config, dataset, pairs, settings), []
    valid = _evaluate(model, dataset, config, "valid")
    if valid is None:
        return model, settings, tried, None
    monitor = config.monitor[0]
    tried.append({**settings, monitor: valid.metrics[monitor]})
    for name in ("decay", "content_weight"):
        for value in getattr(config, name)[1:]:
            other = settings | {name: value}
            candidate = _counted(config, dataset, pairs, other)
            found = _evaluate(candidate, dataset, config, "valid")
            assert found is not None  # of the same events
            tried.append({**other, monitor: found.metrics[monitor]})
            if found.metrics[monitor] > valid.metrics[monitor]:
                model, valid, settings = candidate, found, other
    return model, settings, tried, valid


def _counted(
    config: TransitionsConfig, dataset: Dataset, pairs: ItemPairs | None, settings: Mapping[str, float]
) -> TransitionModel:
    return TransitionModel.fit(
        dataset.histories("train"),
        dataset.num_items,
        max_lag=config.max_lag,
        exponent=config.exponent,
        similar=pairs,
        **settings,
    )


def _evaluate(model: TransitionModel, dataset: Dataset, config: TransitionsConfig, split: str) -> RankingResult | None:
    if not len(dataset.pairs(split)[0]):
        return None
    options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
    return evaluate_histories(model, dataset, split=split, by_target=split == "test", **options)
