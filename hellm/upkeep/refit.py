"""A run trained on with newer data, and taken over unless it is shown to be worse than the one that serves.

B = users, I = items.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hellm._files import atomic_path, read_json
from hellm._folders import hold
from hellm.artifact.files import CONFIG, REFIT, RESULT
from hellm.config import RunConfig, load_saved_config
from hellm.data import DataError, Dataset, Histories, load_dataset
from hellm.evaluate import HistoryScorer, evaluate_dataset, paired_bootstrap
from hellm.evaluate.datasets import KNOWN_SPLITS
from hellm.pipeline import Pipeline, Step
from hellm.recommend import Recommender
from hellm.training.trainers import STAGES
from hellm.training.warm_start import check_continues, same_columns
from hellm.upkeep.append import data_of

__all__ = ["EarlierScorer", "compare_with_served", "refit"]

PathLike_ = str | Path

# Below all scores that a model gives: items that it does not know.
_UNKNOWN_ITEM = -1e30


def refit(
    run: PathLike_,
    data: PathLike_,
    out: PathLike_,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cache: PathLike_ | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> dict[str, Any]:
    """Train the models of a run on newer data, from its weights, and compare them with it on validation events.

    Stage 1 and SASRec begin with the best weights of the run; transitions are counted anew, and the language model of a
    run of all stages is fine-tuned anew. The settings are those of the run.

    Args:
        run: Run of all stages (`hellm run`), or of stage 1, SASRec or transitions, which serves.
        data: Data that continue those of the run, see `hellm.upkeep.append`.
        out: Folder of the new run.
        resume: Go on with what is there.
        overwrite: Replace what is there.
        cache: Folder of encoded texts and pictures; None is the user's cache.
        on_step: Called before each step of a run of all stages.
    Returns: What refit.json in `out` holds: "served" and "candidate" (folders that recommend), "metric", "served_value"
        and "candidate_value", "difference", "low" and "high" (paired, 95%), "num_users", "left_out_events" (of
        validation, as the served run was trained on them), "taken_over" (not shown to be worse) and "notes".
    Raises: ValueError, a run of another stage, data that do not continue those of the run or have no validation events;
        what training raises.
    """
    run, out, dataset = Path(run), Path(out), load_dataset(data_of(data))
    if not (dataset.split == 1).any():
        raise ValueError(f"data set {dataset.name!r} must have validation events to compare on, got none")
    if data_of(run) != run:
        served, candidate, metric = _refit_pipeline(run, dataset, out, resume, overwrite, cache, on_step)
    else:
        served, candidate, metric = _refit_stage(run, dataset, out, resume, overwrite)
    report = {"served": str(served), "candidate": str(candidate)}
    report |= compare_with_served(Recommender.load(served), Recommender.load(candidate), dataset, *metric)
    with atomic_path(out / REFIT) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def _refit_pipeline(run: Path, dataset: Dataset, out: Path, resume, overwrite, cache, on_step):
    config = load_saved_config(RunConfig, run / CONFIG)
    served = next((run / name for name in ("fused", "llm", "sasrec") if (run / name / RESULT).is_file()), None)
    if served is None:
        raise ValueError(f"{run} holds no finished model that recommends; finish it with hellm run --resume")
    check_continues(served, dataset)
    with hold(out):
        pipeline = Pipeline(out, config, resume=resume, overwrite=overwrite, cache=cache, start=run)
        for step in _steps(pipeline, dataset):
            if on_step is not None:
                on_step(step)
            step.run()
    return served, pipeline.path(pipeline.final), (config.fuse.monitor[0], config.protocol)


def _steps(pipeline: Pipeline, dataset: Dataset):
    yield pipeline.data(lambda: dataset)
    yield from pipeline.training()


def _refit_stage(run: Path, dataset: Dataset, out: Path, resume, overwrite):
    if not (run / RESULT).is_file():
        raise FileNotFoundError(f"{run} holds no {RESULT}: it is no run directory, or the run is not finished")
    name = read_json(run / RESULT).get("stage")
    stage = STAGES.get(name) if isinstance(name, str) else None
    if stage is None or stage.inputs:
        raise ValueError(
            f"{run} must be a run of all stages, stage 1, SASRec or transitions, got stage {name!r}, which builds on "
            "other runs; refit those and repeat its command, or refit the run of all stages"
        )
    check_continues(run, dataset)
    config = load_saved_config(stage.config, run / CONFIG)
    # One that is not warm is fitted anew, as transitions are in seconds.
    start = {"start": run} if stage.warm else {}
    stage.train(config, dataset, out, resume=resume, overwrite=overwrite, **start)
    return run, out, (config.monitor[0], config.protocol)


def compare_with_served(
    served: Recommender, candidate: Recommender, dataset: Dataset, metric: str, protocol: str
) -> dict[str, Any]:
    """Both on the same validation events, in the part of the report that `refit` describes.

    The served run knows newer events of users as histories, and takes newer items by their content, as it does when it
    serves. Items that it cannot place are in none of its lists.

    Args:
        served: Of earlier data that `dataset` continues.
        candidate: Of `dataset`.
        dataset: Its validation events decide.
        metric: Name and list length, e.g. "ndcg@10".
        protocol: Of evaluation.
    """
    notes = _take_new_items(served, dataset)
    judged, left_out = _without_trained(served, dataset)
    if not (judged.split == 1).any():
        raise ValueError("the served run was trained on all validation events, so nothing is left to compare on")
    options = {"split": "valid", "protocol": protocol, "ks": (int(metric.partition("@")[2]),)}
    scorers = (EarlierScorer(served, judged, "valid"), candidate.scorer("valid"))
    old, new = (evaluate_dataset(scorer, judged, **options) for scorer in scorers)
    pair = paired_bootstrap(new, old, metric)
    notes.append("the candidate chose its epoch on these events, which favours it a little")
    return {
        "metric": metric,
        "served_value": old.metrics[metric],
        "candidate_value": new.metrics[metric],
        "difference": pair.difference,
        "low": pair.low,
        "high": pair.high,
        "num_users": new.num_users,
        "left_out_events": left_out,
        "taken_over": bool(pair.high >= 0),
        "notes": notes,
    }


class EarlierScorer:
    """Scores [B, I] of a run of earlier data for users and items of data that continue them.

    Users whom a run of stage 1 was trained on are known by their trained embeddings, all others by their events.

    Args:
        recommender: The run.
        dataset: The data that continue its own.
        split: "valid" or "test": which events are known.
    """

    def __init__(self, recommender: Recommender, dataset: Dataset, split: str) -> None:
        self.recommender, self.num_items = recommender, dataset.num_items
        columns = dataset.item_ids.indices(recommender.item_ids.ids)
        rows = np.full(dataset.num_items, -1)
        rows[columns] = np.arange(len(columns))
        known = dataset.histories(*KNOWN_SPLITS[split])
        items = rows[known.items]
        histories = Histories.of_events(known.owners[items >= 0], items[items >= 0], dataset.num_users)
        self._columns = torch.from_numpy(columns)
        self._by_history = HistoryScorer(recommender.model, *map(torch.from_numpy, histories))
        self._trained = np.zeros(dataset.num_users, bool)
        if recommender.model.user is not None:
            self._trained[: recommender.num_users] = recommender.is_trained

    def scores(self, users: Tensor) -> Tensor:
        scores = self._by_history.scores(users)
        trained, table = torch.from_numpy(self._trained[users.numpy()]), self.recommender.model.user
        if table is not None:
            scores[trained] = table[users[trained]] @ self.recommender.item.T
        wide = scores.new_full((len(users), self.num_items), _UNKNOWN_ITEM)
        wide[:, self._columns] = scores
        return wide


def _take_new_items(served: Recommender, dataset: Dataset) -> list[str]:
    """Add the items that are new since, as far as their content places them. Returns: what had to be left out."""
    new = [item for item in dataset.item_ids.ids[served.num_items :] if item not in served.item_ids]
    if not new:
        return []
    content = served.content
    if content is None:
        return [f"{len(new)} newer items are in no list of the served run, which has no content of items"]
    rows = dataset.item_ids.indices(new)
    same = same_columns(content, dataset)
    kinds = {name: one for name, one in dataset.item_features.items() if name in same}
    notes = [
        f"the served run does not know newer items by {name}, which is by another encoder than its own"
        for name in dataset.item_features
        if name in content.features and name not in same
    ]
    values = {name: dataset.item_attributes[name] for name in content.attributes if name in dataset.item_attributes}
    placed = np.zeros(len(new), bool)
    for one in kinds.values():
        placed |= one.mask[rows]
    for name, lists in values.items():
        known = set(content.attributes[name])
        placed |= [not known.isdisjoint(lists[row]) for row in rows]
    rows = rows[placed]
    try:
        served.add_items(
            {name: np.where(one.mask[rows, None], one.values[rows], np.float32(0)) for name, one in kinds.items()},
            [dataset.item_ids.ids[row] for row in rows],
            attributes={name: [lists[row] for row in rows] for name, lists in values.items()},
        )
    except (DataError, ValueError) as error:
        return [*notes, f"{len(new)} newer items are in no list of the served run: {error}"]
    lost = len(new) - len(rows)
    return notes + ([f"{lost} newer items without features are in no list of the served run"] if lost else [])


def _without_trained(served: Recommender, dataset: Dataset) -> tuple[Dataset, int]:
    """The data without validation events that the served run was trained on, and how many those are."""
    trained = served.events.filter(served.events["split"] == 0)
    # Rows are the same in both, as the data continue those of the run.
    pairs = trained["user"].to_numpy().astype(np.int64) * dataset.num_items + trained["item"].to_numpy()
    seen = (dataset.split == 1) & np.isin(dataset.users * dataset.num_items + dataset.items, pairs)
    return dataset.of_events(~seen), int(seen.sum())
