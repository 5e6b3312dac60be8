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
from hellm.ops._backends import no_cuda_reason
from hellm.training.loop import Progress
from hellm.training.plots import plot_curves
from hellm.training.run_directory import RunDirectory, environment, peak_memory_bytes

__all__ = [
    "MAY_CHANGE",
    "Evaluate",
    "common_result",
    "readable_memory_errors",
    "resolve_device",
    "tensorboard",
    "write_curves",
]

# Settings that do not touch the numbers of the epochs before, so a resumed run may change them.
MAY_CHANGE = (
    *("max_epochs", "patience", "checkpoint_every", "device", "num_threads", "eval_batch_size", "tensorboard"),
    "capture",
)


class Evaluate(Protocol):
    """What a stage needs of `hellm.evaluate`: `evaluate_dataset`, or `evaluate_histories` for sequence models."""

    def __call__(self, scorer: Any, dataset: Dataset, *, split: str, protocol: str, ks: tuple, batch_size: int): ...


def resolve_device(name: str) -> str:
    """`name` with "auto" decided. Raises: ValueError, another device than CPU and CUDA, or one that is not there."""
    if name == "auto":
        return "cpu" if no_cuda_reason() else "cuda"
    try:
        kind = torch.device(name).type
    except RuntimeError:
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(f'device must be "auto", "cpu", "cuda" or "cuda:N", got {name!r}')
    reason = no_cuda_reason() if kind == "cuda" else None
    if reason is not None:
        raise ValueError(f"device must be usable, got {name!r}: {reason}")
    count, index = torch.cuda.device_count(), torch.device(name).index
    if kind == "cuda" and index is not None and index >= count:
        raise ValueError(f"device must be usable, got {name!r} where torch sees {count} CUDA device(s)")
    return name


@contextlib.contextmanager
def readable_memory_errors(what: str, advice: str) -> Iterator[None]:
    """Raises: MemoryError in place of torch's own: what ran, how much it asked for, and what to do."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in text:
            raise
        raise MemoryError(f"{what} needs more memory than there is ({text.splitlines()[0]}); {advice}") from error


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
