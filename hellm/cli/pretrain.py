"""`hellm pretrain`: stage 1 into a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hellm.cli._output import count, duration, print_json, table
from hellm.cli._parser import add_settings, new_parser, parse
from hellm.cli.data import add_reading_options, describe, reading_options, summary
from hellm.config import PRESETS, PretrainConfig, config_from_dict, config_to_dict, load_config

__all__ = ["print_result", "run"]


def run(argv: Sequence[str]) -> int:
    parser = _parser()
    _use_base(parser, argv)
    args = parse(parser, argv)
    config = _config(args)
    from hellm.data import load_dataset

    dataset = load_dataset(args.data, **reading_options(args))
    if args.dry_run:
        plan = _plan(config, dataset)
        print_json(plan) if args.json else _print_plan(plan, dataset)
        return 0
    if args.out is None:
        raise ValueError("missing: --out (the run directory to make)")
    from hellm.evaluate import evaluate_dataset
    from hellm.training.pretrain import pretrain

    result = pretrain(
        config, dataset, args.out, evaluate=evaluate_dataset, resume=args.resume, overwrite=args.overwrite
    )
    if args.json:
        print_json(result)
    else:
        print_result(result, args.out)
    return 0


def _parser():
    presets = ", ".join(PRESETS[PretrainConfig])
    parser = new_parser(
        "pretrain",
        "--data DIR --out DIR [--preset NAME | --config FILE] [SETTING=VALUE ...]",
        "Train the graph encoder, choose the best epoch by validation, score the test split once, and leave a run "
        "directory. Every setting below can be given as --name VALUE or name=VALUE.",
    )
    parser.add_argument("--data", required=True, metavar="DIR", help="data set of any known form")
    parser.add_argument("--out", metavar="DIR", help="run directory to make")
    parser.add_argument("--preset", metavar="NAME", help=f"start from these settings: {presets}")
    parser.add_argument("--config", metavar="FILE", help="start from a YAML file, e.g. config.yaml of another run")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run, or start one")
    parser.add_argument("--overwrite", action="store_true", help="replace a run that is there")
    parser.add_argument("--dry-run", action="store_true", help="only print what would be trained")
    parser.add_argument("--json", action="store_true", help="print result.json as one line, the last of the output")
    add_reading_options(parser)
    add_settings(parser, PretrainConfig)
    return parser


def _use_base(parser, argv: Sequence[str]) -> None:
    """Make the preset, the config file or the settings of the run to resume the parser's defaults.

    Only defaults that are there before parsing show up in the help and give way to single settings.
    """
    given = {name: _value_of(name, argv) for name in ("preset", "config", "out")}
    if given["preset"] is not None and given["config"] is not None:
        raise ValueError("give either --preset or --config, got both")
    base = None
    if given["preset"] is not None:
        base = load_config(PretrainConfig, given["preset"])
    elif given["config"] is not None:
        if not Path(given["config"]).is_file():
            raise FileNotFoundError(f"config file {given['config']} does not exist")
        base = load_config(PretrainConfig, given["config"])
    elif "--resume" in argv and given["out"] is not None and (Path(given["out"]) / "config.yaml").is_file():
        base = load_config(PretrainConfig, Path(given["out"]) / "config.yaml")
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


def _config(args) -> PretrainConfig:
    values = args.as_dict()
    return config_from_dict(PretrainConfig, {field.name: values[field.name] for field in fields(PretrainConfig)})


def _plan(config: PretrainConfig, dataset) -> dict[str, Any]:
    """What a run would do, without building graphs or touching the disk."""
    from hellm.training.pretrain import build_sampler, resolve_config

    config, notes = resolve_config(config, dataset)
    model = config.model
    sampler = build_sampler(config, dataset)
    rows = (1 + model.user_hypergraph) * dataset.num_users + (1 + model.item_hypergraph) * dataset.num_items
    return {
        "dataset": describe(dataset),
        "config": config_to_dict(config),
        "steps_per_epoch": sampler.num_steps,
        "max_steps": sampler.num_steps * config.max_epochs,
        "num_embedding_parameters": rows * model.embedding_dim,
        # Weights, gradients and Adam's two moments in float32.
        "parameter_memory_bytes": 16 * rows * model.embedding_dim,
        "notes": notes,
    }


def _print_plan(plan: dict[str, Any], dataset) -> None:
    config = plan["config"]
    model = config["model"]
    graphs = [f"{model['backbone']} on the user-item graph"]
    graphs += ["a user hypergraph"] if model["user_hypergraph"] else []
    graphs += [f"an item hypergraph from {', '.join(model['modalities'])}"] if model["item_hypergraph"] else []
    print(f"{dataset.name}: {summary(dataset)}")
    print(f"  model            {', '.join(graphs)}")
    print(
        f"  parameters       {count(plan['num_embedding_parameters'])} in embeddings "
        f"({plan['parameter_memory_bytes'] / 2**20:.0f} MiB with gradients and optimiser)"
    )
    print(
        f"  training         {count(plan['steps_per_epoch'])} steps per epoch, at most {count(config['max_epochs'])} "
        f"epochs, on {config['device']}"
    )
    for note in plan["notes"]:
        print(f"  note             {note}")
    print("Nothing was trained or written (--dry-run).")


def print_result(result: dict[str, Any], out: str | Path, metrics: Sequence[str] | None = None) -> None:
    """What a run came to, for people; `metrics` None shows all."""
    seconds = result.get("seconds")
    best = f"best epoch {result['best_epoch']} of {result['num_epochs']}"
    print(f"{out}: {best}" + (f", {duration(seconds)}" if seconds is not None else ""))
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
