"""The commands of all stages on a made-up shop, one process each, timed: what rates are measured on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hellm.config import RunConfig, save_config
from hellm.plan.model import STAGES, Sizes, num_steps
from hellm.plan.shop import write_shop

__all__ = ["TOWERS", "measured_stages", "neighbour_rate"]

# Towers of a sum, by stage.
TOWERS = ("stage1", "transitions", "sequence", "llm")


def measured_stages(
    sizes: Sizes,
    stages: Sequence[str],
    config: RunConfig,
    folder: Path,
    *,
    widths: Mapping[str, int] | None = None,
    epochs: int = 1,
    processor_time: bool = False,
) -> dict[str, dict[str, Any]]:
    """What each stage takes on a shop of these sizes, in the order of `STAGES`.

    Args:
        sizes: Of the shop.
        stages: Names; what they build on must be among them.
        config: Settings of the stages.
        folder: Where the shop and the runs are made.
        widths: Features of the items, modality -> columns, in place of those that `hellm data build` makes of titles.
        epochs: Of stages that train, each with a validation.
        processor_time: Count the seconds of the processor, not of the clock: on one thread, those that a command would
            take on a machine without other work.

    Returns: Stage -> "seconds" of the whole command; "step" (seconds of one, where it trains), "validation", and "rest"
        of the seconds; "peak" (bytes of memory), "disk" (bytes left); "parameters" that it trains, "weights" (all) and
        those in "layers" of a language model; of a fusion, and of batch scoring by it, "kept", the towers
        that validation chose. Or "failure", a sentence.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_shop(folder / "shop", *(int(one) for one in sizes))
    found: dict[str, dict[str, Any]] = {}
    for name in STAGES:
        if name not in stages:
            continue
        one = _timed(_command(name, config, folder, epochs, found), folder, processor_time)
        if "failure" not in one:
            one |= _about(folder / name, num_steps(name, config, sizes), epochs, one)
            if name == "batch" and "kept" in found.get("fusion", ()):
                one["kept"] = found["fusion"]["kept"]
        found[name] = one
        if name == "data" and "failure" not in one and widths is not None:
            _put_features(folder / "data", widths)
    return found


def _command(
    name: str, config: RunConfig, folder: Path, epochs: int, found: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The arguments of `hellm`, whose run is in a folder called like the stage."""
    stage, out = STAGES[name], str(folder / name)
    if name == "data":
        return ["data", "build", str(folder / "shop"), out]
    if name == "batch":
        served = next(one for one in ("fusion", *reversed(TOWERS)) if "seconds" in found.get(one, ()))
        Path(out).mkdir()
        return ["batch", str(folder / served), "--out", f"{out}/lists.parquet"]
    if name == "fusion":
        runs = [str(folder / one) for one in TOWERS if "seconds" in found.get(one, ())]
        return ["fuse", *runs, "--data", str(folder / "data"), "--out", out]
    settings = replace(getattr(config, stage.config or ""), protocol=config.protocol, ks=config.ks)
    if name == "llm":
        # What several processes share out, one has whole.
        settings = replace(settings, sharded=False)
    if stage.step:
        settings = replace(settings, max_epochs=epochs, validate_every=1, checkpoint_every=epochs, tensorboard=False)
    save_config(settings, folder / f"{name}.yaml")
    inputs = ["--graph", str(folder / "stage1"), "--sequence", str(folder / "sequence")] if name == "llm" else []
    return [stage.verb, "--data", str(folder / "data"), *inputs, "--config", str(folder / f"{name}.yaml"), "--out", out]


def _timed(arguments: Sequence[str], folder: Path, processor_time: bool) -> dict[str, Any]:
    """Seconds and peak memory of a command in a process of its own, whose neighbours are in no cache yet.

    "counted" is the share of the clock's seconds that those are.
    """
    note = folder / "peak"
    command = [sys.executable, "-m", "hellm.cli._timed", str(note), *arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"failure": f"hellm {arguments[0]}: {said[-1]}"}
    took = json.loads(note.read_text())
    counted = took["processor_seconds"] / seconds if processor_time else 1.0
    return {"seconds": seconds * counted, "peak": took["peak"], "counted": counted}


def _about(run: Path, steps: int, epochs: int, took: Mapping[str, float]) -> dict[str, Any]:
    """How the seconds divide, and what the run has left."""
    found: dict[str, Any] = {"rest": took["seconds"]}
    if steps:
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        training, validation = (
            took["counted"] * sum(one.get(key, 0.0) for one in records) for key in ("seconds", "valid_seconds")
        )
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        found = {
            "step": training / (steps * epochs),
            "validation": validation / epochs,
            "rest": max(0.0, took["seconds"] - training - validation),
            "parameters": result.get("num_trained_parameters", result["num_parameters"]),
            "weights": result["num_parameters"],
            "layers": result.get("plan", {}).get("num_layer_parameters", 0),
        }
    if run.name == "fusion":
        towers = json.loads((run / "result.json").read_text(encoding="utf-8"))["towers"]
        found["kept"] = [name for name, one in towers.items() if one["kept"]]
    return found | {"disk": sum(one.stat().st_size for one in run.rglob("*") if one.is_file())}


def _put_features(data: Path, widths: Mapping[str, int]) -> None:
    """Features of the named widths, drawn at random, in place of those that the data set has."""
    import numpy as np

    from hellm.data import ItemFeatures, load_dataset, save_dataset

    dataset, rng = load_dataset(data), np.random.default_rng(0)
    features = {
        name: ItemFeatures.from_values(rng.standard_normal((dataset.num_items, width), dtype=np.float32))
        for name, width in widths.items()
    }
    save_dataset(replace(dataset, item_features=features), data, overwrite=True)


def neighbour_rate(width: int, *, rows: int = 4000, processor_time: bool = False) -> float:
    """Seconds for each product of two numbers in an exact search for nearest rows, the better of two."""
    import torch

    from hellm.ops import knn

    clock = time.process_time if processor_time else time.perf_counter
    x, seconds = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)), []
    for _ in range(2):
        started = clock()
        knn(x, 10)
        seconds.append(clock() - started)
    return min(seconds) / (rows**2 * width)
