"""The section on stage 2 of the generated page."""

from __future__ import annotations

from typing import Any

_UNITS = (("training", "targets"), ("training", "tokens"), ("scoring", "users"))
_DECISIVE = {"training": "targets", "scoring": "users"}


def target_rows(run: dict[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table of targets, the verdict as a bool in last place."""
    return [
        (
            f"llm-{one['what']}",
            f"{run['llm']}, {_DECISIVE[one['what']]}/s",
            "published loop",
            f"{one['at_least']:g}x",
            f"{one['value']:.1f}x",
            one["met"],
        )
        for one in run["targets"]
    ]


def rows(run: dict[str, Any]) -> list[list[str]]:
    """Work per second of both loops."""
    table = []
    for what, unit in _UNITS:
        values = [run["entries"][name][what][unit] for name in ("hellm", "published")]
        cells = [f"{one['median']:.3g} ({one['p20']:.3g} - {one['p80']:.3g})" for one in values]
        table.append([f"{what}, {unit}/s", *cells, f"{values[0]['median'] / values[1]['median']:.1f}x"])
    return table


def introduction(run: dict[str, Any]) -> str:
    sizes = run["parameters"]
    return (
        f"### Stage 2\n\nFine-tuning and scoring with {run['llm']} and {sizes['num_items']:,} items: the default (all "
        f"targets of a user in one pass, {sizes['batch_tokens']} tokens a step) beside the published loop (one history "
        f"per target, {sizes['published_batch']} a step, the whole prompt for each; one user at a time when scoring). "
        "A target is one next item that was learned from. A token costs the same in both; the published loop reads a "
        "whole prompt for each target. Medians, with the 20th and 80th percentile.\n"
    )
