from __future__ import annotations

import math
import os
import signal
import threading

import pytest
import torch
from torch import nn

from hellm.artifact.run_directory import RunDirectory
from hellm.training.checkpoint import load_checkpoint, read_model, save_checkpoint
from hellm.training.loop import Interrupted, Progress, Schedule, fit
from hellm.training.step import EagerStep

NUM_STEPS = 3


class Task:
    """Minimises (w - 3)^2 with noise from torch's generator; `validate` plays back scripted metrics."""

    def __init__(self, folder, script=(), act=None, **settings):
        torch.manual_seed(0)
        self.model = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1.0)
        self.run = RunDirectory(folder, resume=True)
        self.script, self.act, self.steps, self.checked = list(script), act, [], []
        self.accumulate, self.on_epoch = settings.pop("accumulate", 1), settings.pop("on_epoch", None)
        self.schedule = Schedule(**{"max_epochs": 4, "validate_every": 2} | settings)

    def losses(self, epoch, step):
        self.steps.append((epoch, step))
        if self.act is not None:
            self.act(epoch, step)
        weight = self.model.weight.squeeze()
        return {"fit_loss": (weight - 3 + 0.1 * torch.randn(())) ** 2, "size_loss": 0.01 * weight**2}

    def validate(self, model):
        assert not model.training
        self.checked.append(model.weight.item())
        return self.script[len(self.checked) - 1]

    def fit(self):
        step = EagerStep(
            self.model,
            self.optimizer,
            self.losses,
            NUM_STEPS,
            learning_rate=lambda epoch, step: 0.1 * 0.5**epoch,
            accumulate=self.accumulate,
        )
        validate = self.validate if self.script else None
        return fit(step, self.run, self.schedule, validate=validate, on_epoch=self.on_epoch)

    def records(self):
        return [{k: v for k, v in r.items() if "seconds" not in k} for r in self.run.read_metrics()]


def metrics(recall, ndcg=0.0):
    return {"recall@20": recall, "ndcg@20": ndcg}


def test_loop_runs_every_step_at_the_rate_of_its_epoch(tmp_path):
    rates = []
    task = Task(tmp_path, max_epochs=3)
    task.optimizer.register_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    progress = task.fit()
    assert task.steps == [(epoch, step) for epoch in range(3) for step in range(NUM_STEPS)]
    assert rates == pytest.approx([0.1] * 3 + [0.05] * 3 + [0.025] * 3)
    assert (progress.epoch, progress.best_epoch) == (3, 2)


