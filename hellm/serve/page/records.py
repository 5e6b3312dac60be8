"""What trainings have recorded, as charts with the numbers that they are of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from hellm.serve.page.charts import COLOURS, Interval, Line, interval_chart, line_chart

__all__ = ["Course", "interval_of", "loss_charts", "slice_charts", "slice_metrics", "validation_charts"]

Slices = Mapping[str, Mapping[str, Mapping[str, Any]]]


class Course(NamedTuple):
    """One training.

    Attributes:
        name: Of the run, and of the model in a sum.
        run: Number of the run.
        records: Of metrics.jsonl.
    """

    name: str
    run: int
    records: Sequence[Mapping[str, Any]]


def interval_of(test: Mapping[str, Any], metric: str) -> Interval | None:
    """A metric of a test or of a slice of it; None where it was not measured."""
    value = test.get("metrics", {}).get(metric)
    if value is None:
        return None
    return Interval(value, *(test.get("confidence_intervals", {}).get(metric) or ()))


def slice_metrics(recorded: Sequence[Slices]) -> list[str]:
    """Metrics that all slices have."""
    parts = [part["metrics"] for slices in recorded for labels in slices.values() for part in labels.values()]
    return [name for name in parts[0] if all(name in part for part in parts)] if parts else []


def slice_charts(recorded: Sequence[Slices], metric: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Kind of slices -> "chart" and "rows", each with "label", "what", "num_users" and "values", one of each run.

    Args:
        recorded: Of each run, as `hellm.evaluate.compare.slices_summary` tells it; empty where there is nothing.
        metric: Of `slice_metrics`.
        names: Of the runs.
    """
    found = {}
    for kind in dict.fromkeys(kind for slices in recorded for kind in slices):
        parts = [slices.get(kind, {}) for slices in recorded]
        rows = []
        for label in dict.fromkeys(label for labels in parts for label in labels):
            first = next(labels[label] for labels in parts if label in labels)
            values = [interval_of(labels[label], metric) if label in labels else None for labels in parts]
            told = {"what": first.get("what", label), "num_users": first["num_users"]}
            rows.append({"label": label, "values": values} | told)
        drawn = [(row["label"], row["values"]) for row in rows]
        chart = interval_chart(kind.replace(" ", "-"), f"{metric} by {kind}", drawn, names)
        found[kind] = {"rows": rows, "chart": chart}
    return found


def validation_charts(courses: Sequence[Course]) -> list[dict[str, Any]]:
    """A chart for each of the main validation metrics, with a line for each training."""
    found = []
    for number, metric in enumerate(_main_metrics(courses)):
        lines = []
        for colour, course in enumerate(courses):
            if points := _points(course.records, f"valid_{metric}"):
                best = max(points, key=lambda point: point[1])[0]
                lines.append(Line(course.name, points, colour % COLOURS, course.run > 0, best))
        found.append(_chart(f"valid-{number}", f"Validation {metric}", lines))
    return found


def loss_charts(courses: Sequence[Course]) -> list[dict[str, Any]]:
    """A chart for each training, with a line for each term of its loss."""
    found = []
    for number, course in enumerate(courses):
        names = list(dict.fromkeys(key for record in course.records for key in record if key.endswith("_mean")))
        if len(names) == 2 and names[0] == "loss_mean":
            # The loss is its only term.
            names = names[1:]
        lines = [
            Line(key.removesuffix("_mean").replace("_", " "), points, colour % COLOURS)
            for colour, key in enumerate(names)
            if (points := _points(course.records, key))
        ]
        if lines:
            found.append(_chart(f"loss-{number}", f"Loss of {course.name}, mean per step", lines))
    return found


def _chart(ident: str, title: str, lines: Sequence[Line]) -> dict[str, Any]:
    return {"title": title, "lines": lines, "chart": line_chart(ident, title, lines)}


def _main_metrics(courses: Sequence[Course]) -> Iterator[str]:
    """NDCG and recall, or whatever there is, for the longest lists that all trainings have, or any of them."""
    validated = [{key[6:] for record in one.records for key in record if key.startswith("valid_")} for one in courses]
    validated = [{name for name in names if "@" in name} for names in validated]
    validated = [names for names in validated if names]
    names = set.intersection(*validated) or set.union(*validated) if validated else set()
    longest: dict[str, int] = {}
    for kind, k in (name.split("@") for name in sorted(names)):
        longest[kind] = max(int(k), longest.get(kind, 0))
    chosen = [kind for kind in ("ndcg", "recall") if kind in longest] or list(longest)[:2]
    return (f"{kind}@{longest[kind]}" for kind in chosen)


def _points(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    """The end of an epoch stands at its number, a validation within it before."""
    found = [(record.get("epochs_done", record["epoch"] + 1) - 1, record.get(name)) for record in records]
    return [(epoch, value) for epoch, value in found if isinstance(value, (int, float)) and math.isfinite(value)]
