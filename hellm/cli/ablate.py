"""`hellm ablate`: what each part of a fine-tuned language model or a fused model adds, in one table and one figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hellm.cli._figure import plot_ablation
from hellm.cli._output import difference, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser, parse
from hellm.cli._training import parse_settings
from hellm.cli.data import add_reading_options, reading_options
from hellm.config import PRESETS, FinetuneConfig

__all__ = ["ablate", "print_ablation", "run"]


def run(argv: Sequence[str]) -> int:
    if any(one.partition("=")[0] == "--fused" for one in argv):
        return _run_fused(argv)
    args, config = parse_settings(_parser(), argv, FinetuneConfig)
    from hellm.data import load_dataset
    from hellm.training.ablation import check_ablations

    check_ablations(args.out)
    dataset = load_dataset(args.data, **reading_options(args))
    ablation = ablate(
        config, dataset, args.out, graph=args.graph, sequence=args.sequence, rows=args.rows, seeds=args.seeds
    )
    _print(ablation, args)
    return 0


def _run_fused(argv: Sequence[str]) -> int:
    from hellm.recommend.controls import CONTROLS, check_controls, run_controls

    parser = new_parser(
        "ablate",
        "--fused RUN --data DIR --out DIR [--rows NAME ...] [--graph RUN] [--sequence RUN]",
        "Controls of a fused model (hellm fuse): its towers trained anew with one thing taken from them, with the "
        "settings that they had, fused by validation in the same way, and compared with it user by user, beside the "
        "sum without each tower. The same command goes on where it was interrupted and repeats nothing that is "
        f"finished. Rows: {'; '.join(f'{name}, {words}' for name, words in CONTROLS.items())}.",
    )
    parser.add_argument("--fused", required=True, metavar="RUN", help="fused run (hellm fuse), its towers still there")
    parser.add_argument("--data", required=True, metavar="DIR", help="data set of the fused run")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs, the table and the figure")
    parser.add_argument("--rows", nargs="+", type=str, metavar="NAME", help="all that are possible if not given")
    for name, verb in (("graph", "pretrain"), ("sequence", "sasrec")):
        help = f"run (hellm {verb}) that the language model was trained with, where it is no tower"
        parser.add_argument(f"--{name}", type=str, metavar="RUN", help=help)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print ablation.json as one line, the last of the output")
    add_reading_options(parser)
    args = parse(parser, argv)
    from hellm._folders import hold
    from hellm.data import load_dataset
    from hellm.recommend.compare import split_of_runs

    check_controls(args.out)
    reading = reading_options(args)
    reading["split"] = reading.get("split") or split_of_runs({"fused": [args.fused]})
    dataset, out = load_dataset(args.data, **reading), Path(args.out)
    options = {name: args[name] for name in ("rows", "device", "graph", "sequence")}
    with hold(out):
        ablation = run_controls(args.fused, dataset, out, on_training=_say_training, **options)
        _write(ablation, out, title=f"{dataset.name}: the fused model and its controls")
    _print(ablation, args)
    return 0


def _say_training(label: str, seconds: float) -> None:
    print(f"{label}: what it stands for took {duration(seconds)}", file=sys.stderr)


def _print(ablation: Mapping[str, Any], args) -> None:
    if args.json:
        print_json(ablation)
    else:
        print_ablation(ablation)
        print(f"{Path(args.out) / 'ablation.json'} has every number, ablation.md the table, ablation.png the picture.")


def _parser():
    from hellm.training.ablation import ABLATIONS

    parser = new_parser(
        "ablate",
        "--data DIR --graph RUN --sequence RUN --out DIR [--rows NAME ...] [--seeds N ...] "
        "[--preset NAME | --config FILE] [SETTING=VALUE ...]\n   or: hellm ablate --fused RUN --data DIR --out DIR",
        "Fine-tune the language model as set and with one part changed at a time, each row and seed into a run "
        "directory of its own, and compare their tests with the full model's. The same command goes on where it was "
        f"interrupted and repeats nothing that is finished. Rows: {', '.join(ABLATIONS)}. Every setting below is one "
        "of the full model and can be given as --name VALUE or name=VALUE. A fused model has other rows: see "
        "hellm ablate --fused RUN --help.",
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
    from hellm.training.ablation import run_ablations
    from hellm.training.ablation_report import ablation_report

    ran = run_ablations(
        config,
        dataset,
        out,
        on_run=_say_plan,
        **options,
    )
    ablation = ablation_report(ran, config, dataset, out)
    _write(ablation, out, title=f"{dataset.name}: the full model and what changes without, or with, each part")
    return ablation


def _write(ablation: Mapping[str, Any], out: Path, *, title: str) -> None:
    """Write ablation.json, ablation.md and ablation.png."""
    from hellm._files import atomic_path

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
        [(test["low"], test["high"]) if test["low"] is not None else (test["mean"], test["mean"]) for test in tests],
        metric=compared,
        interval=ablation["interval"],
        title=title,
    )


def _say_plan(label: str, plan: Mapping[str, Any]) -> None:
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
                _span(test[compared]),
                _to_full(row, compared),
                *(
                    "" if row[name] is None else f"{row[name]:,.0f}"
                    for name in ("training_seconds", "users_per_second")
                ),
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


def _span(test: Mapping[str, Any]) -> str:
    return "" if test["low"] is None else f"{test['low']:.4f} to {test['high']:.4f}"


def _half(test: Mapping[str, Any]) -> str:
    return "" if test["low"] is None else f" ±{(test['high'] - test['low']) / 2:.4f}"


def _markdown(ablation: Mapping[str, Any]) -> str:
    """The table as Markdown, with half the width of each interval."""
    shown, compared, chosen = ablation["shown"], ablation["compared"], ablation["chosen_by"][0]
    lines = [f"| row | valid {chosen} | {' | '.join(shown)} | difference to `full`, {compared} |", "|---" * 4 + "|---|"]
    for row in ablation["rows"]:
        valid = f"{row['valid'][chosen]:.4f}" if chosen in row["valid"] else ""
        cells = [f"{row['test'][k]['mean']:.4f}{_half(row['test'][k])}" for k in shown]
        lines.append(
            f"| `{row['name']}`: {row['words']} | {valid} | {' | '.join(cells)} | {_to_full(row, compared, '')} |"
        )
    return "\n".join(lines) + "\n\n" + _how_to_read(ablation) + "\n"


def _how_to_read(ablation: Mapping[str, Any]) -> str:
    monitor = ", ".join(ablation["chosen_by"])
    chosen = ablation.get("chosen", "each run's epoch")
    chose = f"The validation split chose {chosen} (by {monitor}); the test split was scored once per run."
    if not ablation["rows"][0]["valid"]:
        chose = "No validation events: the last epoch was kept; the test split was scored once per run."
    return (
        f"{chose}\nInterval: {ablation['interval']}. Differences to full are paired, user by user"
        f"{', of the means over seeds' if len(ablation['seeds']) > 1 else ''}, with a 95% bootstrap interval."
        "\nSeconds are of training with its validations; users/s are of the test."
    )


def _to_full(row: Mapping[str, Any], metric: str, itself: str = "full") -> str:
    return difference((row["difference_to_full"] or {}).get(metric), itself)
