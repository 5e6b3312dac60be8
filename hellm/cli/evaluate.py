"""`hellm evaluate`: runs and baselines side by side."""

from __future__ import annotations

import difflib
import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hellm._files import read_json
from hellm.cli._output import count, print_json, table
from hellm.cli._parser import new_parser, parse
from hellm.cli.data import add_reading_options, reading_options

__all__ = ["compare", "print_comparison", "run"]

logger = logging.getLogger(__name__)

_BASELINES = ("popularity", "itemknn", "bpr", "als")


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "evaluate",
        "MODEL ... --data DIR [options]",
        "Score run directories and baselines on the same users of the same split, in one table with confidence "
        f"intervals and paired differences to the best. Baselines: {', '.join(_BASELINES)} (all but popularity need "
        'pip install "hellm[baselines]"). Runs with model.backbone=lightgcn or mf and no hypergraphs serve as those. '
        "NAME=RUN,RUN,... is one row of several runs, say of other seeds: their mean, with an interval over them.",
    )
    parser.add_argument("models", nargs="+", type=str, metavar="MODEL", help="run directory, baseline or NAME=RUN,...")
    parser.add_argument("--data", required=True, metavar="DIR", help="data set, the one that the runs were trained on")
    parser.add_argument("--split", default="test", metavar="NAME", help="held-out events to score: test or valid")
    parser.add_argument(
        "--protocol", default="standard", metavar="NAME", help="standard, official, mmrec, ... (see README.md)"
    )
    parser.add_argument("--ks", nargs="+", type=int, default=[10, 20], metavar="K", help="list lengths")
    parser.add_argument("--metrics", nargs="+", type=str, default=["recall", "ndcg"], metavar="NAME", help="to show")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the baselines and the bootstrap")
    parser.add_argument("--device", default="auto", metavar="NAME", help="of runs: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print everything as one line of JSON")
    add_reading_options(parser, split_option="--data-split")
    args = parse(parser, argv)
    if args.split not in ("test", "valid"):
        raise ValueError(f"--split must be test or valid, got {args.split!r}")
    from hellm.data import load_dataset

    models = _named(args.models)
    # Here --split names the held-out events; how the data are split is --data-split, or as the runs have it.
    split = args.data_split or _split_of_runs([one for runs in models.values() for one in runs])
    dataset = load_dataset(args.data, **reading_options(args) | {"split": split})
    if max(args.ks) > dataset.num_items:
        logger.warning("list lengths (--ks) cut to the %d items there are", dataset.num_items)
    comparison = compare(
        models,
        dataset,
        split=args.split,
        protocol=args.protocol,
        ks=[min(k, dataset.num_items) for k in args.ks],
        metrics=args.metrics,
        seed=args.seed,
        device=args.device,
    )
    if args.json:
        print_json(comparison)
    else:
        print_comparison(comparison)
    return 0


