from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hellm.config import FinetuneConfig, PretrainConfig, load_config, override_config
from hellm.data import IdMap
from hellm.evaluate import HistoryScorer, evaluate_histories
from hellm.models import RecommenderLLM, SASRec
from hellm.recommend import Recommender
from hellm.training import finetune as module
from hellm.training.candidates import CandidateItems
from hellm.training.finetune import (
    build_history_sampler,
    build_optimizer,
    build_recommender_llm,
    finetune,
    finetune_loss,
    plan_finetuning,
    rate_schedule,
)
from hellm.training.item_inputs import load_item_inputs
from hellm.training.loop import Interrupted


def run(config, dataset, out, runs, **options):
    return finetune(config, dataset, out, **runs, **options)


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def test_run_learns_and_leaves_a_model_with_the_same_scores(config, small_dataset, runs, tmp_path):
    result = run(config, small_dataset, tmp_path / "run", runs)
    losses = [record["loss_mean"] for record in records(tmp_path / "run")]
    assert losses[-1] < 0.9 * losses[0]
    # Users like 8 of 24 items and have seen 5 of them.
    assert result["test"]["recall@5"] > 5 / 24 and result["test"]["recall@5"] == result["test"]["metrics"]["recall@5"]
    assert result["stage"] == "finetune" and result["test_users_per_second"] > 0
    assert result["num_trained_parameters"] < result["num_parameters"]
    assert 0 < result["plan"]["num_layer_parameters"] < result["num_parameters"]
    tables = load_item_inputs(config, small_dataset, **runs).tables
    loaded = RecommenderLLM.from_pretrained(
        tmp_path / "run" / "model", tables, item_titles=small_dataset.item_titles, sequence_model=None
    )
    again = evaluate_histories(loaded, small_dataset, ks=config.ks, protocol=config.protocol)
    assert again.metrics["ndcg@5"] == pytest.approx(result["test"]["ndcg@5"], abs=1e-6)


def test_resumed_run_equals_the_uninterrupted(config, small_dataset, runs, tmp_path, monkeypatch):
    run(config, small_dataset, tmp_path / "whole", runs)
    steps, original = [], finetune_loss

    def interrupting(*args):
        steps.append(args)
        # Two steps of the plan come first.
        if len(steps) == 2 + 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    monkeypatch.setattr(module, "finetune_loss", interrupting)
    with pytest.raises(Interrupted, match=r"saved .*last.safetensors"):
        run(config, small_dataset, tmp_path / "cut", runs)
    monkeypatch.setattr(module, "finetune_loss", original)
    resumed = run(config, small_dataset, tmp_path / "cut", runs, resume=True)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    whole = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert resumed["test"]["metrics"] == whole["test"]["metrics"]


def test_a_resumed_run_keeps_its_input_runs_and_the_length_of_its_schedule(config, small_dataset, runs, tmp_path):
    from hellm.training.pretrain import pretrain

    config = replace(config, max_epochs=1)
    first = run(config, small_dataset, tmp_path / "run", runs)
    stage_1 = replace(load_config(PretrainConfig, runs["graph"] / "config.yaml"), seed=7, max_epochs=1)
    pretrain(stage_1, small_dataset, tmp_path / "graph")
    with pytest.raises(ValueError, match="a resumed run must keep its input runs, and those given are others"):
        run(config, small_dataset, tmp_path / "run", runs | {"graph": tmp_path / "graph"}, resume=True)
    with pytest.raises(ValueError, match="a resumed run must keep its settings; max_epochs was 1, got 2"):
        run(replace(config, max_epochs=2), small_dataset, tmp_path / "run", runs, resume=True)
    assert run(config, small_dataset, tmp_path / "run", runs, resume=True) == first


@pytest.fixture
def moving_llm(llm, tmp_path):
    """A language model that a test may change or move."""
    return Path(shutil.copytree(llm, tmp_path / "moving"))


