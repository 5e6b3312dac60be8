"""Peak memory of `hellm batch` over many histories: python -m benchmarks.batch [--users N] [--out FILE].

A made-up run and a file of histories are written first. The batch then runs in a process of its own, which is killed
when a third of the parts is there, and again to its end; some of its lists are compared with those of the recommender.
A quarter of the histories, in one go, shows that memory does not grow with their number. It ends with 1 where a batch
takes more than 4 GB, or more than a tenth beyond what the quarter takes.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import ROOT, environment, write_json

MAX_PEAK_BYTES, MAX_GROWTH = 4e9, 1.1
WIDTH, MEAN_LENGTH = 64, 12
# Seconds that a batch may take.
LIMIT = 6 * 3600
# Histories made and compared at a time.
BLOCK = 16 * 1024
MODELS = ("stage1", "sasrec")


def make_run(folder: Path, model: str, num_items: int) -> Path:
    """A run of random weights, saved as a recommender."""
    import polars as pl
    import torch

    from hellm.models import SASRec
    from hellm.recommend import Recommender, ServedGraph, ServedSASRec

    draw = torch.Generator().manual_seed(0)
    tables = {"user": 1, "item": num_items, "fold_in_source": num_items, "fold_in_view": num_items}
    served = {
        "stage1": lambda: ServedGraph({x: torch.randn(n, WIDTH, generator=draw) for x, n in tables.items()}, 0.5),
        "sasrec": lambda: ServedSASRec(SASRec(num_items, embedding_dim=WIDTH).eval()),
    }[model]()
    rows = [("user", 0, "u0", None), *(("item", row, f"p{row}", None) for row in range(num_items))]
    ids = pl.DataFrame(rows, schema={"side": str, "index": int, "id": str, "title": str}, orient="row")
    events = pl.DataFrame({"user": [0], "item": [0], "split": [0]}, schema_overrides={"split": pl.Int8})
    return Recommender(served, ids, events).save(folder / model)


def make_histories(file: Path, count: int, num_items: int) -> None:
    """JSON lines of histories of 1 to about 60 items, popular ones more often."""
    draw = np.random.default_rng(0)
    with file.open("w") as lines:
        for start in range(0, count, BLOCK):
            lengths = np.minimum(draw.geometric(1 / MEAN_LENGTH, min(BLOCK, count - start)), 60)
            items = (num_items * draw.random(lengths.sum()) ** 3).astype(int)
            for place, history in enumerate(np.split(items, np.cumsum(lengths)[:-1])):
                row = {"user": f"visitor {start + place}", "history": [f"p{item}" for item in history]}
                lines.write(json.dumps(row) + "\n")


def run_batch(run: Path, users: Path, out: Path) -> None:
    """What the process does: the batch, and the peak of its memory on standard output."""
    from hellm.artifact.run_directory import peak_memory_bytes
    from hellm.recommend.batch import batch

    started = time.perf_counter()
    report = batch(run, out, users, resume=True)
    print(
        json.dumps(report | {"seconds": time.perf_counter() - started, "peak_bytes": peak_memory_bytes("cpu")["host"]})
    )


def killed_and_resumed(run: Path, users: Path, out: Path, kill_at: int) -> dict[str, Any]:
    """The report of a batch that was killed when `kill_at` parts were there."""
    command = [sys.executable, "-m", "benchmarks.batch", "--run", run, users, out]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    parts = Path(f"{out}.parts")
    stop = time.monotonic() + LIMIT
    while first.poll() is None and time.monotonic() < stop and len(list(parts.glob("part-*.parquet"))) < kill_at:
        time.sleep(0.05)
    first.kill()
    if first.wait() != -signal.SIGKILL:
        raise RuntimeError(f"the batch ended before it was killed, with {first.returncode}")
    return finished(run, users, out)


def finished(run: Path, users: Path, out: Path) -> dict[str, Any]:
    """The report of a batch that comes to its end."""
    command = [sys.executable, "-m", "benchmarks.batch", "--run", run, users, out]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT)
    return json.loads(done.stdout.splitlines()[-1])


def compared(run: Path, users: Path, out: Path) -> int:
    """Lists of the first and the last block that are those of `Recommender.recommend`, to the last bit."""
    import polars as pl

    from hellm.recommend import Recommender
    from hellm.recommend.user_files import asked_in

    recommender, same, blocks = Recommender.load(run), 0, list(asked_in(users, BLOCK))
    for number in {0, len(blocks) - 1}:
        answers = recommender.recommend(histories=blocks[number].histories)
        found = pl.scan_parquet(out).slice(number * BLOCK, BLOCK).collect()
        expected = [([item.item for item in one], [item.score for item in one]) for one in answers]
        if found.select("items", "scores").rows() != expected:
            raise AssertionError(f"block {number} of {out} has other lists than the recommender")
        same += len(answers)
    return same


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=20_000)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--run", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run is not None:
        run_batch(*args.run)
        return 0
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_histories(folder / "users.jsonl", args.users, args.items)
        make_histories(folder / "few.jsonl", args.users // 4, args.items)
        for model in args.models:
            run, out = make_run(folder, model, args.items), folder / f"{model}.parquet"
            report = killed_and_resumed(run, folder / "users.jsonl", out, max(1, args.users // BLOCK // 3))
            report["peak_bytes_of_a_quarter"] = finished(run, folder / "few.jsonl", folder / "few.parquet")[
                "peak_bytes"
            ]
            (folder / "few.parquet").unlink()
            report["compared"] = compared(run, folder / "users.jsonl", out)
            report |= {"out": out.name, "file_bytes": out.stat().st_size}
            results[model] = report
            print(json.dumps({model: report}), flush=True)
    value = {"histories": args.users, "items": args.items, "models": results, "environment": environment()}
    if args.out is not None:
        write_json(args.out, value)
    too_much = [
        name
        for name, one in results.items()
        if one["peak_bytes"] > min(MAX_PEAK_BYTES, MAX_GROWTH * one["peak_bytes_of_a_quarter"])
    ]
    if too_much:
        print(f"too much memory: {', '.join(too_much)}", file=sys.stderr)
    return int(bool(too_much))


if __name__ == "__main__":
    raise SystemExit(main())
