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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryCase:
    """`form` of the contrastive loss, forward + backward, over [num_rows, 64]; `at_most` MiB are allowed."""

    title: str
    form: str
    num_rows: int
    at_most: float | None = None


MEMORY_CASES = {
    "memory-hellm-36000": MemoryCase("hellm info_nce, forward + backward", "hellm", 36_000, at_most=64.0),
    "memory-strip-36000": MemoryCase("plain torch, strips of 512", "strip", 36_000),
    "memory-hellm-9308": MemoryCase("hellm info_nce, forward + backward", "hellm", 9_308),
    "memory-published-9308": MemoryCase("published eager, chunks of 4096", "published", 9_308),
}


def resident(field: str) -> int:
    """Bytes of this process that are resident: field "VmRSS" now, "VmHWM" at the peak. Linux only."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def reset_peak() -> None:
    """Bring the peak down to the present resident size, where the kernel allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        # The peak then includes what came before, so the extra memory is over-stated, never under-stated.
        return


def extra_bytes(form: str, num_rows: int, dim: int = 64) -> int:
    """Peak extra memory of one forward + backward, in this process."""
    from benchmarks import inputs
    from benchmarks.ops.info_nce import info_nce_published, info_nce_strip
    from hellm import ops

    loss = {
        "hellm": lambda a, p, t: ops.info_nce(a, p, t, precision="highest"),
        "strip": info_nce_strip,
        "published": info_nce_published,
    }[form]
    loss(*inputs.views(64, dim), 0.5).backward()
    anchor, positive = inputs.views(num_rows, dim)
    gc.collect()
    reset_peak()
    before = resident("VmRSS")
    loss(anchor, positive, 0.5).backward()
    return resident("VmHWM") - before


def measure(name: str, *, tiny: bool = False) -> dict[str, Any]:
    """Record of one memory case, from a process of its own."""
    case = MEMORY_CASES[name]
    num_rows = 1_000 if tiny else case.num_rows
    record = {"name": name, "title": case.title, "num_rows": num_rows, "at_most_mib": case.at_most}
    if not _STATUS.exists():
        return record | {"failure": "needs /proc/self/status (Linux)"}
    command = [sys.executable, "-m", "benchmarks.memory", case.form, str(num_rows)]
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
    parser.add_argument("form")
    parser.add_argument("num_rows", type=int)
    options = parser.parse_args()
    print(json.dumps({"extra_bytes": extra_bytes(options.form, options.num_rows)}))
