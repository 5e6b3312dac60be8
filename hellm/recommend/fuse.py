"""Several finished runs as one recommender: chosen and weighted on validation, tested once."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hellm.config import FuseConfig
from hellm.data import Dataset
from hellm.evaluate import (
    HistoryScorer,
    RankingResult,
    evaluate_dataset,
    get_protocol,
    log_test_evaluation,
    paired_bootstrap,
)
from hellm.evaluate.evaluation_log import TRAINING
from hellm.recommend.compare import check_run_of
from hellm.recommend.recommender import Recommender
from hellm.recommend.served import ServedFused, ServedModel
from hellm.training.fusion import Selection, TowerScores, select_towers
from hellm.training.run_directory import environment
from hellm.training.stage import OpenedRun, open_run, resolve_common

__all__ = ["fuse", "named_towers"]

# Names of towers are names of folders.
_NAME = re.compile(r"[\w][\w.-]*")

PathLike_ = str | os.PathLike[str]


def fuse(
    towers: Mapping[str, PathLike_],
    data: PathLike_ | Dataset,
    out: PathLike_,
    config: FuseConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Add up the scores of finished runs, with what validation says of each, and leave a run directory.

    Every tower reads the history of a user (stage 1 folds it in). Which towers are kept, and their weights, is settled
    by validation (`hellm.training.fusion.select_towers`), so the fused model is not worse than its best tower there.
    The test split is scored once: the fused model, every tower alone, and the sum without each.

    Args:
        towers: Name -> run directory of any stage, of the same data.
        data: The data set that the runs were trained on, or its path.
        out: Run directory to make; it holds all that serving needs, the towers included.
        config: Settings; None is `FuseConfig()`.
        resume: Return a finished run in `out` as it is, if it is of the same towers, data and settings.
        overwrite: Replace a run in `out`.

    Returns: What result.json holds: "towers" (name -> run, weight, kept, valid and test metrics, seconds per 1,000
        users), "gains" (what was tried, in order, with intervals), "valid", "test" of the sum, and "leave_one_out"
        (name -> metric -> what the tower adds, with its interval).

    Raises:
        ValueError: No tower, a name that is no name of a folder, runs of other data or of another split, or data
            without validation events.
        FileExistsError, FolderInUseError: As `open_run`.
    """
    if not towers:
        raise ValueError("towers must be at least one run directory, got none")
    for name in towers:
        if not _NAME.fullmatch(name):
            raise ValueError(f"names of towers must be letters, digits, '_', '-' and '.', got {name!r}")

    def prepare(config: FuseConfig, dataset: Dataset) -> dict[str, ServedModel]:
        models = {}
        for name, run in towers.items():
            recommender = Recommender.load(run, device=config.device)
            check_run_of(recommender, run, dataset)
            models[name] = recommender.model
        return models

    with open_run(
        config or FuseConfig(),
        data,
        out,
        _resolve,
        prepare=prepare,
        fingerprint=_fingerprint,
        resume=resume,
        overwrite=overwrite,
        read=list(towers.values()),
    ) as opened:
        return _fuse(opened, towers) if opened.finished is None else opened.finished


def _resolve(config: FuseConfig, dataset: Dataset) -> tuple[FuseConfig, list[str]]:
    if not (dataset.split == 1).any():
        raise ValueError(f"data set {dataset.name!r} must have validation events to choose and weigh by, got none")
    return resolve_common(config, dataset)


