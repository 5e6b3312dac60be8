"""What a user would pick instead, on the same data, in the same run.

python -m benchmarks.peers --data DIR [--out FILE]: models of RecTools, PyTorch Geometric and implicit in an
environment of their own, which is made where it is not there yet, and ours, each in a process of its own with as many
threads as the machine has cores, after one another. All learn from the training events, and are tested as `hellm
evaluate --protocol recbole-sequential` tests: nothing is masked, all items are ranked, and a sequence model also reads
the validation event. Settings are not tuned here; a library's own are taken where it has any, and sizes are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.environment import ROOT, environment, write_json

if TYPE_CHECKING:
    from hellm.data import Dataset

PACKAGES = ("rectools[torch]", "torch_geometric", "implicit")
VERSIONS = ("rectools", "torch", "torch-geometric", "implicit", "numpy")
HOME = ROOT / "build/peers"
KS = (10, 20)
# Name -> (what it is called, epochs, a model of the other environment, or a stage and settings of ours).
ROWS: dict[str, tuple[int, str | tuple[str, ...]]] = {
    "RecTools SASRec": (3, "rectools-sasrec"),
    "hellm SASRec, as many epochs": (3, ("sasrec", "content=[]")),
    "hellm SASRec, until validation ends it": (200, ("sasrec", "content=[]")),
    "PyTorch Geometric LightGCN": (20, "pyg-lightgcn"),
    "hellm LightGCN, as many epochs": (
        20,
        (
            *("pretrain", "model.user_hypergraph=false", "model.item_hypergraph=false", "model.num_layers=2"),
            *("sampler=interaction-uniform", "batch_size=8192"),
        ),
    ),
    "implicit BPR": (100, "implicit-bpr"),
}


def python_of_peers() -> Path:
    """The interpreter of the other environment, made where it is not there."""
    python = HOME / "bin/python"
    if not (HOME / "made").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(HOME)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
        (HOME / "made").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Of the packages that were compared with."""
    code = f"import importlib.metadata as m, json; print(json.dumps({{n: m.version(n) for n in {VERSIONS!r}}}))"
    return json.loads(subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True).stdout)


def peer(python: Path, model: str, data: Dataset, epochs: int, folder: Path) -> dict[str, Any]:
    """A row of a model of another library."""
    events, out = folder / "events.npz", folder / f"{model}.npz"
    known = data.split < 2
    np.savez(events, train=np.stack(data.pairs("train")), known=np.stack([data.users[known], data.items[known]]))
    started = time.perf_counter()
    done = subprocess.run(
        [str(python), str(ROOT / "benchmarks/peer_models.py"), model, str(events), str(out), str(epochs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""},
    )
    if done.returncode:
        raise RuntimeError(f"{model} failed:\n{done.stderr[-4000:]}")
    with np.load(out) as found:
        lists, seconds = found["lists"], found["seconds"]
    return {**_row(seconds.tolist(), time.perf_counter() - started), "metrics": tested(lists, data)}


def tested(lists: np.ndarray, data: Dataset) -> Mapping[str, float]:
    """Metrics of lists [U, K], -1 where they are shorter."""
    import torch

    from hellm.evaluate import evaluate_dataset

    class Listed:
        def scores(self, users: torch.Tensor) -> torch.Tensor:
            own = torch.from_numpy(lists)[users]
            scores = torch.full((len(users), data.num_items + 1), -torch.inf)
            # An item that is not there takes what is at the end.
            scores.scatter_(1, own.where(own >= 0, data.num_items), -torch.arange(own.shape[1]).float().expand_as(own))
            return scores[:, :-1]

    return evaluate_dataset(Listed(), data, split="test", protocol="recbole-sequential", ks=KS).metrics


def ours(stage: tuple[str, ...], data: Path, epochs: int, folder: Path) -> dict[str, Any]:
    """A row of a stage of `hellm`."""
    out = folder / "-".join((stage[0], str(epochs)))
    settings = [f"max_epochs={epochs}", f"ks={list(KS)}", "protocol=recbole-sequential", "tensorboard=false"]
    command = [sys.executable, "-m", "hellm", stage[0], "--data", str(data), "--out", str(out), *settings, *stage[1:]]
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    taken = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-4000:]}")
    result = json.loads((out / "result.json").read_text())
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {**_row([one["seconds"] for one in records], taken), "metrics": result["test"]["metrics"]}


def _row(seconds: Sequence[float], taken: float) -> dict[str, Any]:
    return {"epochs": len(seconds), "seconds_of_epoch": statistics.median(seconds), "seconds": taken}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="data set that hellm data build wrote")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/peers.json")
    args = parser.parse_args(argv)
    from hellm.data import load_dataset

    data, python, rows = load_dataset(args.data), python_of_peers(), []
    with tempfile.TemporaryDirectory() as folder:
        for name, (epochs, what) in ROWS.items():
            if isinstance(what, str):
                found = peer(python, what, data, epochs, Path(folder))
            else:
                found = ours(what, args.data, epochs, Path(folder))
            metrics = {
                key: value for key, value in found["metrics"].items() if key.partition("@")[0] in ("recall", "ndcg")
            }
            rows.append({"model": name, **found, "metrics": metrics})
            print(rows[-1], flush=True)
    record = {"kind": "peers", "environment": environment(), "versions": versions(python), "rows": rows}
    write_json(args.out, record | {"dataset": data.summary()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