def compare(
    models: Sequence[str] | Mapping[str, Sequence[str]],
    dataset,
    *,
    split: str = "test",
    protocol: str = "standard",
    ks: Sequence[int] = (10, 20),
    metrics: Sequence[str] = ("recall", "ndcg"),
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Evaluate run directories and named baselines alike.

    A mapping gives rows their names, and to each one run or several, whose mean it shows. The last of `ks` of the first
    of `metrics` decides which is the best; each other one is compared with it on the same users by paired bootstrap.
    Runs are scored on `device`, baselines on the CPU.

    Returns: plain values: data, split, protocol, best, compared (the deciding metric), per model its metrics,
        intervals (over users, or over the runs where there are several), "seeds" (metrics of each run, then),
        users_per_second (of the median run) and difference_to_best, and a verdict on each language model: whether it
        beats the best of the others, and at what speed.
    Raises: ValueError, an unknown baseline or metric, a run of other data, or a device that is not there; ImportError,
        several runs in a row without scipy.
    """
    from hellm._devices import resolve_device
    from hellm.evaluate import evaluate_dataset, mean_result, paired_bootstrap, seeds_summary

    device = resolve_device(device)
    models = dict(models) if isinstance(models, Mapping) else {name: [name] for name in models}
    kinds = {name: _kind(runs[0]) for name, runs in models.items()}
    if any(len(runs) > 1 for runs in models.values()):
        seeds_summary([{}, {}])  # a missing package shows now, not after the scoring
    single, results, speeds = {}, {}, {}
    for name, runs in models.items():
        single[name], speed = [], []
        for one in runs:
            scorer = _run_scorer(one, dataset, split, device) if kinds[name] == "run" else _baseline(one, dataset, seed)
            started = time.perf_counter()
            single[name].append(evaluate_dataset(scorer, dataset, split=split, protocol=protocol, ks=ks))
            speed.append(len(single[name][-1].users) / (time.perf_counter() - started))
        results[name], speeds[name] = mean_result(single[name]), statistics.median(speed)
    shown = [f"{metric}@{k}" for k in sorted(set(ks)) for metric in metrics]
    first = next(iter(results.values()))
    for name in shown:
        if name not in first.per_user:
            known = dict.fromkeys(one.partition("@")[0] for one in first.per_user)
            raise ValueError(f"--metrics must be among {', '.join(known)}, got {name.partition('@')[0]!r}")
    decisive = f"{metrics[0]}@{max(ks)}"
    best = max(models, key=lambda name: results[name].metrics[decisive])
    rows = []
    for name, runs in models.items():
        row = {"name": name, "kind": kinds[name], "stage": _stage(runs[0], kinds[name])}
        row |= results[name].to_dict(level=0.95, seed=seed)
        if len(runs) > 1:
            row["seeds"] = [one.metrics for one in single[name]]
            over_seeds = seeds_summary(row["seeds"])
            row["confidence_intervals"] = {
                metric: [over_seeds[metric]["low"], over_seeds[metric]["high"]]
                for metric in row["confidence_intervals"]
            }
        row |= {"users_per_second": speeds[name], "difference_to_best": None}
        if name != best:
            row["difference_to_best"] = vars(paired_bootstrap(results[name], results[best], decisive, seed=seed))
        rows.append(row)
    others = [row["name"] for row in rows if row["stage"] != "finetune"]
    rival = max(others, key=lambda name: results[name].metrics[decisive], default=None)
    verdicts = []
    for row in rows if rival is not None else ():
        if row["stage"] == "finetune":
            difference = paired_bootstrap(results[row["name"]], results[rival], decisive, seed=seed)
            verdicts.append(_verdict(row["name"], rival, decisive, difference, speeds))
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "split": split,
        "protocol": first.protocol.name,
        "protocol_description": first.protocol.description,
        "num_users": first.num_users,
        "num_items": first.num_items,
        "shown": shown,
        "compared": decisive,
        "best": best,
        "models": rows,
        "verdicts": verdicts,
    }


def print_comparison(comparison: dict[str, Any]) -> None:
    """The table for people."""
    users, items = count(comparison["num_users"]), count(comparison["num_items"])
    print(f"{comparison['data']}, {comparison['split']} split: {users} users, all {items} items ranked")
    print(f"protocol {comparison['protocol']}: {comparison['protocol_description']}")
    shown, decisive = comparison["shown"], comparison["compared"]
    rows = []
    for model in comparison["models"]:
        cells = []
        for name in shown:
            low, high = model["confidence_intervals"][name]
            cells.append(f"{model['metrics'][name]:.4f} ±{(high - low) / 2:.4f}")
        several = f" ({len(model['seeds'])} runs)" if "seeds" in model else ""
        rows.append([model["name"] + several, *cells, _difference(model), f"{model['users_per_second']:,.0f}"])
    print(table(("model", *shown, f"{decisive} - best", "users/s"), rows))
    over_runs = " (of several runs: their t-interval)" if any("seeds" in one for one in comparison["models"]) else ""
    print(f"± is half the 95% bootstrap interval over users{over_runs}; differences to the best are paired by user.")
    for verdict in comparison["verdicts"]:
        print(verdict)


def _stage(name: str, kind: str) -> str | None:
    """What made a run; None for baselines and folders that only serve stage 1 or SASRec."""
    result = Path(name) / "result.json"
    if kind == "run" and (Path(name) / "model" / "config.json").is_file():
        return "finetune"
    if kind != "run" or not result.is_file():
        return None
    return read_json(result).get("stage")


def _verdict(name: str, rival: str, metric: str, difference, speeds: dict[str, float]) -> str:
    """Whether a language model is worth what it costs, in words."""
    measured = f"{metric} {difference.difference:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    cost = f"{speeds[name]:,.0f} users/s against {speeds[rival]:,.0f}"
    if difference.low > 0:
        return f"The language model {name} is better than {rival} ({measured}), at {cost}: it pays if that is enough."
    what = "worse than" if difference.high < 0 else "not shown to be better than"
    return f"The language model {name} is {what} {rival} ({measured}), at {cost}: it does not pay here."


def _difference(model: dict[str, Any]) -> str:
    difference = model["difference_to_best"]
    if difference is None:
        return "best"
    low, high = difference["low"], difference["high"]
    verdict = "" if low > 0 or high < 0 else " (tie)"
    return f"{difference['difference']:+.4f} [{low:+.4f}, {high:+.4f}]{verdict}"


def _named(models: Sequence[str]) -> dict[str, list[str]]:
    """Row -> its runs, of what was given on the command line."""
    rows = {}
    for given in models:
        name, sign, runs = given.partition("=")
        runs = list(dict.fromkeys(runs.split(","))) if sign and not Path(given).is_dir() else [given]
        name = given if runs == [given] else name
        if len(runs) > 1 and "baseline" in map(_kind, runs):
            raise ValueError(f"MODEL must be run directories where it is several, got {given!r}")
        if rows.setdefault(name, runs) != runs:
            raise ValueError(f"MODEL must have a name of its own, got {name!r} for two")
        _kind(runs[0])
    return rows


def _kind(name: str) -> str:
    if name in _BASELINES:
        return "baseline"
    if Path(name).is_dir():
        return "run"
    nearest = difflib.get_close_matches(name, _BASELINES, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"MODEL must be a run directory or one of {', '.join(_BASELINES)}, got {name!r}{hint}")


def _baseline(name: str, dataset, seed: int):
    from hellm.baselines import fit_baseline

    return fit_baseline(name, dataset, seed=seed)


def _run_scorer(path: str, dataset, split: str, device: str):
    """The run's scorer, if it is of this data: another split may have shown it the held-out events."""
    from hellm.recommend import Recommender

    recommender = Recommender.load(path)
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
            "give --data-split as in its training"
        )
    return recommender.scorer(split, device)


def _split_of_runs(models: Sequence[str]) -> str | None:
    """The split that the named runs were trained on, where they agree; None leaves it to the data."""
    found = set()
    for name in models:
        result = Path(name) / "result.json"
        if name not in _BASELINES and result.is_file():
            found |= {read_json(result).get("dataset", {}).get("split")} - {None}
    if len(found) > 1:
        raise ValueError(f"the runs were trained on different splits ({', '.join(sorted(found))}); evaluate them apart")
    return found.pop() if found else None
