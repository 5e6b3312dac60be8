"""Runs trained on with newer data, and compared with the one that serves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from support.command_line import last_json

import hellm
import hellm.upkeep.refit
from hellm.artifact.run_hash import run_hash
from hellm.config import PRESETS, PretrainConfig, RunConfig, SASRecConfig, TransitionsConfig
from hellm.data import IdMap, load_dataset, save_dataset, write_sample_shop
from hellm.evaluate import HistoryScorer, evaluate_dataset
from hellm.models import SASRec
from hellm.recommend import Recommender
from hellm.training.checkpoint import load_checkpoint, read_model
from hellm.training.pretrain import build_encoder, pretrain, resolve_config
from hellm.training.sasrec import build_sasrec, continued_sasrec, resolve_sasrec_config, train_sasrec
from hellm.training.transitions import fit_transitions
from hellm.training.warm_start import check_continues, warm_start
from hellm.upkeep.append import append
from hellm.upkeep.refit import EarlierScorer, compare_with_served, refit

pytestmark = pytest.mark.usefixtures("same_threads")
FAST = {"max_epochs": 2, "num_threads": 1, "tensorboard": False}
STAGES = {
    "pretrain": (pretrain, replace(PRESETS[PretrainConfig]["demo"], batch_size=64, **FAST)),
    "sasrec": (train_sasrec, replace(SASRecConfig(), embedding_dim=16, **FAST)),
    "transitions": (fit_transitions, TransitionsConfig()),
}
NEW_ITEMS = 6


@pytest.fixture(scope="module")
def grown(tmp_path_factory) -> SimpleNamespace:
    """A shop of 60 users and 40 items, the folders of its data before and after the last fifth of its events."""
    top = tmp_path_factory.mktemp("refit")
    write_sample_shop(top / "shop", num_users=60, num_items=40, num_groups=2)
    events, items = (pl.read_csv(top / "shop" / f"{name}.csv") for name in ("events", "items"))
    events, listed = events.sort("timestamp"), items["item"].to_list()
    old, new = events[: int(len(events) * 0.8)], events[int(len(events) * 0.75) :]
    first = listed[:-NEW_ITEMS]
    for name, part, rows in (("old", old, items["item"].is_in(first)), ("new", new, ~items["item"].is_in(first))):
        (top / name).mkdir()
        kept = part.filter(pl.col("item").is_in(first)) if name == "old" else part
        kept.write_csv(top / name / "events.csv")
        items.filter(rows).drop("image", strict=False).write_csv(top / name / "items.csv")
    save_dataset(load_dataset(top / "old"), top / "data")
    append(top / "data", top / "new" / "events.csv", top / "grown", top / "new" / "items.csv")
    return SimpleNamespace(top=top, data=top / "data", grown=top / "grown")


@pytest.fixture(scope="module")
def runs(grown) -> dict[str, Path]:
    for stage, (train, config) in STAGES.items():
        train(config, grown.data, grown.top / stage)
    return {stage: grown.top / stage for stage in STAGES}


class TestWarmStart:
    def test_old_rows_come_first_and_the_rest_stays_fresh(self, grown, runs):
        dataset = load_dataset(grown.grown)
        config, _ = resolve_config(STAGES["pretrain"][1], dataset)
        old_config, _ = resolve_config(STAGES["pretrain"][1], load_dataset(grown.data))
        old = build_encoder(old_config, load_dataset(grown.data))
        model, fresh = build_encoder(config, dataset), build_encoder(config, dataset)
        fresh.load_state_dict(model.state_dict())
        assert warm_start(model, runs["pretrain"]) == []
        read_model(runs["pretrain"] / "checkpoint" / "best.safetensors", old)
        before, start = dict(old.named_parameters()), dict(fresh.named_parameters())
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter[: len(before[name])], before[name])
            assert torch.equal(parameter[len(before[name]) :], start[name][len(before[name]) :])
        assert any(len(one) > len(before[name]) for name, one in model.named_parameters())

    def test_content_stays_whitened_as_the_weights_know_it(self, grown, runs):
        """Old items have the very keys of the old run before a step is made."""
        dataset, served = load_dataset(grown.grown), SASRec.load(runs["sasrec"])
        config, _ = resolve_sasrec_config(replace(STAGES["sasrec"][1], content=("text",)), dataset)
        assert "text" in served.items.modalities
        model, _ = continued_sasrec(config, dataset, runs["sasrec"])
        now, before = (one.items.content("text").table[: served.num_items] for one in (model, served))
        torch.testing.assert_close(now, before, atol=1e-5, rtol=0)
        assert torch.equal(model.items.content("text").matrix, served.items.content("text").matrix)
        assert not torch.equal(
            build_sasrec(config, dataset).items.content("text").mean, served.items.content("text").mean
        )

    def test_weights_of_another_width_stay_fresh(self, grown, runs):
        config, _ = resolve_sasrec_config(replace(STAGES["sasrec"][1], embedding_dim=8), load_dataset(grown.grown))
        _, fresh = continued_sasrec(config, load_dataset(grown.grown), runs["sasrec"])
        assert "position_embedding.weight" in fresh and "items.id_embedding.weight" in fresh

    @pytest.mark.parametrize("changed", ["values", "encoder"])
    def test_columns_of_one_number_that_mean_something_else_begin_anew(self, grown, runs, changed):
        dataset, before = load_dataset(grown.data), SASRec.load(runs["sasrec"]).items
        if changed == "values":
            name = next(name for name, one in dataset.attribute_sets.items() if len(one.values) > 2)
            # The first value is another from now on, and so stands in the last column.
            first = dataset.attribute_sets[name].values[0]
            texts = [text.replace(first, f"~{first}") for text in dataset.item_fields[name]]
            other = replace(dataset, item_fields=dataset.item_fields | {name: texts})
            assert len(other.attribute_sets[name].values) == len(dataset.attribute_sets[name].values)
        else:
            name, text = "text", dataset.item_features["text"]
            other = replace(
                dataset,
                item_features=dataset.item_features | {name: replace(text, values=text.values[:, ::-1].copy())},
                encoders=dataset.encoders | {name: {"encoder": "another of this width"}},
            )
        config, _ = resolve_sasrec_config(STAGES["sasrec"][1], other)
        model, fresh = continued_sasrec(config, other, runs["sasrec"])
        place = model.items.modalities.index(name)
        weights = [f"items.projectors.{place}.{one}" for one, _ in model.items.projectors[place].named_parameters()]
        assert fresh == weights and len(model.items.modalities) > 1
        assert continued_sasrec(config, dataset, runs["sasrec"])[1] == []
        for one in model.items.modalities:
            assert torch.equal(model.items.content(one).mean, before.content(one).mean) is (one != name)

    def test_weights_go_with_their_modality_and_not_with_its_place(self, grown, runs):
        dataset, before = load_dataset(grown.data), SASRec.load(runs["sasrec"]).items
        best, _ = load_checkpoint(runs["sasrec"] / "checkpoint" / "best.safetensors")
        name = before.modalities[-1]
        config, _ = resolve_sasrec_config(replace(STAGES["sasrec"][1], content=(name,)), dataset)
        model, fresh = continued_sasrec(config, dataset, runs["sasrec"])
        expected = best[f"model.items.projectors.{len(before.modalities) - 1}.1.weight"]
        assert fresh == [] and torch.equal(model.items.projectors[0][1].weight, expected)

    def test_data_that_do_not_continue_are_refused(self, grown, runs):
        check_continues(runs["sasrec"], load_dataset(grown.grown))
        dataset = load_dataset(grown.grown)
        other = replace(dataset, item_ids=IdMap(dataset.item_ids.ids[::-1]))
        with pytest.raises(ValueError, match=r"must begin with the 34 items of .*sasrec, each in its row"):
            check_continues(runs["sasrec"], other)
        save_dataset(other, grown.top / "other")
        with pytest.raises(ValueError, match="hellm append makes such data"):
            refit(runs["sasrec"], grown.top / "other", grown.top / "never")
        assert not (grown.top / "never").exists()


class TestStages:
    @pytest.mark.parametrize("stage", STAGES)
    def test_refit_is_a_run_of_the_grown_data_with_a_verdict(self, grown, runs, stage, tmp_path):
        report = refit(runs[stage], grown.grown, tmp_path / "out")
        assert json.loads((tmp_path / "out" / "refit.json").read_text()) == report
        result = json.loads((tmp_path / "out" / "result.json").read_text())
        dataset = load_dataset(grown.grown)
        assert result["dataset"]["fingerprint"] == dataset.fingerprint
        if stage != "transitions":
            assert result["start"] == {"run": run_hash(runs[stage]), "fresh": []}
        candidate = Recommender.load(tmp_path / "out")
        assert candidate.num_items == dataset.num_items
        judged, left_out = hellm.upkeep.refit._without_trained(Recommender.load(runs[stage]), dataset)
        options = {"split": "valid", "protocol": result["test"]["protocol"], "ks": (10, 20)}
        whole = evaluate_dataset(candidate.scorer("valid"), dataset, **options)
        assert whole.metrics[report["metric"]] == pytest.approx(result["valid"]["metrics"][report["metric"]], abs=1e-6)
        kept = np.isin(whole.users, judged.pairs("valid")[0])
        assert report["candidate_value"] == pytest.approx(whole.per_user[report["metric"]][kept].mean(), abs=1e-6)
        assert report["left_out_events"] == left_out == 60 - report["num_users"]
        assert report["difference"] == pytest.approx(report["candidate_value"] - report["served_value"])
        assert report["taken_over"] is (report["high"] >= 0)
        again = refit(runs[stage], grown.grown, tmp_path / "out", resume=True)
        assert again == report

    def test_epochs_begin_from_the_weights_of_the_run(self, grown, runs, tmp_path):
        """With a step size of next to nothing, what is tested is what was there."""
        still = replace(STAGES["sasrec"][1], learning_rate=1e-12, max_epochs=1)
        train_sasrec(still, grown.grown, tmp_path / "warm", start=runs["sasrec"])
        train_sasrec(still, grown.grown, tmp_path / "cold")
        with pytest.raises(ValueError, match="a resumed run must keep its input runs"):
            train_sasrec(still, grown.grown, tmp_path / "warm", start=tmp_path / "cold", resume=True)
        served, warm, cold = (
            SASRec.load(one).item_keys() for one in (runs["sasrec"], tmp_path / "warm", tmp_path / "cold")
        )
        torch.testing.assert_close(warm[: len(served)], served, atol=1e-5, rtol=0)
        assert (cold[: len(served)] - served).abs().max() > 0.01

    def test_other_stages_and_data_without_validation_are_refused(self, grown, runs, tmp_path):
        (tmp_path / "fused").mkdir()
        (tmp_path / "fused" / "result.json").write_text('{"stage": "fuse"}')
        with pytest.raises(ValueError, match="got stage 'fuse', which builds on other runs"):
            refit(tmp_path / "fused", grown.grown, tmp_path / "out")
        with pytest.raises(FileNotFoundError, match=r"holds no result\.json"):
            refit(tmp_path, grown.grown, tmp_path / "out")
        dataset = load_dataset(grown.grown)
        save_dataset(dataset.of_events(dataset.split != 1), tmp_path / "blind")
        with pytest.raises(ValueError, match="must have validation events to compare on, got none"):
            refit(runs["sasrec"], tmp_path / "blind", tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestVerdict:
    def test_served_run_knows_newer_events_and_items(self, grown, runs):
        dataset, served = load_dataset(grown.grown), Recommender.load(runs["sasrec"])
        before = served.num_items
        scores = EarlierScorer(served, dataset, "valid").scores(torch.arange(4))
        assert scores.shape == (4, dataset.num_items) and (scores[:, before:] == -1e30).all()
        histories = dataset.histories("train").take(np.arange(4))
        known = SimpleNamespace(items=histories.items[histories.items < before], owners=histories.owners)
        if len(known.items) == len(histories.items):
            expected = HistoryScorer(served.model, *histories).scores(torch.arange(4))
            torch.testing.assert_close(scores[:, :before], expected)
        hellm.upkeep.refit._take_new_items(served, dataset)
        assert served.item_ids == dataset.item_ids and served.num_items == before + NEW_ITEMS
        expected = HistoryScorer(served.model, *dataset.histories("train")).scores(torch.arange(4))
        torch.testing.assert_close(EarlierScorer(served, dataset, "valid").scores(torch.arange(4)), expected)

    def test_trained_users_of_stage_1_are_known_by_their_embedding(self, grown, runs):
        dataset, served = load_dataset(grown.grown), Recommender.load(runs["pretrain"])
        scores = EarlierScorer(served, dataset, "valid").scores(torch.arange(3))
        torch.testing.assert_close(scores[:, : served.num_items], served.model.user[:3] @ served.item.T)

    def test_newer_items_are_not_known_by_features_of_another_encoder(self, grown, runs):
        dataset = load_dataset(grown.grown)
        dataset = replace(dataset, encoders=dataset.encoders | {"text": {"encoder": "another of this width"}})
        served, expected = (Recommender.load(runs["sasrec"]) for _ in range(2))
        assert "text" in served.content.features and len(served.content.attributes) > 1
        notes = hellm.upkeep.refit._take_new_items(served, dataset)
        assert "the served run does not know newer items by text, which is by another encoder than its own" in notes
        new = served.item_ids.ids[expected.num_items :]
        rows = dataset.item_ids.indices(new)
        attributes = {
            name: [dataset.item_attributes[name][row] for row in rows] for name in expected.content.attributes
        }
        kept = {
            name: one.values[rows]
            for name, one in dataset.item_features.items()
            if name in expected.content.features and name != "text"
        }
        expected.add_items(kept, new, attributes=attributes)
        assert new and torch.equal(served.item, expected.item)

    def test_items_without_content_are_in_no_list_of_the_served_run(self, grown, runs):
        dataset = load_dataset(grown.grown)
        served = Recommender.load(runs["sasrec"])
        served._current = replace(served._current, content=None)
        report = compare_with_served(
            served, Recommender.load(runs["sasrec"]), load_dataset(grown.data), "ndcg@10", "standard"
        )
        assert report["difference"] == 0 and report["taken_over"]
        notes = hellm.upkeep.refit._take_new_items(served, dataset)
        assert notes == ["6 newer items are in no list of the served run, which has no content of items"]

    def test_a_worse_run_is_not_taken_over(self, grown, runs):
        data, served = load_dataset(grown.data), Recommender.load(runs["transitions"])
        worse = Recommender.load(runs["transitions"])
        worse.model.model.following.weight.neg_()
        worse.scorer = lambda split: lambda users: -served.scorer(split).scores(users)
        report = compare_with_served(served, worse, data, "ndcg@10", "standard")
        assert report["high"] < 0 and report["taken_over"] is False

    def test_events_that_the_served_run_was_trained_on_do_not_decide(self, grown, runs):
        data, served = load_dataset(grown.data), Recommender.load(runs["sasrec"])
        split = data.split.copy()
        moved = np.flatnonzero(np.append(data.users[1:] != data.users[:-1], True))[:5] - 2
        assert (split[moved] == 0).all()
        split[moved], split[moved + 1] = 1, 0
        report = compare_with_served(served, served, replace(data, split=split), "ndcg@10", "standard")
        assert report["left_out_events"] == 5
        everything = replace(data, split=np.where(data.split == 0, 1, 2).astype(np.int8))
        with pytest.raises(ValueError, match="was trained on all validation events"):
            compare_with_served(served, served, everything, "ndcg@10", "standard")


class TestPipeline:
    def test_run_of_all_stages_is_refitted_as_a_whole(self, grown, tmp_path, call):
        config = PRESETS[RunConfig]["demo"]
        stages = {name: replace(getattr(config, name), **FAST) for name in ("pretrain", "sasrec", "content")}
        config = replace(config, language_model=False, baselines=("popularity",), text="auto", image="none", **stages)
        hellm.run(grown.data, tmp_path / "all", config)
        code, out, _ = call("refit", tmp_path / "all", "--data", grown.grown, "--out", tmp_path / "next", "--json")
        report = last_json(out)
        assert code == (0 if report["taken_over"] else 1)
        assert report["served"] == str(tmp_path / "all" / "fused") and report["candidate"] == str(
            tmp_path / "next" / "fused"
        )
        for stage in ("stage1", "sasrec", "content"):
            result = json.loads((tmp_path / "next" / stage / "result.json").read_text())
            assert result["start"]["run"] == run_hash(tmp_path / "all" / stage)
        assert Recommender.load(tmp_path / "next" / "fused").num_items == load_dataset(grown.grown).num_items
        # The new run can be gone on with and refitted like any other.
        code, out, _ = call("refit", tmp_path / "all", "--data", grown.grown, "--out", tmp_path / "next", "--resume")
        assert "the served run" in out or "than" in out
        code, _, err = call("refit", tmp_path / "all", "--data", grown.grown, "--out", tmp_path / "next")
        assert code == 2 and "--resume goes on with it" in err
        code, *_ = call("refit", tmp_path / "all", "--data", grown.grown, "--out", tmp_path / "next", "--overwrite")
        assert code in (0, 1) and (tmp_path / "next" / "refit.json").is_file()
