"""Comparison of models on the same users: a row each, paired differences to the best, verdicts on what costs more."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .datasets import evaluate_protocols, history_lengths, item_counts
from .metrics import LIST_METRICS, METRICS, OVERALL_METRICS
from .protocols import Protocol, get_protocol
from .ranking import Scorer
from .result import RankingResult, mean_result, paired_bootstrap, seeds_summary
from .slices import HISTORY_LENGTH, ITEM_POPULARITY, popularity_groups, popularity_words, slices_of

if TYPE_CHECKING:
    from hellm.data import Dataset

LEVEL = 0.95


@dataclass(frozen=True)
class Row:
    """One row of a comparison.

    Attributes:
        name: What it is called.
        makers: One for each run, say of other seeds: makes its scorer, when its turn comes.
        kind: What it is, in a word for reports.
        stage: What made it; "finetune" is a language model, which gets a verdict.
    """

    name: str
    makers: Sequence[Callable[[], Scorer | Callable]]
    kind: str = "scorer"
    stage: str | None = None


def compare(
    models: Mapping[str, Any] | Sequence[Row],
    dataset: Dataset,
    *,
    split: str = "test",
    protocol: str | Protocol | Sequence[str | Protocol] = "standard",
    ks: Sequence[int] = (10, 20),
    metrics: Sequence[str] = ("recall", "ndcg"),
    slices: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Score models on the same users of the same split, and say which is the best and by how much.

    The largest of `ks` of the first of `metrics` decides which is the best. Each other row is compared with it by
    paired bootstrap over the users; where a row is of several runs, over each user's mean of them.

    Args:
        models: Name -> scorer, or a list of scorers of several seeds (see `ranking_metrics`); or `Row`s, where models
            are too large to be there all at once.
        dataset: See `evaluate_dataset`.
        split: "valid", for choosing between models, or "test".
        protocol: Preset name or `Protocol`, or several. Each user is scored once for all of them.
        ks: List lengths.
        metrics: Those to show, among `hellm.evaluate.METRICS`. "diversity" is only measured if it is one of them.
        slices: Whether to add metrics by popularity of the target and by history length.
        seed: Of the bootstrap.

    Returns: Plain values, as of the first protocol:
        data, fingerprint, split, protocol, protocol_description, candidates (those drawn for each user; None where the
        whole catalogue is ranked), num_users, num_items, shown, compared (the deciding metric), best.
        models: For each row name, kind, stage, metrics, confidence_intervals (over users, or Student-t over the runs
            where there are several), seeds (then: metrics of each run), users_per_second and seconds_per_1000_users
            (of the median run, all protocols together), difference_to_best, and with `slices` slices: kind -> label ->
            num_users, metrics, confidence_intervals.
        verdicts: On each language model: whether it beats the best of the others, and at what speed.
        slices: Kind -> label -> what it is, in words.
        other_protocols: For each further one, what of the above depends on the protocol.
        notes: What had to be left out, and why.
    Raises: ValueError, an unknown metric, or as `evaluate_dataset`; ImportError, several runs in a row without scipy.
    """
    rows = _as_rows(models)
    protocols = [get_protocol(one) for one in ([protocol] if isinstance(protocol, (str, Protocol)) else protocol)]
    check_metrics(metrics)
    if not protocols or len({one.name for one in protocols}) < len(protocols):
        raise ValueError(f"protocol must be one or several different ones, got {[one.name for one in protocols]}")
    for one in protocols:
        if one.candidates is not None and metrics[0] in LIST_METRICS:
            raise ValueError(f"metrics must begin with one that protocol {one.name!r} has, got {metrics[0]!r}")
    if any(len(row.makers) > 1 for row in rows):
        seeds_summary([{}, {}])  # a missing package shows now, not after the scoring
    notes, diversity = [], "diversity" in metrics
    if diversity and not dataset.item_features and metrics[0] != "diversity":
        diversity, metrics = False, [name for name in metrics if name != "diversity"]
        notes.append(f"diversity left out: data set {dataset.name!r} has no item features")
    results: list[list[list[RankingResult]]] = []
    speeds = {}
    for row in rows:
        speed, found = [], []
        for make in row.makers:
            scorer = make()
            started = time.perf_counter()
            found.append(
                evaluate_protocols(scorer, dataset, split, protocols, ks, by_target=slices, diversity=diversity)
            )
            speed.append(max(one.num_users for one in found[-1]) / (time.perf_counter() - started))
        results.append(found)
        speeds[row.name] = statistics.median(speed)
    lengths = history_lengths(dataset, split) if slices else None
    reports = []
    for place, one in enumerate(protocols):
        of_rows = {row.name: [run[place] for run in runs] for row, runs in zip(rows, results, strict=True)}
        report = _report(rows, of_rows, speeds, ks, metrics, lengths, seed)
        left_out = [name for name in metrics if f"{name}@{max(ks)}" not in report["shown"]]
        if left_out:
            notes.append(f"{', '.join(left_out)} left out with protocol {one.name}, which ranks drawn candidates")
        reports.append(report)
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "num_items": next(iter(of_rows.values()))[0].num_items,
        **reports[0],
        "slices": _slice_words(dataset, reports[0]["models"][0]["slices"]) if slices else {},
        "other_protocols": reports[1:],
        "notes": notes,
    }