def cut_short(config, dataset, out, runs, monkeypatch):
    """A run that was interrupted in its second epoch."""
    count, original = [0], finetune_loss

    def interrupting(*args):
        count[0] += 1
        if count[0] == 2 + 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(module, "finetune_loss", interrupting)
        run(config, dataset, out, runs)


def scale_weights(folder):
    from safetensors.torch import load_file, save_file

    tensors = {name: 1.5 * value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_resumed_run_keeps_its_language_model(config, small_dataset, runs, tmp_path, monkeypatch, moving_llm):
    config = replace(config, llm=str(moving_llm))
    cut_short(config, small_dataset, tmp_path / "cut", runs, monkeypatch)
    before = {one: one.read_bytes() for one in (tmp_path / "cut").rglob("*") if one.is_file()}
    scale_weights(moving_llm)
    with pytest.raises(ValueError, match=r"cut was trained with the language model .*all_weights \w+.* got .*moving"):
        run(config, small_dataset, tmp_path / "cut", runs, resume=True)
    assert {one: one.read_bytes() for one in (tmp_path / "cut").rglob("*") if one.is_file()} == before


def test_a_finished_run_with_another_language_model_stays_as_it_is(config, small_dataset, runs, tmp_path, moving_llm):
    config = replace(config, llm=str(moving_llm), max_epochs=1)
    first = run(config, small_dataset, tmp_path / "run", runs)
    scale_weights(moving_llm)
    assert run(config, small_dataset, tmp_path / "run", runs, resume=True) == first
    with pytest.raises(ValueError, match="was trained with the language model"):
        run(replace(config, patience=9), small_dataset, tmp_path / "run", runs, resume=True)
    assert run(config, small_dataset, tmp_path / "run", runs, resume=True) == first


def test_a_moved_language_model_can_be_told_to_a_resumed_run(
    config, small_dataset, runs, tmp_path, monkeypatch, moving_llm
):
    config = replace(config, llm=str(moving_llm))
    run(config, small_dataset, tmp_path / "whole", runs)
    cut_short(config, small_dataset, tmp_path / "cut", runs, monkeypatch)
    moved = replace(config, llm=str(shutil.move(moving_llm, tmp_path / "moved")))
    run(moved, small_dataset, tmp_path / "cut", runs, resume=True)
    assert records(tmp_path / "cut") == records(tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=r"moving does not exist; if it was moved, say where it is now"):
        Recommender.load(tmp_path / "whole")
    lists = [
        Recommender.load(tmp_path / "whole", language_model=tmp_path / "moved").recommend("u1", k=3),
        Recommender.load(tmp_path / "cut").recommend("u1", k=3),
    ]
    assert lists[0] == lists[1]


def test_a_run_with_titles_some_of_them_empty_loads(config, small_dataset, runs, tmp_path):
    config = replace(config, max_epochs=1, model=replace(config.model, titles=True))
    run(config, small_dataset, tmp_path / "run", runs)
    assert "" in small_dataset.item_titles
    assert len(Recommender.load(tmp_path / "run").recommend("u1", k=3)[0]) == 3


def test_a_wrong_language_model_leaves_no_folder_and_a_failed_start_binds_nobody(
    config, small_dataset, runs, tmp_path, monkeypatch
):
    for override in ("model.lora_targets=[no_such]", "model.max_length=2000", "llm=no/such/folder/"):
        with pytest.raises((ValueError, OSError)):
            run(override_config(config, [override]), small_dataset, tmp_path / "run", runs)
        assert not (tmp_path / "run").exists()
    with monkeypatch.context() as broken:
        broken.setattr(module, "finetune_loss", lambda model, batch: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(config, small_dataset, tmp_path / "run", runs)
    smaller = replace(config, batch_tokens=30, max_epochs=1)
    assert run(smaller, small_dataset, tmp_path / "run", runs, resume=True)["num_epochs"] == 1


def test_mixed_precision_is_near_the_full(config, small_dataset, runs, tmp_path):
    config = override_config(replace(config, max_epochs=1), ["model.lora_dropout=0"])
    losses = []
    for precision in ("no", "bf16"):
        run(replace(config, mixed_precision=precision), small_dataset, tmp_path / precision, runs)
        losses.append(records(tmp_path / precision)[0]["loss_mean"])
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.01)


def test_a_best_validation_within_an_epoch_is_in_the_result(config, small_dataset, runs, tmp_path):
    config = replace(config, max_epochs=1, validate_steps=3, patience=9)
    result = run(config, small_dataset, tmp_path / "run", runs)
    within, whole = records(tmp_path / "run")
    assert (within["epoch"], within["step"], within["epochs_done"]) == (0, 3, 0.75)
    best = whole if whole["valid_recall@5"] > within["valid_recall@5"] else within
    assert result["valid"]["metrics"]["recall@5"] == best["valid_recall@5"]
    assert (result["best_epoch"], result["best_step"], result["num_epochs"]) == (0, best.get("step"), 1)


def test_checkpoints_hold_only_what_is_trained(config, small_dataset, runs, tmp_path):
    from safetensors import safe_open

    result = run(replace(config, max_epochs=1), small_dataset, tmp_path / "run", runs)
    with safe_open(tmp_path / "run" / "checkpoint" / "best.safetensors", framework="pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118 (not a mapping)
    assert count == result["num_trained_parameters"]
    assert not any("embed_tokens" in str(path) for path in (tmp_path / "run").rglob("*"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.graph_context=prefix"],
        ["model.graph_context=none", "item_inputs=[sequence]"],
        ["model.learned_prefix=true"],
        ["model.head=trained"],
        ["model.head=frozen"],
        ["model.lora_rank=0"],
        ["model.titles=true"],
        ["model.sequence_residual=true"],
        ["item_inputs=[graph, text]"],
        ["accumulate=3", "max_grad_norm=null"],
        ["dtype=bfloat16"],
        ["mixed_precision=bf16"],
        ["mixed_precision=bf16", "dtype=bfloat16", "model.graph_context=prefix"],
    ],
    ids=" ".join,
)
def test_every_ablation_trains_and_scores(overrides, config, small_dataset, runs, tmp_path):
    config = replace(config, max_epochs=1)
    result = run(override_config(config, overrides), small_dataset, tmp_path / "run", runs)
    full = run(config, small_dataset, tmp_path / "full", runs)
    losses = [records(tmp_path / name)[0]["loss"] for name in ("run", "full")]
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    same_size = {"dtype=bfloat16", "mixed_precision=bf16", "accumulate=3", "model.sequence_residual=true"}
    if not same_size & set(overrides):
        assert result["num_trained_parameters"] != full["num_trained_parameters"] or "titles" in overrides[0]
    assert result["test"]["num_users"] == small_dataset.num_users


def test_the_residual_starts_with_the_scores_of_the_sequence_model(config, small_dataset, runs):
    config = override_config(config, ["model.sequence_residual=true"])
    model = build_recommender_llm(config, small_dataset, load_item_inputs(config, small_dataset, **runs))
    sequence = SASRec.load(runs["sequence"])
    users = torch.arange(small_dataset.num_users)
    expected = HistoryScorer.of(sequence, small_dataset, "test").scores(users)
    assert torch.allclose(HistoryScorer.of(model, small_dataset, "test").scores(users), expected, atol=1e-6)


def test_an_item_that_training_knows_nothing_of_is_no_candidate(config, small_dataset, monkeypatch, tmp_path):
    held = small_dataset.of_events((small_dataset.items != 5) | (small_dataset.split > 0))
    config = override_config(config, ["max_epochs=1", "item_inputs=[text]", "model.graph_context=none"])
    model = build_recommender_llm(config, held, load_item_inputs(config, held)).eval()
    batch = build_history_sampler(config, held, model).sample(0, 0)
    trained = CandidateItems.of(held).of_step(0, 0, batch.targets)
    assert 5 not in trained.rows.tolist() and len(trained.rows) == held.num_items - 1
    whole, known = finetune_loss(model, batch).item(), finetune_loss(model, batch, trained).item()
    assert known < whole
    given = []
    monkeypatch.setattr(module, "finetune_loss", lambda *args: given.append(args) or finetune_loss(*args))
    finetune(config, held, tmp_path / "run")
    # Two steps of the plan come first.
    assert all(torch.equal(one[2].rows, trained.rows) for one in given[2:]) and len(given) > 2


def test_loss_of_all_positions_is_the_mean_over_single_histories(config, small_dataset, runs):
    inputs = load_item_inputs(config, small_dataset, **runs)
    model = build_recommender_llm(config, small_dataset, inputs).eval()
    sampler = build_history_sampler(config, small_dataset, model)
    batch = sampler.sample(0, 0)
    together = finetune_loss(model, batch).item()
    keys, single = model.item_keys(), []
    for row in range(len(batch.indptr) - 1):
        for stop in range(batch.indptr[row] + 1, batch.indptr[row + 1] + 1):
            history = torch.from_numpy(batch.items[batch.indptr[row] : stop])
            scores = model.embed(torch.tensor([0, len(history)]), history) @ keys.T
            single.append(-scores[0].log_softmax(0)[batch.targets[stop - 1]].item())
    assert together == pytest.approx(np.mean(single), rel=1e-5)


def test_plan_counts_the_work_and_changes_nothing(config, small_dataset, runs):
    inputs = load_item_inputs(config, small_dataset, **runs)
    torch.manual_seed(5)
    model = build_recommender_llm(config, small_dataset, inputs)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generator = torch.get_rng_state()
    plan = plan_finetuning(config, model, build_history_sampler(config, small_dataset, model))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    # 60 users of 4 training events: 3 positions each, 16 histories in 48 tokens.
    assert (plan["histories"], plan["targets_per_epoch"], plan["tokens_per_epoch"]) == (60, 180, 180)
    assert (plan["steps_per_epoch"], plan["max_steps"], plan["padding_share"]) == (4, 12, 0)
    assert plan["expected_seconds"] == pytest.approx(3 * plan["seconds_of_step"] * 180 / 48)


def test_weight_decay_spares_vectors_and_prefixes(config, small_dataset, runs):
    config = override_config(config, ["model.learned_prefix=true"])
    model = build_recommender_llm(config, small_dataset, load_item_inputs(config, small_dataset, **runs))
    decayed, plain = build_optimizer(config, model).param_groups
    assert decayed["weight_decay"] == config.weight_decay and plain["weight_decay"] == 0
    assert {parameter.ndim for parameter in decayed["params"]} == {2}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert any("prefix_key" in names[id(parameter)] for parameter in plain["params"])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(decayed["params"]) + len(plain["params"]) == len(trained)


def test_rate_warms_up_and_follows_a_cosine():
    config = FinetuneConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_epochs=1.0, max_epochs=3)
    rate = rate_schedule(config, num_steps=4)
    assert [rate(0, step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(1, 0) == 1.0 and rate(2, 0) == pytest.approx(0.6) and rate(3, 0) == pytest.approx(0.2)


def test_published_rate_starts_at_zero():
    from hellm.config import PRESETS

    config = PRESETS[FinetuneConfig]["official"]
    rate = rate_schedule(config, num_steps=100)
    assert rate(0, 0) == 0 and rate(0, 50) == pytest.approx(1.5e-4) and rate(25, 0) == pytest.approx(5e-6)


def test_official_histories_are_cut_before_the_split(config, small_dataset, runs):
    overrides = [f"model.{name}={value}" for name, value in OFFICIAL_OVERRIDES.items()]
    config = override_config(replace(config, batch_size=7), ["model.max_length=4", *overrides])
    model = build_recommender_llm(config, small_dataset, load_item_inputs(config, small_dataset, **runs))
    sampler = build_history_sampler(config, small_dataset, model)
    # The last 4 of 6 events hold 2 training events: one history of one item per user.
    assert (sampler.num_histories, sampler.num_steps) == (60, 9)
    sizes = {len(sampler.sample(0, step).targets) for step in range(9)}
    assert sizes == {7, 60 - 8 * 7}


OFFICIAL_OVERRIDES = {
    "graph_context": "prefix",
    "learned_prefix": "true",
    "prefix_gate": "false",
    "gram_rank": "null",
    "head": "frozen",
    "item_id_dim": "0",
    "item_dropout": "0",
    "compat": "official",
}


def test_missing_and_foreign_runs_are_named(config, small_dataset, runs, tmp_path):
    def load(dataset=small_dataset, overrides=(), **changes):
        return load_item_inputs(override_config(config, overrides), dataset, **runs | changes)

    with pytest.raises(ValueError, match=r"graph must be the run directory of a finished `hellm pretrain`, got none"):
        load(graph=None)
    with pytest.raises(FileNotFoundError, match=r"sequence run .*empty holds no embeddings.safetensors"):
        load(sequence=tmp_path / "empty")
    renamed = replace(small_dataset, item_ids=IdMap(f"x{index}" for index in range(small_dataset.num_items)))
    with pytest.raises(ValueError, match=r"run .* must be of the 24 items .* got 24 items with other ids"):
        load(renamed)
    other = replace(small_dataset, items=small_dataset.items[::-1].copy())
    with pytest.raises(ValueError, match="was trained on other training events"):
        load(other)
    with pytest.raises(ValueError, match=r"item_inputs must be among graph, sequence, image, text .* got 'sound'"):
        load(overrides=["item_inputs=[graph, sound]"])


def test_titles_need_titles(config, small_dataset, runs, tmp_path):
    config = override_config(config, ["model.titles=true"])
    with pytest.raises(ValueError, match=r"model.titles needs item titles, and data set 'blocks' has none"):
        run(config, replace(small_dataset, item_titles=None), tmp_path / "run", runs)
    assert not (tmp_path / "run").exists()


def test_exhausted_memory_says_what_to_lower(config, small_dataset, runs, tmp_path, monkeypatch):
    def too_large(model, batch):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(module, "finetune_loss", too_large)
    with pytest.raises(MemoryError, match=r"can't allocate memory.*; lower batch_tokens, model.max_length"):
        run(config, small_dataset, tmp_path / "run", runs)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rate=0", "learning_rate must be > 0, got 0"),
        ("min_learning_rate=-1", "min_learning_rate must be >= 0, got -1"),
        ("betas=[0.9]", r"betas must be two numbers in \[0, 1\), got"),
        ("item_inputs=[]", "item_inputs must be null, or one or more different names, got"),
        ("batch_tokens=0", "batch_tokens must be >= 1, got 0"),
        ("batch_size=0", "batch_size must be null or >= 1, got 0"),
        ("steps_per_epoch=0", "steps_per_epoch must be null or >= 1, got 0"),
        ("validate_steps=0", "validate_steps must be null or >= 1, got 0"),
        ("accumulate=0", "accumulate must be >= 1, got 0"),
        ("max_grad_norm=0", "max_grad_norm must be null or > 0, got 0"),
        ("model.lora_rank=-1", "lora_rank must be >= 0, got -1"),
    ],
)
def test_settings_out_of_range_are_named(override, message):
    with pytest.raises(ValueError, match=message):
        override_config(FinetuneConfig(), [override])


def test_official_needs_a_batch_size():
    with pytest.raises(ValueError, match=r"batch_size must be given with model.compat=.official."):
        override_config(
            replace(FinetuneConfig(), batch_size=7),
            [*(f"model.{name}={value}" for name, value in OFFICIAL_OVERRIDES.items()), "batch_size=null"],
        )
