"""`hellm ablate`: what each part of the fine-tuned language model adds, in one table and one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hellm._files import atomic_path
from hellm.cli._figure import plot_ablation
from hellm.cli._output import duration, print_json, table
from hellm.cli._parser import add_settings, new_parser
from hellm.cli._training import parse_settings
from hellm.cli.data import add_reading_options, reading_options
from hellm.config import PRESETS, FinetuneConfig, config_to_dict

__all__ = ["ablate", "print_ablation", "run"]

_LEVEL = 0.95


def run(argv: Sequence[str]) -> int:
    args, config = parse_settings(_parser(), argv, FinetuneConfig)
    from hellm.data import load_dataset
    from hellm.training.ablation import check_ablations

    check_ablations(args.out)
    dataset = load_dataset(args.data, **reading_options(args))
    ablation = ablate(
        config, dataset, args.out, graph=args.graph, sequence=args.sequence, rows=args.rows, seeds=args.seeds
    )
    if args.json:
        print_json(ablation)
    else:
        print_ablation(ablation)
        print(f"{Path(args.out) / 'ablation.json'} has every number, ablation.md the table, ablation.png the picture.")
    return 0


def _parser():
    from hellm.training.ablation import ABLATIONS

    parser = new_parser(
        "ablate",
        "--data DIR --graph RUN --sequence RUN --out DIR [--rows NAME ...] [--seeds N ...] "
        "[--preset NAME | --config FILE] [SETTING=VALUE ...]",
        "Fine-tune the language model as set and with one part changed at a time, each row and seed into a run "
        "directory of its own, and compare their tests with the full model's. The same command goes on where it was "
        f"interrupted and repeats nothing that is finished. Rows: {', '.join(ABLATIONS)}. Every setting below is one "
        "of the full model and can be given as --name VALUE or name=VALUE.",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="data set of any known form")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs, the table and the figure")
    parser.add_argument("--graph", type=str, metavar="RUN", help="stage-1 run (hellm pretrain) of the same data")
    parser.add_argument("--sequence", type=str, metavar="RUN", help="SASRec run (hellm sasrec) of the same data")
    parser.add_argument(
        "--rows", nargs="+", type=str, metavar="NAME", help="beside full; all that data and settings allow if not given"
    )
    parser.add_argument("--seeds", nargs="+", type=int, metavar="N", help="of the fine-tuning, in place of seed")
    presets = ", ".join(PRESETS[FinetuneConfig])
    parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {presets}")
    parser.add_argument(
        "--config", metavar="FILE", help="start from a YAML file, e.g. config.yaml of a fine-tuning run"
    )
    parser.add_argument("--json", action="store_true", help="print ablation.json as one line, the last of the output")
    add_reading_options(parser)
    add_settings(parser, FinetuneConfig)
    return parser


def ablate(config: FinetuneConfig, dataset, out: str | Path, **options: Any) -> dict[str, Any]:
    """Run the rows, compare them on the test split, and write ablation.json and ablation.png into `out`.

    Args:
        config: settings of the full model.
        dataset: of the two runs.
        out: folder, made if absent.
        options: graph, sequence, rows and seeds of `hellm.training.ablation.run_ablations`.
    Returns: plain values, as in ablation.json: what `run_ablations` returns, and per row "valid", "test" (metric ->
        mean over seeds and interval) and "difference_to_full" (metric -> paired difference on the same users).
    Raises: as `run_ablations`; ImportError without scipy, where there are several seeds.
    """
    from hellm.evaluate import seeds_summary
    from hellm.training.ablation import hold_ablations

    if len(set(options.get("seeds") or ())) > 1:
        # A missing package shows now, not after the training.
        seeds_summary([{}, {}])
    out = Path(out)
    with hold_ablations(out):
        return _ablate(config, dataset, out, options)


def _ablate(config: FinetuneConfig, dataset, out: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    from hellm.evaluate import evaluate_dataset, evaluate_histories
    from hellm.training.ablation import run_ablations

    ran = run_ablations(
        config,
        dataset,
        out,
        evaluate=evaluate_histories,
        evaluate_graph=evaluate_dataset,
        on_run=_say_plan,
        **options,
    )
    ablation = _summary(ran, config, dataset, out)
    with atomic_path(out / "ablation.json") as temporary:
        temporary.write_text(json.dumps(ablation, indent=2) + "\n", encoding="utf-8")
    with atomic_path(out / "ablation.md") as temporary:
        temporary.write_text(_markdown(ablation), encoding="utf-8")
    compared = ablation["compared"]
    tests = [row["test"][compared] for row in ablation["rows"]]
    plot_ablation(
        out / "ablation.png",
        [row["name"] for row in ablation["rows"]],
        [test["mean"] for test in tests],
        [(test["low"], test["high"]) for test in tests],
        metric=compared,
        interval=ablation["interval"],
        title=f"{dataset.name}: the full model and what changes without, or with, each part",
    )
    return ablation


def _say_plan(label: str, plan: Mapping[str, Any]) -> None:
    import sys

    at_most = duration(plan["expected_seconds"])
    print(f"{label}: {plan['num_trained_parameters']:,} trained parameters, at most {at_most}", file=sys.stderr)


def _summary(ran: Mapping[str, Any], config: FinetuneConfig, dataset, out: Path) -> dict[str, Any]:
    """`ran` with each row's means, intervals and differences to the full model."""
    from hellm.evaluate.protocols import get_protocol

    k = 10 if 10 in config.ks else max(config.ks)
    protocol = get_protocol(config.protocol)
    seeds = len(ran["seeds"])
    full = _test_result(ran["rows"][0], protocol, out)
    shown = [f"recall@{k}", f"ndcg@{k}"]
    rows = []
    for row in ran["rows"]:
        tests = [one["test"] for one in row["runs"].values()]
        summary = {
            "valid": _means([one["valid"]["metrics"] for one in row["runs"].values()]),
            "test": _intervals(tests),
            "difference_to_full": None,
            **{
                name: float(np.mean([one[name] for one in row["runs"].values()]))
                for name in ("training_seconds", "users_per_second", "num_trained_parameters")
            },
        }
        if rows:
            summary["difference_to_full"] = _differences(summary, rows[0], _test_result(row, protocol, out), full)
        rows.append({**row, **summary})
    monitor = config.monitor[0]
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "protocol": protocol.name,
        "protocol_description": protocol.description,
        "num_users": tests[0]["num_users"],
        "num_items": tests[0]["num_items"],
        "chosen_by": list(config.monitor),
        "shown": shown,
        "compared": monitor if monitor in tests[0]["confidence_intervals"] else shown[-1],
        "interval": f"95% t-interval over {seeds} seeds" if seeds > 1 else "95% bootstrap interval over users",
        "config": config_to_dict(config),
        "seeds": ran["seeds"],
        "skipped": ran["skipped"],
        "rows": rows,
    }


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def _intervals(tests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """metric -> mean, low, high: over seeds where there are several, else over users."""
    names = list(tests[0]["confidence_intervals"])
    if len(tests) > 1:
        from hellm.evaluate import seeds_summary

        return seeds_summary([{name: test["metrics"][name] for name in names} for test in tests], level=_LEVEL)
    (test,) = tests
    return {
        name: {"mean": test["metrics"][name], "low": low, "high": high}
        for name, (low, high) in test["confidence_intervals"].items()
    }


def _test_result(row: Mapping[str, Any], protocol, out: Path):
    """The row's test with each user's mean over the seeds; None where a run has no values of single users."""
    from hellm.evaluate import RankingResult, mean_result
    from hellm.training.ablation import read_test_users

    found = [read_test_users(out / one["run"]) for one in row["runs"].values()]
    if any(one is None for one in found):
        return None
    num_items = next(iter(row["runs"].values()))["test"]["num_items"]
    return mean_result(
        [
            RankingResult({name: float(one.mean()) for name, one in values.items()}, values, users, num_items, protocol)
            for users, values in found
        ]
    )


def _differences(row: Mapping[str, Any], full: Mapping[str, Any], a, b) -> dict[str, dict[str, Any]]:
    """metric -> difference to the full model, with a paired interval where both have values of single users."""
    from hellm.evaluate import paired_bootstrap

    if a is None or b is None:
        means = {name: row["test"][name]["mean"] - full["test"][name]["mean"] for name in row["test"]}
        return {name: {"difference": mean, "low": None, "high": None} for name, mean in means.items()}
    return {name: vars(paired_bootstrap(a, b, name, level=_LEVEL)) for name in a.per_user}


def print_ablation(ablation: Mapping[str, Any]) -> None:
    """The table for people."""
    shown, compared = ablation["shown"], ablation["compared"]
    chosen = ablation["chosen_by"][0]
    print(f"{ablation['data']}: {ablation['num_users']:,} test users, all {ablation['num_items']:,} items ranked")
    print(f"protocol {ablation['protocol']}: {ablation['protocol_description']}")
    rows = []
    for row in ablation["rows"]:
        valid, test = row["valid"].get(chosen), row["test"]
        rows.append(
            [
                row["name"],
                "" if valid is None else f"{valid:.4f}",
                *(f"{test[name]['mean']:.4f}" for name in shown),
                f"{test[compared]['low']:.4f} to {test[compared]['high']:.4f}",
                _difference(row["difference_to_full"], compared),
                f"{row['training_seconds']:,.0f}",
                f"{row['users_per_second']:,.0f}",
            ]
        )
    tests = [f"test {name}" for name in shown]
    header = ("row", f"valid {chosen}", *tests, f"{compared} interval", f"{compared} - full", "seconds", "users/s")
    print(table(header, rows))
    print(_how_to_read(ablation))
    width = max(len(row["name"]) for row in ablation["rows"])
    for row in ablation["rows"]:
        print(f"  {row['name']:<{width}}  {row['words']}")
    for name, why in ablation["skipped"].items():
        print(f"  left out: {name} ({why})")


def _markdown(ablation: Mapping[str, Any]) -> str:
    """The table as Markdown, with half the width of each interval."""
    shown, compared, chosen = ablation["shown"], ablation["compared"], ablation["chosen_by"][0]
    lines = [f"| row | valid {chosen} | {' | '.join(shown)} | difference to `full`, {compared} |", "|---" * 4 + "|---|"]
    for row in ablation["rows"]:
        valid = f"{row['valid'][chosen]:.4f}" if chosen in row["valid"] else ""
        cells = [
            f"{row['test'][k]['mean']:.4f} ±{(row['test'][k]['high'] - row['test'][k]['low']) / 2:.4f}" for k in shown
        ]
        difference = "" if row["difference_to_full"] is None else _difference(row["difference_to_full"], compared)
        lines.append(f"| `{row['name']}`: {row['words']} | {valid} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines) + "\n\n" + _how_to_read(ablation) + "\n"


def _how_to_read(ablation: Mapping[str, Any]) -> str:
    monitor = ", ".join(ablation["chosen_by"])
    chose = f"The validation split chose each run's epoch (by {monitor}); the test split was scored once per run."
    if not ablation["rows"][0]["valid"]:
        chose = "No validation events: the last epoch was kept; the test split was scored once per run."
    return (
        f"{chose}\nInterval: {ablation['interval']}. Differences to full are paired, user by user"
        f"{', of the means over seeds' if len(ablation['seeds']) > 1 else ''}, with a 95% bootstrap interval."
        "\nSeconds are of training with its validations; users/s are of the test."
    )


def _difference(differences: Mapping[str, Any] | None, metric: str) -> str:
    if differences is None:
        return "full"
    one = differences[metric]
    if one["low"] is None:
        return f"{one['difference']:+.4f}"
    verdict = "" if one["low"] > 0 or one["high"] < 0 else " (tie)"
    return f"{one['difference']:+.4f} [{one['low']:+.4f}, {one['high']:+.4f}]{verdict}"
