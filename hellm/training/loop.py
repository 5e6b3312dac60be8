"""The training loop: epochs of steps, validation, early stopping, checkpoints, interruption and resumption."""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from hellm.artifact.run_directory import RunDirectory
from hellm.config.loop import LoopConfig
from hellm.training.checkpoint import (
    load_training_state,
    model_weights,
    save_checkpoint,
    training_state,
    whole_weights,
)
from hellm.training.processes import connected
from hellm.training.step import Step

__all__ = ["Interrupted", "Progress", "Schedule", "fit"]

logger = logging.getLogger(__name__)

_ADVICE = "a smaller learning_rate may help, and so may a larger temperature where there is one"
# What asks a process to end. One that it is told to ignore, as nohup does with SIGHUP, stays ignored.
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")


class Interrupted(SystemExit):
    """Training stopped on a signal after saving its state. The exit code is 128 + the signal's number."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(128 + signum)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass
class Progress:
    """How far a run is; together with model, optimiser and generators all that a checkpoint holds.

    Attributes:
        epoch: the epoch that runs next, or is running; counted from 0.
        step: steps of it that are done.
        losses: the loss terms of those steps.
        best: best value so far of each monitored metric.
        best_epoch: last epoch whose validation improved; None before the first.
        best_step: steps of it that were done then; None for all.
        best_metrics: all metrics of that validation.
        checks_without_gain: validations since then.
        seconds: spent on the steps of the running epoch so far.
    """

    epoch: int = 0
    step: int = 0
    losses: list[list[float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    best_epoch: int | None = None
    best_step: int | None = None
    best_metrics: dict[str, float] = field(default_factory=dict)
    checks_without_gain: int = 0
    seconds: float = 0.0

    def improve(self, metrics: Mapping[str, float], monitor: Sequence[str], *, step: int | None = None) -> bool:
        """Note a validation; whether any monitored metric beat its own best (the first check always does)."""
        gains = [name for name in monitor if metrics[name] > self.best.get(name, -math.inf)]
        self.best |= {name: metrics[name] for name in gains}
        if gains:
            self.best_epoch, self.best_step, self.best_metrics = self.epoch, step, dict(metrics)
        self.checks_without_gain = 0 if gains else self.checks_without_gain + 1
        return bool(gains)


@dataclass(frozen=True)
class Schedule:
    """When training pauses, validates, saves and ends.

    It pauses at the end of every epoch, and for validation, always after a whole update.

    Attributes:
        max_epochs: it ends here at the latest.
        validate_every: epochs between validations; the last epoch has one in any case.
        validate_steps: steps between validations, in place of `validate_every`; None goes by epochs.
        patience: it ends where more validations than this in a row bring no gain.
        monitor: metrics; a validation that beats the best value so far of any of them is a gain.
        checkpoint_every: epochs between checkpoints; every validation writes one as well.
    """

    max_epochs: int
    validate_every: int = 5
    validate_steps: int | None = None
    patience: int = 5
    monitor: Sequence[str] = ("recall@20", "ndcg@20")
    checkpoint_every: int = 5

    @classmethod
    def of(cls, config: LoopConfig, *, validate_steps: int | None = None) -> Schedule:
        return cls(
            config.max_epochs,
            config.validate_every,
            validate_steps,
            config.patience,
            config.monitor,
            config.checkpoint_every,
        )

    def next_pause(self, step: Step, epoch: int, done: int) -> int:
        """Steps of the epoch that are done at the next pause, when `done` are; always a whole update."""
        if self.validate_steps is None:
            return step.num_steps
        before = epoch * step.num_steps
        due = ((before + done) // self.validate_steps + 1) * self.validate_steps - before
        return min(step.num_steps, -(-due // step.accumulate) * step.accumulate)

    def validates(self, step: Step, epoch: int, start: int, stop: int) -> bool:
        """Whether the pause at `stop`, after steps from `start` on, is one for validation."""
        if stop == step.num_steps and epoch + 1 == self.max_epochs:
            return True
        if self.validate_steps is None:
            return (epoch + 1) % self.validate_every == 0
        before = epoch * step.num_steps
        return (before + stop) // self.validate_steps > (before + start) // self.validate_steps


def fit(
    step: Step,
    run: RunDirectory,
    schedule: Schedule,
    *,
    validate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], None] | None = None,
) -> Progress:
    """Train until the schedule ends it.

    The weights of the best validation become `run.best`; without `validate` the final weights do. From a checkpoint in
    `run.last` training continues: the same numbers follow as without the break. SIGTERM, SIGINT and SIGHUP let the
    running update end, save, and raise `Interrupted`; in several processes a signal to any of them stops all.

    Args:
        step: what is repeated. Its model holds the final weights afterwards, not the best.
        run: where metrics and checkpoints go.
        schedule: when to pause, validate, save and end; without `validate` it pauses by epochs.
        validate: model -> metrics, on validation data only.
        on_epoch: called with each record of metrics.jsonl once it is written; what it raises ends the training, which
            can be resumed from the checkpoint before.
    Returns: the final progress.

    Raises:
        FloatingPointError: a loss term or a weight became NaN or infinite (which, in which epoch and step). Nothing of
            that is saved.
        Interrupted: see above.
    """
    model, processes = step.model, step.processes
    schedule = schedule if validate is not None else replace(schedule, validate_steps=None)
    progress = _read_progress(step, run)

    def save() -> None:
        tensors, groups = training_state(model, step.optimizer)
        processes.on_first(lambda: save_checkpoint(run.last, tensors, asdict(progress) | groups))

    def write(record: Mapping[str, Any]) -> None:
        run.append_metrics(record)
        if on_epoch is not None:
            on_epoch(record)

    with connected(), _caught_signals(repeated=processes.count > 1) as caught:
        while progress.epoch < schedule.max_epochs and progress.checks_without_gain <= schedule.patience:
            epoch, start = progress.epoch, progress.step
            stop = schedule.next_pause(step, epoch, start)
            names = _train_epoch(step, stop, progress, caught)
            _check_weights(model, progress)
            if progress.step < stop:
                save()
                raise Interrupted(caught[0], f"stopped in epoch {epoch} after step {progress.step}; saved {run.last}")
            ended = stop == step.num_steps
            record = _epoch_record(progress, names) if ended else _pause_record(progress, step.num_steps)
            due = schedule.validates(step, epoch, start, stop)
            if validate is not None and due:
                _validate(step, validate, schedule.monitor, progress, run, record)
            processes.on_first(lambda record=record: write(record))
            if ended:
                progress.epoch, progress.step, progress.losses, progress.seconds = epoch + 1, 0, [], 0.0
            if processes.agree(caught) or due or (epoch + 1) % schedule.checkpoint_every == 0:
                save()
                if processes.agree(caught):
                    where = f"after epoch {epoch}" if ended else f"in epoch {epoch} after step {stop}"
                    raise Interrupted(caught[0], f"stopped {where}; saved {run.last}")
    if validate is None:
        progress.best_epoch = last = progress.epoch - 1
        weights = whole_weights(model)
        processes.on_first(lambda: save_checkpoint(run.best, weights, {"epoch": last}))
    return progress


def _read_progress(step: Step, run: RunDirectory) -> Progress:
    """Restore the last checkpoint, where there is one, and forget the records after it."""
    progress = Progress()
    if run.last.is_file():
        progress = Progress(**load_training_state(run.last, step.model, step.optimizer))
        if step.processes.index == 0:
            logger.info("resuming at epoch %d, step %d", progress.epoch, progress.step)
        # Checkpoints of earlier versions leave the metrics to the log.
        progress.best_metrics = progress.best_metrics or _noted_validation(run, progress)
    step.processes.on_first(lambda: run.truncate_metrics(progress.epoch, progress.step))
    return progress


def _noted_validation(run: RunDirectory, progress: Progress) -> dict[str, float]:
    place = (progress.best_epoch, progress.best_step)
    best = next((one for one in run.read_metrics() if (one["epoch"], one.get("step")) == place), {})
    noted = {name.removeprefix("valid_"): value for name, value in best.items() if name.startswith("valid_")}
    noted.pop("seconds", None)
    return noted


def _train_epoch(step: Step, stop: int, progress: Progress, caught: list[int]) -> list[str]:
    """Run steps of the epoch up to `stop`, or to the first update after a signal; returns the names of the terms."""
    from tqdm import tqdm

    step.model.train()
    started, names, values = time.perf_counter(), [], []
    shown = {"desc": f"epoch {progress.epoch}", "leave": False, "disable": True if step.processes.index else None}
    for number in tqdm(range(progress.step, stop), initial=progress.step, total=step.num_steps, **shown):
        terms = step.run(progress.epoch, number)
        names = list(terms)
        values.append(torch.stack(list(terms.values())))
        if step.updates(number) and step.processes.agree(caught):
            break
    # Read once: reading every step would make a GPU wait.
    losses = step.processes.sum(torch.stack(values)).tolist()
    for number, row in enumerate(losses, start=progress.step):
        for name, value in zip(names, row, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{name} became {value} in epoch {progress.epoch}, step {number}; {_ADVICE}")
    progress.losses += losses
    progress.step += len(losses)
    progress.seconds += time.perf_counter() - started
    return names


def _check_weights(model: nn.Module, progress: Progress) -> None:
    """A gradient may be NaN behind a finite loss, and no loss comes after the last step."""
    for name, weight in model_weights(model).items():
        # Of a weight of which each process has a part, this one's.
        weight = getattr(weight, "to_local", lambda own=weight: own)()
        if weight.is_floating_point() and not torch.isfinite(weight).all():
            raise FloatingPointError(
                f"the weights {name} became NaN or infinite in epoch {progress.epoch}, by step {progress.step - 1}, "
                f"behind a finite loss; what was saved before stays; {_ADVICE}"
            )


def _epoch_record(progress: Progress, names: list[str]) -> dict[str, Any]:
    """Loss terms summed over the steps, as the published logs have them, and their means per step."""
    sums = {name: math.fsum(row[index] for row in progress.losses) for index, name in enumerate(names)}
    sums = {"loss": math.fsum(sums.values()), **sums}
    means = {f"{name}_mean": value / len(progress.losses) for name, value in sums.items()}
    return {"epoch": progress.epoch, **sums, **means, "seconds": progress.seconds}


def _pause_record(progress: Progress, num_steps: int) -> dict[str, Any]:
    """Where in an epoch a validation is; the losses are in the record of the epoch."""
    epochs_done = progress.epoch + progress.step / num_steps
    return {"epoch": progress.epoch, "step": progress.step, "epochs_done": epochs_done}


def _validate(
    step: Step,
    validate: Callable[[nn.Module], Mapping[str, float]],
    monitor: Sequence[str],
    progress: Progress,
    run: RunDirectory,
    record: dict[str, Any],
) -> None:
    started, model, processes = time.perf_counter(), step.model, step.processes
    model.eval()
    if step.is_shared:
        with step.whole_model():
            metrics = validate(model)
    else:
        metrics = processes.on_first(lambda: validate(model))
    missing = [name for name in monitor if name not in metrics]
    if missing:
        raise ValueError(f"monitor must name validation metrics ({', '.join(metrics)}), got {missing[0]!r}")
    improved = progress.improve(metrics, monitor, step=record.get("step"))
    if improved:
        place = {name: record[name] for name in ("epoch", "step") if name in record}
        weights = whole_weights(model)
        processes.on_first(lambda: save_checkpoint(run.best, weights, place))
    record |= {f"valid_{name}": value for name, value in metrics.items()}
    record["valid_seconds"] = time.perf_counter() - started
    if processes.index == 0:
        shown = ", ".join(f"{name} {metrics[name]:.4f}" for name in monitor)
        mark = " (best)" if improved else ""
        loss = math.fsum(map(math.fsum, progress.losses)) / len(progress.losses)
        logger.info("epoch %d: loss %.4f, validation %s%s", progress.epoch, loss, shown, mark)


@contextlib.contextmanager
def _caught_signals(*, repeated: bool) -> Iterator[list[int]]:
    """Collects signals that ask for the end instead of dying of them; a second one acts as usual. Main thread only.

    `repeated` collects the second as well: a launcher passes on what its processes may have got themselves.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    previous = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: object) -> None:
        caught.append(number)
        if not repeated:
            restore()

    numbers = [getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)]
    previous = {number: signal.signal(number, note) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield caught
    finally:
        restore()
