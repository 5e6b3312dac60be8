"""Reliability figures: python -m benchmarks.reliability [--quick] [--only NAME ...] [--out FILE].

Each check is a program of tests/, which says there what it looks at. It runs in a process of its own, so that one that
fails or hangs takes no other with it, and prints what it counted as a line of JSON at the end. The results go into
results/reliability.json, from which `benchmarks.report` makes the page; --only renews those checks and keeps the rest.
Ends with 1 where a check found a failure or could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.environment import ROOT, environment, write_json

__all__ = ["CHECKS", "main", "measure"]

RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
KERNELS = ("native-portable", "native-avx2", "native-avx512", "torch")


class Check(NamedTuple):
    """A program of tests/ and how often it tries.

    Attributes:
        program: Relative to tests/.
        count: The option that says how many.
        full, quick: How many.
        options: Others; FOLDER is an empty folder.
    """

    program: str
    count: str
    full: int
    quick: int
    options: tuple[str, ...] = ()


CHECKS: dict[str, Check] = {
    "kills": Check("killed.py", "--moments", 110, 11, ("FOLDER",)),
    "server kills": Check("serve/killed.py", "--moments", 100, 3),
    "torn files": Check("torn.py", "--cuts", 20, 1, ("FOLDER",)),
    "full disk": Check("full_disk.py", "--moments", 110, 11, ("FOLDER/disk",)),
    "clock jumps": Check("clocks.py", "--moments", 110, 11, ("FOLDER",)),
    **{
        f"operators {one}": Check("ops/fuzzed_operators.py", "--count", 10_000, 20, ("--kernel", one))
        for one in KERNELS
    },
    "readers": Check("data/fuzz_readers.py", "--count", 10_000, 20, ("--json",)),
    "guided readers": Check("guided_readers.py", "--count", 10_000, 100, ("FOLDER",)),
    "races": Check("ops/races.py", "--rounds", 3, 1, ("FOLDER",)),
}


def measure(name: str, count: int, hours: float) -> dict[str, Any]:
    """Run one check.

    Args:
        name: In `CHECKS`.
        count: How often it tries.
        hours: Most that it may take.
    Returns: "count", "figures" (what the program printed), "failure" (why it has none, or what it found), "seconds".
    """
    check = CHECKS[name]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as output:
        options = [one.replace("FOLDER", folder) for one in check.options]
        command = [sys.executable, f"tests/{check.program}", *options, check.count, str(count)]
        # A group of its own, so that what it has started ends with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        why = None
        try:
            process.wait(hours * 3600)
        except subprocess.TimeoutExpired:
            why = f"not finished after {hours:g} hours"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        output.seek(0)
        lines = [line for line in output.read().splitlines() if line.strip()]
    figures = _figures(lines)
    if why is None and process.returncode:
        said = " / ".join(line.strip() for line in (lines if figures is None else lines[:-1])[-3:])
        why = said.replace(folder, "FOLDER")[-500:] or f"ended with {process.returncode}"
    elif why is None and figures is None:
        why = "printed no figures"
    return {"count": count, "figures": figures, "failure": why, "seconds": round(time.monotonic() - started, 1)}


def _figures(lines: Sequence[str]) -> dict[str, Any] | None:
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reliability", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few tries of each, to see that all run; minutes")
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"of {', '.join(CHECKS)}")
    parser.add_argument("--count", type=int, help="tries of each, in place of its own number")
    parser.add_argument("--hours", type=float, default=12.0, help="most that a check may take")
    parser.add_argument("--out", type=Path, help="default benchmarks/results/reliability.json, but for --quick")
    options = parser.parse_args(arguments)
    out = options.out or (None if options.quick else RESULTS)
    results: dict[str, Any] = {}
    if options.only and out is not None and out.is_file():
        results = json.loads(out.read_text(encoding="utf-8"))["checks"]
    good = True
    for name in options.only or CHECKS:
        check = CHECKS[name]
        count = options.count or (check.quick if options.quick else check.full)
        found = measure(name, count, options.hours)
        good &= found["failure"] is None
        print(f"{name}: {found['failure'] or 'well'} {json.dumps(found['figures'])}", flush=True)
        seen = environment()
        results[name] = {**found, **{key: seen[key] for key in ("date", "commit", "cpu", "python")}}
        if out is not None:
            in_order = {one: results[one] for one in CHECKS if one in results}
            write_json(out, {"schema": 1, "kind": "reliability", "checks": in_order})
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
