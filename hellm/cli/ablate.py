"""`hellm ablate`: what each part of the fine-tuned language model adds, in one table and one figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hellm.cli._figure import plot_ablation
from hellm.cli._output import difference, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser
from hellm.cli._training import parse_settings
from hellm.cli.data import add_reading_options, reading_options
from hellm.config import PRESETS, FinetuneConfig

__all__ = ["ablate", "print_ablation", "run"]


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
    Returns: plain values, as in ablation.json; see `hellm.training.ablation_report`.
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

    from hellm._files import atomic_path
    from hellm.evaluate import evaluate_dataset, evaluate_histories
    from hellm.training.ablation import run_ablations
    from hellm.training.ablation_report import ablation_report

    ran = run_ablations(
        config,
        dataset,
        out,
        evaluate=evaluate_histories,
        evaluate_graph=evaluate_dataset,
        on_run=_say_plan,
        **options,
    )
    ablation = ablation_report(ran, config, dataset, out)
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
                _to_full(row, compared),
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
        lines.append(
            f"| `{row['name']}`: {row['words']} | {valid} | {' | '.join(cells)} | {_to_full(row, compared, '')} |"
        )
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


def _to_full(row: Mapping[str, Any], metric: str, itself: str = "full") -> str:
    return difference((row["difference_to_full"] or {}).get(metric), itself)
