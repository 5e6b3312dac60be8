"""`hellm data check | build | convert | sample`."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from hellm.cli._output import count, print_json
from hellm.cli._parser import PAIRS, new_parser, parse

__all__ = ["add_reading_options", "print_report", "reading_options", "run", "summary"]

_ACTIONS = {
    "check": "what is in a data set, and what in it is likely to bite",
    "build": "read any known form and write it in hellm's own, features included, for fast loading",
    "convert": "read any known form and write another",
    "sample": "write a made-up shop: events.csv, items.csv and pictures",
}
_HELP = """usage: hellm data ACTION ...      hellm data ACTION --help for its options

{actions}

Forms that are recognised: {forms}
"""


def run(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        from hellm.data import form_names

        lines = "\n".join(f"  {name:<10} {text}" for name, text in _ACTIONS.items())
        print(_HELP.format(actions=lines, forms=", ".join(form_names())), end="")
        return 0
    actions = {"check": _check, "build": _build, "convert": _convert, "sample": _sample}
    if argv[0] not in actions:
        nearest = difflib.get_close_matches(argv[0], actions, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"data action must be one of {', '.join(actions)}, got {argv[0]!r}{hint}")
    return actions[argv[0]](argv[1:])


def add_reading_options(parser, *, split_default: str = "the label in the data, else leave-two-out") -> None:
    """Options of `load_dataset` that every verb reading data has."""
    parser.add_argument(
        "--split",
        metavar="NAME",
        help="how events are held out: given, leave-two-out, ratio, time, item-cold or user-cold; "
        f"default: {split_default}",
    )
    parser.add_argument("--form", metavar="NAME", help="read the data as this form instead of recognising it")
    parser.add_argument(
        "--features",
        default="auto",
        metavar="HOW",
        help="auto, simple (built-in text and picture features where the data bring none) or none",
    )
    parser.add_argument(
        "--event-types", nargs="+", type=str, metavar="TYPE", help="only events of these types (form shop)"
    )
    parser.add_argument(
        "--missing-items", metavar="HOW", help="events on items that the item table lacks: error, keep or drop"
    )
    parser.add_argument("--min-rating", type=float, metavar="X", help="leave out events rated lower")
    parser.add_argument(
        "--columns",
        nargs="+",
        type=str,
        metavar=PAIRS,
        help="columns by name, where they have no usual one, e.g. time=sold_at user=cust attribute=colour",
    )
    parser.add_argument(
        "--separator", type=str, metavar="MARK", help="of the fields of a table: one character, tab or space"
    )
    parser.add_argument("--encoding", type=str, metavar="NAME", help="of text files, e.g. latin-1 (default: UTF-8)")


def reading_options(args) -> dict[str, Any]:
    """Arguments of `load_dataset` that were given."""
    names = ("split", "form", "features", "event_types", "missing_items", "min_rating", "separator", "encoding")
    given = {name: args[name] for name in names if args.get(name) is not None}
    return given | {"columns": _columns(args.columns)} if args.get("columns") else given


def _columns(pairs: Sequence[str]) -> dict[str, list[str]]:
    """ "role=column" of each pair as role -> columns."""
    columns: dict[str, list[str]] = {}
    for pair in pairs:
        role, equals, name = pair.partition("=")
        if not (role and equals and name):
            raise ValueError(f"--columns must be given as role=column, e.g. time=sold_at, got {pair!r}")
        columns.setdefault(role, []).append(name)
    return columns


def _check(argv: Sequence[str]) -> int:
    parser = new_parser("data check", "DATA [options]", f"Report {_ACTIONS['check']}; nothing is changed.")
    parser.add_argument("data", metavar="DATA", help="folder or file of any known form")
    add_reading_options(parser)
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    args = parse(parser, argv)
    from hellm.data import check_dataset

    report = check_dataset(args.data, **reading_options(args))
    if args.json:
        print_json(report)
    else:
        print_report(report)
    return 0


def _build(argv: Sequence[str]) -> int:
    return _write("build", argv)


def _convert(argv: Sequence[str]) -> int:
    return _write("convert", argv)


def _write(action: str, argv: Sequence[str]) -> int:
    converts = action == "convert"
    usage = "SOURCE OUT --to FORM [options]" if converts else "SOURCE OUT [options]"
    parser = new_parser(f"data {action}", usage, f"{_ACTIONS[action][0].upper()}{_ACTIONS[action][1:]}.")
    parser.add_argument("source", metavar="SOURCE", help="folder or file of any known form")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    if converts:
        from hellm.data import form_names

        writable = ", ".join(form_names(writable=True))
        parser.add_argument("--to", required=True, metavar="FORM", help=f"form to write: {writable}")
    add_reading_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--json", action="store_true", help="print what was written as one line of JSON")
    args = parse(parser, argv)
    from hellm._folders import check_target
    from hellm.data import load_dataset, save_dataset

    form = args.to if converts else "hellm"
    check_target(args.out, kind="data", overwrite=args.overwrite, inputs=[args.source])
    dataset = load_dataset(args.source, **reading_options(args))
    save_dataset(dataset, args.out, form=form, overwrite=args.overwrite)
    if args.json:
        print_json({"out": str(args.out), "form": form} | dataset.summary())
        return 0
    print(f"{args.out} (form {form}): {summary(dataset)}")
    for note in dataset.notes:
        print(f"  note: {note}")
    return 0


def _sample(argv: Sequence[str]) -> int:
    parser = new_parser("data sample", "OUT [options]", f"{_ACTIONS['sample'][0].upper()}{_ACTIONS['sample'][1:]}.")
    parser.add_argument("out", metavar="OUT", help="folder to make")
    parser.add_argument("--num-users", type=int, default=600, metavar="N")
    parser.add_argument("--num-items", type=int, default=240, metavar="N")
    parser.add_argument("--num-groups", type=int, default=8, metavar="N", help="groups of items that belong together")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same files")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    args = parse(parser, argv)
    from hellm.data import write_sample_shop

    write_sample_shop(
        args.out,
        num_users=args.num_users,
        num_items=args.num_items,
        num_groups=args.num_groups,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    print(f"{args.out}: {count(args.num_users)} users, {count(args.num_items)} items in {args.num_groups} groups")
    return 0


def summary(dataset) -> str:
    """Counts of a data set in one line."""
    parts = ", ".join(f"{name} {count(number)}" for name, number in dataset.split_counts().items())
    return (
        f"{count(dataset.num_users)} users, {count(dataset.num_items)} items, {count(dataset.num_events)} events "
        f"({dataset.split_name} split: {parts})"
    )


def print_report(report: dict[str, Any]) -> None:
    """The report of `check_dataset` for people: counts, then whatever deserves a look."""
    from hellm.data.check import check_remarks

    events, lengths = report["events"], report["history_length"]
    print(f"{report['name']} (form {report['form']}, split {report['split']})")
    parts = ", ".join(f"{name} {count(events[name])}" for name in events if name != "total")
    rows = [
        ["users", count(report["users"])],
        ["items", count(report["items"])],
        ["events", f"{count(events['total'])} ({parts})"],
        ["density", f"{report['density']:.3%} of all user-item pairs"],
    ]
    if lengths is not None:
        spread = f"{lengths['p0']:.0f} to {lengths['p100']:.0f} events per user, median {lengths['p50']:.0f}"
        rows.append(["history", spread])
    rows.append(["order", _order(report)])
    if report["columns"]:
        rows.append(["columns", ", ".join(f"{role} {column!r}" for role, column in report["columns"].items())])
    for name, feature in report["features"].items():
        without = f"{count(feature['missing'])} items without"
        rows.append([f"{name} features", f"{feature['dim']} numbers per item, {without}"])
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"  {name:<{width}}  {text}" for name, text in rows))
    remarks = [*check_remarks(report).values(), *report["notes"]]
    print("Worth a look:" if remarks else "Nothing stands out.")
    print("".join(f"  - {remark}\n" for remark in remarks), end="")


def _order(report: dict[str, Any]) -> str:
    if not report["time"]["known"]:
        return f"{report['order']['by']}, as there are no times"
    return f"by {report['order']['by']}, from {report['time']['first_day']} to {report['time']['last_day']}"