def check_metrics(metrics: Sequence[str], what: str = "metrics") -> None:
    """Raises: ValueError, naming `what`: none, an unknown one, or a first that is not a mean over users."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"{what} must be among {', '.join(METRICS)}, got {name!r}")
    if not metrics or metrics[0] in OVERALL_METRICS:
        raise ValueError(
            f"{what} must begin with one that is a mean over users, by which models are compared, not with "
            f"{' or '.join(OVERALL_METRICS)}, got {', '.join(metrics) or 'none'}"
        )


def summary(results: Sequence[RankingResult], *, seed: int = 0) -> dict[str, Any]:
    """`RankingResult.to_dict` of one or several runs: their mean, then, with t-intervals over them and "seeds"."""
    values = mean_result(results).to_dict(level=LEVEL, seed=seed)
    if len(results) > 1:
        values["seeds"] = [one.metrics for one in results]
        over_seeds = seeds_summary(values["seeds"], level=LEVEL)
        values["confidence_intervals"] = {
            name: [over_seeds[name]["low"], over_seeds[name]["high"]] for name in over_seeds
        }
    return values


def slices_summary(result: RankingResult, dataset: Dataset, *, seed: int = 0) -> dict[str, dict[str, dict[str, Any]]]:
    """Both kinds of slices of one result, as plain values.

    Args:
        result: With `by_target`.
        dataset: That it is of.
        seed: Of the bootstrap.
    Returns: Kind -> label -> "what" (in words), "num_users", "metrics", "confidence_level", "confidence_intervals".
    """
    found = _slices([result], history_lengths(dataset, result.split), seed)
    words = _slice_words(dataset, found)
    return {
        kind: {label: {"what": words[kind][label], **part} for label, part in parts.items()}
        for kind, parts in found.items()
    }


def _as_rows(models: Mapping[str, Any] | Sequence[Row]) -> list[Row]:
    if isinstance(models, Mapping):
        several = {name: one if isinstance(one, (list, tuple)) else [one] for name, one in models.items()}
        rows = [Row(name, [lambda one=one: one for one in scorers]) for name, scorers in several.items()]
    else:
        rows = list(models)
    if not rows or not all(row.makers for row in rows):
        raise ValueError("models must have at least one row, each with at least one scorer")
    return rows


def _report(
    rows: Sequence[Row],
    results: Mapping[str, Sequence[RankingResult]],
    speeds: Mapping[str, float],
    ks: Sequence[int],
    metrics: Sequence[str],
    lengths,
    seed: int,
) -> dict[str, Any]:
    """What depends on the protocol, of which all `results` are."""
    means = {name: mean_result(runs) for name, runs in results.items()}
    first = next(iter(means.values()))
    shown = [f"{metric}@{k}" for k in sorted(set(ks)) for metric in metrics]
    decisive = f"{metrics[0]}@{max(ks)}"
    best = max(means, key=lambda name: means[name].metrics[decisive])
    models = []
    for row in rows:
        model = {"name": row.name, "kind": row.kind, "stage": row.stage} | summary(results[row.name], seed=seed)
        speed = speeds[row.name]
        model |= {"users_per_second": speed, "seconds_per_1000_users": 1000 / speed, "difference_to_best": None}
        if row.name != best:
            model["difference_to_best"] = vars(paired_bootstrap(means[row.name], means[best], decisive, seed=seed))
        if lengths is not None:
            model["slices"] = _slices(results[row.name], lengths, seed)
        models.append(model)
    return {
        "protocol": first.protocol.name,
        "protocol_description": first.protocol.description,
        "candidates": None if first.protocol.candidates is None else asdict(first.protocol.candidates),
        "num_users": first.num_users,
        "shown": [name for name in shown if name in first.metrics],
        "compared": decisive,
        "best": best,
        "models": models,
        "verdicts": _verdicts(rows, means, speeds, decisive, seed),
    }


def _slices(runs: Sequence[RankingResult], lengths, seed: int) -> dict[str, dict[str, dict[str, Any]]]:
    of_runs = [slices_of(one, lengths) for one in runs]
    kept = ("num_users", "metrics", "confidence_level", "confidence_intervals")
    return {
        kind: {
            label: {
                name: value
                for name, value in summary([one[kind][label] for one in of_runs], seed=seed).items()
                if name in kept
            }
            for label in parts
        }
        for kind, parts in of_runs[0].items()
    }


def _slice_words(dataset: Dataset, slices: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    counts = item_counts(dataset)
    popularity = popularity_words(counts, popularity_groups(counts))
    labels = {kind: list(parts) for kind, parts in slices.items()}
    return {
        ITEM_POPULARITY: {label: popularity[label] for label in labels[ITEM_POPULARITY]},
        HISTORY_LENGTH: {
            label: f"users known by {label} event{'' if label == '1' else 's'}" for label in labels[HISTORY_LENGTH]
        },
    }


def _verdicts(rows, means, speeds, decisive: str, seed: int) -> list[str]:
    # A sum of models may hold the language model itself.
    others = [row.name for row in rows if row.stage not in ("finetune", "fuse")]
    if not others:
        return []
    rival = max(others, key=lambda name: means[name].metrics[decisive])
    verdicts = []
    for row in rows:
        if row.stage == "finetune":
            difference = paired_bootstrap(means[row.name], means[rival], decisive, seed=seed)
            verdicts.append(_verdict(row.name, rival, decisive, difference, speeds))
    return verdicts


def _verdict(name: str, rival: str, metric: str, difference, speeds: Mapping[str, float]) -> str:
    """Whether a language model is worth what it costs, in words."""
    measured = f"{metric} {difference.difference:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    cost = f"{speeds[name]:,.0f} users/s against {speeds[rival]:,.0f}"
    if difference.low > 0:
        return f"The language model {name} is better than {rival} ({measured}), at {cost}: it pays if that is enough."
    what = "worse than" if difference.high < 0 else "not shown to be better than"
    return f"The language model {name} is {what} {rival} ({measured}), at {cost}: it does not pay here."
