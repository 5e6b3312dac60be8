"""`hellm evaluate`: runs and baselines side by side."""

from __future__ import annotations

import argparse
import logging
import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from hellm.cli._output import count, difference, print_json, table
from hellm.cli._parser import new_parser, parse
from hellm.cli.data import add_reading_options, reading_options

__all__ = ["print_comparison", "run"]

logger = logging.getLogger(__name__)

_HELD_OUT = ("test", "valid")


def run(argv: Sequence[str]) -> int:
    from hellm.baselines import BASELINES
    from hellm.evaluate import METRICS

    parser = new_parser(
        "evaluate",
        "MODEL ... --data DIR [options]",
        "Score run directories and baselines on the same users of the same split, in one table with confidence "
        f"intervals and paired differences to the best. Baselines: {', '.join(BASELINES)} (itemknn, bpr and als need "
        'pip install "hellm[baselines]"). Runs with model.backbone=lightgcn or mf and no hypergraphs serve as those. '
        "NAME=RUN,RUN,... is one row of several runs, say of other seeds: their mean, with an interval over them.",
    )
    parser.add_argument("models", nargs="+", type=str, metavar="MODEL", help="run directory, baseline or NAME=RUN,...")
    parser.add_argument("--data", required=True, metavar="DIR", help="data set, the one that the runs were trained on")
    parser.add_argument(
        "--on", default="test", metavar="NAME", help="held-out events to score: test, or valid to choose by"
    )
    parser.add_argument(
        "--protocol",
        default="standard",
        metavar="NAME,...",
        help="standard, official, mmrec, ... (see docs/reference/protocols.md); several, with commas between, are "
        "shown side by side",
    )
    parser.add_argument("--ks", nargs="+", type=int, default=[10, 20], metavar="K", help="list lengths")
    parser.add_argument(
        "--metrics",
        nargs="+",
        type=str,
        default=["recall", "ndcg"],
        metavar="NAME",
        help=f"to show, the first to compare by: {', '.join(METRICS)}",
    )
    parser.add_argument("--slices", action="store_true", help="also by popularity of the target and history length")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the baselines and the bootstrap")
    parser.add_argument("--device", default="auto", metavar="NAME", help="of runs: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print everything as one line of JSON")
    add_reading_options(parser, split_default="that of the runs")
    parser.add_argument("--data-split", help=argparse.SUPPRESS)
    args = parse(parser, argv)
    if args.split in _HELD_OUT:
        # An older spelling: --split for --on, and --data-split for --split.
        args.on, args.split = args.split, None
    if args.on not in _HELD_OUT:
        raise ValueError(f"--on must be {' or '.join(_HELD_OUT)}, got {args.on!r}")
    from hellm.data import load_dataset
    from hellm.evaluate.compare import check_metrics
    from hellm.recommend.compare import compare, named_rows, split_of_runs

    check_metrics(args.metrics, "--metrics")
    rows = named_rows(args.models)
    reading = reading_options(args)
    reading["split"] = args.split or args.data_split or split_of_runs(rows)
    dataset = load_dataset(args.data, **reading)
    if max(args.ks) > dataset.num_items:
        logger.warning("list lengths (--ks) cut to the %d items there are", dataset.num_items)
    comparison = compare(
        rows,
        dataset,
        split=args.on,
        protocol=args.protocol.split(","),
        ks=[min(k, dataset.num_items) for k in args.ks],
        metrics=args.metrics,
        slices=args.slices,
        seed=args.seed,
        device=args.device,
        by=shlex.join(["hellm", "evaluate", *argv]),
    )
    if args.json:
        print_json(comparison)
    else:
        print_comparison(comparison)
    return 0


def print_comparison(comparison: Mapping[str, Any], slices: Collection[str] | None = None) -> None:
    """The tables for people; of the slices there are, all or those of these kinds."""
    reports = [comparison, *comparison["other_protocols"]]
    users, items = count(comparison["num_users"]), count(comparison["num_items"])
    ranked = f"all {items} items ranked" if all(one["candidates"] is None for one in reports) else f"{items} items"
    print(f"{comparison['data']}, {comparison['split']} split: {users} users, {ranked}")
    for report in reports:
        other = f" ({count(report['num_users'])} users)" if report["num_users"] != comparison["num_users"] else ""
        print(f"protocol {report['protocol']}{other}: {report['protocol_description']}")
    print(table(*_main_table(reports)))
    several = any("seeds" in model for model in comparison["models"])
    over_runs = " (of several runs: their t-interval)" if several else ""
    print(f"± is half the 95% bootstrap interval over users{over_runs}; differences to the best are paired by user.")
    for kind, labels in comparison["slices"].items():
        if slices is not None and kind not in slices:
            continue
        for report in reports:
            _print_slices(kind, labels, report, len(reports) > 1)
    counts = ", ".join(f"{run} {number}" for run, number in comparison.get("test_evaluations", {}).items() if number)
    if counts:
        print(f"Evaluated on the test split so far, in training and since (choose with --on valid): {counts}")
    for note in comparison["notes"]:
        print(f"note: {note}")
    for report in reports:
        prefix = f"{report['protocol']}: " if len(reports) > 1 else ""
        for verdict in report["verdicts"]:
            print(f"{prefix}{verdict}")


def _main_table(reports: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and rows; the protocols of a model stand below each other."""
    several = len(reports) > 1
    shown = list(dict.fromkeys(name for report in reports for name in report["shown"]))
    rows = []
    for models in zip(*(report["models"] for report in reports), strict=True):
        for report, model in zip(reports, models, strict=True):
            runs = f" ({len(model['seeds'])} runs)" if "seeds" in model else ""
            first = [model["name"] + runs, *([report["protocol"]] if several else [])]
            speed = [f"{model['users_per_second']:,.0f}", f"{model['seconds_per_1000_users']:.2g}"]
            rows.append([*first, *_cells(model, shown), difference(model["difference_to_best"], "best"), *speed])
    header = ["model", *(["protocol"] if several else []), *shown, f"{reports[0]['compared']} - best"]
    return [*header, "users/s", "s/1,000 users"], rows


def _print_slices(kind: str, words: Mapping[str, str], report: Mapping[str, Any], several: bool) -> None:
    from hellm.evaluate.slices import ITEM_POPULARITY

    parts = report["models"][0]["slices"][kind]
    labels = [label for label in words if label in parts]
    shown = [name for name in report["shown"] if all(name in parts[label]["metrics"] for label in labels)]
    metric = report["compared"] if report["compared"] in shown else (shown or [None])[0]
    if metric is None or not labels:
        return
    print(f"{metric} by {kind}{', protocol ' + report['protocol'] if several else ''}:")
    rows = [
        [model["name"], *(_cells(model["slices"][kind][label], [metric])[0] for label in labels)]
        for model in report["models"]
    ]
    rows.append(["users", *(count(parts[label]["num_users"]) for label in labels)])
    print(table((kind, *labels), rows))
    if kind == ITEM_POPULARITY:
        print("  of the target: " + "; ".join(f"{label}, {words[label]}" for label in labels))


def _cells(model: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Value and half interval, where there is one, of each metric that there is."""
    cells = []
    for name in names:
        if name not in model["metrics"]:
            cells.append("")
            continue
        low, high = model["confidence_intervals"].get(name, (None, None))
        half = "" if low is None else f" ±{(high - low) / 2:.4f}"
        cells.append(f"{model['metrics'][name]:.4f}{half}")
    return cells
