"""`hellm transitions`: what follows what, counted into a run directory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hellm.cli._output import count
from hellm.cli._training import run_training
from hellm.cli.data import summary
from hellm.config import TransitionsConfig, config_to_dict

__all__ = ["run"]


def run(argv: Sequence[str]) -> int:
    return run_training(
        argv,
        verb="transitions",
        description="Count what followed what, and spread it over items that are alike in content; choose settings by "
        "validation, score the test split once, and leave a run directory. It takes seconds.",
        plan=_plan,
        print_plan=_print_plan,
    )


def _plan(config: TransitionsConfig, dataset) -> dict[str, Any]:
    """What a run would do, without touching the disk."""
    from hellm.training.transitions import resolve_transitions_config

    config, notes = resolve_transitions_config(config, dataset)
    return {
        "dataset": dataset.summary(),
        "config": config_to_dict(config),
        "num_events": int((dataset.split == 0).sum()),
        "num_validations": len(config.decay) + len(config.content_weight) - 1,
        "notes": notes,
    }


def _print_plan(plan: dict[str, Any], dataset) -> None:
    print(f"{dataset.name}: {summary(dataset)}")
    print(f"  counted          {count(plan['num_events'])} events, {count(plan['num_validations'])} times validated")
    for note in plan["notes"]:
        print(f"  note             {note}")
    print("Nothing was counted or written (--dry-run).")
