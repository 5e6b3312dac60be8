"""Users of whom nothing was trained: the user-cold split through data, training and comparison."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hellm.data import check_dataset, load_dataset, save_dataset, write_sample_shop
from hellm.evaluate import HistoryScorer, evaluate_dataset
from hellm.recommend import Recommender
from hellm.recommend.compare import compare

FAST = ["max_epochs=3", "num_threads=1", "tensorboard=false"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cold") / "shop"
    write_sample_shop(folder, num_users=160, num_items=90, num_groups=4)
    return folder


@pytest.fixture(scope="module")
def dataset(shop):
    return load_dataset(shop, split="user-cold")


@pytest.fixture(scope="module")
def runs(shop, same_threads):
    from hellm.cli import main

    argv = ["--data", str(shop), "--split", "user-cold", *FAST]
    for verb in ("pretrain", "sasrec"):
        assert main([verb, "--out", str(shop.parent / verb), *argv]) == 0
    return [str(shop.parent / verb) for verb in ("pretrain", "sasrec")]


def test_held_out_users_are_in_no_training_event(dataset):
    assert dataset.split_name == "user-cold"
    held = {split: np.unique(dataset.pairs(split)[0]) for split in ("train", "valid", "test", "history")}
    assert len(held["valid"]) == len(held["test"]) == 16
    for split in ("valid", "test"):
        assert not np.intersect1d(held[split], held["train"]).size
        assert (np.diff(dataset.histories("train")[0])[held[split]] >= 2).all()
    assert np.array_equal(np.union1d(held["valid"], held["test"]), held["history"])
    report = check_dataset(dataset)
    assert report["events"]["history"] == len(dataset.pairs("history")[0])
    assert sum(value for name, value in report["events"].items() if name != "total") == report["events"]["total"]
    assert report["cold"]["test"]["users"] == 16


def test_own_form_keeps_the_split_and_others_refuse_it(dataset, tmp_path):
    again = load_dataset(save_dataset(dataset, tmp_path / "built"))
    assert again.fingerprint == dataset.fingerprint and again.split_name == "user-cold"
    for form in ("mmrec", "recbole", "lattice", "shop"):
        with pytest.raises(ValueError, match=f"form '{form}' has no place for events that are only history, .* has "):
            save_dataset(dataset, tmp_path / form, form=form)
        assert not (tmp_path / form).exists()
    with pytest.warns(UserWarning, match="stores no split"):
        save_dataset(dataset, tmp_path / "sasrec", form="sasrec")


def test_stage_1_folds_cold_users_in(dataset, runs):
    recommender = Recommender.load(runs[0])
    users = torch.from_numpy(np.unique(dataset.pairs("test")[0]))
    scores = recommender.scorer("test").scores(users)
    for place, user in enumerate(users.tolist()):
        history = dataset.histories("train", "valid")
        items = history[1][history[0][user] : history[0][user + 1]]
        query = recommender.model.embed(torch.tensor([0, len(items)]), torch.from_numpy(items))
        torch.testing.assert_close(scores[place], (query @ recommender.item.T)[0])
    by_table = evaluate_dataset(recommender, dataset).metrics["recall@20"]
    folded = evaluate_dataset(recommender.scorer("test"), dataset).metrics["recall@20"]
    result = json.loads(Path(runs[0], "result.json").read_text(encoding="utf-8"))
    assert folded > by_table
    assert result["test"]["metrics"]["recall@20"] == pytest.approx(folded)
    assert result["dataset"]["num_events"]["history"] == len(dataset.pairs("history")[0])


def test_history_models_read_what_was_not_trained_on(dataset, runs):
    recommender = Recommender.load(runs[1])
    users = torch.from_numpy(np.unique(dataset.pairs("test")[0]))
    expected = HistoryScorer.of(recommender.model, dataset, "test").scores(users)
    torch.testing.assert_close(recommender.scorer("test").scores(users), expected)
    assert not torch.equal(expected[0], expected[1])


def test_comparison_leaves_out_what_needs_trained_users(dataset, shop, runs):
    report = compare([*runs, "popularity", "als"], shop, ks=(10,), protocol=["standard", "recbole-sequential"])
    assert [row["name"] for row in report["models"]] == [*runs, "popularity"]
    assert report["notes"] == ["als left out: it knows users by their training events, and those scored here have none"]
    assert report["num_users"] == 16 and report["fingerprint"] == dataset.fingerprint
    for place, one in enumerate([report, *report["other_protocols"]]):
        test = json.loads(Path(runs[place], "result.json").read_text(encoding="utf-8"))["test"]
        assert one["protocol"] == test["protocol"]
        assert one["models"][place]["metrics"]["ndcg@10"] == pytest.approx(test["metrics"]["ndcg@10"])
    with pytest.raises(ValueError, match="models must have one that can score these users; bpr left out: it knows"):
        compare(["bpr"], dataset)


@pytest.mark.skipif(importlib.util.find_spec("implicit") is None, reason="the implicit library is not installed")
def test_item_knn_takes_other_histories(dataset):
    from hellm.baselines import ItemKNN

    users, items = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 0, 1, 2])
    model = ItemKNN(weighting="cosine").fit((users, items), 3, 3)
    other = model.with_histories(np.array([0, 0, 1]), np.array([1]))
    # Items 0 and 1 have the same users: cosine 1.
    assert other.scores(torch.tensor([0, 1])).tolist() == [[0, 0, 0], [pytest.approx(1), 0, 0]]
    assert model.num_users == 3 and model.scores(torch.tensor([2])).tolist() == [[0, 0, 0]]
    report = compare(["itemknn", "popularity"], dataset)
    assert report["best"] == "itemknn" and report["notes"] == []
