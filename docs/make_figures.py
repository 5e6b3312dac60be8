"""The figures of the documentation: python docs/make_figures.py.

planted_structure.png is the picture that `hellm demo` draws of its first stage; the others are drawn here, the fusion
from the results in benchmarks/results.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon

DOCS = Path(__file__).resolve().parent
FIGURES = DOCS / "figures"
RESULTS = DOCS.parent / "benchmarks" / "results"
RED, BLUE, GREEN, GREY, DARK = "#b2182b", "#4575b4", "#5aae61", "#c4c9d0", "#2f3b4a"


def main() -> None:
    for name, figure in (("hypergraph", hypergraph()), ("contrast", contrast()), ("fusion", fusion())):
        figure.savefig(FIGURES / f"{name}.png", dpi=130, metadata={"Software": None})


def hypergraph() -> Figure:
    """Four purchases as a hypergraph, its incidence matrix, and one convolution as two products."""
    points = {"ann": (0.0, 1.6), "bob": (1.1, 2.0), "cy": (1.3, 0.9), "dee": (2.5, 1.5), "eve": (2.6, 0.3)}
    edges = {"lamp": ("ann", "bob", "cy"), "mug": ("bob", "cy", "dee"), "clock": ("dee", "eve")}
    colors = dict(zip(edges, (RED, BLUE, GREEN), strict=True))
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.15, 0.75, 1.3))

    for edge, members in edges.items():
        outline = hull(np.array([points[name] for name in members]), radius=0.36)
        left.add_patch(Polygon(outline, facecolor=colors[edge], alpha=0.16, edgecolor="none"))
        left.add_patch(Polygon(outline, facecolor="none", edgecolor=colors[edge], linewidth=1.6))
    for edge, place in (("lamp", (0.05, 0.75)), ("mug", (2.0, 2.1)), ("clock", (3.0, 0.95))):
        left.text(*place, edge, color=colors[edge], fontsize=11, fontweight="bold")
    for name, (x, y) in points.items():
        left.plot(x, y, "o", color=DARK, markersize=8)
        left.text(x, y - 0.17, name, ha="center", va="top", fontsize=10)
    left.set(title="users are vertices, items hyperedges", xlim=(-0.6, 3.7), ylim=(-0.4, 2.6), aspect="equal")
    left.axis("off")

    matrix = np.array([[name in members for members in edges.values()] for name in points], dtype=float)
    middle.imshow(matrix, cmap="Greys", vmin=-0.08, vmax=1.9, aspect="equal")
    for (row, column), value in np.ndenumerate(matrix):
        middle.text(column, row, f"{value:.0f}", ha="center", va="center", color="white" if value else "#9aa3ae")
    middle.set_xticks(np.arange(-0.5, 3), minor=True)
    middle.set_yticks(np.arange(-0.5, 5), minor=True)
    middle.grid(which="minor", color="white", linewidth=3)
    middle.set_xticks(range(3), list(edges))
    middle.set_yticks(range(5), list(points))
    middle.tick_params(which="both", length=0)
    middle.xaxis.tick_top()
    middle.set_title("its incidence matrix H", pad=12)
    middle.spines[:].set_visible(False)

    for column, names in enumerate((points, edges, points)):
        height = np.linspace(1, 0, len(names)) if column != 1 else np.linspace(0.82, 0.18, len(names))
        for name, y in zip(names, height, strict=True):
            right.text(column, y, name, ha="center", va="center", fontsize=10, color=colors.get(name, DARK))
    vertex_y = dict(zip(points, np.linspace(1, 0, 5), strict=True))
    edge_y = dict(zip(edges, np.linspace(0.82, 0.18, 3), strict=True))
    for edge, members in edges.items():
        for name in members:
            for begin, end in (
                ((0.16, vertex_y[name]), (0.8, edge_y[edge])),
                ((1.2, edge_y[edge]), (1.84, vertex_y[name])),
            ):
                style = {"arrowstyle": "-|>", "mutation_scale": 9, "color": colors[edge], "linewidth": 1.1}
                right.add_patch(FancyArrowPatch(begin, end, shrinkA=0, shrinkB=0, **style))
    right.text(0.5, -0.16, "Hᵀ x: each hyperedge\nsums its vertices", ha="center", va="top", fontsize=9)
    right.text(1.5, -0.16, "H y: each vertex\nsums its hyperedges", ha="center", va="top", fontsize=9)
    right.set(title="one convolution: two sparse products", xlim=(-0.3, 2.3), ylim=(-0.45, 1.12))
    right.axis("off")
    return figure


def hull(points: np.ndarray, radius: float) -> np.ndarray:
    """Outline at a distance around points: the convex hull of circles around them."""
    angle = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    circle = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    around = (points[:, None] + circle).reshape(-1, 2)
    chains = []
    for ordered in (sorted(map(tuple, around)), sorted(map(tuple, around), reverse=True)):
        chain: list[tuple[float, float]] = []
        for x, y in ordered:
            while len(chain) > 1 and turn(chain[-2], chain[-1], (x, y)) <= 0:
                chain.pop()
            chain.append((x, y))
        chains += chain[:-1]
    return np.array(chains)


def turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Positive where a, b, c turn left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def contrast() -> Figure:
    """What InfoNCE compares, and what it must not store."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    n = 8
    kind = np.zeros((n, 2 * n + 1, 3))
    kind[:] = np.array([0.87, 0.91, 0.96])
    kind[:, n] = 1
    for row in range(n):
        kind[row, row] = np.array([0.70, 0.09, 0.17])
        kind[row, n + 1 + row] = 1
    left.imshow(kind, aspect="equal")
    left.set_xticks(np.arange(-0.5, 2 * n + 1), minor=True)
    left.set_yticks(np.arange(-0.5, n), minor=True)
    left.grid(which="minor", color="white", linewidth=1.5)
    left.tick_params(which="both", length=0)
    left.set_xticks([(n - 1) / 2, n + 1 + (n - 1) / 2], ["rows of the positive view", "rows of the anchor view"])
    left.set(ylabel="anchor i", yticks=[], title="similarities of one InfoNCE loss")
    left.spines[:].set_visible(False)
    rows = np.logspace(3, 5, 50)
    right.loglog(
        rows, 2 * rows**2 * 4 / 2**20, color=GREY, linewidth=2.5, label="both N x N blocks of exponentials, float32"
    )
    for prefix, label, color, marker in (
        ("published", "published code, measured", DARK, "s"),
        ("plain torch", "plain torch by strips, measured", GREEN, "^"),
        ("hellm", "hellm, forward and backward, measured", RED, "o"),
    ):
        runs = [
            one for one in json.loads((RESULTS / "cpu.json").read_text())["memory"] if one["title"].startswith(prefix)
        ]
        sizes, extra = ([one[key] for one in runs] for key in ("num_rows", "extra_mib"))
        right.plot(sizes, extra, marker, color=color, markersize=8, label=label)
    right.set(title="memory against the number of rows", xlabel="N", ylabel="MiB beside the inputs")
    right.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9)
    return figure


