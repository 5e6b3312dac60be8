"""What every stage does around its training loop: device, curves, and the common part of its result."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from hellm._files import atomic_path
from hellm.data import Dataset
from hellm.training.loop import Progress
from hellm.training.plots import plot_curves
from hellm.training.run_directory import RunDirectory, environment, peak_memory_bytes

__all__ = ["MAY_CHANGE", "Evaluate", "common_result", "resolve_device", "tensorboard", "write_curves"]

# Settings that do not touch the numbers of the epochs before, so a resumed run may change them.
MAY_CHANGE = ("max_epochs", "patience", "checkpoint_every", "device", "num_threads", "eval_batch_size", "tensorboard")


class Evaluate(Protocol):
    """What a stage needs of `hellm.evaluate`: `evaluate_dataset`, or `evaluate_histories` for sequence models."""

    def __call__(self, scorer: Any, dataset: Dataset, *, split: str, protocol: str, ks: tuple, batch_size: int): ...


def resolve_device(name: str) -> str:
    """`name` with "auto" decided. Raises: ValueError, another device than CPU and CUDA, or one that is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be usable, got {name!r} where torch sees no CUDA device")
    return name


@contextlib.contextmanager
def tensorboard(enabled: bool, run: RunDirectory) -> Iterator[Callable[[Mapping[str, Any]], None] | None]:
    """A writer of epoch records as TensorBoard events into the run directory, or None."""
    if not enabled:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(run.path)) as writer:

        def write(record: Mapping[str, Any]) -> None:
            for name, value in record.items():
                if name != "epoch":
                    writer.add_scalar(name, value, record["epoch"])

        yield write


def common_result(
    stage: str,
    model: nn.Module,
    dataset: Dataset,
    run: RunDirectory,
    progress: Progress,
    *,
    test: Mapping[str, Any] | None,
    device: str,
) -> dict[str, Any]:
    """What result.json of every stage holds: test and validation, counts, time and memory."""
    records = run.read_metrics()
    best = next((record for record in records if record["epoch"] == progress.best_epoch), {})
    valid = {name.removeprefix("valid_"): best[name] for name in best if name.startswith("valid_")}
    valid.pop("seconds", None)
    counts = np.bincount(dataset.split, minlength=3).tolist()
    return {
        "stage": stage,
        "test": test,
        "valid": {"metrics": valid},
        "best_epoch": progress.best_epoch,
        "num_epochs": progress.epoch,
        "seconds_per_epoch": float(np.median([record["seconds"] for record in records])) if records else None,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": {
            "name": dataset.name,
            "form": dataset.form,
            "split": dataset.split_name,
            "num_users": dataset.num_users,
            "num_items": dataset.num_items,
            "num_events": dict(zip(("train", "valid", "test"), counts, strict=True)),
            "fingerprint": dataset.fingerprint,
        },
        "peak_memory_bytes": peak_memory_bytes(device),
        "environment": environment(device),
    }


def write_curves(run: RunDirectory, *, metrics: Sequence[str], best_epoch: int | None, title: str) -> None:
    """Write curves.png."""
    with atomic_path(run.curves) as temporary:
        plot_curves(run.read_metrics(), temporary, metrics=metrics, best_epoch=best_epoch, title=title)
