"""The run directory: the unit that passes between stages.

config.yaml             resolved settings
metrics.jsonl           one record per epoch, and one per validation within an epoch
result.json             test metrics, protocol, counts, seconds, peak memory, versions; there when the run is finished
embeddings.safetensors  final embeddings
ids.parquet             which id each embedding row belongs to
histories.parquet       the events, as embedding rows
content.safetensors     what the items look and read like, where the data have features
test_evaluations.jsonl  every evaluation on the test split, training's own first (`hellm.evaluate.evaluation_log`)
checkpoint/             last.safetensors (to go on from) and best.safetensors (what is tested)
curves.png              losses and validation metrics over epochs
events.out.tfevents.*   TensorBoard, if asked for
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from hellm._files import atomic_path
from hellm.config import config_to_dict, load_config, save_config
from hellm.data import Dataset

__all__ = ["RunDirectory", "environment", "peak_memory_bytes"]


class RunDirectory:
    """A folder of one training run.

    Args:
        path: made with its parents if absent.
        resume: go on with the run that is there; where there is none, start one.
        overwrite: delete a run that is there.

    Raises:
        FileExistsError: the folder holds something and neither `resume` nor `overwrite` is given; or `overwrite` would
            delete a folder that is not a run.
        ValueError: both are given.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ValueError("resume and overwrite must not both be given")
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"run directory {self.path} is a file")
        if self.path.is_dir() and any(self.path.iterdir()) and not resume:
            if not overwrite:
                raise FileExistsError(
                    f"run directory {self.path} is not empty; resume it, overwrite it, or choose another"
                )
            if not self.config.is_file():
                raise FileExistsError(f"{self.path} holds no config.yaml, so it is no run and is not overwritten")
            shutil.rmtree(self.path)
        self.checkpoints.mkdir(parents=True, exist_ok=True)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def embeddings(self) -> Path:
        return self.path / "embeddings.safetensors"

    @property
    def ids(self) -> Path:
        return self.path / "ids.parquet"

    @property
    def histories(self) -> Path:
        return self.path / "histories.parquet"

    @property
    def content(self) -> Path:
        return self.path / "content.safetensors"

    @property
    def curves(self) -> Path:
        return self.path / "curves.png"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoint"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.safetensors"

    @staticmethod
    def holds_result(path: str | os.PathLike[str]) -> bool:
        """Whether there is a finished run at `path`."""
        return (Path(path) / "result.json").is_file()

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to go on from; without it, settings and data bind nobody."""
        return self.last.is_file() or self.result.is_file()

    def write_config(self, config: Any, *, may_change: Collection[str] = ()) -> bool:
        """Write the resolved settings; whether what is there was trained with others.

        Raises: ValueError, if a setting outside `may_change` differs from those it was trained with (which, and how).
        """
        changed = False
        if self.config.is_file() and self.is_trained:
            before, now = config_to_dict(load_config(type(config), self.config)), config_to_dict(config)
            for key in now:
                if before[key] != now[key] and key not in may_change:
                    raise ValueError(
                        f"{self.config}: a resumed run must keep its settings; {key} was {before[key]!r}, "
                        f"got {now[key]!r}"
                    )
            changed = before != now
        save_config(config, self.config)
        return changed

    def check_data(self, fingerprint: str, inputs: str | None = None) -> None:
        """Note what the run is of: fingerprints of the data set, and of what other runs gave.

        Raises: ValueError, if what is there was trained on others.
        """
        note, now = self.checkpoints / "data.json", {"fingerprint": fingerprint}
        now |= {} if inputs is None else {"inputs": inputs}
        if note.is_file() and self.is_trained:
            before = json.loads(note.read_text(encoding="utf-8"))
            for name, what in (("fingerprint", "data"), ("inputs", "input runs")):
                if name in before and before[name] != now.get(name):
                    raise ValueError(
                        f"{self.path}: a resumed run must keep its {what}; their fingerprint was {before[name]}, "
                        f"got {now.get(name)}"
                    )
        with atomic_path(note) as temporary:
            temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add the record of one epoch or validation."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All records so far; a last line cut short by a kill is left out."""
        if not self.metrics.is_file():
            return []
        records = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def training_seconds(self) -> float:
        """Seconds of training steps and validations, over all sessions."""
        return sum(one.get("seconds", 0.0) + one.get("valid_seconds", 0.0) for one in self.read_metrics())

    def truncate_metrics(self, num_epochs: int, num_steps: int = 0) -> None:
        """Keep what a checkpoint after `num_epochs` epochs and `num_steps` steps of the next has seen."""

        def seen(record: Mapping[str, Any]) -> bool:
            in_running = record["epoch"] == num_epochs and record.get("step", num_steps + 1) <= num_steps
            return record["epoch"] < num_epochs or in_running

        kept = [record for record in self.read_metrics() if seen(record)]
        with atomic_path(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        with atomic_path(self.result) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def read_result(self) -> dict[str, Any]:
        """The result of a finished run."""
        return json.loads(self.result.read_text(encoding="utf-8"))

    def write_ids(self, dataset: Dataset) -> None:
        """Write ids.parquet: side ("user" or "item"), index (embedding row), id, title (of items that have one)."""
        import polars as pl

        num_users, num_items = dataset.num_users, dataset.num_items
        titles = dataset.item_titles if dataset.item_titles is not None else [None] * num_items
        table = pl.DataFrame(
            {
                "side": ["user"] * num_users + ["item"] * num_items,
                "index": [*range(num_users), *range(num_items)],
                "id": [*dataset.user_ids.ids, *dataset.item_ids.ids],
                "title": [None] * num_users + [title or None for title in titles],
            },
            schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
        )
        with atomic_path(self.ids) as temporary:
            table.write_parquet(temporary)

    def write_histories(self, dataset: Dataset) -> None:
        """Write histories.parquet: user and item (embedding rows) and split (0, 1, 2) of each event, in time order."""
        import polars as pl

        columns = {"user": dataset.users, "item": dataset.items, "split": dataset.split}
        with atomic_path(self.histories) as temporary:
            pl.DataFrame(columns).write_parquet(temporary)

    def write_content(
        self, dataset: Dataset, *, modalities: Collection[str] | None = None, k: int = 10, device: str = "cpu"
    ) -> None:
        """Write content.safetensors, for reasons and new items (see `ItemContent`); nothing without item features.

        Neighbours are searched on `device`.
        """
        from hellm.models.item_content import ItemContent

        features = {
            name: one for name, one in dataset.item_features.items() if modalities is None or name in modalities
        }
        if features:
            ItemContent.of(features, k, device).save(self.content)


def environment(device: str) -> dict[str, str]:
    """Versions and hardware that a number depends on."""
    import numpy as np
    import torch

    import hellm

    versions = {
        "hellm": hellm.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "num_threads": str(torch.get_num_threads()),
    }
    if device.startswith("cuda"):
        versions["device_name"] = torch.cuda.get_device_name(device)
    return versions


def peak_memory_bytes(device: str) -> dict[str, int]:
    """Peak resident memory of this process and, on CUDA, peak allocated device memory, in bytes; what can be read."""
    peaks = {}
    try:
        import resource
    except ImportError:
        pass
    else:
        # Linux counts KiB, macOS bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.startswith("cuda"):
        import torch

        peaks["device"] = torch.cuda.max_memory_allocated(device)
    return peaks
