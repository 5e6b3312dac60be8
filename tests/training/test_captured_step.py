"""The step over fixed memory against the plain loop: same losses, weights, checkpoints, with and without a graph."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from hellm.artifact.run_directory import RunDirectory
from hellm.config import ModelConfig, PretrainConfig
from hellm.training import captured_step as module
from hellm.training.captured_step import CapturedStep
from hellm.training.checkpoint import load_training_state, save_training_state
from hellm.training.loop import Interrupted, Schedule, fit
from hellm.training.pretrain import (
    _losses,
    build_captured_step,
    build_encoder,
    build_optimizer,
    build_sampler,
    pretrain,
    resolve_config,
)
from hellm.training.samplers import DeviceTripleSampler
from hellm.training.step import EagerStep

CONFIG = PretrainConfig(
    model=ModelConfig(embedding_dim=8, knn_k=4, backbone="ngcf"),
    learning_rate=0.013,
    learning_rate_decay_epochs=1.0,
    batch_size=20,
    max_epochs=3,
    ks=(5,),
    monitor=("recall@5",),
    contrastive_rows=16,
    num_threads=1,
    device="cpu",
    tensorboard=False,
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none")


@pytest.fixture
def emulated_graph(monkeypatch):
    """Captures and replays on the CPU: recording leaves weights as they were, a replay writes into the outputs."""
    recorded = []

    def record(body, stream):
        step = body.func.__self__
        parameters, state = step._parameters, step.optimizer.state
        before = [p.detach().clone() for p in parameters]
        kept = [{name: value.clone() for name, value in state[p].items()} for p in parameters]
        generator = torch.get_rng_state()
        outputs = body()
        torch.set_rng_state(generator)
        with torch.no_grad():
            for p, value, values in zip(parameters, before, kept, strict=True):
                p.copy_(value)
                for name, old in values.items():
                    state[p][name].copy_(old)

        def replay():
            # As a graph does it: torch is not told that weights are written.
            versions = [p._version for p in parameters]
            for name, value in body().items():
                outputs[name].copy_(value)
            torch._C._autograd._unsafe_set_version_counter(tuple(parameters), tuple(versions))

        recorded.append(step)
        return replay, outputs

    monkeypatch.setattr(module, "_record", record)
    monkeypatch.setattr(module, "_on", lambda stream: contextlib.nullcontext())
    return recorded


def train(folder, config, dataset, kind, *, stop_at=None):
    """Epoch records and final weights of a run whose steps are "plain", "fixed" (no graph) or "captured"."""
    torch.manual_seed(3)
    config = replace(config, capture=kind == "captured")
    model = build_encoder(config, dataset, config.device)
    sampler, optimizer = build_sampler(config, dataset), build_optimizer(config, model)
    step = build_captured_step(model, config, sampler, optimizer)
    calls = []
    if kind == "plain":

        def losses(epoch, number):
            return step._losses(*step._inputs(epoch, number))

        repeated = EagerStep(model, optimizer, losses, sampler.num_steps, learning_rate=step._learning_rate)
    else:
        repeated = step
    inputs = step._inputs

    def counted(epoch, number):
        calls.append((epoch, number))
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs(epoch, number)

    step._inputs = counted
    run, seen = RunDirectory(folder, resume=True), []

    def validate(scorer):
        seen.append(scorer.embeddings().item.clone())
        return {"recall@5": float(seen[-1].abs().sum())}

    fit(repeated, run, Schedule.of(config), validate=validate)
    records = [{k: v for k, v in r.items() if "seconds" not in k} for r in run.read_metrics()]
    return records, [p.detach().clone() for p in model.parameters()], seen


def assert_same(found, expected):
    assert found[0] == expected[0]
    for index in (1, 2):
        assert all(torch.equal(a, b) for a, b in zip(found[index], expected[index], strict=True))


SETTINGS = {
    "published": {},
    "all-anchors": {"contrastive_rows": None},
    "host-sampler": {"negatives": "popularity"},
    "ragged": {"sampler": "interaction-uniform", "batch_size": 33},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("kind", ["fixed", "captured"])
def test_same_bits_as_the_plain_loop(small_dataset, tmp_path, emulated_graph, settings, kind):
    config = replace(CONFIG, **settings)
    expected = train(tmp_path / "plain", config, small_dataset, "plain")
    assert_same(train(tmp_path / kind, config, small_dataset, kind), expected)
    assert len(emulated_graph) == (kind == "captured")
    # Validation must not see the cached embeddings of the epoch before.
    assert not torch.equal(expected[2][0], expected[2][1])


@pytest.mark.parametrize("stop_at", [2, 4, 17])
@pytest.mark.parametrize("kind", ["fixed", "captured"])
def test_interrupted_run_ends_like_an_uninterrupted_one(small_dataset, tmp_path, emulated_graph, kind, stop_at):
    expected = train(tmp_path / "whole", CONFIG, small_dataset, kind)
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", CONFIG, small_dataset, kind, stop_at=stop_at)
    found = train(tmp_path / "broken", CONFIG, small_dataset, kind)
    assert_same((*found[:2], found[2][-1:]), (*expected[:2], expected[2][-1:]))


def test_run_goes_on_with_another_kind_of_step(small_dataset, tmp_path, emulated_graph):
    expected = train(tmp_path / "whole", CONFIG, small_dataset, "plain")
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", CONFIG, small_dataset, "captured", stop_at=15)
    found = train(tmp_path / "broken", CONFIG, small_dataset, "plain")
    assert_same((*found[:2], found[2][-1:]), (*expected[:2], expected[2][-1:]))


def test_step_of_another_shape_runs_without_the_graph(emulated_graph):
    model = nn.Linear(1, 1, bias=False)
    optimizer, sizes = torch.optim.SGD(model.parameters(), lr=1.0), []

    def losses(x):
        sizes.append(len(x))
        return {"loss": model(x).sum()}

    step = CapturedStep(
        model,
        optimizer,
        lambda epoch, number: [torch.ones(2 if number % 3 == 2 else 4, 1)],
        losses,
        9,
        learning_rate=lambda epoch, number: 1.0,
        capture=True,
    )
    start = model.weight.item()
    for number in range(9):
        step.run(0, number)
    # Six steps of four rows (the fourth of them is recorded as well) and three of two.
    assert sizes.count(2) == 3 and sizes.count(4) == 7 and len(emulated_graph) == 1
    assert model.weight.item() == pytest.approx(start - 6 * 4 - 3 * 2)


def test_run_resumed_at_the_ragged_last_step_replays_the_others(small_dataset, tmp_path, emulated_graph):
    config = replace(CONFIG, **SETTINGS["ragged"])
    num_steps = build_sampler(config, small_dataset).num_steps
    expected = train(tmp_path / "whole", config, small_dataset, "captured")
    with pytest.raises(Interrupted):
        train(tmp_path / "broken", config, small_dataset, "captured", stop_at=num_steps - 1)
    emulated_graph.clear()
    found = train(tmp_path / "broken", config, small_dataset, "captured")
    assert_same((*found[:2], found[2][-1:]), (*expected[:2], expected[2][-1:]))
    assert len(emulated_graph) == 1


def test_warm_up_and_capture_share_a_stream(monkeypatch):
    streams = []
    monkeypatch.setattr(module, "_on", lambda stream: streams.append(stream) or contextlib.nullcontext())
    monkeypatch.setattr(module, "_record", lambda body, stream: (lambda: streams.append(stream), body()))
    model = nn.Linear(1, 1)
    step = CapturedStep(
        model,
        torch.optim.SGD(model.parameters(), lr=1.0),
        lambda epoch, number: [torch.ones(2, 1)],
        lambda x: {"loss": model(x).sum()},
        5,
        learning_rate=lambda epoch, number: 1.0,
        capture=True,
    )
    step._stream = object()
    for number in range(5):
        step.run(0, number)
    assert streams == [step._stream] * 5


def test_loop_adds_nothing_to_a_captured_step(tmp_path):
    class Untouchable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            added.append(function.__name__) if "add" in function.__name__ or "div" in function.__name__ else None
            return super().__torch_function__(function, types, arguments, options or {})

    added: list[str] = []
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = CapturedStep(
        model,
        optimizer,
        lambda *_: [torch.ones(2, 1)],
        lambda x: {"loss": model(x).sum()},
        2,
        learning_rate=lambda *_: 1.0,
        capture=False,
    )
    train = step._train
    step._train = lambda inputs: {name: term.as_subclass(Untouchable) for name, term in train(inputs).items()}
    fit(step, RunDirectory(tmp_path, resume=True), Schedule(max_epochs=1))
    assert added == []


def test_whole_step_reads_no_value(small_dataset):
    config, _ = resolve_config(replace(CONFIG, model=replace(CONFIG.model, backbone="lightgcn")), small_dataset)
    model = build_encoder(config, small_dataset).to("meta")
    sampler = DeviceTripleSampler(build_sampler(config, small_dataset), "cpu", ((60, 16), (24, 16)))
    for holder in (sampler, sampler._words):
        tensors = {name: value for name, value in vars(holder).items() if isinstance(value, torch.Tensor)}
        vars(holder).update({name: value.to("meta") for name, value in tensors.items()})
    triples, rows = sampler.draw(sampler.keys(0, 0).to("meta"))
    rows = dict(zip(("user_rows", "item_rows"), rows, strict=True))
    sum(_losses(model, config, triples, rows).values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_checkpoint_holds_plain_numbers_and_fits_another_kind_of_optimizer(tmp_path):
    model = nn.Linear(2, 1)
    first = torch.optim.Adam(model.parameters(), lr=0.5)
    first.param_groups[0] |= {"lr": torch.tensor(0.25), "capturable": True, "fused": True}
    save_training_state(tmp_path / "last", model, first, {"epoch": 1})
    second = torch.optim.Adam(model.parameters(), lr=0.5)
    assert load_training_state(tmp_path / "last", model, second) == {"epoch": 1}
    group = second.param_groups[0]
    assert (group["lr"], group["capturable"], group["fused"]) == (0.25, False, None)


def test_capture_without_a_gpu_is_an_error(small_dataset):
    with pytest.raises(ValueError, match="capture must be null or false without a GPU, got true with device 'cpu'"):
        resolve_config(replace(CONFIG, capture=True), small_dataset)
    assert resolve_config(CONFIG, small_dataset)[0].capture is False


def test_step_that_cannot_be_captured_says_what_to_do(monkeypatch):
    class Refusing:
        def __init__(self, *arguments, **options):
            pass

        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def __exit__(self, *arguments):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Refusing)
    monkeypatch.setattr(torch.cuda, "graph", Refusing)
    message = r"cannot be captured as a CUDA graph \(operation not permitted when stream is capturing\); capture false"
    with pytest.raises(RuntimeError, match=message):
        module._record(dict, None)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_captured_equals_uncaptured_on_a_gpu(small_dataset, tmp_path, settings):
    config = replace(CONFIG, device="cuda", **settings)
    torch.use_deterministic_algorithms(True)
    try:
        expected = train(tmp_path / "fixed", config, small_dataset, "fixed")
        assert_same(train(tmp_path / "captured", config, small_dataset, "captured"), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@needs_gpu
def test_captured_run_is_resumed_on_a_gpu_and_on_the_cpu(small_dataset, tmp_path):
    config = replace(CONFIG, device="cuda", max_epochs=2)
    result = pretrain(config, small_dataset, tmp_path / "run")
    assert result["num_epochs"] == 2 and json.loads((tmp_path / "run" / "result.json").read_text()) == result
    for device in ("cuda", "cpu"):
        config = replace(config, device=device, max_epochs=config.max_epochs + 1)
        result = pretrain(config, small_dataset, tmp_path / "run", resume=True)
        assert result["num_epochs"] == config.max_epochs


@pytest.mark.gpu
@needs_gpu
def test_replays_do_not_wait_for_the_device(small_dataset):
    config = replace(CONFIG, device="cuda", capture=True)
    model = build_encoder(config, small_dataset, "cuda").train()
    step = build_captured_step(model, config, build_sampler(config, small_dataset), build_optimizer(config, model))
    for number in range(5):
        step.run(0, number)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in range(5, 12):
            step.run(0, number)
    finally:
        torch.cuda.set_sync_debug_mode("default")
