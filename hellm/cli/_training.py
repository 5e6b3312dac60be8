"""What the verbs that train have in common: their options, where their settings come from, what they print."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hellm.artifact.files import CONFIG
from hellm.cli._output import count, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser, parse
from hellm.cli.data import add_reading_options, reading_options
from hellm.config import config_from_dict, config_to_dict, load_config, load_saved_config, presets_of

__all__ = ["parse_settings", "print_result", "run_training", "settings_parser"]

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

ConfigT = TypeVar("ConfigT", bound="DataclassInstance")


def run_training(
    argv: Sequence[str],
    *,
    verb: str,
    description: str,
    plan: Callable[..., dict[str, Any]],
    print_plan: Callable[[dict[str, Any], Any], None],
    train: Callable[..., dict[str, Any]] | None = None,
) -> int:
    """One training verb, of `hellm.training.trainers.STAGES`.

    Args:
        argv: arguments after the verb.
        description: for the help, before the sentence on settings.
        plan: (config, dataset, and the inputs) -> what `--dry-run` says, as plain values.
        print_plan: (plan, dataset) -> the same for people.
        train: (config, dataset, out, resume=, overwrite=, and the inputs) -> the result; None is that of the stage.
    """
    from hellm.training.trainers import STAGES

    stage = STAGES[verb]
    parser = settings_parser(verb, description, stage.config, stage.inputs)
    args, config = parse_settings(parser, argv, stage.config)
    from hellm.data import load_dataset

    runs = {name: args[name] for name in stage.inputs}
    if args.dry_run:
        dataset = load_dataset(args.data, **reading_options(args))
        planned = plan(config, dataset, **runs)
        print_json(planned) if args.json else print_plan(planned, dataset)
        return 0
    if args.out is None:
        raise ValueError("missing: --out (the run directory to make)")
    from hellm.artifact.run_directory import check_run

    # Before the data are read, which may take long.
    check_run(args.out, resume=args.resume, overwrite=args.overwrite, inputs=[args.data, *runs.values()])
    dataset = load_dataset(args.data, **reading_options(args))
    train = stage.train if train is None else train
    result = train(config, dataset, args.out, resume=args.resume, overwrite=args.overwrite, **runs)
    if args.json:
        print_json(result)
    else:
        print_result(result, args.out)
    return 0


def settings_parser(
    verb: str,
    description: str,
    config_class: type,
    inputs: Mapping[str, str] | None = None,
    *,
    dry_run: str = "only print what would be trained",
    json: str = "print result.json as one line, the last of the output",
):
    """The options of a verb that makes run directories, with every setting of `config_class`.

    `inputs` is name -> help of options for runs of other stages; `dry_run` and `json` are the help of those options.
    """
    inputs = inputs or {}
    presets = ", ".join(presets_of(config_class))
    parser = new_parser(
        verb,
        "--data DIR --out DIR "
        + "".join(f"[--{name} RUN] " for name in inputs)
        + "[--preset NAME | --config FILE] [SETTING=VALUE ...]",
        f"{description} Every setting below can be given as --name VALUE or name=VALUE.",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="data set of any known form")
    parser.add_argument("--out", metavar="DIR", help="run directory to make")
    for name, text in inputs.items():
        parser.add_argument(f"--{name}", type=str, metavar="RUN", help=text)
    parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {presets}")
    parser.add_argument("--config", metavar="FILE", help="start from a YAML file, e.g. config.yaml of another run")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, or start one")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--dry-run", action="store_true", help=dry_run)
    parser.add_argument("--json", action="store_true", help=json)
    add_reading_options(parser)
    add_settings(parser, config_class)
    return parser


def parse_settings(
    parser, argv: Sequence[str], config_class: type[ConfigT], *, resumed: str = CONFIG
) -> tuple[Any, ConfigT]:
    """The options, and the settings among them: preset, config file or resumed run, with single settings on top.

    `resumed` is the file with the settings of what --resume goes on with.
    """
    _use_base(parser, argv, config_class, resumed)
    args = parse(parser, argv)
    values = args.as_dict()
    return args, config_from_dict(config_class, {field.name: values[field.name] for field in fields(config_class)})


def _use_base(parser, argv: Sequence[str], config_class: type, resumed: str) -> None:
    """Make the preset, the config file or the settings of the run to resume the parser's defaults.

    Only defaults that are there before parsing show up in the help and give way to single settings.
    """
    given = {name: _value_of(name, argv) for name in ("preset", "config", "out")}
    if given["preset"] is not None and given["config"] is not None:
        raise ValueError("give either --preset or --config, got both")
    base = None
    if given["preset"] is not None:
        base = load_config(config_class, given["preset"])
    elif given["config"] is not None:
        if not Path(given["config"]).is_file():
            raise FileNotFoundError(f"config file {given['config']} does not exist")
        base = load_config(config_class, given["config"])
    elif "--resume" in argv and given["out"] is not None and (Path(given["out"]) / resumed).is_file():
        base = load_saved_config(config_class, Path(given["out"]) / resumed)
    if base is not None:
        parser.set_defaults(_dotted(config_to_dict(base)))


def _value_of(name: str, argv: Sequence[str]) -> str | None:
    found = None
    for place, one in enumerate(argv):
        if one == f"--{name}" and place + 1 < len(argv):
            found = argv[place + 1]
        for prefix in (f"--{name}=", f"{name}="):
            if one.startswith(prefix):
                found = one[len(prefix) :]
    return found


def _dotted(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _dotted(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def print_result(result: dict[str, Any], out: str | Path, metrics: Sequence[str] | None = None) -> None:
    """What a run came to, for people; `metrics` None shows all."""
    seconds = result.get("seconds")
    if "chosen" in result:
        best = ", ".join(f"{name} {value:g}" for name, value in result["chosen"].items())
    else:
        best = f"best epoch {result['best_epoch']} of {result['num_epochs']}"
    print(f"{out}: {best}" + (f", {duration(seconds)}" if seconds is not None else ""))
    for name, recall in result.get("knn_recall", {}).items():
        print(f"  neighbours by {name} are approximate: {recall:.4f} of the exact ones are found")
    test = result["test"]
    if test is None:
        print("  no test events, so nothing was scored")
        return
    intervals = test.get("confidence_intervals", {})
    rows = []
    for name in metrics or test["metrics"]:
        value = test["metrics"][name]
        valid = result["valid"]["metrics"].get(name)
        interval = intervals.get(name)
        rows.append(
            [
                name,
                f"{value:.4f}",
                f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "",
                f"{valid:.4f}" if valid is not None else "",
            ]
        )
    print(table(("metric", "test", "95% interval", "validation"), rows))
    print(f"  {count(test['num_users'])} users, protocol {test['protocol']}: {test['protocol_description']}")
