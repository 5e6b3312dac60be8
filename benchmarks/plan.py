"""What `hellm plan` says beside what the stages then take: python -m benchmarks.plan [--events N ...] [--out FILE].

Rates are measured once, on small samples; then all stages run at each size, and the ratio of plan to measurement is
taken of time and of peak memory. One thread, and seconds of the processor: those of the clock where a machine has no
other work.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

EVENTS = (100_000, 180_000, 320_000)
STAGES = ("data", "stage1", "transitions", "sequence", "fusion", "batch")
EVENTS_PER_USER, EVENTS_PER_ITEM = 10, 100
_CHECKED = {"seconds": "seconds", "peak_bytes": "peak", "disk_bytes": "disk"}
MOST = 0.25
"""Of the measurement, how far a plan may be off."""


def measure(
    events: Sequence[int], stages: Sequence[str], folder: Path, keep: Callable[[dict[str, Any]], None], say=print
) -> None:
    """The study, given to `keep` whenever a size is done, ready for JSON."""
    from benchmarks.environment import environment
    from hellm.config import RunConfig, override_config
    from hellm.plan import Rates, Sizes
    from hellm.plan.sample import measured_stages

    settings = ["language_model=false", "pretrain.max_epochs=1", "sasrec.max_epochs=1"]
    config = override_config(RunConfig(), [*settings, "pretrain.validate_every=1", "sasrec.validate_every=1"])
    run: dict[str, Any] = {"schema": 1, "kind": "plan", "environment": environment(), "settings": settings}
    rates = Rates.measured(EVENTS_PER_USER, config, stages, folder=folder, processor_time=True, on_sample=say)
    run |= {"rates": rates.rates, "samples": rates.samples, "notes": rates.notes, "sizes": [], "most": MOST}
    for count in events:
        sizes = Sizes(count, count // EVENTS_PER_USER, count // EVENTS_PER_ITEM)
        place = folder / f"plan-{count}"
        try:
            took = measured_stages(sizes, stages, config, place, processor_time=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        planned, rows = rates.plan(sizes)["stages"], {}
        for name, one in took.items():
            if "failure" in one:
                raise RuntimeError(one["failure"])
            rows[name] = {
                key: {
                    "planned": planned[name][key],
                    "measured": one[measured],
                    "ratio": planned[name][key] / one[measured],
                }
                for key, measured in _CHECKED.items()
            } | {"took": one}
            shown = ", ".join(f"{key} {rows[name][key]['ratio']:.2f}" for key in _CHECKED)
            say(f"{count:>9,} events: {name:<12} {one['seconds']:7.1f} s, planned / measured: {shown}")
        run["sizes"].append({"sizes": sizes._asdict(), "stages": rows})
        checked = [one[key]["ratio"] for size in run["sizes"] for one in size["stages"].values() for key in _CHECKED]
        run["within"] = sum(abs(ratio - 1) <= MOST for ratio in checked) / len(checked)
        run["met"] = len(run["sizes"]) == len(events) and run["within"] == 1
        keep(run)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=float, nargs="+", default=EVENTS, metavar="N", help="sizes (default: three)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--folder", type=Path, help="for shops and runs, which are deleted again")
    parser.add_argument("--out", type=Path, help="JSON to write; by default it is only printed")
    options = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"

    def keep(run: dict[str, Any]) -> None:
        if options.out is not None:
            from benchmarks.environment import write_json

            write_json(options.out, run)

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure([int(one) for one in options.events], options.stages, Path(folder), keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
