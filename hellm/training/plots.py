"""Curves of one run as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["plot_curves"]


def plot_curves(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    metrics: Sequence[str],
    best_epoch: int | None = None,
    title: str = "",
) -> None:
    """Draw mean loss terms per step and validation metrics over epochs into a PNG file.

    Args:
        records: as in metrics.jsonl: "epoch", "*_mean" losses, "valid_*" metrics where validated.
        path: PNG file.
        metrics: validation metrics to draw, e.g. "recall@20".
        best_epoch: marked with a dashed line.
        title: of the figure.
    """
    # The object interface: no global state, no display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set(title="training loss, mean per step", xlabel="epoch", ylabel="loss")
    for name in dict.fromkeys(name for record in records for name in record if name.endswith("_mean")):
        left.plot(*_series(records, name), label=name.removesuffix("_mean").replace("_", " "), marker=".", markersize=4)
    right.set(title="validation", xlabel="epoch", ylabel="metric")
    for name in metrics:
        right.plot(*_series(records, f"valid_{name}"), label=name, marker="o", markersize=4)
    for axes in (left, right):
        if best_epoch is not None:
            axes.axvline(best_epoch, color="0.5", linestyle="--", linewidth=1, label=f"best epoch ({best_epoch})")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(title, parse_math=False)
    figure.savefig(path, dpi=120, format="png")


def _series(records: Sequence[Mapping[str, Any]], name: str) -> tuple[list[float], list[float]]:
    # The end of an epoch stands at its number, so a validation within it stands before.
    points = [
        (record.get("epochs_done", record["epoch"] + 1) - 1, record[name]) for record in records if name in record
    ]
    return [epoch for epoch, _ in points], [value for _, value in points]
