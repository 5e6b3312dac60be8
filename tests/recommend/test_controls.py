"""Controls of a fused model: from the command line and from Python."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from saved_llm import save_tiny_llm
from support.command_line import last_json

from hellm.config import (
    CONTENT_TOWER,
    FinetuneConfig,
    FuseConfig,
    PretrainConfig,
    SASRecConfig,
    TransitionsConfig,
    load_config,
    override_config,
)
from hellm.data import load_dataset, write_sample_shop
from hellm.evaluate import read_test_evaluations
from hellm.recommend import Recommender, controls
from hellm.recommend.controls import CONTROLS, plan_controls, run_controls
from hellm.recommend.fuse import fuse
from hellm.training.finetune import finetune
from hellm.training.pretrain import pretrain
from hellm.training.sasrec import train_sasrec
from hellm.training.transitions import fit_transitions

pytestmark = pytest.mark.usefixtures("same_threads")
FAST = {"num_threads": 1, "tensorboard": False, "device": "cpu"}
SMALL = {"batch_size": 128, "embedding_dim": 8, "feedforward_dim": 16, "num_layers": 1}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_sample_shop(tmp_path_factory.mktemp("data") / "shop", num_users=80, num_items=40, num_groups=2)


@pytest.fixture(scope="module")
def dataset(shop):
    return load_dataset(shop)


@pytest.fixture(scope="module")
def towers(dataset, tmp_path_factory):
    top = tmp_path_factory.mktemp("towers")
    stage_1 = PretrainConfig(max_epochs=4, learning_rate=5e-3, batch_size=64, **FAST)
    pretrain(stage_1, dataset, top / "graph")
    ids = SASRecConfig(max_epochs=8, content=(), **SMALL, **FAST)
    train_sasrec(ids, dataset, top / "ids")
    content = replace(CONTENT_TOWER, max_epochs=8, content_hidden_dim=8, **SMALL, **FAST)
    train_sasrec(content, dataset, top / "content")
    llm = FinetuneConfig(llm=str(save_tiny_llm(top / "tiny")), max_epochs=1, batch_tokens=256, **FAST)
    finetune(llm, dataset, top / "llm", graph=top / "graph")
    fit_transitions(TransitionsConfig(device="cpu"), dataset, top / "transitions")
    return {name: top / name for name in ("graph", "ids", "content", "llm", "transitions")}


@pytest.fixture(scope="module")
def fused(towers, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "run"
    # Few users tell little: what helps at all is kept.
    fuse(towers, dataset, out, FuseConfig(level=0.1, **{name: FAST[name] for name in ("num_threads", "device")}))
    return out


@pytest.fixture(scope="module")
def ran(fused, dataset, tmp_path_factory):
    out, said = tmp_path_factory.mktemp("controls") / "out", []
    report = run_controls(fused, dataset, out, device="cpu", on_training=lambda label, seconds: said.append(label))
    return out, report, said


def row_of(report, name):
    return next(row for row in report["rows"] if row["name"] == name)


def test_each_control_trains_what_it_changes_and_nothing_else(ran, fused, towers):
    out, report, said = ran
    left = json.loads((fused / "result.json").read_text())["leave_one_out"]
    assert [row["name"] for row in report["rows"]] == ["full", *CONTROLS, *(f"without-{name}" for name in left)]
    best = max(
        ("ids", "content"),
        key=lambda name: json.loads((towers[name] / "result.json").read_text())["valid"]["metrics"]["ndcg@20"],
    )
    reading = ("graph", "content", "llm", "transitions")
    assert said == [
        f"two-seeds, {best}-seed2025 (1 of 1)",
        *(f"permuted-text, {name} ({place} of 4)" for place, name in enumerate(reading, 1)),
        "random-transformer, llm (1 of 1)",
    ]
    seeds = load_config(SASRecConfig, out / f"two-seeds-towers/{best}-seed2025/config.yaml")
    assert seeds == replace(load_config(SASRecConfig, towers[best] / "config.yaml"), seed=2025)
    drawn = load_config(FinetuneConfig, out / "random-transformer-towers/llm/config.yaml")
    assert drawn == replace(load_config(FinetuneConfig, towers["llm"] / "config.yaml"), llm_init="random")
    of = {name: json.loads((out / name / "result.json").read_text())["towers"] for name in CONTROLS}
    assert set(of["two-seeds"]) == {best, f"{best}-seed2025"}
    assert set(of["permuted-text"]) == set(of["random-transformer"]) == set(towers)
    assert of["permuted-text"]["ids"]["run"] == of["random-transformer"]["ids"]["run"] == str(towers["ids"])


def test_permuted_text_reaches_all_that_read_it(ran, towers, dataset):
    out, order = ran[0] / "permuted-text-towers", np.random.default_rng(0).permutation(dataset.num_items)
    llm = load_file(out / "llm/embeddings.safetensors")
    # The graph that it reads was trained on other content as well.
    assert torch.equal(llm["graph"], load_file(out / "graph/embeddings.safetensors")["item"])
    own = Recommender.load(towers["content"]).content.features["text"].float()
    assert torch.equal(Recommender.load(out / "content").content.features["text"].float(), own[order])


def test_differences_are_those_of_the_tests_user_by_user(ran, fused, dataset):
    out, report, _ = ran
    result = json.loads((fused / "result.json").read_text())
    full = row_of(report, "full")
    assert full["test"]["ndcg@10"]["mean"] == result["test"]["ndcg@10"] and full["difference_to_full"] is None
    for name in CONTROLS:
        row, one = row_of(report, name), json.loads((out / name / "result.json").read_text())
        difference = row["difference_to_full"]["ndcg@10"]
        assert difference["difference"] == pytest.approx(one["test"]["ndcg@10"] - result["test"]["ndcg@10"])
        assert difference["low"] <= difference["difference"] <= difference["high"]
        assert row["weights"] == one["weights"] and row["valid"] == one["valid"]["metrics"]
        # Each test was looked at once.
        assert [by["by"] for by in read_test_evaluations(out / name)] == ["training"]
    assert [by["by"] for by in read_test_evaluations(fused)] == ["training"]
    for name, gains in result["leave_one_out"].items():
        row = row_of(report, f"without-{name}")
        assert row["difference_to_full"]["ndcg@10"]["low"] == -gains["ndcg@10"]["high"]
        assert row["test"]["ndcg@10"]["mean"] == pytest.approx(
            result["test"]["ndcg@10"] - gains["ndcg@10"]["difference"]
        )


def test_nothing_finished_is_done_again_and_an_older_run_is_tested_again(ran, fused, dataset, monkeypatch):
    out, report, _ = ran
    (fused / "test_users.safetensors").rename(fused / "aside")

    def never(*args, **options):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr("hellm.recommend.fuse._fuse", never)
    monkeypatch.setattr("hellm.training.sasrec._fit", never)
    again = run_controls(fused, dataset, out, device="cpu")
    (fused / "aside").unlink()
    for row, other in zip(again["rows"], report["rows"], strict=True):
        assert row["test"] == other["test"], row["name"]
        if row["difference_to_full"]:
            found, expected = (one["difference_to_full"]["ndcg@10"]["difference"] for one in (row, other))
            assert found == pytest.approx(expected, abs=1e-9)
    assert [one["by"] for one in read_test_evaluations(fused)] == ["training", "hellm ablate"]
    assert (fused / "test_users.safetensors").is_file()


def test_command_line(ran, fused, shop, capsys):
    from hellm.cli import main

    argv = ["ablate", "--fused", str(fused), "--data", str(shop), "--out", str(ran[0]), "--device", "cpu"]
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert re.search(r"\n  full +0\.\d{4} +0\.\d{4} +0\.\d{4} +0\.\d{4} to 0\.\d{4} +full +\d", text)
    assert re.search(r"\n  two-seeds .* [+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]", text)
    assert "The validation split chose each tower's epoch, the towers and their weights (by ndcg@20)" in text
    assert main([*argv, "--json"]) == 0
    found = last_json(capsys.readouterr().out)
    assert found == json.loads((ran[0] / "ablation.json").read_text())
    assert (ran[0] / "ablation.png").read_bytes().startswith(b"\x89PNG")
    table = (ran[0] / "ablation.md").read_text()
    assert "| `random-transformer`: random weights in place of the language model's" in table


def test_rows_that_the_towers_do_not_allow_are_left_out_with_the_reason(towers, dataset, tmp_path):
    bare = override_config(PretrainConfig(max_epochs=1, **FAST), ["model.item_hypergraph=false"])
    pretrain(bare, dataset, tmp_path / "mf")
    out = tmp_path / "fused"
    fuse({"mf": tmp_path / "mf"}, dataset, out, FuseConfig(num_threads=1))
    planned, skipped = plan_controls(out)
    assert planned == [] and skipped == {
        "two-seeds": "a tower must be a sequence model, got none",
        "permuted-text": "a tower must read the content of the items, got none",
        "random-transformer": "a tower must be a language model, got none",
    }
    with pytest.raises(ValueError, match="row 'two-seeds' is not possible: a tower must be a sequence model, got none"):
        plan_controls(out, rows=["two-seeds"])


def test_a_graph_that_is_no_tower_must_be_given(towers, dataset, tmp_path):
    out = tmp_path / "fused"
    fuse({name: towers[name] for name in ("ids", "llm")}, dataset, out, FuseConfig(num_threads=1))
    with pytest.raises(ValueError, match="graph must be the run that tower llm was trained with, which is no tower"):
        plan_controls(out, rows=["random-transformer"])
    (planned,), _ = plan_controls(out, rows=["permuted-text"], graph=towers["graph"])
    assert [one.name for one in controls._trainings(planned.towers.values())] == ["llm-graph", "llm"]


def test_mistakes_show_before_anything_is_trained(fails, fused, towers, shop, tmp_path):
    out = tmp_path / "out"
    argv = ["ablate", "--data", shop, "--out", out]
    fails(*argv, "--fused", fused, "--rows", "two-seds", match="rows must be among .*did you mean 'two-seeds'")
    fails(*argv, "--fused", towers["ids"], match="must be of `hellm fuse`, got one of stage 'sasrec'")
    fails(*argv, "--fused", tmp_path / "absent", match="absent")
    fails(*argv, "--fused", fused, "--max-epochs", 3, match="unknown option '--max-epochs'")
    other = write_sample_shop(tmp_path / "other", num_users=80, num_items=40, num_groups=2, seed=3)
    fails("ablate", "--data", other, "--out", out, "--fused", fused, match="data must be those of fused run")
    assert not out.exists()
