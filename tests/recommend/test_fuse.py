"""Finished runs as one: from the command line and from Python."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.command_line import last_json

from hellm.cli import main
from hellm.config import CONTENT_TOWER, FuseConfig, PretrainConfig, SASRecConfig, TransitionsConfig
from hellm.data import DataError, load_dataset, write_sample_shop
from hellm.evaluate import evaluate_histories, read_test_evaluations
from hellm.recommend import Recommender, ServedSASRec
from hellm.recommend.fuse import fuse
from hellm.training.fusion import Selection
from hellm.training.pretrain import pretrain
from hellm.training.sasrec import train_sasrec
from hellm.training.transitions import fit_transitions

FAST = {"num_threads": 1, "tensorboard": False, "validate_every": 2}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    return write_sample_shop(tmp_path_factory.mktemp("data") / "shop", num_users=150, num_items=160)


@pytest.fixture(scope="module")
def dataset(shop):
    return load_dataset(shop)


@pytest.fixture(scope="module")
def runs(dataset, tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    stage_1 = PretrainConfig(max_epochs=6, learning_rate=5e-3, batch_size=64, **FAST)
    pretrain(stage_1, dataset, top / "graph")
    sequence = SASRecConfig(max_epochs=20, batch_size=128, embedding_dim=16, feedforward_dim=32, content=(), **FAST)
    train_sasrec(sequence, dataset, top / "sequence")
    small = {"batch_size": 128, "embedding_dim": 16, "feedforward_dim": 32, "content_hidden_dim": 16}
    content = replace(CONTENT_TOWER, max_epochs=8, **small, **FAST)
    train_sasrec(content, dataset, top / "content")
    return {name: top / name for name in ("graph", "sequence", "content")}


@pytest.fixture(scope="module")
def fused(runs, dataset, tmp_path_factory):
    out = tmp_path_factory.mktemp("fused") / "run"
    # Few users tell little: what helps at all is kept.
    return out, fuse(runs, dataset, out, FuseConfig(level=0.1, num_threads=1))


def test_fused_model_is_not_worse_than_its_best_tower_on_validation(fused):
    _, result = fused
    best = max(tower["valid"]["ndcg@20"] for tower in result["towers"].values())
    assert result["cross_fitted"]["ndcg@20"] >= best - 1e-6
    assert len(result["weights"]) > 1 and all(weight > 0 for weight in result["weights"].values())
    assert {name for name, tower in result["towers"].items() if tower["kept"]} == set(result["weights"])
    assert set(result["leave_one_out"]) == set(result["weights"])
    for tower in result["towers"].values():
        assert tower["seconds_per_1000_users"] > 0 and set(tower["valid"]) == set(result["valid"]["metrics"])


def test_run_keeps_the_course_of_its_towers(fused, runs):
    out, result = fused
    for name in result["weights"]:
        assert (out / "towers" / name / "metrics.jsonl").read_bytes() == (runs[name] / "metrics.jsonl").read_bytes()
    slices = result["test"]["slices"]["history length"]
    assert sum(part["num_users"] for part in slices.values()) == result["test"]["num_users"]


def test_run_serves_what_was_tested(fused, dataset):
    out, result = fused
    recommender = Recommender.load(out)
    found = evaluate_histories(recommender.model, dataset, protocol="recbole-sequential", ks=(5, 10, 20))
    for name, value in result["test"]["metrics"].items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-12), name
    assert json.loads((out / "result.json").read_text()) == result
    assert [one["by"] for one in read_test_evaluations(out)] == ["training"]


def test_scores_are_the_weighted_sums_of_the_towers(fused, runs):
    out, result = fused
    recommender, history = Recommender.load(out), (torch.tensor([0, 2]), torch.tensor([3, 5]))
    expected = 0
    for name, weight in result["weights"].items():
        model = Recommender.load(runs[name]).model
        expected = expected + weight * model.embed(*history) @ model.item_keys().T
    torch.testing.assert_close(recommender.model.embed(*history) @ recommender.item.T, expected)


@pytest.fixture(scope="module")
def differing(runs, dataset, tmp_path_factory):
    """Towers that know items by other modalities and other numbers of neighbours, and their sum."""
    top = tmp_path_factory.mktemp("differing")
    graph = PretrainConfig(max_epochs=2, batch_size=512, **FAST)
    text = replace(graph, model=replace(graph.model, knn_k=4, modalities=("text",), attributes=()))
    pretrain(text, dataset, top / "text")
    pretrain(replace(graph, loss="softmax", model=replace(graph.model, knn_k=13)), dataset, top / "unit")
    pretrain(replace(graph, loss="softmax", model=replace(graph.model, item_hypergraph=False)), dataset, top / "plain")
    fit_transitions(
        TransitionsConfig(content=("image",), content_neighbours=6, num_threads=1), dataset, top / "transitions"
    )
    towers = {name: top / name for name in ("text", "unit", "plain", "transitions")} | runs
    # All of them, whatever validation would say.
    selection = Selection(dict.fromkeys(towers, 1.0), {}, 0.0, [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hellm.recommend.fuse.select_towers", lambda *_, **__: selection)
        fuse(towers, dataset, top / "sum", FuseConfig(num_threads=1))
    return towers, top / "sum"


@pytest.mark.parametrize("name", ["graph", "text", "unit", "plain", "transitions", "sequence", "content"])
@pytest.mark.parametrize("saved", [False, True])
def test_a_tower_of_a_sum_places_a_new_item_as_it_does_alone(differing, dataset, tmp_path, name, saved):
    towers, path = differing
    fused, alone = Recommender.load(path), Recommender.load(towers[name])
    if saved:
        fused = Recommender.load(fused.save(tmp_path / "saved"))
    draw = np.random.default_rng(0)
    rows, ids = draw.choice(dataset.num_items, 5), [f"new {place}" for place in range(5)]
    features = {
        modality: one.values[rows] + draw.normal(size=one.values[rows].shape) / 20
        for modality, one in dataset.item_features.items()
    }
    attributes = {attribute: [one[row] for row in rows] for attribute, one in dataset.item_attributes.items()}
    assert len(features) > 1 and fused.content.attributes
    for recommender in (fused, alone):
        known = recommender.content
        recommender.add_items(
            {modality: one for modality, one in features.items() if modality in known.features},
            ids,
            attributes={attribute: one for attribute, one in attributes.items() if attribute in known.attributes},
        )
    tower, history = fused.model.towers[name], (torch.tensor([0, 2]), torch.tensor([3, dataset.num_items]))
    assert torch.equal(tower.item_keys(), alone.item)
    read = "history_scores" if name == "transitions" else "embed"
    assert torch.equal(getattr(tower, read)(*history), getattr(alone.model, read)(*history))


def test_a_tower_places_an_item_without_its_modalities_by_those_that_the_sum_knows(differing, dataset):
    fused, row = Recommender.load(differing[1]), int(np.flatnonzero(dataset.item_features["image"].mask)[0])
    image, content = torch.from_numpy(dataset.item_features["image"].values[[row]]), fused.content
    shares = content.weights(content.nearest({"image": image}), fused.popularity > 0)
    expected = (shares @ fused.model.towers["text"].tensors["fold_in_source"])[0]
    fused.add_items({"image": image}, ["new"])
    found = fused.model.towers["text"].tensors["fold_in_source"][-1]
    assert found.any() and torch.equal(found, expected)


def test_histories_are_read_once_for_all_sums(runs, dataset, tmp_path, monkeypatch):
    read = []
    embed = ServedSASRec.embed

    def counted(self, indptr, items):
        read.append(len(indptr) - 1)
        return embed(self, indptr, items)

    monkeypatch.setattr(ServedSASRec, "embed", counted)
    config = FuseConfig(level=0.1, num_threads=1)
    first = fuse(runs, dataset, tmp_path / "first", config)
    # Two of the towers are of that class, and every user has an event of validation and one of the test.
    num_events = len(dataset.pairs("valid")[0]) + len(dataset.pairs("test")[0])
    assert {"sequence", "content"} & set(first["weights"]) and sum(read) == 2 * num_events
    # The same numbers where nothing is kept.
    read.clear()
    monkeypatch.setattr("hellm.recommend.fuse._REMEMBERED", 0)
    second = fuse(runs, dataset, tmp_path / "second", config)
    assert sum(read) > 3 * num_events
    for name in ("weights", "gains", "leave_one_out", "valid"):
        assert second[name] == first[name]
    assert second["test"]["metrics"] == first["test"]["metrics"]


def test_cost_is_told_before_anything_is_scored(runs, dataset, tmp_path, monkeypatch):
    told = []

    class Stopped(Exception):
        pass

    def stop(*args):
        raise Stopped

    monkeypatch.setattr("hellm.recommend.fuse._tower_scores", stop)
    with pytest.raises(Stopped):
        fuse(runs, dataset, tmp_path / "out", FuseConfig(num_threads=1), on_plan=told.append)
    (plan,) = told
    speeds = plan["seconds_per_1000_users"]
    assert list(speeds) == list(runs) and all(seconds > 0 for seconds in speeds.values())
    valid, test = (plan["num_users"][split] for split in ("valid", "test"))
    assert (valid, test) == tuple(len(np.unique(dataset.pairs(split)[0])) for split in ("valid", "test"))
    assert plan["expected_seconds"] == pytest.approx(sum(speeds.values()) * (2 * valid + test) / 1000)


def test_lifts_say_what_each_tower_adds_to_a_score(fused, runs):
    out, result = fused
    recommender = Recommender.load(out)
    user = recommender.user_ids.ids[3]
    (ranked,) = recommender.recommend([user], k=5)
    lifts = recommender.lifts([one.item for one in ranked], user=user)
    score = {one.item: one.score for one in recommender.recommend([user], k=160, exclude_seen=False)[0]}
    mean = np.mean(list(score.values()))
    for one, lift in zip(ranked, lifts, strict=True):
        assert set(lift) == set(result["weights"]) and list(lift.values()) == sorted(lift.values(), reverse=True)
        assert sum(lift.values()) == pytest.approx(one.score - mean, abs=1e-3)
    # A tower's lift is its own score, weighted, less its own mean.
    name, weight = next(iter(result["weights"].items()))
    history = [one.item for one in recommender.history(user)]
    own = Recommender.load(runs[name]).recommend(histories=[history], k=160, exclude_seen=False)[0]
    scores = {one.item: one.score for one in own}
    expected = weight * (scores[ranked.items[0].item] - np.mean(list(scores.values())))
    assert lifts[0][name] == pytest.approx(expected, abs=1e-3)
    assert recommender.lifts([ranked.items[0].item], history=history)[0] == pytest.approx(lifts[0], abs=1e-4)


def test_lifts_are_of_fused_models_with_a_history(fused, runs):
    recommender = Recommender.load(fused[0])
    item = recommender.item_ids.ids[0]
    assert recommender.lifts([item], history=[]) == [{}] and recommender.lifts([], history=[item]) == []
    assert Recommender.load(runs["sequence"]).lifts([item, item], history=[item]) == [{}, {}]
    with pytest.raises(ValueError, match="give either user or history, got neither"):
        recommender.lifts([item])
    with pytest.raises(DataError, match="nothing"):
        recommender.lifts(["nothing"], history=[item])


def test_explained_lists_say_it_in_words(fused, call):
    recommender = Recommender.load(fused[0])
    argv = ["recommend", fused[0], "--users", recommender.user_ids.ids[3], "-k", 2, "--explain", "--device", "cpu"]
    code, text, _ = call(*argv)
    lines = re.findall(r"\n         \d+\.\d\d (?:above|below) the mean item: (.+)", text)
    assert code == 0 and len(lines) == 2
    towers = recommender.model.weights
    assert all(set(re.findall(r"(\w+) [+-]\d+\.\d\d", line)) == set(towers) for line in lines)
    code, text, _ = call(*argv, "--json")
    items = last_json(text)[0]["items"]
    assert [set(one["towers"]) for one in items] == [set(towers)] * 2 and "because" in items[0]


def test_new_items_rank_at_once_and_survive_saving(fused, tmp_path):
    recommender = Recommender.load(fused[0])
    features = {name: recommender.content.features[name][:2].float() for name in recommender.content.modalities}
    recommender.add_items(features, ["new1", "new2"], ["One", "Two"])
    like = recommender.recommend(histories=[recommender.item_ids.ids[0]], k=recommender.num_items - 1)[0]
    place = {one.item: rank for rank, one in enumerate(like)}
    # A twin of the item that was bought.
    assert place["new1"] < np.median(list(place.values()))
    recommender.save(tmp_path / "serving")
    again = Recommender.load(tmp_path / "serving").recommend(histories=[recommender.item_ids.ids[0]], k=20)[0]
    assert [one.item for one in again] == [one.item for one in like][:20]


def test_a_finished_fusion_is_kept_and_another_is_refused(fused, runs, dataset):
    out, result = fused
    same = FuseConfig(level=0.1, num_threads=1)
    assert fuse(runs, dataset, out, same, resume=True) == result
    with pytest.raises(ValueError, match=r"level was 0\.1, got 0\.5"):
        fuse(runs, dataset, out, FuseConfig(level=0.5, num_threads=1), resume=True)
    fewer = {name: runs[name] for name in ("graph", "sequence")}
    with pytest.raises(ValueError, match="a resumed run must keep its input runs"):
        fuse(fewer, dataset, out, same, resume=True)
    with pytest.raises(FileExistsError, match="is not empty"):
        fuse(runs, dataset, out, same)


def test_command_line(runs, shop, tmp_path, capsys):
    argv = ["fuse", *map(str, runs.values()), "--data", str(shop), "--out", str(tmp_path / "out"), "level=0.1"]
    assert main([*argv, "num_threads=1"]) == 0
    text = capsys.readouterr().out
    assert "adds, test ndcg@10" in text and "graph" in text and "on validation:" in text
    assert main([*argv, "num_threads=1", "--resume", "--json"]) == 0
    assert set(last_json(capsys.readouterr().out)["towers"]) == set(runs)
    assert main(["fuse", f"a={runs['graph']}", f"a={runs['content']}", *argv[4:]]) == 2
    assert "RUN must have a name of its own, got 'a' for" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("towers", "message"),
    [
        ({}, "towers must be at least one run directory, got none"),
        ({"a/b": "x"}, r"names of towers must be letters, digits, '_', '-' and '.', got 'a/b'"),
    ],
)
def test_towers_must_be_named(towers, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        fuse(towers, dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_validation_events_are_needed_and_runs_must_be_of_the_data(runs, dataset, tmp_path):
    bare = replace(dataset, split=np.where(dataset.split == 1, 0, dataset.split).astype(np.int8))
    with pytest.raises(ValueError, match="must have validation events to choose and weigh by"):
        fuse(runs, bare, tmp_path / "out")
    other = load_dataset(write_sample_shop(tmp_path / "other", num_users=40, num_items=160))
    with pytest.raises(ValueError, match="must be a run of data set 'other'"):
        fuse(runs, other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"monitor": ("mrr@10",)}, "monitor must be one of ndcg@k and recall@k"),
        ({"monitor": ("ndcg@10", "recall@10")}, "monitor must be one of ndcg@k and recall@k"),
        ({"level": 1.0}, r"level must be in \(0, 1\), got 1.0"),
        ({"max_scores": 0}, "max_scores must be >= 1, got 0"),
    ],
)
def test_settings_must_be_in_range(setting, message):
    with pytest.raises(ValueError, match=message):
        FuseConfig(**setting)
