"""Several finished runs as one recommender: chosen and weighted on validation, tested once."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm._files import atomic_path
from hellm.artifact.files import METRICS, TOWERS
from hellm.artifact.run_directory import environment
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
from hellm.recommend.compare import check_run_of
from hellm.recommend.recommender import Recommender
from hellm.recommend.served import Placing, ServedFused, ServedModel
from hellm.training.fusion import Selection, TowerScores, select_towers
from hellm.training.stage import OpenedRun, open_run, resolve_common, tested, write_tables

__all__ = ["fuse", "named_towers", "plan_fusion"]

# Names of towers are names of folders.
_NAME = re.compile(r"[\w][\w.-]*")

# Users that a tower is timed on before it scores all.
_TIMED_USERS = 64
# Bytes of queries that are kept for other sums of the same towers.
_REMEMBERED = 2**30

PathLike_ = str | os.PathLike[str]


def fuse(
    towers: Mapping[str, PathLike_],
    data: PathLike_ | Dataset,
    out: PathLike_,
    config: FuseConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Mapping[str, Any]], None] | None = None,
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
        on_plan: Called with `plan_fusion(...)` before anything is scored.

    Returns: What result.json holds: "towers" (name -> run, weight, kept, valid and test metrics, seconds per 1,000
        users), "gains" (what was kept, in order, and what each of the others would have brought,
        with intervals), "valid", "test" of the sum, and "leave_one_out"
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

    def prepare(config: FuseConfig, dataset: Dataset) -> _Towers:
        found = _Towers({}, {})
        for name, run in towers.items():
            recommender = Recommender.load(run, device=config.device)
            check_run_of(recommender, run, dataset)
            found.models[name] = recommender.model
            if recommender.content is not None:
                found.placing[name] = Placing.of(recommender.content)
        return found

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
        return _fuse(opened, towers, on_plan) if opened.finished is None else opened.finished


class _Towers(NamedTuple):
    """What a sum is made of, by name.

    Attributes:
        models: All that were given.
        placing: What they place new items by, where they know any content.
    """

    models: dict[str, ServedModel]
    placing: dict[str, Placing]


def _resolve(config: FuseConfig, dataset: Dataset) -> tuple[FuseConfig, list[str]]:
    if not (dataset.split == 1).any():
        raise ValueError(f"data set {dataset.name!r} must have validation events to choose and weigh by, got none")
    return resolve_common(config, dataset)


def _fingerprint(towers: _Towers) -> str:
    digest = hashlib.sha256()
    for name, model in towers.models.items():
        keys = model.item_keys()
        digest.update(f"{name} {list(keys.shape)} ".encode() + keys.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def plan_fusion(models: Mapping[str, ServedModel], dataset: Dataset, config: FuseConfig) -> dict[str, Any]:
    """What scoring comes to at most, from some users that every tower is timed on.

    Returns: "num_users" (of both splits), "seconds_per_1000_users" (tower -> seconds) and "expected_seconds".
    """
    users = {split: np.unique(dataset.pairs(split)[0]) for split in ("valid", "test")}
    sample = torch.from_numpy(users["valid"][: min(config.eval_batch_size, _TIMED_USERS)])
    speeds = {}
    for name, model in models.items():
        scorer = HistoryScorer.of(model, dataset, "valid")
        # The first of the two touches fresh memory.
        for _ in range(2):
            started = time.perf_counter()
            scorer.scores(sample)
            speeds[name] = 1000 * (time.perf_counter() - started) / len(sample)
    # Validation: for the weights and, if batches differ, for the metrics. What sums need of the towers is there then.
    passes = 2 * len(users["valid"]) + len(users["test"])
    return {
        "num_users": {split: len(one) for split, one in users.items()},
        "seconds_per_1000_users": speeds,
        "expected_seconds": sum(speeds.values()) * passes / 1000,
    }


def _fuse(
    opened: OpenedRun, towers: Mapping[str, PathLike_], on_plan: Callable[[Mapping[str, Any]], None] | None
) -> dict[str, Any]:
    config, dataset, (models, placing), run = opened.config, opened.dataset, opened.inputs, opened.run
    if on_plan is not None:
        on_plan(plan_fusion(models, dataset, config))
    started = time.perf_counter()
    room = _Room()
    remembered: dict[str, Any] = {name: _Remembered(model, room) for name, model in models.items()}
    scores = _tower_scores(remembered, dataset, config)
    new = [name for name, model in models.items() if model.reads_content]
    selection = select_towers(scores, *config.monitor, level=config.level, seed=config.seed, rank_new_items=new)
    placing = {name: one for name, one in placing.items() if name in selection.weights}
    fused = ServedFused({name: models[name] for name in selection.weights}, selection.weights, placing)
    result, test = _result(remembered, selection, towers, dataset, config)
    seconds = time.perf_counter() - started
    result |= {"test": tested(run, test, dataset), "notes": opened.notes, "seconds": seconds}
    result |= {"environment": environment(config.device)}
    if test is not None:
        used = {"protocols": [config.protocol], "metrics": list(test.metrics), "fingerprint": dataset.fingerprint}
        for tower in towers.values():
            log_test_evaluation(tower, by="hellm.fuse", **used)
    fused.save(run.path)
    for name in fused.towers:
        if (course := Path(towers[name]) / METRICS).is_file():
            with atomic_path(run.path / TOWERS / name / METRICS) as temporary:
                temporary.write_bytes(course.read_bytes())
    # As many neighbours as any tower needs to place an item as it would alone.
    k = max((one.k for one in placing.values()), default=1)
    write_tables(run, dataset, k=k, device=config.device)
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
    known = dataset.histories("train").lengths > 0
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
    known = dataset.histories(*splits).take(users)
    return torch.from_numpy(known.owners), torch.from_numpy(known.items)


def _result(
    models: Mapping[str, ServedModel],
    selection: Selection,
    towers: Mapping[str, PathLike_],
    dataset: Dataset,
    config: FuseConfig,
) -> tuple[dict[str, Any], RankingResult | None]:
    """What result.json holds but for the test of the sum and the time, and that test."""
    parts: dict[str, tuple[RankingResult, RankingResult | None, float | None]] = {}

    def sum_of(weights: Mapping[str, float]) -> ServedFused:
        return ServedFused({name: models[name] for name in weights}, weights)

    for name, model in models.items():
        valid, _ = _evaluate(model, dataset, config, "valid")
        test, seconds = _evaluate(model, dataset, config, "test")
        assert valid is not None  # the weights come of it
        parts[name] = (valid, test, seconds)
    fused = sum_of(selection.weights)
    valid, _ = _evaluate(fused, dataset, config, "valid")
    assert valid is not None
    test, _ = _evaluate(fused, dataset, config, "test")
    without = {}
    if test is not None and len(fused.weights) > 1:
        for name in fused.weights:
            rest = {other: weight for other, weight in fused.weights.items() if other != name}
            other, _ = _evaluate(sum_of(rest), dataset, config, "test")
            assert other is not None  # of the events of `test`
            without[name] = _differences(test, other)
    result = {
        "stage": "fuse",
        "valid": {"metrics": valid.metrics},
        "cross_fitted": {config.monitor[0]: selection.fused},
        "weights": selection.weights,
        "seconds_per_1000_users": None if test is None else sum(parts[name][2] or 0.0 for name in fused.weights),
        "towers": {
            name: {
                "run": str(towers[name]),
                "weight": selection.weights.get(name, 0.0),
                "kept": name in selection.weights,
                "valid": one_valid.metrics,
                "test": None if one_test is None else one_test.metrics,
                "seconds_per_1000_users": one_seconds,
                "difference_to_fused": None if test is None or one_test is None else _differences(one_test, test),
            }
            for name, (one_valid, one_test, one_seconds) in parts.items()
        },
        "gains": [asdict(gain) for gain in selection.gains],
        "leave_one_out": without,
        "dataset": dataset.summary(),
    }
    return result, test


class _Room:
    """Bytes that queries may still take.

    Attributes:
        left: Counted down by who keeps some.
    """

    def __init__(self) -> None:
        self.left = _REMEMBERED


class _Remembered:
    """A model that makes the queries of a batch of histories once, as long as there is room for them.

    Evaluations ask for the same batches again and again: of a tower, of the sum, and of the sum without another tower.
    Those of a language model take minutes.
    """

    def __init__(self, model: ServedModel, room: _Room) -> None:
        self._model, self._room = model, room
        self._known: dict[bytes, Tensor] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        digest = hashlib.blake2b(digest_size=16)
        for part in (indptr, items):
            digest.update(part.cpu().numpy().tobytes())
        key = digest.digest()
        queries = self._known.get(key)
        if queries is None:
            queries = self._model.embed(indptr, items)
            size = queries.numel() * queries.element_size()
            if size <= self._room.left:
                self._room.left -= size
                self._known[key] = queries
        return queries


def _evaluate(
    model: ServedModel, dataset: Dataset, config: FuseConfig, split: str
) -> tuple[RankingResult | None, float | None]:
    """Metrics, and seconds per 1,000 users; None where the split is empty."""
    if not len(dataset.pairs(split)[0]):
        return None, None
    scorer = HistoryScorer.of(model, dataset, split)
    started = time.perf_counter()
    options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
    result = evaluate_dataset(scorer, dataset, split=split, by_target=split == "test", **options)
    return result, 1000 * (time.perf_counter() - started) / result.num_users


def _differences(a: RankingResult, b: RankingResult) -> dict[str, dict[str, float]]:
    found = {}
    for metric in a.per_user:
        if metric.startswith(("recall", "ndcg")):
            pair = paired_bootstrap(a, b, metric)
            found[metric] = {"difference": pair.difference, "low": pair.low, "high": pair.high}
    return found
