"""Cost against size, from 0.2 to 20 million interactions: python -m benchmarks.scale [--out FILE].

Each size runs in a process of its own, from interactions on disk: build the user-item hypergraph, then LightGCN
(2 layers) and the user hypergraph convolution (2 layers), forward and backward at width 64.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import inputs
from benchmarks.environment import ROOT, environment, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from hellm import Hypergraph

DIM = 64
MAX_PEAK_BYTES = 8e9
SIZES = (
    inputs.Size(10_000, 5_000, 200_000),
    inputs.Size(50_000, 25_000, 1_000_000),
    inputs.Size(250_000, 125_000, 5_000_000),
    inputs.Size(1_000_000, 500_000, 20_000_000),
)


def run_size(pairs: Path, num_users: int, num_items: int, rounds: int) -> dict[str, Any]:
    """Seconds of each stage and the peak memory of this whole process, torch and the inputs included."""
    import torch

    from hellm import ops
    from hellm.graphs import user_hypergraph

    index = torch.from_numpy(np.load(pairs))
    # The first use of torch and of the extension has costs of its own, which are not those of a size.
    ops.hypergraph_conv(torch.ones(2, DIM), user_hypergraph(torch.tensor([[0, 1], [0, 0]]), 2, 1))
    started = time.perf_counter()
    graph = user_hypergraph(index, num_users, num_items)
    settings = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
    graph.bipartite_scales()
    graph.scales(**settings)
    build = time.perf_counter() - started
    del index

    tables = [
        inputs.rows(count, DIM, seed).requires_grad_() for seed, count in enumerate((num_users, num_items, num_users))
    ]
    forward, backward = [], []
    for _ in range(rounds):
        for table in tables:
            table.grad = None
        started = time.perf_counter()
        user, item = ops.bipartite_propagate(tables[0], tables[1], graph, num_layers=2)
        view = ops.hypergraph_conv(tables[2], graph, num_layers=2, **settings)
        forward.append(time.perf_counter() - started)
        started = time.perf_counter()
        torch.autograd.backward([user, item, view], [user.detach(), item.detach(), view.detach()])
        backward.append(time.perf_counter() - started)
    if not all(bool(torch.isfinite(table.grad).all()) and bool(table.grad.any()) for table in tables):
        raise FloatingPointError("a gradient is zero or not finite")
    # ru_maxrss is in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    gathers = [_gather_seconds(graph, tables[0].detach(), tables[1].detach()) for _ in range(rounds)]
    return {
        "num_incidences": graph.num_incidences,
        "build_seconds": build,
        "forward_seconds": statistics.median(forward),
        "backward_seconds": statistics.median(backward),
        "gather_seconds": statistics.median(gathers),
        "peak_bytes": peak,
    }


def _gather_seconds(graph: Hypergraph, users: Tensor, items: Tensor) -> float:
    """What torch's `embedding_bag` takes for the sums of the forward pass alone, without scales: the machine's pace.

    Two layers of each operator are four sums over the users of every item, and four over the items of every user.
    """
    from torch.nn.functional import embedding_bag

    passes = [(graph.edge_vertices, graph.edge_indptr, users), (graph.vertex_edges, graph.vertex_indptr, items)]
    seconds = 0.0
    for indices, indptr, table in passes:
        offsets = indptr[:-1].to(indices.dtype)
        started = time.perf_counter()
        embedding_bag(indices, table, offsets, mode="sum")
        seconds += time.perf_counter() - started
    return 4 * seconds


def measure_size(size: inputs.Size, rounds: int) -> dict[str, Any]:
    """Record of one size, from a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs.npy"
        np.save(pairs, inputs.interactions(size))
        command = [sys.executable, "-m", "benchmarks.scale", "--child", str(pairs)]
        command += [str(size.num_users), str(size.num_items), str(rounds)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    record: dict[str, Any] = {**size._asdict(), "rounds": rounds, "failure": None}
    if done.returncode:
        return record | {"failure": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}
    return record | json.loads(done.stdout)


def growth(records: Sequence[dict[str, Any]], field: str) -> float:
    """Least-squares slope of log cost against log interactions; 1 is linear."""
    size, cost = ([math.log(record[name]) for record in records] for name in ("num_interactions", field))
    return statistics.linear_regression(size, cost).slope


def measure(sizes: Sequence[inputs.Size], rounds: int = 3, say=print) -> dict[str, Any]:
    """The whole study, ready for JSON."""
    run: dict[str, Any] = {"schema": 1, "kind": "scale", "environment": environment(), "dim": DIM, "sizes": []}
    for size in sizes:
        record = measure_size(size, rounds)
        run["sizes"].append(record)
        if record["failure"]:
            say(f"{size.num_interactions:>12,} interactions: FAILED: {record['failure']}")
            continue
        say(
            f"{size.num_interactions:>12,} interactions: build {record['build_seconds']:.2f} s, "
            f"forward {record['forward_seconds']:.3f} s, backward {record['backward_seconds']:.3f} s, "
            f"peak {record['peak_bytes'] / 1e9:.2f} GB"
        )
    done = [record for record in run["sizes"] if not record["failure"]]
    fields = ("build_seconds", "forward_seconds", "backward_seconds", "gather_seconds")
    run["growth"] = {field: growth(done, field) for field in fields} if len(done) > 1 else {}
    run["max_peak_bytes"] = MAX_PEAK_BYTES
    run["met"] = len(done) == len(sizes) and max(record["peak_bytes"] for record in done) <= MAX_PEAK_BYTES
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--largest", type=float, default=20e6, help="leave out sizes with more interactions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="default: results/scale.json; with --largest it is only printed")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        pairs, *counts = options.child
        print(json.dumps(run_size(Path(pairs), *map(int, counts))))
        return 0
    sizes = [size for size in SIZES if size.num_interactions <= options.largest]
    if not sizes:
        parser.error(f"--largest must be >= {SIZES[0].num_interactions}, got {options.largest:g}")
    run = measure(sizes, options.rounds)
    out = options.out
    if out is None and len(sizes) == len(SIZES):
        out = ROOT / "benchmarks" / "results" / "scale.json"
    if out is not None:
        write_json(out, run)
    return 0 if all(record["failure"] is None for record in run["sizes"]) else 1


if __name__ == "__main__":
    sys.exit(main())
