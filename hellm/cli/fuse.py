"""`hellm fuse`: finished runs as one recommender."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

from hellm.cli._output import difference, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser, parse
from hellm.cli.data import add_reading_options, reading_options
from hellm.config import FuseConfig, config_from_dict, config_to_dict

__all__ = ["print_fusion", "print_plan", "run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "fuse",
        "RUN ... --data DIR --out DIR [SETTING=VALUE ...]",
        "Add up the scores of finished runs of any stage. Validation chooses which runs help, and their weights; the "
        "test split is scored once. NAME=RUN names a run; else it is called as its folder. Every setting below can be "
        "given as --name VALUE or name=VALUE.",
    )
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN", help="run directory, or NAME=RUN")
    parser.add_argument("--data", required=True, metavar="DIR", help="data set, the one that the runs were trained on")
    parser.add_argument("--out", required=True, metavar="DIR", help="run directory to make")
    parser.add_argument("--resume", action="store_true", help="keep a finished run of the same runs and settings")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--json", action="store_true", help="print result.json as one line, the last of the output")
    add_reading_options(parser)
    add_settings(parser, FuseConfig)
    settings = set(config_to_dict(FuseConfig()))
    args = parse(parser, [f"--{one}" if one.partition("=")[0] in settings else one for one in argv])
    values = args.as_dict()
    config = config_from_dict(FuseConfig, {name: values[name] for name in settings})
    from hellm.data import load_dataset
    from hellm.recommend.compare import split_of_runs
    from hellm.recommend.fuse import fuse, named_towers

    towers = named_towers(args.runs)
    reading = reading_options(args)
    reading["split"] = reading.get("split") or split_of_runs({name: [run] for name, run in towers.items()})
    result = fuse(
        towers,
        load_dataset(args.data, **reading),
        args.out,
        config,
        resume=args.resume,
        overwrite=args.overwrite,
        on_plan=lambda plan: print_plan(plan, sys.stderr),
    )
    print_json(result) if args.json else print_fusion(result, args.out)
    return 0


def print_plan(plan: Mapping[str, Any], file: TextIO | None = None) -> None:
    """What a fusion is likely to cost, before it starts; on standard output if there is no `file`."""
    speeds = ", ".join(f"{name} {seconds:.2g} s" for name, seconds in plan["seconds_per_1000_users"].items())
    print(
        f"Scoring takes about {duration(plan['expected_seconds'])} in all; 1,000 users take {speeds}.",
        file=file,
        flush=True,
    )


def print_fusion(result: dict[str, Any], out: str | os.PathLike[str]) -> None:
    """What was chosen, what it comes to, and what each tower adds, for people."""
    names = [name for name in result["valid"]["metrics"] if name.startswith(("recall", "ndcg"))]
    k = names[len(names) // 2].partition("@")[2] if names else ""
    shown = [name for name in (f"recall@{k}", f"ndcg@{k}") if name in result["valid"]["metrics"]]
    print(f"{out}: {', '.join(f'{weight:.3g} x {name}' for name, weight in result['weights'].items())}")
    rows = []
    for name, one in [("fused", result), *result["towers"].items()]:
        valid, test = one["valid"]["metrics"] if name == "fused" else one["valid"], one["test"]
        metrics = [f"{valid[metric]:.4f}" for metric in shown]
        metrics += ["" if test is None else f"{test[metric]:.4f}" for metric in shown]
        adds = result["leave_one_out"].get(name, {}).get(shown[-1])
        cost = one["seconds_per_1000_users"]
        added = difference(adds, "") if adds else ("" if name == "fused" or one["kept"] else "left out")
        rows.append([name, *metrics, added, "" if cost is None else f"{cost:.2g}"])
    header = [f"{split} {metric}" for split in ("valid", "test") for metric in shown]
    print(table(["model", *header, f"adds, test {shown[-1]}", "s/1,000 users"], rows))
    for gain in result["gains"]:
        kept = "kept" if gain["kept"] else "left out: not shown to help"
        if gain.get("for_new_items"):
            kept = "kept for items without events" if gain["kept"] else "left out, also for items without events"
        print(
            f"  {gain['tower']} on validation: {gain['gain']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] in "
            f"{next(iter(result['cross_fitted']))}, {kept}"
        )
