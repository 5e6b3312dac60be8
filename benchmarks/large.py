"""Memory and time against events, from a table of events to samplers: python -m benchmarks.large [--largest N].

A made-up shop of each size is written in pieces, its items bought by a power law, its ids text. Each stage then runs in
a process of its own: `hellm data build`, reading what was built, `hellm data check`, what training draws from, an
evaluation of 4,096 users, and a few steps of stage 1 over sampled neighbours and of the sequence model, from which an
epoch follows. The figure is the peak of resident memory, mapped files that are held included; the bound is on all but
the steps, which hold tables of all users.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.resident import resident
from hellm.plan.shop import write_shop

ROOT = Path(__file__).resolve().parents[1]
EVENTS = (200_000, 1_000_000, 5_000_000, 10_000_000, 20_000_000, 50_000_000)
EVENTS_PER_USER, EVENTS_PER_ITEM = 5, 250
MAX_PEAK_BYTES = 6e9
DATA = ("build", "load", "check", "samplers", "evaluate")
STAGES = (*DATA, "stage1", "sequence")
# Of the steps: columns of the tables, of which there are two for all users, and how many are timed.
DIM, ROUNDS = 16, 5


def run_stage(stage: str, source: Path, built: Path) -> dict[str, Any]:
    """Seconds of a stage, by the clock and of the processor, and the peak memory of this process, imports included."""
    run = _stage(stage, source, built)
    before = resident("VmHWM")
    started, worked = time.perf_counter(), time.process_time()
    found = run() or {}
    return {
        "stage": stage,
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time() - worked,
        "peak_bytes": resident("VmHWM"),
        "import_bytes": before,
        **found,
    }


def _stage(stage: str, source: Path, built: Path) -> Callable[[], dict[str, Any] | None]:
    """What it runs; torch is imported before where it needs it."""
    from hellm.data import load_dataset

    def quietly(*arguments: str) -> None:
        from hellm.cli import main

        with contextlib.redirect_stdout(io.StringIO()):
            if main(["data", *arguments]):
                raise RuntimeError(f"hellm data {' '.join(arguments)} failed")

    def samplers() -> None:
        import torch

        from hellm.graphs import user_hypergraph
        from hellm.training.history_sampler import SequenceSampler
        from hellm.training.samplers import TripleSampler

        data = load_dataset(built)
        users, items = data.pairs("train")
        TripleSampler(users, items, data.num_users, data.num_items).sample(0, 0)
        SequenceSampler(users, items, data.num_users, data.num_items).sample(0, 0)
        index = torch.stack([torch.from_numpy(one) for one in (users, items)])
        del users, items
        user_hypergraph(index, data.num_users, data.num_items)

    def evaluate() -> None:
        import torch

        from hellm.evaluate import evaluate_dataset
        from hellm.evaluate.datasets import item_counts

        data = load_dataset(built)
        counts = torch.from_numpy(item_counts(data)).float()
        some = np.arange(0, data.num_users, max(1, data.num_users // 4096))
        evaluate_dataset(lambda users: counts.expand(len(users), -1), data, users=some)

    def load() -> dict[str, Any]:
        data = load_dataset(built)
        return {"num_users": data.num_users, "num_items": data.num_items, "num_events": data.num_events}

    def steps() -> dict[str, Any]:
        from benchmarks.catalogue import KEYS, SAMPLED, neighbour_step, sequence_step, timed_steps

        data = load_dataset(built)
        if stage == "sequence":
            return timed_steps(lambda: sequence_step(data, SAMPLED), ROUNDS)
        return timed_steps(lambda: neighbour_step(data, KEYS, f"model.embedding_dim={DIM}"), ROUNDS)

    if stage not in ("build", "load", "check"):
        import torch  # noqa: F401
    runs = {
        "build": lambda: quietly("build", str(source), str(built)),
        "load": load,
        "check": lambda: quietly("check", str(built)),
        "samplers": samplers,
        "evaluate": evaluate,
        "stage1": steps,
        "sequence": steps,
    }
    return runs[stage]


def measure_size(num_events: int, folder: Path, suffix: str, stages: Sequence[str], say=print) -> dict[str, Any]:
    """Record of one size; every stage in a fresh process."""
    source, built = folder / "shop", folder / "built"
    write_shop(source, num_events, num_events // EVENTS_PER_USER, num_events // EVENTS_PER_ITEM, suffix=suffix)
    record: dict[str, Any] = {"num_interactions": num_events, "suffix": suffix, "stages": {}, "failure": None}
    record["source_bytes"] = sum(one.stat().st_size for one in source.iterdir())
    for stage in stages:
        command = [sys.executable, "-m", "benchmarks.large", "--child", stage, str(source), str(built)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            record["failure"] = f"{stage}: {(done.stderr.strip().splitlines() or [f'exit code {done.returncode}'])[-1]}"
            say(f"{num_events:>12,} events: FAILED: {record['failure']}")
            break
        found = json.loads(done.stdout)
        record["stages"][found.pop("stage")] = found
        epoch = f", an epoch {found['seconds_of_epoch']:,.0f} s" if "seconds_of_epoch" in found else ""
        say(
            f"{num_events:>12,} events: {stage:<9} {found['processor_seconds']:8.1f} s, "
            f"peak {found['peak_bytes'] / 1e9:6.2f} GB, "
            f"{(found['peak_bytes'] - found['import_bytes']) / num_events:6.0f} bytes per event beside the imports"
            f"{epoch}"
        )
    if built.is_dir():
        record["built_bytes"] = sum(one.stat().st_size for one in built.rglob("*") if one.is_file())
    return record


def measure(sizes: Sequence[int], suffix: str, stages: Sequence[str], folder: Path, say=print) -> dict[str, Any]:
    """The whole study, ready for JSON."""
    from benchmarks.environment import environment
    from benchmarks.scale import growth

    run: dict[str, Any] = {"schema": 1, "kind": "large", "environment": environment(), "sizes": []}
    for num_events in sizes:
        place = folder / f"large-{num_events}"
        try:
            run["sizes"].append(measure_size(num_events, place, suffix, stages, say))
        finally:
            shutil.rmtree(place, ignore_errors=True)
    done = [one for one in run["sizes"] if one["failure"] is None]
    run["growth"] = {}
    if len(done) > 1:
        for stage in stages:
            rows = [{"num_interactions": one["num_interactions"], **one["stages"][stage]} for one in done]
            field = "processor_seconds" if stage in DATA else "seconds_of_epoch"
            run["growth"][stage] = growth(rows, field)
    run["max_peak_bytes"] = MAX_PEAK_BYTES
    peaks = [found["peak_bytes"] for one in done for name, found in one["stages"].items() if name in DATA]
    run["met"] = len(done) == len(sizes) and max(peaks) <= MAX_PEAK_BYTES
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=float, nargs="+", metavar="N", help="these sizes only")
    parser.add_argument("--largest", type=float, default=5e6, help="leave out sizes with more events (default: 5e6)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all, in this order")
    parser.add_argument("--suffix", choices=("parquet", "csv"), default="parquet", help="of the table of events")
    parser.add_argument("--folder", type=Path, help="for the shops, which are deleted again (default: a temporary one)")
    parser.add_argument("--out", type=Path, help="JSON to write; by default it is only printed")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        stage, source, built = options.child
        print(json.dumps(run_stage(stage, Path(source), Path(built))))
        return 0
    sizes = [int(one) for one in options.events or EVENTS if options.events or one <= options.largest]
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run = measure(sizes, options.suffix, options.stages, Path(folder))
    if options.out is not None:
        from benchmarks.environment import write_json

        write_json(options.out, run)
    return 0 if all(record["failure"] is None for record in run["sizes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
