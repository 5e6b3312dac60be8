"""Pictures of what the verbs found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hellm._files import atomic_path

__all__ = ["plot_ablation", "plot_planted_structure"]


def plot_planted_structure(
    path: Path, items: np.ndarray, group: np.ndarray, names: Sequence[str], shares: Mapping[str, float]
) -> None:
    """Similarity of all items, shuffled and sorted by planted group, and how well the lists keep to the groups.

    Args:
        path: PNG file.
        items: [num_items, D] learned embeddings.
        group: [num_items] planted group of each item.
        names: What each group is called.
        shares: "model", "popularity" and "chance": share of recommendations in the groups a user likes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    unit = items / np.linalg.norm(items, axis=1, keepdims=True).clip(min=1e-12)
    cosine = unit @ unit.T
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.75))
    shuffled = np.random.default_rng(0).permutation(len(group))
    order = np.argsort(group, kind="stable")
    for axes, rows in ((left, shuffled), (middle, order)):
        image = axes.imshow(cosine[np.ix_(rows, rows)], cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    left.set(title="products in random order", xlabel="product", ylabel="product", xticks=[], yticks=[])
    borders = np.cumsum(np.bincount(group))
    middle.set(title="the same, sorted by planted group", xticks=[])
    middle.set_yticks(borders - np.bincount(group) / 2 - 0.5, names, fontsize=9)
    middle.tick_params(length=0)
    for border in borders[:-1] - 0.5:
        middle.axhline(border, color="black", linewidth=0.4)
        middle.axvline(border, color="black", linewidth=0.4)
    bar = figure.colorbar(image, ax=[left, middle], location="bottom", shrink=0.4, aspect=40, ticks=(-1, 0, 1))
    bar.set_label("cosine of the learned embeddings")
    labels = ("hellm", "popularity", "chance")
    values = [100 * shares[name] for name in ("model", "popularity", "chance")]
    bars = right.bar(labels, values, color=("#b2182b", "#6b7f99", "#c4c9d0"), width=0.6)
    right.bar_label(bars, fmt="%.0f%%", padding=3)
    right.set(title="first 10 recommendations", ylabel="% in groups the user likes", ylim=(0, 108))
    right.spines[["top", "right"]].set_visible(False)
    right.set_box_aspect(1 / 0.8)
    with atomic_path(path) as temporary:
        _save_small(figure, temporary)


def _save_small(figure: Any, path: Path) -> None:
    """A PNG of few colours: noise in many makes a file of half a megabyte."""
    from PIL import Image

    figure.canvas.draw()
    whole = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3])
    whole.quantize(128, method=Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, format="png", optimize=True
    )


def plot_ablation(
    path: Path,
    labels: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[tuple[float, float]],
    *,
    metric: str,
    interval: str,
    title: str,
) -> None:
    """Horizontal bars with intervals, one per row, beside the value of the first row, the full model.

    Args:
        path: PNG file.
        labels: of the rows, from the top; the first is the full model.
        values: [rows] test metric.
        intervals: [rows] low and high of each value.
        metric: its name.
        interval: what the intervals are.
        title: of the figure.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.6 + 0.42 * len(labels)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    # An interval need not hold its value: percentiles of a skewed bootstrap.
    errors = np.abs(
        [
            [value - min(low, value), max(high, value) - value]
            for value, (low, high) in zip(values, intervals, strict=True)
        ]
    ).T
    colors = ["#b2182b", *["#6b7f99"] * (len(labels) - 1)]
    axes.barh(
        range(len(labels)), values, xerr=errors, color=colors, height=0.62, error_kw={"capsize": 3, "ecolor": "0.25"}
    )
    axes.axvline(values[0], color="#b2182b", linestyle="--", linewidth=1)
    right = max(value + error for value, error in zip(values, errors[1], strict=True))
    for place, value in enumerate(values):
        difference = "" if place == 0 else f"  ({value - values[0]:+.4f})"
        axes.text(1.02 * right, place, f"{value:.4f}{difference}", va="center", fontsize=9)
    axes.set_yticks(range(len(labels)), labels)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set(xlabel=f"test {metric} with {interval}", xlim=(0, 1.3 * right or 1.0), title=title)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