def fusion() -> Figure:
    """What each model reaches alone and what the sum loses without it, from the results of the Scientific data."""
    fused = json.loads((RESULTS / "scientific" / "fusion-fused-2024.json").read_text())
    metric = "ndcg@10"
    names = {
        "fused": "their weighted sum",
        "sasrec": "sequences, ids and content",
        "content": "sequences, content alone",
        "llm": "language model",
        "graph": "hypergraph (stage 1)",
    }
    alone = {name: tower["test"][metric] for name, tower in fused["towers"].items()} | {"fused": fused["test"][metric]}
    order = sorted(names, key=alone.__getitem__)
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.1, 1), sharey=True)
    color = [RED if name == "fused" else BLUE if name in fused["weights"] else GREY for name in order]
    bars = left.barh([names[name] for name in order], [alone[name] for name in order], color=color, height=0.62)
    left.bar_label(bars, fmt="%.4f", padding=4, fontsize=9)
    left.set(title="each alone, and the sum", xlabel=f"test {metric}", xlim=(0, 0.082))
    for row, name in enumerate(order):
        change = fused["leave_one_out"].get(name, {}).get(metric)
        if change is not None:
            error = [[change["difference"] - change["low"]], [change["high"] - change["difference"]]]
            right.barh(row, change["difference"], xerr=error, color=BLUE, height=0.62, ecolor=DARK, capsize=3)
            right.text(change["high"] + 0.0004, row, f"weight {fused['weights'][name]:.2f}", va="center", fontsize=9)
        elif name != "fused":
            right.text(
                0.0003, row, "left out: not shown to help on validation", va="center", fontsize=9, color="#7b8794"
            )
    right.set(title="what the sum loses without it", xlabel=f"test {metric}, 95% interval over users", xlim=(0, 0.0205))
    right.set_xticks([0, 0.005, 0.01, 0.015])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


if __name__ == "__main__":
    main()
