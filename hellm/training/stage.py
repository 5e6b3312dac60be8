"""What every stage does around its training loop: opening its run, device, curves, the common part of its result."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from hellm._devices import resolve_device
from hellm._files import atomic_path, writing
from hellm._folders import hold
from hellm.artifact.evaluation_log import TRAINING, log_test_evaluation
from hellm.artifact.files import CONTENT
from hellm.artifact.run_directory import RunDirectory, check_run, environment, peak_memory_bytes
from hellm.artifact.test_users import write_test_users
from hellm.config.loop import LoopConfig, StageConfig
from hellm.data import Dataset, load_dataset
from hellm.evaluate import RankingResult
from hellm.evaluate.compare import slices_summary
from hellm.models import ItemContent
from hellm.training.loop import Progress, Schedule, fit
from hellm.training.plots import plot_curves
from hellm.training.processes import Processes
from hellm.training.step import Step

__all__ = [
    "OnEpoch",
    "OnPlan",
    "OpenedRun",
    "common_result",
    "fit_stage",
    "open_run",
    "plan_of_steps",
    "readable_memory_errors",
    "resolve_common",
    "seconds_of_step",
    "tested",
    "write_curves",
    "write_tables",
]

logger = logging.getLogger(__name__)

ConfigT = TypeVar("ConfigT", bound=StageConfig)
ContentT = TypeVar("ContentT")
# Called with a record of metrics.jsonl, see `hellm.training.loop.fit`.
OnEpoch = Callable[[Mapping[str, Any]], None]
# Called with what a training will cost, before its first epoch.
OnPlan = Callable[[Mapping[str, Any]], None]

# Settings that do not touch the numbers of the epochs before, so a resumed run may change them; but for `max_epochs`
# where the step size depends on it.
MAY_CHANGE = frozenset(
    {"max_epochs", "patience", "checkpoint_every", "device", "num_threads", "eval_batch_size", "tensorboard", "capture"}
)


class OpenedRun(NamedTuple):
    """A run that is ready to train, or that was finished before.

    Attributes:
        config: settings as they will run.
        dataset: what they run on.
        notes: a sentence for each setting that had to give way.
        inputs: what `prepare` returned.
        run: its folder.
        finished: the result of a finished run; None where there is training to do.
    """

    config: Any
    dataset: Dataset
    notes: list[str]
    inputs: Any
    run: RunDirectory
    finished: dict[str, Any] | None


@contextlib.contextmanager
def open_run(
    config: ConfigT,
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    resolve: Callable[[ConfigT, Dataset], tuple[ConfigT, list[str]]],
    *,
    prepare: Callable[[ConfigT, Dataset], Any] | None = None,
    fingerprint: Callable[[Any], str] | None = None,
    may_change: Collection[str] = MAY_CHANGE,
    resume: bool,
    overwrite: bool,
    read: Collection[str | os.PathLike[str] | None] = (),
    processes: Processes | None = None,
) -> Iterator[OpenedRun]:
    """Load the data, settle the settings, set torch's threads and generator, and make or find the run directory.

    No other process can write into it until the block ends.

    Args:
        config: settings as given.
        data: a data set, or a path for `hellm.data.load_dataset`.
        out, resume, overwrite: see `RunDirectory`.
        resolve: (config, dataset) -> settings as they will run, and notes.
        prepare: (resolved config, dataset) -> whatever must be there before a folder is made.
        fingerprint: of what `prepare` returned; a resumed run must keep it.
        may_change: settings that a resumed run need not keep.
        read: what is read beside `data`, and so must not stand in a folder that is overwritten.
        processes: those that open it together.

    Raises:
        FileExistsError, ValueError: as `RunDirectory`, `resolve` and `prepare`.
        FolderInUseError: another process trains there.
    """
    processes = processes or Processes()
    read = [*read, None if isinstance(data, Dataset) else data]
    held = contextlib.ExitStack()

    def enter_folder() -> None:
        check_run(out, resume=resume, overwrite=overwrite, inputs=read)
        held.enter_context(hold(out))

    with held:
        processes.on_first(enter_folder)
        yield _opened(config, data, out, resolve, prepare, fingerprint, may_change, resume, overwrite, processes)


def _opened(
    config, data, out, resolve, prepare, fingerprint, may_change, resume: bool, overwrite: bool, processes: Processes
) -> OpenedRun:
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    config, notes = resolve(config, dataset)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    inputs = None if prepare is None else prepare(config, dataset)

    def enter() -> tuple[RunDirectory, dict[str, Any] | None]:
        run = RunDirectory(out, resume=resume, overwrite=overwrite)
        run.check_data(dataset, None if fingerprint is None else fingerprint(inputs))
        changed = run.write_config(config, may_change=may_change)
        if run.result.is_file() and not changed:
            return run, run.read_result()
        run.result.unlink(missing_ok=True)
        for note in notes:
            logger.warning(note)
        return run, None

    run, finished = processes.on_first(enter)
    return OpenedRun(config, dataset, notes, inputs, run, finished)


def resolve_common(config: ConfigT, dataset: Dataset) -> tuple[ConfigT, list[str]]:
    """The part of settling `config` that all stages share, with notes.

    Lists are as long as the catalogue at most, and what is monitored is among the metrics.

    Raises: ValueError for a device that is not there, or no training events.
    """
    if not (dataset.split == 0).any():
        raise ValueError(f"data set {dataset.name!r} must have training events, got none")
    notes = []
    ks = _lengths((*config.ks, *(int(name.partition("@")[2]) for name in config.monitor)), dataset)
    monitor = tuple(dict.fromkeys(_cut(name, dataset) for name in config.monitor))
    if monitor != config.monitor or max(config.ks) > dataset.num_items:
        notes.append(f"list lengths (ks and monitor) cut to the {dataset.num_items} items there are")
    if not (dataset.split == 1).any():
        notes.append("no validation events: trained for max_epochs, the last weights are kept")
    return replace(config, ks=ks, monitor=monitor, device=resolve_device(config.device)), notes


def _lengths(ks: Iterable[int], dataset: Dataset) -> tuple[int, ...]:
    """Distinct list lengths, none beyond the catalogue."""
    return tuple(dict.fromkeys(min(k, dataset.num_items) for k in ks))


def _cut(metric: str, dataset: Dataset) -> str:
    name, _, k = metric.partition("@")
    return f"{name}@{min(int(k), dataset.num_items)}"


def seconds_of_step(model: nn.Module, loss: Callable[[], Tensor]) -> float:
    """Seconds of one forward and backward pass; weights, gradients and generators are as before.

    Args:
        model: In training mode afterwards.
        loss: Gives that of a step.
    """
    model.train()
    cuda = [one.device for one in model.parameters() if one.device.type == "cuda"][:1]
    # The first of the two touches fresh memory, which no later step does.
    with torch.random.fork_rng(cuda):
        for _ in range(2):
            started = time.perf_counter()
            loss().backward()
            model.zero_grad(set_to_none=True)
            for device in cuda:
                torch.cuda.synchronize(device)
            seconds = time.perf_counter() - started
    return seconds


def plan_of_steps(seconds: float, num_steps: int, max_epochs: int) -> dict[str, Any]:
    """What training comes to at most, from the seconds of a step; without validations."""
    return {
        "steps_per_epoch": num_steps,
        "max_steps": num_steps * max_epochs,
        "seconds_of_step": seconds,
        "expected_seconds_per_epoch": seconds * num_steps,
        "expected_seconds": seconds * num_steps * max_epochs,
    }


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
def tensorboard(enabled: bool, run: RunDirectory, on_epoch: OnEpoch | None = None) -> Iterator[OnEpoch | None]:
    """A writer of epoch records as TensorBoard events into the run directory, then `on_epoch`; None for neither."""
    if not enabled:
        yield on_epoch
        return
    from torch.utils.tensorboard import SummaryWriter

    name = run.path / "events.out.tfevents"
    with writing(name):
        writer = SummaryWriter(str(run.path))

    def write(record: Mapping[str, Any]) -> None:
        with writing(name):
            for name_, value in record.items():
                if name_ not in ("epoch", "step", "epochs_done"):
                    writer.add_scalar(name_, value, record["epoch"])
        if on_epoch is not None:
            on_epoch(record)

    try:
        yield write
    finally:
        with writing(name):
            writer.close()


def fit_stage(
    step: Step,
    config: LoopConfig,
    dataset: Dataset,
    run: RunDirectory,
    validate: Callable[[Any], Mapping[str, float]],
    on_epoch: OnEpoch | None,
    *,
    validate_steps: int | None = None,
) -> Progress:
    """`hellm.training.loop.fit` as a stage's settings have it: validated where there are validation events."""
    schedule = Schedule.of(config, validate_steps=validate_steps)
    has_validation = (dataset.split == 1).any()
    with tensorboard(config.tensorboard and step.processes.index == 0, run, on_epoch) as on_record:
        return fit(step, run, schedule, validate=validate if has_validation else None, on_epoch=on_record)


