"""What `hellm plan` says beside what the stages then take: python -m benchmarks.plan [--events N ...] [--out FILE].

Rates are measured once, on small samples; then all stages run at each size, and the ratio of plan to measurement is
taken of time and of peak memory. One thread, and seconds of the processor: those of the clock where a machine has no
other work.
"""

from __future__ import annotations

import argparse
import json
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
_KEPT = ("samples", "second_per_product", "width", "searching", "free_bytes", "notes")
_CHECKED = {"seconds": "seconds", "peak_bytes": "peak", "disk_bytes": "disk"}
SETTINGS = ["language_model=false", "pretrain.max_epochs=1", "sasrec.max_epochs=1"]
MOST = 0.25
"""Of the measurement, how far a plan may be off."""


def measure(
    events: Sequence[int], stages: Sequence[str], folder: Path, keep: Callable[[dict[str, Any]], None], say=print
) -> None:
    """The study, given to `keep` whenever a size is done, ready for JSON."""
    from benchmarks.environment import environment
    from hellm.plan import Rates, Sizes
    from hellm.plan.sample import measured_stages

    run: dict[str, Any] = {"schema": 1, "kind": "plan", "environment": environment(), "settings": SETTINGS}
    config = _config(run)
    rates = Rates.measured(EVENTS_PER_USER, config, stages, folder=folder, processor_time=True, on_sample=say)
    run |= {name: getattr(rates, name) for name in _KEPT} | {"sizes": []}
    for count in events:
        sizes = Sizes(count, count // EVENTS_PER_USER, count // EVENTS_PER_ITEM)
        place = folder / f"plan-{count}"
        try:
            took = measured_stages(sizes, stages, config, place, processor_time=True)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        failures = [one["failure"] for one in took.values() if "failure" in one]
        if failures:
            raise RuntimeError(failures[0])
        run["sizes"].append({"sizes": sizes._asdict(), "stages": {name: {"took": one} for name, one in took.items()}})
        keep(compared(run, say))


def compared(run: dict[str, Any], say=print) -> dict[str, Any]:
    """The study, with what the model plans from its samples beside what each size took."""
    from hellm.plan import Rates, Sizes

    rates = Rates(_config(run), **{name: run[name] for name in _KEPT})
    ratios = []
    for size in run["sizes"]:
        # Which towers it keeps is not for a model of cost to know.
        kept = size["stages"].get("batch", {"took": {}})["took"].get("kept")
        planned = rates.plan(Sizes(**size["sizes"]), kept=None if kept is None else len(kept))["stages"]
        for name, one in size["stages"].items():
            for key, measured in _CHECKED.items():
                pair = {"planned": planned[name][key], "measured": one["took"][measured]}
                one[key] = pair | {"ratio": pair["planned"] / pair["measured"]}
                ratios.append(one[key]["ratio"])
            if size is run["sizes"][-1]:
                shown = ", ".join(f"{key} {one[key]['ratio']:.2f}" for key in _CHECKED)
                say(f"{size['sizes']['events']:>9,} events: {name:<12} {one['took']['seconds']:7.1f} s; ratios {shown}")
    within = sum(abs(ratio - 1) <= MOST for ratio in ratios) / len(ratios)
    return run | {"rates": rates.rates, "most": MOST, "within": within, "met": within == 1}


def _config(run: dict[str, Any]) -> Any:
    from hellm.config import RunConfig, override_config

    return override_config(RunConfig(), run["settings"])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan", description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=float, nargs="+", default=EVENTS, metavar="N", help="sizes (default: three)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--folder", type=Path, help="for shops and runs, which are deleted again")
    parser.add_argument("--again", type=Path, help="JSON of an earlier study, whose samples the model plans from anew")
    parser.add_argument("--out", type=Path, help="JSON to write; by default it is only printed")
    options = parser.parse_args(arguments)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = "1"

    def keep(run: dict[str, Any]) -> None:
        if options.out is not None:
            from benchmarks.environment import write_json

            write_json(options.out, run)

    if options.again is not None:
        keep(compared(json.loads(options.again.read_text(encoding="utf-8"))))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measure([int(one) for one in options.events], options.stages, Path(folder), keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
