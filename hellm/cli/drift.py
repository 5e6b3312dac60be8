"""`hellm drift`: recent events beside what a run was trained on, and what it shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, print_json, table
from hellm.cli._parser import new_parser, parse
from hellm.cli.data import add_reading_options, reading_options

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    parser = new_parser(
        "drift",
        "RUN --events FILE [options]",
        "Compare recent events with those that a run was trained on: unknown users and items, lengths of histories, "
        "popularity of what is bought; and say what the run shows to the people behind them: how much of the "
        "catalogue, how many new items, how popular they are, and how many recent events it had in its lists.",
    )
    parser.add_argument("run", metavar="RUN", help="run directory")
    parser.add_argument("--events", required=True, metavar="FILE", help="recent events: file or folder of any form")
    parser.add_argument("-k", type=int, default=10, metavar="N", help="length of the lists that are looked at")
    parser.add_argument("--num-users", type=int, default=1000, metavar="N", help="users recommended to, at most")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of their choice")
    parser.add_argument("--llm", metavar="PATH", help="where the language model of a fine-tuning run is, if moved")
    parser.add_argument("--device", default="auto", metavar="NAME", help="reads histories: auto, cpu, cuda or cuda:N")
    parser.add_argument("--json", action="store_true", help="print the report as one line of JSON")
    add_reading_options(parser)
    args = parse(parser, argv)
    for name in ("k", "num_users"):
        if args[name] < 1:
            raise ValueError(f"{'-k' if name == 'k' else '--num-users'} must be >= 1, got {args[name]}")
    from hellm._devices import resolve_device
    from hellm.upkeep.drift import drift

    reading = reading_options(args)
    for name in ("features", "split"):
        reading.pop(name, None)
    options = {"k": args.k, "num_users": args.num_users, "seed": args.seed, "language_model": args.llm}
    report = drift(args.run, args.events, device=resolve_device(args.device), **options, **reading)
    print_json(report) if args.json else _print(report)
    return 0


def _print(report: Mapping[str, Any]) -> None:
    events, users, items, shown = (report[name] for name in ("events", "users", "items", "shown"))
    who, what = (
        f"{count(one['count'])} {name} ({count(one['unknown'])} unknown)"
        for name, one in (("users", users), ("items", items))
    )
    print(f"{count(events['count'])} recent events of {who} on {what}")
    rows = [
        ("events by unknown users", _percent(events["by_unknown_users"]), ""),
        ("events on unknown items", _percent(events["on_unknown_items"]), ""),
        ("events on known items without training events", _percent(events["on_untrained_items"]), "0.0%"),
        (
            "events on the most popular tenth of the items",
            _percent(events["on_popular_items"]),
            _percent(events["on_popular_items_in_training"]),
        ),
        (
            "events of a user: median, 90th percentile",
            _lengths(users["events_per_user"]),
            _lengths(users["events_per_user_in_training"]),
        ),
    ]
    print(table(("", "recent", "training"), rows))
    bases = ", ".join(f"{count(number)} by {basis}" for basis, number in shown["lists"].items()) or "none"
    print(f"shown to {count(shown['users'])} of these users, lists of {shown['k']} ({bases}):")
    rows = [
        ("catalogue that is shown", _percent(shown["coverage"])),
        ("places with items without training events", _percent(shown["untrained_items"])),
        ("places with the most popular tenth", _percent(shown["popular_items"])),
        ("recent events, new to their user, that the list had", _percent(shown["found"])),
    ]
    print(table(("", "share"), rows))


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _lengths(lengths: Mapping[str, float] | None) -> str:
    return "" if lengths is None else f"{lengths['median']:g}, {lengths['p90']:g}"
