from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hellm.artifact.test_users import read_test_users
from hellm.config import FinetuneConfig, load_config, override_config
from hellm.evaluate import evaluate_histories
from hellm.recommend import Recommender
from hellm.training import finetune as finetuning
from hellm.training.ablation import ABLATIONS, plan_ablations, run_ablations
from hellm.training.loop import Interrupted


def ablate(config, dataset, out, runs, **options):
    return run_ablations(config, dataset, out, **runs, **options)


def names(planned):
    return [row.name for row in planned]


def test_each_row_changes_what_it_says(config, small_dataset, runs):
    planned, skipped = plan_ablations(config, small_dataset, graph=runs["graph"])
    needs = "item_inputs must hold features where titles are not read, got graph, sequence"
    assert skipped == {"no-learned-prefix": "the same as full with these settings", "permuted-text": needs}
    assert names(planned) == [name for name in ABLATIONS if name not in skipped]
    row = {one.name: one for one in planned}
    assert row["full"].config == config and row["full"].overrides == ()
    assert row["no-graph"].config.item_inputs == ("sequence",)
    assert row["no-graph"].config.model.graph_context == "none"
    assert row["no-graph-context"].config.item_inputs == ("graph", "sequence")
    assert row["no-sequence"].config == replace(config, item_inputs=("graph",))
    assert row["text"].config == replace(config, item_inputs=("graph", "sequence", "text"))
    assert row["prefix"].overrides == ("model.graph_context=prefix", "model.learned_prefix=true")
    assert row["random-transformer"].config == replace(config, llm_init="random")
    assert row["no-lora"].config == override_config(config, ["model.lora_rank=0"])
    for name, user, item in (("no-user-hypergraph", False, True), ("no-item-hypergraph", True, False)):
        stage_1 = row[name].stage_1
        assert row[name].config == config
        assert (stage_1.model.user_hypergraph, stage_1.model.item_hypergraph) == (user, item)
        before = load_config(type(stage_1), runs["graph"] / "config.yaml")
        assert replace(stage_1, model=before.model) == before
    assert {one.name for one in planned if one.stage_1 is not None} == {"no-user-hypergraph", "no-item-hypergraph"}


def test_inputs_of_the_full_model_are_kept_beside_the_one_that_goes(config, small_dataset, runs):
    config = override_config(config, ["item_inputs=[image, graph, sequence]", "model.sequence_residual=true"])
    planned, skipped = plan_ablations(config, small_dataset, rows=["no-sequence", "text", "residual"])
    assert planned[1].config.item_inputs == ("image", "graph") and not planned[1].config.model.sequence_residual
    assert planned[2].config.item_inputs == ("image", "graph", "sequence", "text")
    assert names(planned) == ["full", "no-sequence", "text"]
    assert skipped == {"residual": "the same as full with these settings"}


def test_rows_that_the_data_do_not_allow_are_left_out_with_the_reason(config, small_dataset, runs):
    bare = replace(small_dataset, item_titles=None, item_features={})
    planned, skipped = plan_ablations(config, bare, graph=runs["graph"])
    assert set(skipped) == {"titles", "text", "no-learned-prefix", "permuted-text"}
    assert len(planned) == len(ABLATIONS) - 4
    assert skipped["titles"] == "model.titles needs item titles, and data set 'blocks' has none"
    assert skipped["text"] == "data set 'blocks' has no item features 'text'"
    with pytest.raises(ValueError, match=r"row 'titles' is not possible: model.titles needs item titles"):
        plan_ablations(config, bare, rows=["titles"])
    alone = replace(config, item_inputs=("graph",))
    assert "item_inputs must be null, or one or more" in plan_ablations(alone, bare, graph=runs["graph"])[1]["no-graph"]
    alone = override_config(config, ["model.graph_context=none", "item_inputs=[sequence]"])
    why = plan_ablations(alone, bare)[1]["no-user-hypergraph"]
    assert why == "item_inputs must hold 'graph', got sequence"


def test_a_graph_run_without_a_branch_is_not_trained_again(config, small_dataset, tmp_path):
    (tmp_path / "config.yaml").write_text("model: {item_hypergraph: false}\n", encoding="utf-8")
    rows = ["no-item-hypergraph", "no-user-hypergraph"]
    planned, skipped = plan_ablations(config, small_dataset, graph=tmp_path, rows=rows)
    assert names(planned) == ["full", "no-user-hypergraph"] and list(skipped) == ["no-item-hypergraph"]
    assert not planned[1].stage_1.model.item_hypergraph


