"""`hellm ab`: the arms of an experiment compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, difference, print_json, table
from hellm.cli._parser import new_parser, parse
from hellm.cli.data import add_reading_options, reading_options

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    from hellm.evaluate.ab import OUTCOMES

    words = "; ".join(f"{name}, {text}" for name, text in OUTCOMES.items())
    parser = new_parser(
        "ab",
        "EXPOSURES --events FILE [options]",
        "Compare the arms of an experiment: what users did after they were shown what their arm recommends. Outcomes: "
        f"{words}.",
    )
    parser.add_argument("exposures", metavar="EXPOSURES", help="parquet file of exposures, or a folder of such files")
    parser.add_argument("--events", required=True, metavar="FILE", help="what users did: file or folder of any form")
    parser.add_argument("--outcome", default="converted", metavar="NAME", help=", ".join(OUTCOMES))
    parser.add_argument("--control", type=str, metavar="ARM", help="arm to compare with; default: the first by name")
    parser.add_argument("--days", type=float, metavar="X", help="count events within so many days after an exposure")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    parser.add_argument("--json", action="store_true", help="print the comparison as one line of JSON")
    add_reading_options(parser)
    args = parse(parser, argv)
    from hellm.upkeep.experiments import compare_experiment

    reading = reading_options(args)
    for name in ("features", "split"):
        reading.pop(name, None)
    options = {"outcome": args.outcome, "control": args.control, "days": args.days, "seed": args.seed}
    comparison = compare_experiment(args.exposures, args.events, **options, **reading)
    print_json(comparison) if args.json else _print(comparison)
    return 0


def _print(comparison: Mapping[str, Any]) -> None:
    from hellm.evaluate.ab import OUTCOMES

    how = "paired by user" if comparison["paired"] else "of independent users"
    print(f"experiment {comparison['experiment']}, {comparison['outcome']}: {OUTCOMES[comparison['outcome']]}")
    rows = [
        [
            arm,
            count(one["users"]),
            count(one["exposures"]),
            f"{one['value']:.4f} [{one['low']:.4f}, {one['high']:.4f}]",
            difference(one["difference"], "control"),
        ]
        for arm, one in comparison["arms"].items()
    ]
    print(table(("arm", "users", "exposures", comparison["outcome"], f"less {comparison['control']}, {how}"), rows))
    print(f"Intervals of {comparison['level']:.0%} by bootstrap over users.")
    for note in comparison["notes"]:
        print(f"note: {note}")
