"""`hellm search`: settings of a stage by validation."""

from __future__ import annotations

import difflib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hellm.cli._output import count, duration, print_json, table
from hellm.cli._training import parse_settings, settings_parser
from hellm.cli.data import reading_options
from hellm.config import config_to_dict

__all__ = ["print_search", "run"]

_HELP = """usage: hellm search STAGE ...      hellm search STAGE --help for its options

{stages}

Try many settings of a stage, and keep those that validation finds best; the test split is never opened.
"""
# Of the table: the best ones.
_SHOWN = 20


def run(argv: Sequence[str]) -> int:
    from hellm.training.search import BASE, check_search, search
    from hellm.training.trainers import SEARCHED, STAGES

    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP.format(stages="\n".join(f"  {name:<10} as hellm {name} trains it" for name in SEARCHED)), end="")
        return 0
    stage, *rest = argv
    if stage not in SEARCHED:
        nearest = difflib.get_close_matches(stage, SEARCHED, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"STAGE must be one of {', '.join(SEARCHED)}, got {stage!r}{hint}")
    inputs = STAGES[stage].inputs
    parser = _parser(stage, SEARCHED[stage], inputs)
    space, rest = _split(rest, config_to_dict(SEARCHED[stage]()))
    args, config = parse_settings(parser, rest, SEARCHED[stage], resumed=BASE)
    if args.dry_run:
        return _print_plan(stage, space, config, args)
    missing = [name for name in ("out", "trials") if args[name] is None]
    if missing:
        raise ValueError(f"missing: {', '.join(f'--{name}' for name in missing)}")
    from hellm.data import load_dataset

    runs = {name: args[name] for name in inputs}
    check_search(args.out, resume=args.resume, overwrite=args.overwrite, inputs=[args.data, *runs.values()])
    found = search(
        stage,
        load_dataset(args.data, **reading_options(args)),
        args.out,
        num_trials=args.trials,
        space=space or None,
        config=config,
        resume=args.resume,
        overwrite=args.overwrite,
        on_trial=lambda trial: print(_line(trial), file=sys.stderr),
        **runs,
    )
    print_json(found) if args.json else print_search(found, args.out, ["--data", args.data, *_given(runs)])
    return 0


def _parser(stage: str, config_class: type, inputs: Mapping[str, str]):
    from hellm.training.search_space import SPACES

    parser = settings_parser(
        f"search {stage}",
        f"Train {stage} with many settings and keep those that validation finds best: the first trial has the settings "
        "given, the next are drawn at random, then by what was good so far, and a trial that falls behind is given up. "
        "The test split is never opened. SETTING=LOW..HIGH, SETTING=LOW..HIGH:log and SETTING=VALUE,VALUE,... are "
        f"searched ({' '.join(SPACES[config_class])} if there is none), SETTING=VALUE holds for all trials.",
        config_class,
        inputs,
        dry_run="only print what would be searched",
        json="print search.json as one line, the last of the output",
    )
    parser.usage = str(parser.usage).replace("--out DIR ", "--out DIR --trials N ", 1) + " [SETTING=SPACE ...]"
    parser.add_argument("--trials", type=int, metavar="N", help="trials in all, those before --resume counted")
    return parser


def _split(argv: Sequence[str], settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """The words of the space, with names as settings are called, and all others."""
    from hellm.training.search_space import is_dimension

    space, others = [], []
    for word in argv:
        name, equals, value = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        if equals and name.split(".")[0] in settings and is_dimension(value):
            space.append(f"{name}={value}")
        else:
            others.append(word)
    return space, others


def _print_plan(stage: str, words: Sequence[str], config: Any, args) -> int:
    from hellm.training.search_space import SPACES, parse_space

    words = words or SPACES[type(config)]
    parse_space(words, config)
    plan = {"stage": stage, "trials": args.trials, "monitor": config.monitor[0], "space": list(words)}
    if args.json:
        print_json(plan)
        return 0
    trials = "trials" if args.trials is None else f"{count(args.trials)} trials"
    print(f"hellm search {stage}: {trials} of at most {config.max_epochs} epochs, by validation {config.monitor[0]}")
    for word in words:
        print(f"  {word}")
    print("Nothing was trained or written (--dry-run).")
    return 0


def _line(trial: Mapping[str, Any]) -> str:
    value = "" if trial["value"] is None else f" {trial['value']:.4f}"
    why = f" ({trial['why']})" if trial["why"] else ""
    settings = " ".join(f"{name}={_shown(value)}" for name, value in trial["settings"].items())
    return f"trial {trial['trial']}: {trial['state']}{value}{why}, {duration(trial['seconds'])}, {settings}"


def print_search(found: Mapping[str, Any], out: str, options: Sequence[str] = ()) -> None:
    """The best trials as a table for people, and how to train with the best settings; `options` are of that command."""
    states = [trial["state"] for trial in found["trials"]]
    parts = ", ".join(f"{states.count(one)} {one}" for one in ("finished", "given up", "failed") if one in states)
    print(f"{found['data']}: {len(states)} trials of {found['stage']}, {parts}")
    names = list(found["space"])
    ranked = sorted(found["trials"], key=lambda one: (one["state"] != "finished", -(one["value"] or 0)))
    rows = [
        [
            str(trial["trial"]),
            "" if trial["value"] is None else f"{trial['value']:.4f}",
            trial["state"],
            "" if trial["best_epoch"] is None else str(trial["best_epoch"]),
            duration(trial["seconds"]),
            *(_shown(trial["settings"].get(name, "")) for name in names),
        ]
        for trial in ranked[:_SHOWN]
    ]
    print(table(("trial", f"valid {found['monitor']}", "", "best epoch", "time", *names), rows))
    if len(ranked) > _SHOWN:
        print(f"  and {len(ranked) - _SHOWN} more in {out}/search.json")
    if found["best"] is None:
        print("No trial was finished, so there is no config.yaml.")
        return
    command = shlex.join(["hellm", found["stage"], *options, "--config", f"{out}/config.yaml", "--out", "RUN"])
    print(
        f"The settings of trial {found['best']} are in {out}/config.yaml. The test split was not opened; train with\n"
        f"    $ {command}"
    )


def _given(runs: Mapping[str, str | None]) -> list[str]:
    return [word for name, run in runs.items() if run is not None for word in (f"--{name}", run)]


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