def fit_line(folder, slopes, **settings):
    """Minimise the sum of slope_s * w over the steps by plain gradient descent from w = 1; returns w."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    step = EagerStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda epoch, step: {"slope_loss": slopes[step] * model.weight.squeeze()},
        len(slopes),
        **{"learning_rate": lambda epoch, step: 0.1} | settings,
    )
    fit(step, RunDirectory(folder), Schedule(max_epochs=1))
    return model.weight.item()


def test_rate_may_change_with_every_step(tmp_path):
    weight = fit_line(tmp_path, [1.0, 1.0, 1.0], learning_rate=lambda epoch, step: 0.1 * 10**-step)
    assert weight == pytest.approx(1 - 0.1 - 0.01 - 0.001)


def test_accumulated_steps_update_by_their_mean_gradient(tmp_path):
    # Updates: mean(1, 2), mean(6, 0), then 4 alone.
    weight = fit_line(tmp_path, [1.0, 2.0, 6.0, 0.0, 4.0], accumulate=2)
    assert weight == pytest.approx(1 - 0.1 * (1.5 + 3.0 + 4.0))


def test_long_gradients_are_clipped_after_accumulation(tmp_path):
    weight = fit_line(tmp_path, [8.0, 2.0, 0.5, 0.5], accumulate=2, max_grad_norm=2.0)
    assert weight == pytest.approx(1 - 0.1 * (2.0 + 0.5), rel=1e-5)


def test_signal_waits_for_the_whole_accumulated_update(tmp_path):
    task = Task(tmp_path, max_epochs=1, accumulate=2)
    task.act = lambda epoch, step: os.kill(os.getpid(), signal.SIGTERM) if step == 0 else None
    with pytest.raises(Interrupted, match="stopped in epoch 0 after step 2"):
        task.fit()
    assert task.steps == [(0, 0), (0, 1)]


def test_records_hold_sums_and_means(tmp_path):
    task = Task(tmp_path, script=[metrics(0.1), metrics(0.2)])
    values = []
    inner = task.losses
    task.losses = lambda epoch, step: values.append(inner(epoch, step)) or values[-1]
    task.fit()
    records = task.run.read_metrics()
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    for epoch, record in enumerate(records):
        terms = values[epoch * NUM_STEPS : (epoch + 1) * NUM_STEPS]
        for name in ("fit_loss", "size_loss"):
            assert record[name] == pytest.approx(sum(term[name].item() for term in terms))
            assert record[f"{name}_mean"] == pytest.approx(record[name] / NUM_STEPS)
        assert record["loss"] == pytest.approx(record["fit_loss"] + record["size_loss"])
        assert record["seconds"] > 0
        assert ("valid_recall@20" in record) == (epoch in (1, 3))


@pytest.mark.parametrize(
    ("patience", "script", "best_epoch", "last_epoch"),
    [
        # best epoch / last epoch differ by 6 checks of 5 epochs, as in the published logs (24 / 54, 39 / 69)
        (5, [0.1, 0.2, 0.3, 0.4, 0.5, *[0.5] * 9], 24, 54),
        (5, [0.1, *[0.05] * 5, 0.2, *[0.1] * 9], 34, 64),
        (0, [0.1, 0.2, 0.2, 0.3], 9, 14),
    ],
)
def test_training_stops_at_the_check_after_patience(tmp_path, patience, script, best_epoch, last_epoch):
    script = [metrics(value) for value in script]
    progress = Task(tmp_path, script, max_epochs=1000, validate_every=5, patience=patience).fit()
    assert (progress.best_epoch, progress.epoch - 1) == (best_epoch, last_epoch)


def test_any_monitored_metric_counts_against_its_own_best(tmp_path):
    script = [metrics(0.2, 0.1), metrics(0.1, 0.3), metrics(0.19, 0.29), metrics(0.3, 0.0), metrics(0.3, 0.3)]
    task = Task(tmp_path, script, max_epochs=5, validate_every=1)
    progress = task.fit()
    assert progress.best == {"recall@20": 0.3, "ndcg@20": 0.3}
    assert (progress.best_epoch, progress.checks_without_gain) == (3, 1)


def test_monitor_can_be_one_metric(tmp_path):
    script = [metrics(0.2, 0.1), metrics(0.1, 0.3)]
    assert Task(tmp_path, script, max_epochs=2, validate_every=1, monitor=("recall@20",)).fit().best_epoch == 0


def test_best_weights_are_those_of_the_best_epoch(tmp_path):
    task = Task(tmp_path, [metrics(0.1), metrics(0.3), metrics(0.2)], max_epochs=3, validate_every=1)
    task.fit()
    read_model(task.run.best, task.model)
    assert task.model.weight.item() == task.checked[1]
    assert load_checkpoint(task.run.best)[1] == {"epoch": 1}


def test_last_epoch_is_validated_too(tmp_path):
    assert Task(tmp_path, [metrics(0.1)], max_epochs=3, validate_every=5).fit().best_epoch == 2


@pytest.mark.parametrize(
    ("validate_steps", "accumulate", "places"),
    [
        # (epoch, steps of it) of validations in three epochs of three steps; the last step always has one
        (2, 1, [(0, 2), (1, 1), (1, 3), (2, 2), (2, 3)]),
        (4, 1, [(1, 1), (2, 2), (2, 3)]),
        (100, 1, [(2, 3)]),
        # rounded up to whole updates: after steps 2 and 3 of an epoch
        (1, 2, [(0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (2, 3)]),
        (4, 2, [(1, 2), (2, 2), (2, 3)]),
    ],
)
def test_validation_by_steps_comes_after_whole_updates(tmp_path, validate_steps, accumulate, places):
    script = [metrics(0.1 * check) for check in range(1, 7)]
    task = Task(tmp_path, script, max_epochs=3, validate_steps=validate_steps, accumulate=accumulate)
    progress = task.fit()
    found = [(r["epoch"], r.get("step", NUM_STEPS)) for r in task.records() if "valid_recall@20" in r]
    assert found == places and (progress.best_epoch, progress.best_step) == (2, None)
    assert [record["epoch"] for record in task.records() if "loss" in record] == [0, 1, 2]
    assert task.steps == [(epoch, step) for epoch in range(3) for step in range(NUM_STEPS)]


def test_best_weights_may_be_those_within_an_epoch(tmp_path):
    task = Task(tmp_path, [metrics(0.1), metrics(0.3), metrics(0.2), metrics(0.2)], max_epochs=2, validate_steps=2)
    progress = task.fit()
    assert (progress.best_epoch, progress.best_step) == (1, 1)
    read_model(task.run.best, task.model)
    assert task.model.weight.item() == task.checked[1]
    assert load_checkpoint(task.run.best)[1] == {"epoch": 1, "step": 1}


def test_patience_may_end_within_an_epoch(tmp_path):
    task = Task(tmp_path, [metrics(0.2), metrics(0.1)], max_epochs=9, validate_steps=2, patience=0)
    progress = task.fit()
    assert (progress.epoch, progress.step) == (1, 1)
    again = Task(tmp_path, [metrics(0.3)], max_epochs=9, validate_steps=2, patience=0)
    assert again.fit() == progress and again.steps == []


def test_the_best_validation_is_kept_by_the_checkpoint(tmp_path):
    script = [metrics(0.1), metrics(0.3, 0.2), metrics(0.2)]
    Task(tmp_path, script, max_epochs=3, validate_every=1).fit()
    resumed = Task(tmp_path, script, max_epochs=3, validate_every=1)
    resumed.run.metrics.write_text("")
    assert resumed.fit().best_metrics == metrics(0.3, 0.2) and resumed.steps == []


def test_the_best_validation_of_a_checkpoint_without_it_is_that_of_the_log(tmp_path):
    task = Task(tmp_path, [metrics(0.1), metrics(0.3, 0.2), metrics(0.2)], max_epochs=2, validate_steps=2)
    task.fit()
    tensors, state = load_checkpoint(task.run.last)
    assert state.pop("best_metrics") == metrics(0.3, 0.2)
    save_checkpoint(task.run.last, tensors, state)
    assert Task(tmp_path, task.script, max_epochs=2, validate_steps=2).fit().best_metrics == metrics(0.3, 0.2)


@pytest.mark.parametrize("act", [lambda: os.kill(os.getpid(), signal.SIGTERM), lambda: 1 / 0], ids=["signal", "crash"])
@pytest.mark.parametrize("where", [(0, 1), (0, 2), (1, 0), (1, 1), (2, 2)], ids=str)
def test_validation_by_steps_goes_on_the_same_after_an_interruption(tmp_path, where, act):
    script = [metrics(value) for value in (0.1, 0.3, 0.2, 0.4, 0.5)]
    settings = {"max_epochs": 3, "validate_steps": 2}
    whole = Task(tmp_path / "whole", script, **settings)
    whole.fit()
    broken = Task(tmp_path / "broken", script, lambda *place: act() if place == where else None, **settings)
    with pytest.raises((Interrupted, ZeroDivisionError)):
        broken.fit()
    state = load_checkpoint(broken.run.last)[1] if broken.run.last.is_file() else {"epoch": 0, "step": 0}
    places = [(0, 2), (1, 1), (1, 3), (2, 2), (2, 3)]
    seen = sum(place <= (state["epoch"], state["step"]) for place in places)
    resumed = Task(tmp_path / "broken", script[seen:], **settings)
    # Without a checkpoint the run starts anew, with the generator that it is given.
    if broken.run.last.is_file():
        torch.manual_seed(99)
    resumed.fit()
    assert resumed.records() == whole.records()
    assert resumed.model.weight.item() == whole.model.weight.item()
    assert load_checkpoint(resumed.run.best)[1] == load_checkpoint(whole.run.best)[1]


def test_nan_metric_is_no_gain():
    progress = Progress()
    assert not progress.improve({"recall@20": math.nan}, ["recall@20"])
    assert (progress.best_epoch, progress.checks_without_gain) == (None, 1)


SCRIPT = [metrics(0.1), metrics(0.3), metrics(0.2), metrics(0.4)]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("where", [(0, 0), (2, 1), (2, 2), (3, 0)], ids=str)
def test_signal_saves_after_the_step_and_the_rest_is_the_same(tmp_path, signum, where):
    whole = Task(tmp_path / "whole", SCRIPT, validate_every=1)
    whole.fit()
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    act = lambda epoch, step: os.kill(os.getpid(), signum) if (epoch, step) == where else None  # noqa: E731
    broken = Task(tmp_path / "broken", SCRIPT, act, validate_every=1)
    with pytest.raises(Interrupted, match=rf"stopped (in|after) epoch {where[0]}.*; saved ") as stopped:
        broken.fit()
    assert stopped.value.code == 128 + signum
    assert broken.steps[-1] == where
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    resumed = Task(tmp_path / "broken", SCRIPT[len(broken.checked) :], validate_every=1)
    torch.manual_seed(99)
    resumed.fit()
    assert broken.steps + resumed.steps == whole.steps
    assert resumed.records() == whole.records()
    assert resumed.model.weight.item() == whole.model.weight.item()
    assert load_checkpoint(resumed.run.best)[0].keys() == load_checkpoint(whole.run.best)[0].keys()


def test_run_killed_without_warning_goes_on_from_its_last_checkpoint(tmp_path):
    whole = Task(tmp_path / "whole", max_epochs=6, checkpoint_every=2)
    whole.fit()

    def die(epoch, step):
        if (epoch, step) == (5, 1):
            raise RuntimeError("power cut")

    broken = Task(tmp_path / "broken", act=die, max_epochs=6, checkpoint_every=2, validate_every=100)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.fit()
    assert [record["epoch"] for record in broken.records()] == [0, 1, 2, 3, 4]
    resumed = Task(tmp_path / "broken", max_epochs=6, checkpoint_every=2)
    resumed.fit()
    assert resumed.steps[0] == (4, 0)
    assert resumed.records() == whole.records()
    assert resumed.model.weight.item() == whole.model.weight.item()


def test_loss_that_is_not_finite_is_named_and_not_saved(tmp_path):
    task = Task(tmp_path, max_epochs=6, checkpoint_every=1)
    inner = task.losses
    task.losses = lambda epoch, step: (
        inner(epoch, step) | ({"size_loss": task.model.weight.sum() * math.inf} if (epoch, step) == (1, 2) else {})
    )
    with pytest.raises(FloatingPointError, match=r"size_loss became inf in epoch 1, step 2; a smaller learning_rate"):
        task.fit()
    tensors, state = load_checkpoint(task.run.last)
    assert state["epoch"] == 1 and torch.isfinite(tensors["model.weight"]).all()


@pytest.mark.parametrize("script", [(), [metrics(0.1), metrics(0.2)]], ids=["checkpoint", "validation"])
@pytest.mark.parametrize("where", [0, NUM_STEPS - 1])
def test_weights_that_are_not_finite_behind_a_finite_loss_are_not_saved(tmp_path, where, script):
    """After the last step no loss would tell."""
    task = Task(tmp_path, script, max_epochs=2, checkpoint_every=1, validate_every=1)
    inner = task.losses
    task.losses = lambda epoch, step: {name: loss.nan_to_num() for name, loss in inner(epoch, step).items()}
    task.model.weight.register_hook(lambda grad: grad * (math.nan if task.steps[-1] == (1, where) else 1.0))
    with pytest.raises(FloatingPointError, match=r"weight became NaN .* in epoch 1, by step 2, behind a finite loss"):
        task.fit()
    for file in task.run.checkpoints.iterdir():
        tensors, state = load_checkpoint(file)
        assert torch.isfinite(tensors["model.weight"]).all() and state["epoch"] == (file == task.run.last)
    resumed = Task(tmp_path, [metrics(0.2)] if script else (), max_epochs=2, checkpoint_every=1, validate_every=1)
    assert resumed.fit().epoch == 2 and resumed.steps[0] == (1, 0)


def test_unknown_monitored_metric_is_named(tmp_path):
    task = Task(tmp_path, [metrics(0.1)], validate_every=1, monitor=("map@20",))
    with pytest.raises(ValueError, match=r"monitor must name validation metrics \(recall@20, ndcg@20\), got 'map@20'"):
        task.fit()


def test_loop_runs_outside_the_main_thread(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(Task(tmp_path, max_epochs=1).fit().epoch))
    thread.start()
    thread.join()
    assert done == [1]


def test_every_record_is_passed_on(tmp_path):
    seen = []
    task = Task(tmp_path, max_epochs=2, on_epoch=seen.append)
    task.fit()
    assert seen == task.run.read_metrics()
