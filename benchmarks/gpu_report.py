"""The part of the page about GPUs, from results/gpu.json."""

from __future__ import annotations

from typing import Any

UNMEASURED = """## GPUs

Unmeasured: no GPU kernel of this commit has run on a GPU yet, and none is chosen automatically. `python -m
benchmarks.gpu` builds, tests and measures them in one run.
"""


def section(run: dict[str, Any]) -> str:
    """Environment, checks and one table for each case."""
    environment = dict(run["environment"])
    environment |= {name: version for name, version in environment.pop("versions", {}).items() if version}
    parts = [f"## GPUs: {environment.get('device')} (`{run['file']}`)\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in environment.items()))
    parts += [f"**{step} failed: {_first_line(text)}**\n" for step, text in run["failures"].items()]
    parts += _checks(run)
    limits = {
        (case["name"], entry["label"]): case["work"] / _best(entry)
        for case in run["cases"]
        for entry in case["entries"]
        if not entry["failure"]
    }
    for case in run["cases"]:
        parts.append(f"### {case['name']}\n")
        if case["failure"]:
            parts.append(f"**Not finished: {_first_line(case['failure'])}**\n")
        if case["entries"]:
            parameters = dict(case["parameters"]) | ({"clocks": case["clocks"]} if case.get("clocks") else {})
            parts.append(", ".join(f"{name} {value}" for name, value in parameters.items()) + "\n")
            parts.append(_table(case, limits))
    if run["not_run"]:
        parts.append("Not run: " + ", ".join(run["not_run"]) + "\n")
    return "\n".join(parts)


def _checks(run: dict[str, Any]) -> list[str]:
    """Self-test, GPU tests and memory checker, as far as they ran."""
    lines = []
    rows = run.get("selftest", [])
    for backend in dict.fromkeys(row["backend"] for row in rows):
        bad = [row for row in rows if row["backend"] == backend and not row["ok"]]
        failed = ", ".join(f"{row['op']} {row['dtype']} ({_first_line(row['case'])})" for row in bad)
        lines.append(f"- self-test of {backend}: " + (f"**failed: {failed}**" if bad else "passed") + "\n")
    for name, tests in run.get("tests", {}).items():
        failed = f"**{len(tests['failed'])} failed: {', '.join(tests['failed'])}**" if tests["failed"] else "0 failed"
        lines.append(f"- GPU tests, {name}: {tests['passed']} passed, {failed}, exit status {tests['status']}\n")
    for name, checked in run.get("memory", {}).items():
        lines.append(f"- memory checker, {name}: {'clean' if checked['status'] == 0 else '**not clean**'}\n")
    return ["".join(lines)] if lines else []


def _best(entry: dict[str, Any]) -> float:
    """Seconds, eager or as a graph."""
    runs = [entry["seconds"], entry.get("graph_seconds")]
    return min(one["warm"]["median"] for one in runs if one)


def _table(case: dict[str, Any], limits: dict[tuple[str, str], float]) -> str:
    limit = limits.get(tuple(case["ceiling"])) if case["ceiling"] else None
    head = ["", "warm", "p20 - p80", "caches flushed", "with launches", "as a graph", f"G{case['unit']}/s"]
    head += ["of ceiling" if case["ceiling"] is None else f"of {' '.join(case['ceiling'])}"]
    head += ["extra MB", "error", "repeats"]
    rows = [head, ["---"] * len(head)]
    for entry in case["entries"]:
        if entry["failure"]:
            rows.append([entry["label"], f"**{_first_line(entry['failure'])}**", *[""] * (len(head) - 2)])
            continue
        seconds, graph = entry["seconds"], entry.get("graph_seconds")
        rate = case["work"] / _best(entry)
        rows.append(
            [
                entry["label"],
                _ms(seconds["warm"]["median"]),
                f"{_ms(seconds['warm']['p20'])} - {_ms(seconds['warm']['p80'])}",
                _ms(seconds["flushed"]["median"]),
                _ms(seconds["eager"]["median"]),
                _ms(graph["warm"]["median"]) if graph else _first_line(entry.get("graph_failure") or "")[:40],
                f"{rate / 1e9:.0f}",
                f"{rate / limit:.0%}" if limit else "",
                "" if entry["extra_bytes"] is None else f"{entry['extra_bytes'] / 1e6:.1f}",
                "" if entry["error"] is None else f"{entry['error']:.0e}",
                "bit by bit" if entry["bitwise_repeat"] else "no",
            ]
        )
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows) + "\n"


def _first_line(text: str) -> str:
    return (text.splitlines() or [""])[0][:120]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
