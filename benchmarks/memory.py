"""Peak memory of one call beyond what was there before it, each in a fresh process.

The kernel's high-water mark of resident memory is reset after the inputs are made and a small warm-up has run; what it
reaches above the resident size at that moment is the extra memory, returned gradients included.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from typing import Any

from benchmarks.cases import CASES
from benchmarks.environment import ROOT
from benchmarks.registry import MEMORY_CASES, Run, Setup
from benchmarks.resident import STATUS, reset_peak, resident


def extra_bytes(case: str, label: str, num_rows: int) -> int:
    """Peak extra memory of one run of an entry, in this process."""

    def run_of(num_rows: int) -> Run:
        entries = CASES[case].build(Setup(), num_rows=num_rows).entries
        return {entry.label: entry.run for entry in entries}[label]

    run_of(64)()
    run = run_of(num_rows)
    gc.collect()
    reset_peak()
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def measure(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """Record of one memory case, from a process of its own."""
    case = MEMORY_CASES[name]
    num_rows = 1_000 if tiny else case.num_rows
    record = {"name": name, "title": case.title, "num_rows": num_rows, "at_most_mib": case.at_most}
    if not STATUS.exists():
        return record | {"failure": "needs /proc/self/status (Linux)"}
    command = [sys.executable, "-m", "benchmarks.memory", case.case, case.entry, str(num_rows)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return record | {"failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    extra = json.loads(done.stdout)["extra_bytes"] / 2**20
    met = None if case.at_most is None else extra <= case.at_most
    return record | {"extra_mib": extra, "met": met, "failure": None}


def line(record: dict[str, Any]) -> str:
    """One memory record as text."""
    if record["failure"]:
        return f"{record['name']}: FAILED: {record['failure']}"
    allowed = "" if record["met"] is None else f" (at most {record['at_most_mib']:g}: {record['met']})"
    size = f"N {record['num_rows']:,}: {record['extra_mib']:.1f} MiB extra"
    return f"{record['name']}: {record['title']}, {size}{allowed}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("case")
    parser.add_argument("label")
    parser.add_argument("num_rows", type=int)
    options = parser.parse_args()
    print(json.dumps({"extra_bytes": extra_bytes(**vars(options))}))