def common_result(
    stage: str,
    model: nn.Module,
    dataset: Dataset,
    run: RunDirectory,
    progress: Progress,
    *,
    test: RankingResult | None,
    device: str,
) -> dict[str, Any]:
    """What result.json of every stage holds; "seconds" are of training steps and validations, over all sessions.

    The test is noted as `tested` does.
    """
    records = run.read_metrics()
    seconds = [record["seconds"] for record in records if "seconds" in record]
    return {
        "stage": stage,
        "test": tested(run, test, dataset),
        "valid": {"metrics": progress.best_metrics},
        "best_epoch": progress.best_epoch,
        "best_step": progress.best_step,
        "num_epochs": progress.epoch + (progress.step > 0),
        "seconds_per_epoch": float(np.median(seconds)) if seconds else None,
        "seconds": run.training_seconds(),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dataset": dataset.summary(),
        "peak_memory_bytes": peak_memory_bytes(device),
        "environment": environment(device),
    }


def tested(run: RunDirectory, test: RankingResult | None, dataset: Dataset) -> dict[str, Any] | None:
    """What result.json says of the test, which is noted in test_evaluations.jsonl and, by user, in test_users.

    Slices are part of it where the test was made by target.
    """
    if test is None:
        return None
    values = test.to_dict(level=0.95)
    if test.by_target:
        values["slices"] = slices_summary(test, dataset)
    names = {"protocols": [values["protocol"]], "metrics": list(values["metrics"])}
    log_test_evaluation(run.path, by=TRAINING, **names, fingerprint=dataset.fingerprint)
    write_test_users(run.path, test)
    return {**values["metrics"], **values}