def test_runs_are_made_once_and_stage_1_anew(config, small_dataset, runs, tmp_path, monkeypatch):
    config, said = replace(config, max_epochs=1), []
    options = {"rows": ["no-user-hypergraph"], "seeds": [3, 4, 3]}
    first = ablate(config, small_dataset, tmp_path, runs, on_run=lambda label, plan: said.append(label), **options)
    assert [label.split(" (")[1] for label in said] == [f"{place} of 4)" for place in (1, 2, 3, 4)]
    assert said[1].startswith("full, seed 4 ") and said[2].startswith("no-user-hypergraph, seed 3 ")
    full, changed = first["rows"]
    assert (first["seeds"], list(full["runs"]), full["stage_1"]) == ([3, 4], ["3", "4"], None)
    stage_1 = changed["stage_1"]
    assert stage_1["overrides"] == ["model.user_hypergraph=false"] and stage_1["seconds"] > 0
    assert "user_hypergraph: false" in (tmp_path / stage_1["run"] / "config.yaml").read_text()
    one = full["runs"]["4"]
    assert load_config(FinetuneConfig, tmp_path / one["run"] / "config.yaml").seed == 4
    users, values = read_test_users(tmp_path / one["run"])
    assert np.array_equal(users, np.arange(60))
    assert values["ndcg@5"].mean() == pytest.approx(one["test"]["metrics"]["ndcg@5"])
    low, high = one["test"]["confidence_intervals"]["ndcg@5"]
    assert low < one["test"]["metrics"]["ndcg@5"] < high
    assert one["training_seconds"] > 0 and one["users_per_second"] > 0 and one["num_trained_parameters"] > 0
    assert read_test_users(tmp_path) is None

    def never(*args, **options):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(finetuning, "build_step", never)
    assert ablate(config, small_dataset, tmp_path, runs, **options) == first


def test_controls_read_other_content_and_random_weights(config, small_dataset, runs, tmp_path):
    config = replace(config, max_epochs=1, item_inputs=("graph", "text"))
    ran = ablate(config, small_dataset, tmp_path, runs, rows=["permuted-text", "random-transformer"])
    full, permuted, drawn = (tmp_path / row["runs"]["2024"]["run"] for row in ran["rows"])
    tables = [load_file(run / "embeddings.safetensors") for run in (full, permuted, drawn)]
    order = np.random.default_rng(0).permutation(small_dataset.num_items)
    assert torch.equal(tables[1]["graph"], tables[0]["graph"]) and torch.equal(tables[2]["text"], tables[0]["text"])
    # Whitened after the change, so equal but for rounding.
    torch.testing.assert_close(tables[1]["text"].abs(), tables[0]["text"][order].abs(), rtol=1e-3, atol=1e-3)
    identity = {
        run: json.loads((run / "checkpoint/language_model.json").read_text()) for run in (full, permuted, drawn)
    }
    assert identity[full]["weights"] == identity[permuted]["weights"] != identity[drawn]["weights"]
    assert identity[full]["config"] == identity[drawn]["config"] and identity[drawn]["random_seed"] == 2024
    # What is served has the drawn weights again.
    served = Recommender.load(drawn)
    tested = evaluate_histories(served.model, small_dataset, protocol=config.protocol, ks=config.ks)
    assert tested.metrics["ndcg@5"] == pytest.approx(ran["rows"][2]["runs"]["2024"]["test"]["metrics"]["ndcg@5"])


def test_an_interrupted_ablation_goes_on(config, small_dataset, runs, tmp_path, monkeypatch):
    config, original, steps = replace(config, max_epochs=2), finetuning.finetune_loss, []
    whole = ablate(config, small_dataset, tmp_path / "whole", runs, rows=["no-lora"])

    def interrupting(*args):
        steps.append(args)
        # Two steps of the plan before and four in each of two epochs: this is the second run.
        if len(steps) == 10 + 2 + 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(finetuning, "finetune_loss", interrupting)
    with pytest.raises(Interrupted, match=r"saved .*no-lora-seed2024"):
        ablate(config, small_dataset, tmp_path / "cut", runs, rows=["no-lora"])
    monkeypatch.setattr(finetuning, "finetune_loss", original)
    resumed = ablate(config, small_dataset, tmp_path / "cut", runs, rows=["no-lora"])
    for one, other in zip(resumed["rows"], whole["rows"], strict=True):
        assert one["runs"]["2024"]["test"] == other["runs"]["2024"]["test"]


def test_mistakes_show_before_anything_is_trained(config, small_dataset, runs, tmp_path):
    def fails(match, dataset=small_dataset, kind=ValueError, **options):
        with pytest.raises(kind, match=match):
            ablate(config, dataset, tmp_path / "out", runs | options.pop("other", {}), **options)
        assert not (tmp_path / "out").exists()

    fails(r"rows must be among full, .*, got 'no-graf'; did you mean 'no-graph'\?", rows=["no-graf"])
    fails("seeds must hold one or more numbers, got none", seeds=[])
    fails("graph must be the run directory of a finished `hellm pretrain`, got none", other={"graph": None})
    fails(
        "sequence run .*x holds no embeddings.safetensors", kind=FileNotFoundError, other={"sequence": tmp_path / "x"}
    )
    fails("graph run .*x holds no config.yaml", kind=FileNotFoundError, other={"graph": tmp_path / "x"})
    untested = replace(small_dataset, split=np.minimum(small_dataset.split, 1))
    fails("data set 'blocks' must have test events to compare by, got none", dataset=untested)
