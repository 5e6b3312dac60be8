"""The part of the page about GPUs, from results/gpu.json."""

from __future__ import annotations

from typing import Any

UNMEASURED = """## GPUs

Unmeasured: no GPU kernel of this commit has run on a GPU yet, and none is chosen automatically. `python -m
benchmarks.gpu` builds, tests and measures them in one run.
"""


def section(run: dict[str, Any]) -> str:
    """Environment, tests and one table for each case."""
    environment = run["environment"]
    parts = [f"## GPUs: {environment['device']} (`{run['file']}`)\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in environment.items()))
    if tests := run.get("tests"):
        parts.append(f"GPU tests: {'passed' if tests['status'] == 0 else '**failed**'}.\n")
    for case in run["cases"]:
        parts.append(f"### {case['name']}\n")
        if case["failure"]:
            parts.append(f"**No numbers: {case['failure']}**\n")
            continue
        parts.append(", ".join(f"{name} {value}" for name, value in case["parameters"].items()) + "\n")
        parts.append(_table(case))
    if run["not_run"]:
        parts.append("Not run, the time was up: " + ", ".join(run["not_run"]) + "\n")
    return "\n".join(parts)


def _table(case: dict[str, Any]) -> str:
    head = (
        "",
        "warm",
        "p20 - p80",
        "caches flushed",
        "as a graph",
        f"G{case['unit']}/s",
        "extra MB",
        "error",
        "repeats",
    )
    rows = [head, ["---"] * len(head)]
    for entry in case["entries"]:
        if entry["failure"]:
            rows.append([entry["label"], f"**{entry['failure'].splitlines()[0][:120]}**", *[""] * 7])
            continue
        warm, flushed = entry["seconds"]["warm"], entry["seconds"]["flushed"]
        graph = entry.get("graph_seconds")
        best = min(warm["median"], graph["warm"]["median"]) if graph else warm["median"]
        rows.append(
            [
                entry["label"],
                _ms(warm["median"]),
                f"{_ms(warm['p20'])} - {_ms(warm['p80'])}",
                _ms(flushed["median"]),
                _ms(graph["warm"]["median"]) if graph else "",
                f"{case['work'] / best / 1e9:.0f}",
                "" if entry["extra_bytes"] is None else f"{entry['extra_bytes'] / 1e6:.1f}",
                "" if entry["error"] is None else f"{entry['error']:.0e}",
                "bit by bit" if entry["bitwise_repeat"] else "no",
            ]
        )
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
