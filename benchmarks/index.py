"""From how many items an index pays: python -m benchmarks.index [--items N ...] [--out FILE].

Keys and queries are made up: items in groups and of different popularity, which is the length of a key, and queries
that are the mean of some items of a group. Exact and approximate search are timed one query at a time, on one thread.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.environment import environment, write_json

if TYPE_CHECKING:
    from torch import Tensor

SIZES = (10_000, 30_000, 100_000, 300_000, 1_000_000)
WIDTH, GROUPS, QUERIES, HISTORY = 64, 200, 500, 4


def vectors(num_items: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Keys [num_items, WIDTH] and queries [QUERIES, WIDTH]."""
    import torch

    draw = np.random.default_rng(seed)
    groups = draw.integers(0, GROUPS, num_items)
    keys = draw.normal(size=(GROUPS, WIDTH))[groups] + draw.normal(size=(num_items, WIDTH))
    keys *= np.clip(np.exp(0.4 * draw.normal(size=(num_items, 1))), 0.3, 2.0)
    order = np.argsort(groups, kind="stable")
    starts = np.searchsorted(groups[order], np.arange(GROUPS))
    asked = draw.integers(0, GROUPS, QUERIES)
    members = np.stack(
        [order[np.minimum(starts[asked] + draw.integers(0, 20, QUERIES), num_items - 1)] for _ in range(HISTORY)]
    )
    return torch.from_numpy(keys.astype(np.float32)), torch.from_numpy(keys[members].mean(0).astype(np.float32))


def measure(num_items: int, threads: int) -> dict[str, Any]:
    """What `hellm export --to usearch` would report of so many items."""
    import torch

    from hellm.export.index import build_index, index_report

    keys, queries = vectors(num_items)
    started = time.perf_counter()
    index = build_index(keys, threads=threads)
    seconds = time.perf_counter() - started
    torch.set_num_threads(1)
    return index_report(index, keys, queries) | {"build_seconds": seconds, "build_threads": threads}


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--items", nargs="+", type=int, default=SIZES)
    parser.add_argument("--threads", type=int, default=1, help="of building")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for num_items in sorted(args.items):
        rows.append(measure(num_items, args.threads))
        print(json.dumps(rows[-1]), flush=True)
    paying = [row["items"] for row in rows if row["pays"]]
    value = {"width": WIDTH, "sizes": rows, "pays_from": min(paying, default=None), "environment": environment()}
    print(json.dumps({"pays_from": value["pays_from"]}))
    if args.out is not None:
        write_json(args.out, value)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
