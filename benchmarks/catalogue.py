"""A training step against the size of the catalogue: python -m benchmarks.catalogue [--items N ...] [--out FILE].

Steps of the sequence model and of stage 1 (softmax and both contrasts, without item hypergraph), each over all items
and nodes and over some that stand for them (`sampled_items`, `contrastive_keys`), in a process of its own with one
thread; of stage 1 also over 4,096 of them and 8 `sampled_neighbours` in place of the whole graphs. Three users for four
items, eight events each, items by a power law.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from benchmarks.environment import ROOT, environment, write_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hellm.data import Dataset

SIZES, SAMPLED, EVENTS = (10_000, 100_000, 1_000_000), 8192, 8
# Of the stage that does not propagate over the whole graphs.
NEIGHBOURS, KEYS = 8, 4096

# Optimiser, loss terms of a step, and steps of an epoch.
Steps: TypeAlias = "tuple[torch.optim.Optimizer, Callable[[int], Mapping[str, Tensor]], int]"


def shop(num_items: int) -> Dataset:
    """Training events alone."""
    from hellm.data import Dataset, IdMap

    num_users = max(1, num_items * 3 // 4)
    draw = np.random.default_rng(0)
    users = np.repeat(np.arange(num_users), EVENTS)
    # A power law with every item in reach: the log-uniform distribution of its rank.
    items = np.minimum(np.exp(draw.random(len(users)) * np.log(num_items + 1)).astype(np.int64) - 1, num_items - 1)
    items = draw.permutation(num_items)[items]
    ids = (IdMap([str(row) for row in range(count)]) for count in (num_users, num_items))
    return Dataset("made", num_users, num_items, users, items, None, np.zeros(len(users), np.int8), *ids)


def sequence_step(data: Dataset, sampled: int | None) -> Steps:
    """Those of the sequence model."""
    import torch

    from hellm.config import SASRecConfig
    from hellm.training.candidates import CandidateItems
    from hellm.training.sasrec import build_sasrec, build_sequence_sampler, sasrec_losses

    config = SASRecConfig(content=(), sampled_items=sampled)
    model, sampler = build_sasrec(config, data), build_sequence_sampler(config, data)
    candidates = CandidateItems.of(data, count=sampled, seed=config.seed)

    def losses(step: int) -> Mapping[str, Tensor]:
        batch = sampler.sample(0, step)
        return sasrec_losses(model, batch, config.loss, candidates.of_step(0, step, batch.targets))

    return torch.optim.Adam(model.parameters(), lr=1e-3), losses, sampler.num_steps


def graph_step(data: Dataset, sampled: int | None, *more: str) -> Steps:
    """Those of stage 1, with more settings."""
    from hellm.config import PretrainConfig, override_config
    from hellm.training import pretrain

    settings = ["loss=softmax", "batch_size=4096", "model.item_hypergraph=false", *more]
    if sampled:
        settings += [f"contrastive_rows={min(512, sampled)}", f"contrastive_keys={sampled}", f"sampled_items={sampled}"]
    config = override_config(PretrainConfig(), settings)
    model, sampler = pretrain.build_encoder(config, data), pretrain.build_sampler(config, data)
    losses = pretrain.step_losses(config, model, sampler)
    return pretrain.build_optimizer(config, model), lambda step: losses(0, step), sampler.num_steps


def neighbour_step(data: Dataset, sampled: int | None, *more: str) -> Steps:
    """Those of stage 1 over drawn neighbours, with more settings."""
    return graph_step(data, sampled, f"sampled_neighbours={NEIGHBOURS}", *more)


STAGES = {"sequence": sequence_step, "stage 1": graph_step, "stage 1, sampled neighbours": neighbour_step}


def counts_of(stage: str, sampled: int) -> tuple[int | None, ...]:
    """Items and keys of a step that are measured; None is all."""
    return (min(KEYS, sampled),) if STAGES[stage] is neighbour_step else (sampled, None)


def run_steps(stage: str, num_items: int, sampled: int | None, rounds: int) -> dict[str, Any]:
    """What `timed_steps` gives, and the peak memory of this whole process."""
    found = timed_steps(lambda: STAGES[stage](shop(num_items), sampled), rounds)
    return {**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def timed_steps(steps: Callable[[], Steps], rounds: int) -> dict[str, Any]:
    """Seconds of a whole step on one thread, its update included, and of an epoch of them."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    optimizer, losses, num_steps = steps()
    seconds, values = [], []
    # The first step makes Adam's moments and what else is made once.
    for step in range(rounds + 1):
        started = time.perf_counter()
        loss = sum(losses(step % num_steps).values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
        values.append(loss.item())
    one = statistics.median(seconds[1:])
    return {
        "seconds_of_step": one,
        "steps_per_epoch": num_steps,
        "seconds_of_epoch": one * num_steps,
        "losses": values,
    }


def measure(sizes: Sequence[int], rounds: int, sampled: int, say=print) -> dict[str, Any]:
    """The whole study, ready for JSON."""
    run: dict[str, Any] = {"schema": 1, "kind": "catalogue", "environment": environment(), "rows": []}
    for stage in STAGES:
        for size in sizes:
            for count in counts_of(stage, sampled):
                told = [stage, str(size), str(count or 0), str(rounds)]
                command = [sys.executable, "-m", "benchmarks.catalogue", "--child", *told]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                row = {"stage": stage, "num_items": size, "sampled": count}
                if STAGES[stage] is neighbour_step:
                    row["sampled_neighbours"] = NEIGHBOURS
                if done.returncode:
                    row["failure"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
                else:
                    row |= json.loads(done.stdout)
                run["rows"].append(row)
                what = row.get("failure") or (
                    f"{row['seconds_of_step']:.2f} s a step, {row['seconds_of_epoch'] / 60:.1f} min an epoch, "
                    f"peak {row['peak_bytes'] / 1e9:.2f} GB"
                )
                say(f"{stage:>27}, {size:>9,} items, {f'{count:,} drawn' if count else 'all':>11}: {what}")
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.catalogue", description=__doc__.partition("\n")[0])
    parser.add_argument("--items", nargs="+", type=float, default=SIZES, metavar="N")
    parser.add_argument("--sampled", type=int, default=SAMPLED, metavar="N")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        stage, size, sampled, rounds = args.child
        print(json.dumps(run_steps(stage, int(size), int(sampled) or None, int(rounds))))
        return 0
    run = measure([int(size) for size in args.items], args.rounds, args.sampled)
    if args.out:
        write_json(args.out, run)
    return int(any("failure" in row for row in run["rows"]))


if __name__ == "__main__":
    sys.exit(main())