def write_curves(run: RunDirectory, *, metrics: Sequence[str], best_epoch: int | None, title: str) -> None:
    """Write curves.png."""
    with atomic_path(run.curves) as temporary:
        plot_curves(run.read_metrics(), temporary, metrics=metrics, best_epoch=best_epoch, title=title)


def write_tables(
    run: RunDirectory,
    dataset: Dataset,
    *,
    modalities: Collection[str] | None = None,
    k: int = 10,
    device: str = "cpu",
    search: str | None = None,
) -> None:
    """Write ids.parquet, histories.parquet and, where the items have content, content.safetensors.

    Args:
        modalities: features and attributes that content.safetensors has; None is all.
        k: neighbours of an item that it has, itself included.
        device: where neighbours are searched.
        search: how, see `hellm.graphs.nearest_items`.
    """
    run.write_tables(dataset)

    def kept(there: Mapping[str, ContentT]) -> dict[str, ContentT]:
        return {name: one for name, one in there.items() if modalities is None or name in modalities}

    features, attributes = kept(dataset.item_features), kept(dataset.attribute_sets)
    if features or attributes:
        encoders = {name: one for name, one in dataset.encoders.items() if name in features}
        content = ItemContent.of(features, k, device, attributes=attributes, encoders=encoders, search=search)
        content.save(run.path / CONTENT)
