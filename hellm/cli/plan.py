"""`hellm plan`: what the stages will take, before they run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hellm.cli._output import count, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser
from hellm.cli._training import parse_settings
from hellm.config import RunConfig

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    from hellm.plan.model import STAGES

    parser = new_parser(
        "plan",
        "DATA | --events N --users N --items N [--stages NAME ...] [--preset NAME | --config FILE] [SETTING=VALUE ...]",
        "Time, memory, disk and traffic of each stage on this machine, for a data set or for sizes alone: the commands "
        "run on four small made-up shops, which takes some minutes, and a model of cost says what grows from there. "
        "Settings are those of `hellm run`, and can be given as --name VALUE or name=VALUE.",
    )
    parser.add_argument("data", nargs="?", type=str, metavar="DATA", help="data set of any known form")
    for name in ("events", "users", "items"):
        parser.add_argument(f"--{name}", type=float, metavar="N", help=f"{name} of data that are not there, as in 1e9")
    parser.add_argument("--stages", nargs="+", type=str, metavar="NAME", help=f"these only: {', '.join(STAGES)}")
    parser.add_argument(
        "--processes", type=int, default=1, metavar="N", help="that train together; plans what they send"
    )
    parser.add_argument("--folder", type=str, metavar="DIR", help="for the samples, which are deleted again")
    parser.add_argument("--preset", metavar="NAME", help="start from these settings of `hellm run`")
    parser.add_argument("--config", metavar="FILE", help="start from a YAML file, e.g. config.yaml of `hellm run`")
    parser.add_argument("--json", action="store_true", help="print the plan as one line of JSON")
    add_settings(parser, RunConfig)
    args, config = parse_settings(parser, argv, RunConfig)
    if args.processes < 1:
        raise ValueError(f"--processes must be >= 1, got {args.processes}")
    from hellm.plan import plan

    sizes, widths = _sizes(args)
    planned = plan(
        sizes,
        config,
        args.stages,
        widths=widths,
        processes=args.processes,
        folder=None if args.folder is None else Path(args.folder),
    )
    print_json(planned) if args.json else _print(planned)
    return 0


def _sizes(args: Any) -> tuple[Any, dict[str, int] | None]:
    """What is planned for, and the features of its items."""
    from hellm.plan import Sizes

    given = {name: args[name] for name in ("events", "users", "items")}
    if args.data is None:
        missing = [name for name, value in given.items() if value is None]
        if missing:
            raise ValueError(f"give a data set, or --events, --users and --items; missing: --{missing[0]}")
        return Sizes(**given), None
    from hellm.data import load_dataset

    data = load_dataset(args.data)
    there = {"events": data.num_events, "users": data.num_users, "items": data.num_items}
    widths = {name: one.values.shape[1] for name, one in data.item_features.items()}
    return Sizes(**{name: there[name] if value is None else value for name, value in given.items()}), widths


def _print(planned: Mapping[str, Any]) -> None:
    sizes = planned["sizes"]
    print(", ".join(f"{count(round(sizes[name]))} {name}" for name in ("events", "users", "items")))
    head = ["stage", "time, at most", "steps an epoch", "an epoch", "memory", "disk"]
    several = planned["processes"] > 1
    rows = [
        [
            name,
            duration(one["seconds"]),
            count(one["steps_per_epoch"]) if one["steps_per_epoch"] else "",
            duration(one["seconds_per_epoch"]) if one["steps_per_epoch"] else "",
            _bytes(one["peak_bytes"]),
            _bytes(one["disk_bytes"]),
            *([_bytes(one["sent_bytes"]) if one["sent_bytes"] else ""] if several else []),
        ]
        for name, one in planned["stages"].items()
    ]
    print(table([*head, *(["sent by each process"] if several else [])], rows))
    memory, free = planned["memory_bytes"], planned["free_bytes"]
    print(f"  all: {duration(planned['seconds'])}, {_bytes(planned['disk_bytes'])} on disk ({_bytes(free)} are free)")
    if memory is not None and planned["peak_bytes"] > memory:
        print(f"  this machine has {_bytes(memory)} of memory, less than the {_bytes(planned['peak_bytes'])} needed")
    for note in planned["notes"]:
        print(f"  note: {note}")
    print("  A model, whose rates were measured here; times are for max_epochs, which patience may cut short.")


def _bytes(value: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e6:.0f} MB"
