"""The run directory: the unit that passes between stages; `hellm.artifact.files` says what is in it."""

from __future__ import annotations

import json
import logging
import os
import platform
import sys
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from hellm._files import append_line, atomic_path, read_json, writing
from hellm._folders import check_target, clear_folder, mark_folder
from hellm.artifact.files import (
    CHECKPOINT,
    CONFIG,
    CURVES,
    EMBEDDINGS,
    HISTORIES,
    IDS,
    METRICS,
    RESULT,
    RUN_LAYOUT,
)
from hellm.artifact.tables import histories_table, ids_table, read_ids, side_of
from hellm.config import config_to_dict, load_saved_config, save_config
from hellm.data import Dataset

__all__ = ["START_OVER", "RunDirectory", "check_run", "environment", "peak_memory_bytes", "read_metrics"]

logger = logging.getLogger(__name__)

START_OVER = "to start over, give overwrite=True or another folder"
# What a training came to, that of epochs, of a choice or of a sum.
_OUTCOMES = ({"best_epoch", "num_epochs"}, {"chosen"}, {"weights", "towers"})


def check_run(
    path: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Whether a run may be made, gone on with or replaced at `path`; changes nothing.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    check_target(
        path, kind="run", layout=RUN_LAYOUT, resume=resume, overwrite=overwrite, inputs=inputs, proof=CHECKPOINT
    )


class RunDirectory:
    """A folder of one training run.

    Args:
        path: made with its parents if absent.
        resume: go on with the run that is there; where there is none, start one.
        overwrite: delete a run that is there.

    Raises:
        FileExistsError: the folder holds something and neither `resume` nor `overwrite` is given, or it is not known to
            be a run.
        ValueError: both are given.
        WriteError: it cannot be made.
    """

    def __init__(self, path: str | os.PathLike[str], *, resume: bool = False, overwrite: bool = False) -> None:
        check_run(path, resume=resume, overwrite=overwrite)
        self.path = Path(path)
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            mark_folder(self.path, "run", layout=RUN_LAYOUT)
            if overwrite:
                # Until `last` is gone, what is left can be gone on with, and makes the old outputs again.
                last = (self.last, self.best, self.config)
                clear_folder(self.path, first=[self.result], last=last)
            self.checkpoints.mkdir(exist_ok=True)

    @property
    def config(self) -> Path:
        return self.path / CONFIG

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def result(self) -> Path:
        return self.path / RESULT

    @property
    def embeddings(self) -> Path:
        return self.path / EMBEDDINGS

    @property
    def ids(self) -> Path:
        return self.path / IDS

    @property
    def histories(self) -> Path:
        return self.path / HISTORIES

    @property
    def curves(self) -> Path:
        return self.path / CURVES

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINT

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.safetensors"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.safetensors"

    @staticmethod
    def holds_result(path: str | os.PathLike[str]) -> bool:
        """Whether there is a finished run at `path`."""
        return (Path(path) / RESULT).is_file()

    @property
    def is_trained(self) -> bool:
        """Whether there is anything to go on from; without it, settings and data bind nobody."""
        return self.last.is_file() or self.result.is_file()

    def write_config(self, config: Any, *, may_change: Collection[str] = ()) -> bool:
        """Write the resolved settings; whether what is there was trained with others.

        Raises: ValueError, if a setting outside `may_change` differs from those it was trained with (which, and how).
        """
        changed = False
        if self.is_trained:
            before, now = config_to_dict(load_saved_config(type(config), self.config)), config_to_dict(config)
            for key in now:
                if before[key] != now[key] and key not in may_change:
                    name, was, given = _first_difference(key, before[key], now[key])
                    raise ValueError(
                        f"{self.config}: a resumed run must keep its settings; {name} was {was!r}, got {given!r}; "
                        f"{START_OVER}"
                    )
            changed = before != now
        save_config(config, self.config)
        return changed

    def check_data(self, dataset: Dataset, inputs: str | None = None) -> None:
        """Note what the run is of: the data set, and a fingerprint of what other runs gave.

        Raises: ValueError, if what is there was trained on others.
        """
        note, parts = self.checkpoints / "data.json", dataset.fingerprints
        now = {"fingerprint": dataset.fingerprint, **parts} | ({} if inputs is None else {"inputs": inputs})
        before = read_json(note) if note.is_file() and self.is_trained else {}
        changed = [name for name in now if name in before and before[name] != now[name]]
        if changed == ["fingerprint"]:
            # Of an earlier version, which did not note the parts.
            changed = ["events, split or item features"]
        elif not changed and "item ids" not in before and self.ids.is_file():
            changed = self._changed_ids(dataset)
        changed = [name for name in changed if name != "fingerprint"]
        if changed:
            what = "input runs" if changed == ["inputs"] else "data"
            named = "" if changed == ["inputs"] else f": {', '.join(changed)}"
            raise ValueError(
                f"{self.path}: a resumed run must keep its {what}, and those given are others{named}; give what it was "
                f"trained on, or, {START_OVER}"
            )
        with atomic_path(note) as temporary:
            temporary.write_text(json.dumps(now) + "\n", encoding="utf-8")

    def _changed_ids(self, dataset: Dataset) -> list[str]:
        """What differs from ids.parquet, for a run that was finished before ids had a fingerprint."""
        own = {"user ids": ("user", dataset.user_ids), "item ids": ("item", dataset.item_ids)}
        table = read_ids(self.path)
        return [name for name, (side, ids) in own.items() if side_of(table, side)[0] != ids]

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Add the record of one epoch or validation."""
        append_line(self.metrics, json.dumps(record))

    def read_metrics(self) -> list[dict[str, Any]]:
        """See `read_metrics`."""
        return read_metrics(self.path)

    def training_seconds(self) -> float:
        """Seconds of training steps and validations, over all sessions."""
        return sum(one.get("seconds", 0.0) + one.get("valid_seconds", 0.0) for one in self.read_metrics())

    def truncate_metrics(self, num_epochs: int, num_steps: int = 0) -> None:
        """Keep what a checkpoint after `num_epochs` epochs and `num_steps` steps of the next has seen.

        Warns of epochs that it has seen and that have no record, as in a damaged file.
        """

        def seen(record: Mapping[str, Any]) -> bool:
            in_running = record["epoch"] == num_epochs and record.get("step", num_steps + 1) <= num_steps
            return record["epoch"] < num_epochs or in_running

        kept = [record for record in self.read_metrics() if seen(record)]
        lost = sorted(set(range(num_epochs)) - {record["epoch"] for record in kept if "step" not in record})
        if lost:
            logger.warning(
                "%s: damaged, lacks %d of %d epochs, the first of them %d; training goes on from its checkpoint, but "
                "curves and seconds are those of the other epochs", self.metrics, len(lost), num_epochs, lost[0]
            )  # fmt: skip
        with atomic_path(self.metrics) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json."""
        with atomic_path(self.result) as temporary:
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def read_result(self) -> dict[str, Any]:
        """The result of a finished run. Raises: ValueError, a damaged file."""
        result = read_json(self.result)
        missing = [name for name in ("stage", "test", "valid") if name not in result]
        if missing or not any(result.keys() >= one for one in _OUTCOMES):
            raise ValueError(f"{self.result}: damaged, lacks {(missing or ['best_epoch'])[0]!r}; {START_OVER}")
        return result

    def write_tables(self, dataset: Dataset) -> None:
        """Write ids.parquet and histories.parquet, see `hellm.artifact.tables`."""
        ids = ids_table(dataset.user_ids, dataset.item_ids, dataset.item_titles)
        for path, table in ((self.ids, ids), (self.histories, histories_table(dataset))):
            with atomic_path(path) as temporary:
                table.write_parquet(temporary)


def read_metrics(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All records of metrics.jsonl so far, up to a line that is none, as a kill may have left at the end."""
    file = Path(run) / METRICS
    if not file.is_file():
        return []
    records = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if not isinstance(record, dict) or "epoch" not in record:
            break
        records.append(record)
    return records


def _first_difference(name: str, before: Any, now: Any) -> tuple[str, Any, Any]:
    """Dotted name and values of the first setting that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in now:
            if before.get(key) != now[key]:
                return _first_difference(f"{name}.{key}", before.get(key), now[key])
    return name, before, now


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