def _fingerprint(models: Mapping[str, ServedModel]) -> str:
    digest = hashlib.sha256()
    for name, model in models.items():
        keys = model.item_keys()
        digest.update(f"{name} {list(keys.shape)} ".encode() + keys.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _fuse(opened: OpenedRun, towers: Mapping[str, PathLike_]) -> dict[str, Any]:
    config, dataset, models, run = opened.config, opened.dataset, opened.inputs, opened.run
    started = time.perf_counter()
    scores = _tower_scores(models, dataset, config)
    selection = select_towers(scores, *config.monitor, level=config.level, seed=config.seed)
    fused = ServedFused({name: models[name] for name in selection.weights}, selection.weights)
    result = _result(models, fused, selection, towers, dataset, config)
    seconds, where = time.perf_counter() - started, environment(config.device)
    result |= {"notes": opened.notes, "seconds": seconds, "environment": where}
    if result["test"] is not None:
        for one, by in ((run.path, TRAINING), *((tower, "hellm.fuse") for tower in towers.values())):
            log_test_evaluation(
                one,
                by=by,
                protocols=[config.protocol],
                metrics=list(result["test"]["metrics"]),
                fingerprint=dataset.fingerprint,
            )
    fused.save(run.path)
    run.write_ids(dataset)
    run.write_histories(dataset)
    run.write_content(dataset, device=config.device)
    run.write_result(result)
    return result


def named_towers(runs: Sequence[PathLike_]) -> dict[str, str]:
    """Name -> run directory, of runs given as RUN or NAME=RUN.

    Raises: ValueError, one name for two.
    """
    towers: dict[str, str] = {}
    for given in map(str, runs):
        name, sign, run = given.partition("=")
        if not sign or Path(given).is_dir():
            name, run = Path(given).resolve().name, given
        if towers.setdefault(name, run) != run:
            raise ValueError(
                f"RUN must have a name of its own, got {name!r} for {towers[name]} and {run}; give NAME=RUN"
            )
    return towers


def _tower_scores(models: Mapping[str, ServedModel], dataset: Dataset, config: FuseConfig) -> TowerScores:
    """Scores of validation events by what was known before them; those of users without a history are left out."""
    users, items = dataset.pairs("valid")
    known = np.diff(dataset.histories("train")[0]) > 0
    users, items = users[known[users]], items[known[users]]
    most = max(1, config.max_scores // (dataset.num_items * len(models)))
    if len(users) > most:
        kept = np.sort(np.random.default_rng(config.seed).choice(len(users), most, replace=False))
        users, items = users[kept], items[kept]
    mask = _masked_pairs(dataset, users, get_protocol(config.protocol).mask["valid"])
    scores = {}
    for name, model in models.items():
        scorer = HistoryScorer.of(model, dataset, "valid")
        parts = [scorer.scores(part).cpu() for part in torch.from_numpy(users).split(config.eval_batch_size)]
        scores[name] = torch.cat(parts).float()
        if mask is not None:
            scores[name][mask] = -torch.inf
    return TowerScores(scores, torch.from_numpy(items), users)


def _masked_pairs(dataset: Dataset, users: np.ndarray, splits: tuple[str, ...]) -> tuple[Tensor, Tensor] | None:
    if not splits:
        return None
    indptr, items = dataset.histories(*splits)
    length = np.diff(indptr)[users]
    rows = np.repeat(np.arange(len(users)), length)
    place = np.arange(len(rows)) - np.repeat(length.cumsum() - length, length) + np.repeat(indptr[users], length)
    return torch.from_numpy(rows), torch.from_numpy(items[place])


def _result(
    models: Mapping[str, ServedModel],
    fused: ServedFused,
    selection: Selection,
    towers: Mapping[str, PathLike_],
    dataset: Dataset,
    config: FuseConfig,
) -> dict[str, Any]:
    parts = {}
    for name, model in models.items():
        valid, _ = _evaluate(model, dataset, config, "valid")
        test, seconds = _evaluate(model, dataset, config, "test")
        parts[name] = (valid, test, seconds)
    valid, _ = _evaluate(fused, dataset, config, "valid")
    test, seconds = _evaluate(fused, dataset, config, "test")
    without = {}
    if test is not None and len(fused.weights) > 1:
        for name in fused.weights:
            rest = {other: weight for other, weight in fused.weights.items() if other != name}
            other, _ = _evaluate(ServedFused({one: models[one] for one in rest}, rest), dataset, config, "test")
            without[name] = _differences(test, other)
    return {
        "stage": "fuse",
        "test": None if test is None else {**test.metrics, **test.to_dict(level=0.95)},
        "valid": {"metrics": valid.metrics},
        "cross_fitted": {config.monitor[0]: selection.fused},
        "weights": selection.weights,
        "seconds_per_1000_users": seconds,
        "towers": {
            name: {
                "run": str(towers[name]),
                "weight": selection.weights.get(name, 0.0),
                "kept": name in selection.weights,
                "valid": one_valid.metrics,
                "test": None if one_test is None else one_test.metrics,
                "seconds_per_1000_users": one_seconds,
                "difference_to_fused": None if test is None else _differences(one_test, test),
            }
            for name, (one_valid, one_test, one_seconds) in parts.items()
        },
        "gains": [asdict(gain) for gain in selection.gains],
        "leave_one_out": without,
        "dataset": {"name": dataset.name, "split": dataset.split_name, "fingerprint": dataset.fingerprint},
    }


def _evaluate(
    model: ServedModel, dataset: Dataset, config: FuseConfig, split: str
) -> tuple[RankingResult | None, float | None]:
    """Metrics, and seconds per 1,000 users; None where the split is empty."""
    if not len(dataset.pairs(split)[0]):
        return None, None
    scorer = HistoryScorer.of(model, dataset, split)
    started = time.perf_counter()
    result = evaluate_dataset(
        scorer, dataset, split=split, protocol=config.protocol, ks=config.ks, batch_size=config.eval_batch_size
    )
    return result, 1000 * (time.perf_counter() - started) / result.num_users


def _differences(a: RankingResult, b: RankingResult) -> dict[str, dict[str, float]]:
    found = {}
    for metric in a.per_user:
        if metric.startswith(("recall", "ndcg")):
            pair = paired_bootstrap(a, b, metric)
            found[metric] = {"difference": pair.difference, "low": pair.low, "high": pair.high}
    return found
