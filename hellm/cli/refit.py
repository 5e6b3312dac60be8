"""`hellm refit`: a run trained on with newer data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, difference, print_json
from hellm.cli._parser import new_parser, parse
from hellm.cli.features import CACHE_HELP

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "refit",
        "RUN --data DIR --out DIR [options]",
        "Train the models of a run on with newer data (hellm append), from its weights and with its settings, and "
        "compare them with it on the same validation events. The exit code is 0 where the new run is not shown to be "
        "worse, so that it can take over, and 1 where it is.",
    )
    parser.add_argument("run", metavar="RUN", help="run that serves: of all stages, stage 1, SASRec or transitions")
    parser.add_argument("--data", required=True, metavar="DIR", help="data that continue those of the run")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the new run")
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    parser.add_argument("--resume", action="store_true", help="go on with what is there")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print refit.json as one line of JSON")
    args = parse(parser, argv)
    from hellm.upkeep.refit import refit

    report = refit(
        args.run,
        args.data,
        args.out,
        resume=args.resume,
        overwrite=args.overwrite,
        cache=args.cache,
        on_step=None if args.json else lambda step: print(step.text, flush=True),
    )
    if args.json:
        print_json(report)
    else:
        _print(report)
    return 0 if report["taken_over"] else 1


def _print(report: Mapping[str, Any]) -> None:
    verdict = "takes over: it is not shown to be worse" if report["taken_over"] else "is worse, and does not take over"
    print(f"{report['candidate']} {verdict} than {report['served']}")
    print(
        f"  {report['metric']} {report['candidate_value']:.4f} against {report['served_value']:.4f}, "
        f"{difference(report, '')} on {count(report['num_users'])} users of the validation events"
    )
    if report["left_out_events"]:
        number = count(report["left_out_events"])
        print(f"  note: {number} validation events left out, which the served run was trained on")
    for note in report["notes"]:
        print(f"  note: {note}")
