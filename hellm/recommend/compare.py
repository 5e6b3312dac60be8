"""Run directories and baselines side by side: what `hellm.evaluate.compare` takes, from their names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hellm._files import read_json
from hellm.artifact.files import LANGUAGE_MODEL, RESULT
from hellm.baselines import BASELINES, ItemKNN, fit_baseline
from hellm.evaluate import Protocol, Row, log_test_evaluation, read_test_evaluations
from hellm.evaluate import compare as compare_rows
from hellm.evaluate.datasets import KNOWN_SPLITS
from hellm.recommend.recommender import Recommender

if TYPE_CHECKING:
    from hellm.data import Dataset

__all__ = ["check_run_of", "compare", "named_rows", "split_of_runs"]

# They have no way to score a user whom they were not fitted on.
_NEED_TRAINED_USERS = ("bpr", "als")

PathLike_ = str | PathLike[str]


def compare(
    models: Sequence[PathLike_] | Mapping[str, PathLike_ | Sequence[PathLike_]],
    data: PathLike_ | Dataset,
    *,
    split: str = "test",
    protocol: str | Protocol | Sequence[str | Protocol] = "standard",
    ks: Sequence[int] = (10, 20),
    metrics: Sequence[str] = ("recall", "ndcg"),
    slices: bool = False,
    seed: int = 0,
    device: str = "auto",
    by: str = "hellm.compare",
) -> dict[str, Any]:
    """Evaluate run directories and named baselines alike.

    On the test split, every run notes the evaluation in its test_evaluations.jsonl (`hellm.artifact.evaluation_log`).

    Args:
        models: Run directories and baselines (`hellm.baselines.BASELINES`). A mapping gives rows their names, and to
            each one run or several, whose mean it shows.
        data: The data set that the runs were trained on, or its path; read from a path, it is split as theirs.
        split, protocol, ks, metrics, slices: See `hellm.evaluate.compare`.
        seed: Of the baselines and the bootstrap.
        device: Where runs are scored: "auto", "cpu", "cuda" or "cuda:N". Baselines are on the CPU.
        by: Who evaluates, for the notes of the runs.

    Returns: What `hellm.evaluate.compare` returns, and test_evaluations: run -> how often it has been evaluated on the
        test split, with its training and, where it could be noted, this time. kind is "run" or "baseline", stage what
        made a run.
    Raises: ValueError, an unknown baseline or metric, a run of other data, or a device that is not there; ImportError,
        several runs in a row without scipy.
    """
    from hellm._devices import resolve_device
    from hellm.data import Dataset, load_dataset

    device = resolve_device(device)
    rows = _named(models) if isinstance(models, Mapping) else named_rows(models)
    if not isinstance(data, Dataset):
        data = load_dataset(data, split=split_of_runs(rows))
    made, notes = [], []
    for name, runs in rows.items():
        kind = kind_of(runs[0])
        if data.has_cold_users and runs[0] in _NEED_TRAINED_USERS:
            notes.append(f"{name} left out: it knows users by their training events, and those scored here have none")
            continue
        make = partial(_run_scorer, device=device) if kind == "run" else partial(_baseline, seed=seed)
        makers = [partial(make, one, data, split) for one in runs]
        made.append(Row(name, makers, kind, _stage(runs[0], kind)))
    if not made:
        raise ValueError(f"models must have one that can score these users; {'; '.join(notes)}")
    comparison = compare_rows(
        made, data, split=split, protocol=protocol, ks=ks, metrics=metrics, slices=slices, seed=seed
    )
    runs = [one for names in rows.values() for one in names if kind_of(one) == "run"]
    comparison["notes"] += notes
    if split == "test":
        comparison["notes"] += _log(runs, comparison, by)
    counts = {one: len(read_test_evaluations(one)) for one in runs}
    return comparison | {"test_evaluations": counts}


def _log(runs: Sequence[str], comparison: Mapping[str, Any], by: str) -> list[str]:
    """Note the evaluation in every run; a sentence for each where that is not possible."""
    reports = [comparison, *comparison["other_protocols"]]
    notes = [
        log_test_evaluation(
            one,
            by=by,
            protocols=[report["protocol"] for report in reports],
            metrics=comparison["shown"],
            fingerprint=comparison["fingerprint"],
        )
        for one in dict.fromkeys(runs)
    ]
    return [note for note in notes if note is not None]


def named_rows(models: Sequence[PathLike_]) -> dict[str, list[str]]:
    """Row -> its runs, of models given as RUN, BASELINE or NAME=RUN,RUN,...

    Raises: ValueError, something that is neither, baselines among several, or one name for two rows.
    """
    rows = {}
    for given in map(str, models):
        name, sign, runs = given.partition("=")
        runs = list(dict.fromkeys(runs.split(","))) if sign and not Path(given).is_dir() else [given]
        name = given if runs == [given] else name
        if rows.setdefault(name, runs) != runs:
            raise ValueError(f"MODEL must have a name of its own, got {name!r} for two")
    return _named(rows)


def _named(models: Mapping[str, PathLike_ | Sequence[PathLike_]]) -> dict[str, list[str]]:
    rows = {}
    for name, runs in models.items():
        rows[name] = [str(runs)] if isinstance(runs, (str, PathLike)) else list(map(str, runs))
        kinds = [kind_of(one) for one in rows[name]]
        if not kinds:
            raise ValueError(f"MODEL must be of at least one run, got none for {name!r}")
        if len(kinds) > 1 and "baseline" in kinds:
            raise ValueError(f"MODEL must be run directories where it is several, got {name}={','.join(rows[name])}")
    return rows


def split_of_runs(rows: Mapping[str, Sequence[str]]) -> str | None:
    """The split that the runs were trained on, where they agree; None leaves it to the data.

    Raises: ValueError, they do not agree.
    """
    found = set()
    for name in (one for runs in rows.values() for one in runs):
        result = Path(name) / RESULT
        if name not in BASELINES and result.is_file():
            found |= {read_json(result).get("dataset", {}).get("split")} - {None}
    if len(found) > 1:
        raise ValueError(f"the runs were trained on different splits ({', '.join(sorted(found))}); evaluate them apart")
    return found.pop() if found else None


def kind_of(name: str) -> str:
    """ "baseline" or "run". Raises: ValueError, neither."""
    if name in BASELINES:
        return "baseline"
    if Path(name).is_dir():
        return "run"
    nearest = difflib.get_close_matches(name, BASELINES, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"MODEL must be a run directory or one of {', '.join(BASELINES)}, got {name!r}{hint}")


def _stage(name: str, kind: str) -> str | None:
    """What made a run; None for baselines and folders that only serve stage 1 or SASRec."""
    result = Path(name) / RESULT
    if kind == "run" and (Path(name) / LANGUAGE_MODEL / "config.json").is_file():
        return "finetune"
    if kind != "run" or not result.is_file():
        return None
    return read_json(result).get("stage")


def _baseline(name: str, dataset: Dataset, split: str, *, seed: int):
    baseline = fit_baseline(name, dataset, seed=seed)
    if dataset.has_cold_users and isinstance(baseline, ItemKNN):
        return baseline.with_histories(*dataset.histories(*KNOWN_SPLITS[split]))
    return baseline


def _run_scorer(path: str, dataset: Dataset, split: str, *, device: str):
    """The run's scorer, if it is of this data."""
    recommender = Recommender.load(path)
    check_run_of(recommender, path, dataset)
    return recommender.scorer(split, device)


def check_run_of(recommender: Recommender, path: PathLike_, dataset: Dataset) -> None:
    """Raises: ValueError, a run of other data, or of another split, which may have shown it the held-out events."""
    for kind, of_run, of_data in (
        ("user", recommender.user_ids, dataset.user_ids),
        ("item", recommender.item_ids, dataset.item_ids),
    ):
        if of_run != of_data:
            raise ValueError(
                f"{path} must be a run of data set {dataset.name!r}, but its {len(of_run)} {kind} ids are not the "
                f"{len(of_data)} of the data"
            )
    if not recommender.has_training_events(*dataset.pairs("train")):
        raise ValueError(
            f"{path} was trained on another split of {dataset.name!r}, so its numbers would not be comparable; "
            "give --split as in its training"
        )
