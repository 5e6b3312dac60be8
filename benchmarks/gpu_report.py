"""The part of the page about GPUs, from results/gpu.json."""

from __future__ import annotations

from typing import Any

from benchmarks.cases import TARGETS
from benchmarks.registry import GPU, Target

_UNMEASURED = """## GPUs

Unmeasured: no GPU kernel of this commit has run on a GPU yet, and none is chosen automatically. `python -m
benchmarks.gpu` builds, tests and measures them in one run. What they are held to, on an H100:
"""


def unmeasured() -> str:
    """The section where there is no run."""
    return _UNMEASURED + "\n" + _targets([])


def section(run: dict[str, Any]) -> str:
    """Environment, checks and one table for each case."""
    environment = dict(run["environment"])
    environment |= {name: version for name, version in environment.pop("versions", {}).items() if version}
    parts = [f"## GPUs: {environment.get('device')} (`{run['file']}`)\n"]
    parts.append("".join(f"- {name}: {value}\n" for name, value in environment.items()))
    parts += [f"**{step} failed: {_first_line(text)}**\n" for step, text in run["failures"].items()]
    parts += _checks(run)
    parts.append(_targets(run["cases"]))
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


def _targets(cases: list[dict[str, Any]]) -> str:
    """What is required beside what was measured, if it was."""
    entries = {case["name"]: [one for one in case["entries"] if not one["failure"]] for case in cases}
    rows = [["case", "required", "measured", ""], ["---"] * 4]
    for target in (target for target in TARGETS if target.device == GPU):
        of_case = entries.get(target.case, [])
        ours = [one for one in of_case if (one["kind"] == target.entry if target.entry else one["hellm"])]
        required, measured, met = _judged(target, ours, of_case)
        verdict = "" if measured is None else "met" if met else "**missed**"
        rows.append([target.case, required, measured or "unmeasured", verdict])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _judged(target: Target, ours: list[dict[str, Any]], of_case: list[dict[str, Any]]) -> tuple[str, str | None, bool]:
    """What is required, what was measured, None where nothing was, and whether it is met."""
    who = target.entry or "ours"
    if target.milliseconds:
        required, best = f"{who} within {target.milliseconds:g} ms", min(map(_best, ours), default=None)
        return required, None if best is None else _ms(best), best is not None and best * 1e3 <= target.milliseconds
    if target.megabytes:
        required = f"each of {who} within {target.megabytes:.1f} MB beside its inputs, and bit by bit again"
        sizes = [one["extra_bytes"] / 1e6 for one in ours if one["extra_bytes"] is not None]
        if not sizes:
            return required, None, False
        again = all(one["bitwise_repeat"] for one in ours)
        measured = f"{max(sizes):.1f} MB, {'the same bits' if again else 'other bits'}"
        return required, measured, again and max(sizes) <= target.megabytes
    peers = [_best(one) for one in of_case if target.peer.lower() in one["label"].lower()]
    required = f"{who} at least {target.factor:.3g} times as fast as {target.peer}"
    if not ours or not peers:
        return required, None, False
    ratio = min(peers) / min(map(_best, ours))
    return required, f"{ratio:.3g} times", ratio >= target.factor


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
