"""Several processes train as one does: same losses, same weights, same interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hellm.cli import main
from hellm.data import save_dataset
from hellm.training.checkpoint import load_checkpoint
from hellm.training.history_sampler import HistoryBatch
from hellm.training.processes import Processes, launched_processes

WORKER = Path(__file__).with_name("stage_worker.py")
ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
NO_DROPOUT = ["model.lora_dropout=0", "model.prefix_dropout=0", "model.item_dropout=0"]
PREFIX = ["model.graph_context=prefix", "model.learned_prefix=true"]
# 180 targets make batches of 179 and of 1, of which one of two processes has no share.
CASES = {
    "causal": [*NO_DROPOUT, "accumulate=3", "max_grad_norm=0.5", "validate_steps=5"],
    "prefix": [*NO_DROPOUT, *PREFIX, "batch_size=179", "batch_tokens=99999"],
    "sharded": [*NO_DROPOUT, "accumulate=3", "max_grad_norm=0.5", "validate_steps=5", "sharded=true"],
}
OF_FOUR = ("causal", "sharded")


def train(count: int, jobs: list[dict[str, Any]], folder: Path) -> subprocess.CompletedProcess[str]:
    """Trainings by so many processes."""
    return subprocess.run(
        [sys.executable, str(WORKER), str(count), json.dumps(jobs)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def verb(small_dataset, runs, llm, tmp_path_factory):
    """(out, settings) -> arguments of a fine-tuning."""
    data = tmp_path_factory.mktemp("data") / "built"
    save_dataset(small_dataset, data)
    common = {"data": data, "graph": runs["graph"], "sequence": runs["sequence"], "llm": llm, "ks": "[1,5]"}
    common |= {"monitor": "[recall@5]", "num_threads": 1, "device": "cpu", "tensorboard": "false", "max_epochs": 3}
    common |= {"learning_rate": 0.01, "batch_tokens": 48}
    return lambda out, *settings: ["finetune", *(f"{k}={v}" for k, v in common.items()), f"out={out}", *settings]


@pytest.fixture(scope="module")
def folder(verb, tmp_path_factory):
    """Runs of two processes, and of one under "alone": the cases, and a run with dropout whole and interrupted."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "4").mkdir()
    jobs = [{"arguments": verb(folder / name, *settings)} for name, settings in CASES.items()]
    jobs += [
        {"arguments": verb(folder / "whole")},
        {"arguments": verb(folder / "cut"), "signal": [signal.SIGTERM, 1, 2]},
    ]
    jobs += [{"arguments": verb(folder / "cut", "--resume")}, {"arguments": verb(folder / "cut")}]
    jobs += [{"arguments": verb(folder / "official", "--preset", "official")}]
    sharded = ["sharded=true", *NO_DROPOUT]
    jobs += [
        {"arguments": verb(folder / "cut-sharded", *sharded), "signal": [signal.SIGTERM, 1, 2]},
        {"arguments": verb(folder / "cut-sharded", *sharded, "--resume")},
        {"arguments": verb(folder / "whole-sharded", *sharded)},
        {"arguments": verb(folder / "prefixed", *sharded, *PREFIX)},
    ]
    done = train(2, jobs, folder)
    assert done.returncode == 0, done.stderr
    (folder / "output.txt").write_text(done.stdout + done.stderr)
    by_four = [{"arguments": verb(folder / "4" / name, *CASES[name])} for name in OF_FOUR]
    assert train(4, by_four, folder / "4").returncode == 0
    for name, settings in CASES.items():
        alone = [one for one in settings if one != "sharded=true"]
        assert main(verb(folder / "alone" / name, *alone)) == 0
    return folder


