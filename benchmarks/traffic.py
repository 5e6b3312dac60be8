"""Bytes that several processes send while they train, measured and by the model of `hellm plan`.

python -m benchmarks.traffic: steps of every stage with 1, 2 and 4 processes, connected by gloo over loopback. What is
counted is what the kernel sends there, headers and acknowledgements too, of all processes, less what the same time
without steps sends. So nothing else may use loopback. Three users for four items, eight events each, as in
`benchmarks.catalogue`; the language model is SmolLM2's first six layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.catalogue import shop
from benchmarks.environment import ROOT, environment, write_json

if TYPE_CHECKING:
    from hellm.data import Dataset
    from hellm.training.processes import Processes
    from hellm.training.step import Step

ITEMS, STEPS, PROCESSES = 20_000, 3, (1, 2, 4)
_SENT = Path("/proc/net/dev")


def stage_1(settings: Sequence[str]) -> Callable[[Dataset, Processes], tuple[Step, float]]:
    """(data, processes) -> steps of stage 1, and the bytes that each process sends in one by the model."""

    def build(data: Dataset, processes: Processes) -> tuple[Step, float]:
        from hellm.config import PretrainConfig, override_config
        from hellm.plan.model import sent_by_columns
        from hellm.training import pretrain

        config = override_config(PretrainConfig(), ["device=cpu", "model.item_hypergraph=false", *settings])
        model, sampler = pretrain.build_encoder(config, data), pretrain.build_sampler(config, data)
        step = pretrain.build_step(model, config, sampler, processes)
        return step, sent_by_columns(config, data.num_users, data.num_items, processes.count)

    return build


def sequence(data: Dataset, processes: Processes) -> tuple[Step, float]:
    """The same of the sequence model."""
    from hellm.config import SASRecConfig
    from hellm.plan.model import sent_bytes
    from hellm.training import sasrec

    config = SASRecConfig(content=(), device="cpu")
    model, sampler = sasrec.build_sasrec(config, data), sasrec.build_sequence_sampler(config, data)
    step = sasrec.build_step(model, config, data, sampler, processes)
    return step, sent_bytes(sum(one.numel() for one in model.parameters()), 1, processes.count)


def language_model(settings: Sequence[str]) -> Callable[[Dataset, Processes], tuple[Step, float]]:
    """The same of the language model, which reads a table of the size of stage 1's."""

    def build(data: Dataset, processes: Processes) -> tuple[Step, float]:
        import torch

        from hellm.config import FinetuneConfig, override_config
        from hellm.models.llm.language_model import layers_of
        from hellm.plan.model import sent_by_shards, sent_bytes
        from hellm.training import finetune
        from hellm.training.item_inputs import ItemInputs

        config = override_config(FinetuneConfig(), ["device=cpu", "item_inputs=[graph]", *settings])
        inputs = ItemInputs({"graph": torch.randn(data.num_items, 64)}, {}, None)
        model = finetune.build_recommender_llm(config, data, inputs)
        layers = sum(one.numel() for layer in layers_of(model.prompted.base) for one in layer.parameters())
        weights = sum(one.numel() for one in model.parameters())
        trained = sum(one.numel() for one in model.parameters() if one.requires_grad)
        sampler = finetune.build_history_sampler(config, data, model)
        step = finetune.build_step(model, config, data, sampler, processes)
        if config.sharded:
            return step, sent_by_shards(weights, layers, trained, processes.count)
        return step, sent_bytes(trained, 1, processes.count)

    return build


STAGES: dict[str, Callable[[Dataset, Processes], tuple[Step, float]]] = {
    "stage 1, all nodes as keys": stage_1([]),
    "stage 1, 4,096 keys and items": stage_1(
        ["loss=softmax", "batch_size=4096", "contrastive_rows=512", "contrastive_keys=4096", "sampled_items=4096"]
    ),
    "stage 1, NGCF": stage_1(["model.backbone=ngcf"]),
    "sequence model": sequence,
    "language model": language_model([]),
    "language model, sharded": language_model(["sharded=true"]),
}
NOT_ALONE = ("language model, sharded",)


def work(name: str) -> None:
    """What one of several processes does; the first prints what came of it."""
    import torch
    from torch import distributed

    from hellm.training.processes import launched_processes

    torch.set_num_threads(1)
    torch.manual_seed(0)
    processes = launched_processes("cpu", seed=0)
    step, modelled = STAGES[name](shop(ITEMS), processes)

    def wait() -> None:
        if processes.count > 1:
            distributed.barrier()

    step.run(0, 0)
    wait()
    before, started = _sent(), time.perf_counter()
    for number in range(STEPS):
        step.run(0, 1 + number)
    wait()
    sent, seconds = _sent() - before, time.perf_counter() - started
    before = _sent()
    time.sleep(seconds)
    wait()
    if processes.index == 0:
        found = {
            "processes": processes.count,
            "sent_bytes": max(0, sent - (_sent() - before)) / STEPS / processes.count,
            "modelled_bytes": modelled,
        }
        print(json.dumps(found), flush=True)


def _sent() -> int:
    """Bytes that loopback has sent."""
    line = next(line for line in _SENT.read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def measure(names: Sequence[str] = tuple(STAGES)) -> list[Mapping[str, Any]]:
    """Rows of every stage and number of processes."""
    rows = []
    for name in names:
        for count in PROCESSES:
            if count == 1 and name in NOT_ALONE:
                continue
            several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
            launcher = [] if count == 1 else several
            done = subprocess.run(
                [sys.executable, *launcher, "-m", "benchmarks.traffic", "--worker", name],
                cwd=ROOT,
                capture_output=True,
                text=True,
            )
            if done.returncode:
                raise RuntimeError(f"{name} in {count} processes failed:\n{done.stderr}")
            rows.append({"stage": name, **json.loads(done.stdout.splitlines()[-1])})
            print(rows[-1], flush=True)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.traffic", description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/traffic.json")
    parser.add_argument("--worker", metavar="STAGE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    write_json(args.out, {"kind": "traffic", "environment": environment(), "items": ITEMS, "rows": measure()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
