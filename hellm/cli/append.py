"""`hellm append`: newer events and items into a new data set."""

from __future__ import annotations

from collections.abc import Sequence

from hellm.cli._output import count, print_json
from hellm.cli._parser import new_parser, parse
from hellm.cli.data import add_reading_options, reading_options
from hellm.cli.features import CACHE_HELP

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "append",
        "DATA --events FILE [--items FILE] --out DIR [options]",
        "Write a new data set with newer events and items. Users and items that were there keep their rows, new ones "
        "follow; events that are there already are left out, so exports may overlap. The options of reading are about "
        "the new events. hellm refit then trains the models of a run on.",
    )
    parser.add_argument("data", metavar="DATA", help="data set, or a run of all stages, whose data are taken")
    parser.add_argument("--events", required=True, metavar="FILE", help="new events: file or folder of any known form")
    parser.add_argument("--items", metavar="FILE", help="table of new items: item, title, image, brand, ...")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    parser.add_argument("--overwrite", action="store_true", help="replace a data set that is there")
    parser.add_argument("--json", action="store_true", help="print the counts as one line of JSON")
    add_reading_options(parser)
    args = parse(parser, argv)
    from hellm.upkeep.append import append

    reading = reading_options(args)
    # Features are not read but made, as those of the data are.
    del reading["features"]
    split = reading.pop("split", None)
    options = {"split": split, "overwrite": args.overwrite, "cache": args.cache}
    report = append(args.data, args.events, args.out, args["items"], **options, **reading)
    if args.json:
        print_json(report)
        return 0
    print(
        f"{report['out']}: {count(report['num_events'])} events of {count(report['num_users'])} users on "
        f"{count(report['num_items'])} items"
    )
    print(
        f"  new: {count(report['new_events'])} events, {count(report['new_users'])} users, "
        f"{count(report['new_items'])} items; {count(report['repeated_events'])} events were there already"
    )
    for modality, number in report["without_features"].items():
        if number:
            print(f"  note: {count(number)} new items have no {modality} features; hellm features encodes them")
    return 0