def records(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def assert_same(run, other, tolerance):
    assert [record.keys() for record in records(run)] == [record.keys() for record in records(other)]
    for record, expected in zip(records(run), records(other), strict=True):
        losses = {name: value for name, value in expected.items() if not name.startswith("valid")}
        assert {name: record[name] for name in losses} == pytest.approx(losses, rel=tolerance)
        # Of 60 users, one whose two best items are alike may change places.
        metrics = {name: value for name, value in expected.items() if name not in losses}
        assert {name: record[name] for name in metrics} == pytest.approx(metrics, abs=0.02)
    for name in ("best", "last"):
        tensors, _ = load_checkpoint(run / "checkpoint" / f"{name}.safetensors")
        expected, _ = load_checkpoint(other / "checkpoint" / f"{name}.safetensors")
        weights = [key for key in expected if key.startswith("model.")]
        assert len(weights) > 3
        for key in weights:
            torch.testing.assert_close(tensors[key], expected[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("count", "case"), [*((2, case) for case in CASES), *((4, case) for case in OF_FOUR)])
def test_several_processes_train_as_one(folder, count, case):
    several = folder / "4" if count == 4 else folder
    assert_same(several / case, folder / "alone" / case, 1e-5)
    result, alone = (json.loads((run / case / "result.json").read_text()) for run in (several, folder / "alone"))
    assert (result["num_processes"], alone["num_processes"]) == (count, 1)
    assert result["best_epoch"] == alone["best_epoch"]
    assert result["test"]["metrics"]["recall@5"] == pytest.approx(alone["test"]["metrics"]["recall@5"], abs=0.02)


def test_a_signal_to_one_process_stops_both_and_the_rest_is_the_same(folder):
    codes = [json.loads((folder / f"codes-{index}.json").read_text()) for index in range(2)]
    stopped, in_the_way, official, prefixed = 128 + signal.SIGTERM, 2, 2, 2
    cases = [0] * len(CASES)
    assert codes == [[*cases, 0, stopped, 0, in_the_way, official, stopped, 0, 0, prefixed]] * 2
    assert_same(folder / "cut", folder / "whole", 0)
    assert_same(folder / "cut-sharded", folder / "whole-sharded", 0)


def test_the_first_process_alone_speaks(folder):
    output = (folder / "output.txt").read_text()
    finished = [line for line in output.splitlines() if "best epoch" in line]
    assert len(finished) == len(CASES) + 4
    assert output.count("stopped in epoch 1 after step 3; saved") == 2
    assert "sharded must be false with a prefix" in output
    assert "cut is not empty; --resume goes on with it" in output
    assert "model.compat must be null in several processes, got 'official'" in output


def test_a_signal_to_the_launcher_and_all_its_processes_still_saves(verb, tmp_path):
    arguments = verb(tmp_path / "run", "max_epochs=500", "patience=500")
    process = subprocess.Popen(
        [*TORCHRUN, "-m", "hellm", *arguments],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "errors.txt").open("w"),
    )
    try:
        until = time.monotonic() + 300
        while not (tmp_path / "run" / "metrics.jsonl").is_file() or not records(tmp_path / "run"):
            assert process.poll() is None and time.monotonic() < until, (tmp_path / "errors.txt").read_text()
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(timeout=60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    _, state = load_checkpoint(tmp_path / "run" / "checkpoint" / "last.safetensors")
    assert (state["epoch"], state["step"]) >= (len(records(tmp_path / "run")), 0)


# Stage 1 with dropout, which is the same in all processes; shares of 4 processes are unequal, and some are empty.
STAGES = {
    "pretrain": ["batch_size=18", "contrastive_rows=7", "model.dropout=0.2", "model.embedding_dim=8", "model.knn_k=4"],
    "pretrain-softmax": [
        "batch_size=18",
        "contrastive_rows=6",
        "contrastive_keys=11",
        "loss=softmax",
        "sampled_items=7",
    ],
    "pretrain-few": ["batch_size=3", "contrastive_rows=3", "model.embedding_dim=6"],
    "pretrain-ngcf": ["batch_size=18", "contrastive_rows=6", "model.backbone=ngcf", "model.embedding_dim=8"],
    "sasrec": ["batch_size=50", "dropout=0", "embedding_dim=8", "feedforward_dim=8"],
    "sasrec-bce": ["batch_size=50", "dropout=0", "embedding_dim=8", "loss=bce"],
    "sasrec-sampled": ["batch_size=50", "dropout=0", "embedding_dim=8", "sampled_items=5"],
}


@pytest.fixture(scope="module")
def stage_verb(small_dataset, tmp_path_factory):
    """(out, name among `STAGES`) -> arguments of a training."""
    folder = tmp_path_factory.mktemp("stages")
    save_dataset(small_dataset, folder / "data")
    common = {"data": folder / "data", "num_threads": 1, "device": "cpu", "tensorboard": "false", "max_epochs": 2}
    common |= {"ks": "[1,5]", "monitor": "[recall@5]", "validate_every": 1}

    def arguments(out: Path, name: str) -> list[str]:
        given = [*(f"{k}={v}" for k, v in common.items()), *STAGES[name]]
        return [name.partition("-")[0], *given, f"out={out}"]

    return arguments


@pytest.fixture(scope="module")
def stages(stage_verb, tmp_path_factory):
    """Runs of each of `STAGES` under "1", "2" and "4", as many processes."""
    folder = tmp_path_factory.mktemp("stages")

    def arguments(count: int, name: str) -> list[str]:
        return stage_verb(folder / str(count) / name, name)

    for count in (2, 4):
        done = train(count, [{"arguments": arguments(count, name)} for name in STAGES], folder)
        assert done.returncode == 0, done.stderr
        for index in range(count):
            assert json.loads((folder / f"codes-{index}.json").read_text()) == [0] * len(STAGES), done.stderr
    for name in STAGES:
        assert main(arguments(1, name)) == 0
    return folder


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("name", STAGES)
def test_other_stages_in_several_processes_are_those_of_one(stages, name, count):
    run, alone = stages / str(count) / name, stages / "1" / name
    assert_same(run, alone, 2e-5)
    result, expected = (json.loads((one / "result.json").read_text()) for one in (run, alone))
    assert (result["num_processes"], expected["num_processes"]) == (count, 1)
    assert result["test"]["metrics"]["recall@5"] == pytest.approx(expected["test"]["metrics"]["recall@5"], abs=0.02)


@pytest.mark.parametrize("name", ["sasrec", "pretrain"])
def test_a_process_that_dies_ends_the_others_and_another_number_goes_on(stages, stage_verb, tmp_path, name):
    arguments = stage_verb(tmp_path / "run", name)
    done = train(2, [{"arguments": arguments, "signal": [signal.SIGKILL, 1, 0]}], tmp_path)
    assert done.returncode == 1 and not (tmp_path / "codes-1.json").exists()
    assert json.loads((tmp_path / "codes-0.json").read_text()) == [2], done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("hellm: error: ")]
    assert len(said) == 1 and said[0].startswith("hellm: error: another process of this training is gone (")
    assert said[0].endswith("; --resume goes on from the last checkpoint, with any number of processes")
    assert len(records(tmp_path / "run")) == 1
    shutil.copytree(tmp_path / "run", tmp_path / "three" / "run")
    assert main([*arguments, "--resume"]) == 0
    assert_same(tmp_path / "run", stages / "1" / name, 2e-5)
    by_three = [*stage_verb(tmp_path / "three" / "run", name), "--resume"]
    assert train(3, [{"arguments": by_three}], tmp_path / "three").returncode == 0
    assert_same(tmp_path / "three" / "run", stages / "1" / name, 2e-5)


def of_several(index: int, count: int) -> Processes:
    return Processes(SimpleNamespace(process_index=index, num_processes=count))


def test_shares_are_the_whole_batch():
    for targets in (np.arange(6) + 10, np.arange(3) + 10):
        batch = HistoryBatch(np.array([0, 3, 4, 6]), np.arange(6), targets)
        for count in (1, 2, 3, 5):
            shares = [batch.share(of_several(index, count)) for index in range(count)]
            kept = [share for share, part in shares if part]
            for name in ("items", "targets"):
                together = np.concatenate([getattr(share, name) for share in kept])
                assert together.tolist() == getattr(batch, name).tolist()
            assert np.concatenate([np.diff(share.indptr) for share in kept]).tolist() == [3, 1, 2]
            assert [part for _, part in shares if part] == [len(share.targets) / len(targets) for share in kept]
            # Who has no history runs one that counts for nothing.
            assert [share.items.tolist() for share, part in shares if not part] == [[0, 1, 2]] * max(0, count - 3)


def test_one_process_needs_no_accelerate(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    processes = launched_processes("cuda:1", seed=0)
    assert (processes.index, processes.count) == (0, 1)
    caught = []
    assert not processes.agree(caught)
    assert processes.on_first(lambda: 3) == 3


def test_a_numbered_device_is_refused_in_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r'device must be "auto", "cpu" or "cuda" in several processes, got .cuda:1.'):
        launched_processes("cuda:1", seed=0)


def test_a_launcher_that_shards_by_itself_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"accelerate launch must be without --use_fsdp: `hellm finetune sharded=true"):
        launched_processes("cpu", seed=0)


def test_one_process_shares_nothing_out(verb, tmp_path, capsys):
    assert main(verb(tmp_path / "run", "sharded=true")) == 2
    assert "sharded must be false in one process" in capsys.readouterr().err


def test_other_verbs_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["fuse", "--data", "x"]) == 2
    message = "only pretrain, sasrec, finetune run in several processes (WORLD_SIZE 2), got fuse"
    assert message in capsys.readouterr().err


def test_every_process_draws_its_own_dropout():
    class Second:
        process_index, num_processes = 1, 2

    def draw(processes, epoch, step):
        torch.manual_seed(0)
        processes.seed_step(epoch, step)
        return torch.rand(4).tolist()

    first, second = Processes(), Processes(Second(), seed=3)
    assert draw(first, 0, 0) == draw(first, 0, 1)
    draws = [
        tuple(draw(processes, *place)) for processes, place in ((first, (0, 0)), (second, (0, 0)), (second, (0, 1)))
    ]
    assert len(set(draws)) == 3 and draw(second, 0, 1) == list(draws[2])
