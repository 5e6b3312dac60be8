from __future__ import annotations

import itertools
import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hellm.config import PRESETS, SASRecConfig, config_from_dict, load_config, override_config, save_config
from hellm.data import Dataset, IdMap
from hellm.evaluate import evaluate_histories
from hellm.models import SASRec
from hellm.models.histories import pad_histories
from hellm.recommend import Recommender
from hellm.training import sasrec as module
from hellm.training.candidates import CandidateItems, Candidates
from hellm.training.history_sampler import HistoryBatch, SequenceSampler
from hellm.training.loop import Interrupted
from hellm.training.sasrec import build_sasrec, sasrec_losses, train_sasrec
from hellm.training.step import EagerStep

NUM_USERS, NUM_ITEMS = 48, 12
CONFIG = SASRecConfig(
    embedding_dim=16,
    num_layers=1,
    feedforward_dim=32,
    max_length=8,
    dropout=0.1,
    learning_rate=0.02,
    batch_size=48,
    max_epochs=6,
    ks=(1, 5),
    monitor=("recall@1",),
    num_threads=1,
    device="cpu",
    tensorboard=False,
)


def changed(*overrides):
    return override_config(CONFIG, overrides)


def run(config, dataset, out, **options):
    return train_sasrec(config, dataset, out, **options)


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def without_splits(dataset, *names):
    codes = [("train", "valid", "test").index(name) for name in names]
    kept = ~np.isin(dataset.split, codes)
    return replace(dataset, users=dataset.users[kept], items=dataset.items[kept], split=dataset.split[kept])


@pytest.fixture(scope="module")
def walks():
    """Everybody walks through the items in one fixed order, from anywhere: the next item is always known."""
    rng = np.random.default_rng(0)
    order = rng.permutation(NUM_ITEMS)
    lengths = rng.integers(5, 9, NUM_USERS)
    histories = [order[(rng.integers(NUM_ITEMS) + np.arange(length)) % NUM_ITEMS] for length in lengths]
    return Dataset(
        name="walks",
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        users=np.repeat(np.arange(NUM_USERS), lengths),
        items=np.concatenate(histories),
        timestamps=None,
        split=np.concatenate([[0] * (n - 2) + [1, 2] for n in lengths]).astype(np.int8),
        user_ids=IdMap(f"u{index}" for index in range(NUM_USERS)),
        item_ids=IdMap(f"i{index}" for index in range(NUM_ITEMS)),
    )


@pytest.fixture(scope="module")
def finished(walks, tmp_path_factory):
    """(folder, result, calls of evaluate) of one whole run."""
    folder, calls = tmp_path_factory.mktemp("runs") / "run", []

    def evaluate(model, dataset, **options):
        calls.append((options["split"], options["protocol"], model.item_keys().clone()))
        return evaluate_histories(model, dataset, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hellm.training.sasrec.evaluate_histories", evaluate)
        result = train_sasrec(changed("max_epochs=14"), walks, folder)
    return folder, result, calls


class TestSampler:
    users = np.repeat(np.arange(5), [4, 1, 7, 0, 2])
    items = np.array([5, 1, 2, 6, 3, 0, 1, 2, 3, 4, 5, 6, 6, 0])

    def sampler(self, **options):
        return SequenceSampler(self.users, self.items, 5, 9, **({"max_length": 3, "batch_size": 3} | options))

    @staticmethod
    def sequences(batch):
        bounds = list(zip(batch.indptr[:-1], batch.indptr[1:], strict=True))
        return [(batch.items[a:b].tolist(), batch.targets[a:b].tolist()) for a, b in bounds]

    def test_an_epoch_holds_the_latest_positions_of_every_user_once(self):
        # User 1 has one event and user 3 none: nothing to learn. Of user 2 the last 3 of 6 positions count.
        expected = [([5, 1, 2], [1, 2, 6]), ([3, 4, 5], [4, 5, 6]), ([6], [0])]
        sampler = self.sampler()
        assert (sampler.num_positions, sampler.num_steps) == (7, 2)
        for epoch in range(5):
            steps = [self.sequences(sampler.sample(epoch, step)) for step in range(2)]
            assert sorted(itertools.chain(*steps)) == sorted(expected)
            assert all(steps)

    def test_steps_hold_about_equally_many_positions(self, walks):
        sampler = SequenceSampler(*walks.pairs("train"), NUM_USERS, NUM_ITEMS, max_length=8, batch_size=20)
        assert sampler.num_steps == sampler.num_positions // 20
        for epoch in range(3):
            sizes = [len(sampler.sample(epoch, step).items) for step in range(sampler.num_steps)]
            assert sum(sizes) == sampler.num_positions
            assert max(abs(size - sampler.num_positions / sampler.num_steps) for size in sizes) < 8

    def test_a_step_depends_on_nothing_but_seed_epoch_and_step(self):
        one, other = self.sampler(negatives=True), self.sampler(negatives=True)
        other.sample(3, 1)
        for epoch, step in ((0, 1), (2, 0)):
            for a, b in zip(one.sample(epoch, step), other.sample(epoch, step), strict=True):
                assert np.array_equal(a, b)
        orders = {str(self.sequences(self.sampler(seed=seed).sample(0, 0))) for seed in range(8)}
        assert len(orders) > 1

    def test_negatives_are_items_the_user_never_had(self):
        sampler, drawn = self.sampler(negatives=True, batch_size=100), {}
        own = {5: {5, 1, 2, 6}, 3: {0, 1, 2, 3, 4, 5, 6}, 6: {6, 0}}
        for epoch in range(200):
            batch = sampler.sample(epoch, 0)
            for a, b in zip(batch.indptr[:-1], batch.indptr[1:], strict=True):
                drawn.setdefault(batch.items[a], set()).update(batch.negatives[a:b].tolist())
        assert drawn == {first: set(range(9)) - had for first, had in own.items()}

    def test_user_with_every_item_has_no_negative(self):
        users, items = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1])
        both = SequenceSampler(users, items, 2, 3, negatives=False)
        one = SequenceSampler(users, items, 2, 3, negatives=True)
        assert (both.num_positions, one.num_positions) == (3, 1)
        assert one.sample(0, 0).negatives.tolist() == [2]

    def test_wrong_arguments_are_named(self):
        with pytest.raises(ValueError, match=r"max_length must be >= 1, got 0"):
            self.sampler(max_length=0)
        with pytest.raises(ValueError, match=r"batch_size must be >= max_length 3 positions, got 2"):
            self.sampler(batch_size=2)
        with pytest.raises(ValueError, match=r"no user has two training events, so there is no next item to learn"):
            SequenceSampler(np.array([0, 2]), np.array([1, 1]), 3, 2)


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_loss_and_gradients_are_the_formulas_at_every_position(walks, loss):
    torch.manual_seed(0)
    model = build_sasrec(changed("dropout=0"), walks).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = HistoryBatch(*(np.array(one) for one in ([0, 3, 4], [5, 1, 2, 7], [1, 2, 6, 0], [8, 9, 8, 3])))
    losses = sasrec_losses(model, batch, loss)
    assert list(losses) == [loss]
    terms = []
    for start, stop in ((0, 3), (3, 4)):
        for t in range(start, stop):
            prefix = torch.from_numpy(batch.items[start : t + 1])[None]
            hidden = model(prefix, torch.ones_like(prefix, dtype=torch.bool))[0, -1]
            scores = model.items() @ hidden
            if loss == "cross_entropy":
                terms.append(-torch.log_softmax(scores, 0)[batch.targets[t]])
            else:
                terms.append(-torch.log(torch.sigmoid(scores[batch.targets[t]])))
                terms[-1] = terms[-1] - torch.log(1 - torch.sigmoid(scores[batch.negatives[t]]))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(losses[loss], expected, rtol=1e-9, atol=1e-12)
    mine, theirs = (torch.autograd.grad(one, list(model.parameters())) for one in (losses[loss], expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-11)


def test_training_learns_the_walk(finished):
    assert finished[1]["test"]["recall@1"] > 0.9


def test_one_sampled_negative_is_learnt(walks, tmp_path):
    run(changed("loss=bce", "max_epochs=10", "validate_every=10"), walks, tmp_path / "run")
    losses = [record["bce_mean"] for record in records(tmp_path / "run")]
    # Nearly all scores are 0 at first: 2 log 2.
    assert losses[0] == pytest.approx(1.39, abs=0.1) and losses[-1] < 0.3


def test_run_directory_is_complete(finished, walks):
    import polars as pl

    folder, result, _ = finished
    names = ("checkpoint", "config.yaml", "curves.png", "embeddings.safetensors", "histories.parquet", "ids.parquet")
    names += (".hellm.json", "metrics.jsonl", "result.json", "test_evaluations.jsonl", "test_users.safetensors")
    assert {path.name for path in folder.iterdir()} == set(names)
    assert json.loads((folder / "result.json").read_text()) == result
    assert load_config(SASRecConfig, folder / "config.yaml") == replace(changed("max_epochs=14"), content=())
    assert pl.read_parquet(folder / "histories.parquet")["item"].to_list() == walks.items.tolist()
    ids = pl.read_parquet(folder / "ids.parquet")
    assert ids.filter(pl.col("side") == "item")["id"].to_list() == walks.item_ids.ids


def test_result_says_what_was_run(finished, walks):
    result = finished[1]
    test = result["test"]
    assert {name: test[name] for name in test["metrics"]} == test["metrics"]
    assert {"recall@1", "ndcg@1", "recall@5", "ndcg@5"} <= test.keys()
    assert (test["protocol"], test["num_users"]) == ("recbole-sequential", NUM_USERS)
    assert result["test_masked"]["protocol"] == "standard"
    assert result["test_masked"]["metrics"]["recall@5"] >= test["recall@5"]
    assert (result["stage"], result["num_epochs"], result["notes"]) == ("sasrec", 14, [])
    assert result["dataset"]["fingerprint"] == walks.fingerprint
    assert result["num_parameters"] == sum(p.numel() for p in build_sasrec(CONFIG, walks).parameters())


def test_test_split_is_scored_once_per_protocol_with_the_best_weights(finished):
    folder, result, calls = finished
    valid = [("valid", "recbole-sequential")] * 7
    assert [call[:2] for call in calls] == [*valid, ("test", "recbole-sequential"), ("test", "standard")]
    best = calls[(result["best_epoch"] - 1) // 2][2]
    assert torch.equal(calls[-1][2], best) and torch.equal(calls[-2][2], best)
    assert torch.equal(load_file(folder / "embeddings.safetensors")["sequence_embedding"], best)
    record = next(r for r in records(folder) if r["epoch"] == result["best_epoch"])
    assert result["valid"]["metrics"]["recall@1"] == record["valid_recall@1"]


def test_loaded_model_scores_as_the_run_did(finished, walks):
    folder, result, _ = finished
    again = evaluate_histories(SASRec.load(folder), walks, "test", protocol="recbole-sequential", ks=(1, 5))
    assert again.metrics == result["test"]["metrics"]


def test_finished_run_is_returned_as_it_is(finished, walks):
    folder, result, _ = finished
    assert run(changed("max_epochs=14"), walks, folder, resume=True) == result


@pytest.mark.parametrize("call", [3, 10])
def test_interrupted_run_ends_like_an_uninterrupted_one(walks, tmp_path, monkeypatch, call):
    config = changed("max_epochs=4", "loss=bce", "dropout=0.3")
    whole = run(config, walks, tmp_path / "whole")
    calls = []

    def losses(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGTERM)
        return sasrec_losses(*arguments, **options)

    monkeypatch.setattr(module, "sasrec_losses", losses)
    with pytest.raises(Interrupted):
        run(config, walks, tmp_path / "broken")
    assert len(calls) == call and not (tmp_path / "broken" / "result.json").exists()
    torch.manual_seed(77)
    resumed = run(config, walks, tmp_path / "broken", resume=True)
    assert resumed["test"] == whole["test"]
    assert records(tmp_path / "broken") == records(tmp_path / "whole")
    first, second = (load_file(tmp_path / name / "embeddings.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_item_that_training_knows_nothing_of_is_no_candidate(walks):
    # 3 and 9 are only asked for after training.
    held = walks.of_events(~np.isin(walks.items, [3, 9]) | (walks.split > 0))
    trained = CandidateItems.of(held).of_step(0, 0, np.array([1]))
    assert CandidateItems.of(walks).of_step(0, 0, np.array([1])) is None
    assert trained.log_weight is None and trained.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 10, 11]
    model = build_sasrec(changed("dropout=0"), held)
    batch = HistoryBatch(np.array([0, 3, 4]), np.array([5, 1, 2, 7]), np.array([1, 2, 6, 0]), None)
    loss = sasrec_losses(model, batch, "cross_entropy", trained)["cross_entropy"]
    padded, mask = pad_histories(*(torch.from_numpy(one) for one in batch[:2]))
    scores = model(padded, mask)[mask] @ model.items().T
    scores[:, [3, 9]] = -torch.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.from_numpy(batch.targets))
    torch.testing.assert_close(loss, expected)
    loss.backward()
    (table,) = (parameter for name, parameter in model.items.named_parameters() if parameter.shape[0] == NUM_ITEMS)
    assert not table.grad[[3, 9]].any() and table.grad[[4, 8]].any(dim=1).all()


def test_some_items_stand_for_the_catalogue(walks):
    model = build_sasrec(changed("dropout=0"), walks)
    batch = HistoryBatch(np.array([0, 3, 4]), np.array([5, 1, 2, 7]), np.array([1, 2, 6, 0]), None)
    padded, mask = pad_histories(*(torch.from_numpy(one) for one in batch[:2]))
    candidates = Candidates(torch.tensor([0, 1, 2, 6, 9]), torch.tensor([0.0, 0.0, 0.0, 0.0, 0.7]))
    scores = (model(padded, mask)[mask] @ model.items().T)[:, candidates.rows] + candidates.log_weight
    expected = torch.nn.functional.cross_entropy(scores, torch.tensor([1, 2, 3, 0]))
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss = sasrec_losses(model, batch, "cross_entropy", candidates)["cross_entropy"]
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-6)


def test_training_with_sampled_items_learns_and_goes_on_like_without_a_break(walks, tmp_path):
    config = changed("sampled_items=4", "max_epochs=6")
    whole = run(config, walks, tmp_path / "whole")
    run(replace(config, max_epochs=2), walks, tmp_path / "parts")
    parts = run(config, walks, tmp_path / "parts", resume=True)
    assert parts["test"] == whole["test"] and records(tmp_path / "parts") == records(tmp_path / "whole")
    every = run(changed("max_epochs=6"), walks, tmp_path / "every")
    found, wanted = (one["test"]["recall@1"] for one in (whole, every))
    assert found > 0.5 and found == pytest.approx(wanted, abs=0.15)


def test_cost_is_told_first_and_changes_nothing(walks, tmp_path):
    told = []

    def tell(plan):
        told.append((plan, (tmp_path / "told" / "metrics.jsonl").is_file()))

    config = changed("dropout=0.3", "max_epochs=4")
    result = run(config, walks, tmp_path / "told", on_plan=tell)
    ((plan, started),) = told
    assert not started
    assert plan["max_steps"] == 4 * plan["steps_per_epoch"]
    assert (
        plan["expected_seconds"] == pytest.approx(4 * plan["expected_seconds_per_epoch"])
        and plan["seconds_of_step"] > 0
    )
    assert result["test"] == run(config, walks, tmp_path / "untold")["test"]
    assert records(tmp_path / "told") == records(tmp_path / "untold")


def test_training_stops_when_validation_no_longer_improves(walks, tmp_path):
    result = run(changed("max_epochs=60", "patience=1", "validate_every=1"), walks, tmp_path / "run")
    assert result["num_epochs"] < 60 and result["num_epochs"] == result["best_epoch"] + 3


def test_step_size_grows_and_ends_near_zero_by_cosine(walks, tmp_path, monkeypatch):
    rates = []
    update = EagerStep._update
    monkeypatch.setattr(EagerStep, "_update", lambda step, rate: (rates.append(rate), update(step, rate)))
    config = changed("schedule=cosine", "warmup_epochs=2", "max_epochs=6", "patience=9")
    run(config, walks, tmp_path / "run")
    steps = len(rates) // 6
    assert rates[: 2 * steps] == pytest.approx([0.02 * (1 + step) / (2 * steps) for step in range(2 * steps)])
    assert (
        rates[4 * steps] == pytest.approx(0.01)
        and 0 < rates[-1] < 0.001
        and rates[2 * steps :] == sorted(rates[2 * steps :], reverse=True)
    )
    with pytest.raises(ValueError, match=r"must keep its settings; max_epochs was 6, got 8"):
        run(replace(config, max_epochs=8), walks, tmp_path / "run", resume=True)


def test_run_of_other_settings_or_data_is_not_resumed(finished, walks):
    folder = finished[0]
    with pytest.raises(ValueError, match=r"must keep its settings; dropout was 0.1, got 0.3"):
        run(changed("max_epochs=14", "dropout=0.3"), walks, folder, resume=True)
    with pytest.raises(ValueError, match=r"must keep its data"):
        run(changed("max_epochs=14"), replace(walks, items=np.roll(walks.items, 5)), folder, resume=True)
    with pytest.raises(FileExistsError, match=r"is not empty; resume=True goes on with it"):
        run(CONFIG, walks, folder)


def test_data_without_validation_or_test_trains_to_the_end(walks, tmp_path):
    result = run(changed("max_epochs=2"), without_splits(walks, "valid", "test"), tmp_path / "run")
    assert (result["best_epoch"], result["test"], result["test_masked"], result["valid"]["metrics"]) == (
        1,
        None,
        None,
        {},
    )
    assert result["notes"] == ["no validation events: trained for max_epochs, the last weights are kept"]


def test_training_never_sees_validation_and_test_events(walks, tmp_path):
    run(changed("max_epochs=2"), walks, tmp_path / "all")
    run(changed("max_epochs=2"), without_splits(walks, "valid", "test"), tmp_path / "train")
    losses = [[record["cross_entropy"] for record in records(tmp_path / name)] for name in ("all", "train")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("protocol", ["standard", "recbole-sequential"])
def test_masked_test_stands_beside_an_unmasked_one_only(walks, tmp_path, protocol):
    result = run(changed("max_epochs=1", f"protocol={protocol}"), walks, tmp_path / "run")
    assert result["test"]["protocol"] == protocol
    assert (result["test_masked"] is None) == (protocol == "standard")


def test_data_must_have_something_to_learn(walks, tmp_path):
    with pytest.raises(ValueError, match=r"data set 'walks' must have training events, got none"):
        run(CONFIG, without_splits(walks, "train"), tmp_path / "run")
    first = np.unique(walks.users, return_index=True)[1]
    single = replace(walks, users=walks.users[first], items=walks.items[first], split=walks.split[first])
    with pytest.raises(ValueError, match=r"data set 'walks': no user has two training events"):
        run(CONFIG, single, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_order_in_time_is_noted(walks):
    _, notes = module.resolve_sasrec_config(CONFIG, replace(walks, form="mmrec"))
    assert notes == ["the data have no times: the order of the source is taken as the order in time"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"embedding_dims": 8}, r"unknown setting 'embedding_dims'; did you mean 'embedding_dim'\?"),
        ({"embedding_dim": 9}, r"embedding_dim must be a multiple of num_heads 2, got 9"),
        ({"num_layers": 0}, r"num_layers must be >= 1, got 0"),
        ({"dropout": 1}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"learning_rate": 0}, r"learning_rate must be > 0, got 0.0"),
        ({"schedule": "linear"}, r"schedule must be one of 'constant', 'cosine', got 'linear'"),
        ({"warmup_epochs": -1}, r"warmup_epochs must be >= 0, got -1"),
        ({"batch_size": 20}, r"batch_size must be >= max_length 50, got 20"),
        ({"loss": "hinge"}, r"loss must be one of 'cross_entropy', 'bce', got 'hinge'"),
        ({"monitor": ["ndcg@0"]}, r"monitor must be metric@k with k >= 1, got 'ndcg@0'"),
        ({"num_threads": 0}, r"num_threads must be null or >= 1, got 0"),
        ({"patience": -1}, r"patience must be >= 0, got -1"),
    ],
)
def test_wrong_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        config_from_dict(SASRecConfig, values)


@pytest.mark.parametrize("name", PRESETS[SASRecConfig])
def test_saved_config_loads_equal(name, tmp_path):
    config = load_config(SASRecConfig, name)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(SASRecConfig, tmp_path / "config.yaml") == config


class TestAttributes:
    CONFIG = replace(CONFIG, learning_rate=0.01, max_epochs=10)

    @pytest.mark.parametrize("item_id", [True, False])
    def test_items_are_read_by_their_values_and_new_ones_too(self, dataset_with_brands, tmp_path, item_id):
        config = replace(self.CONFIG, item_id=item_id)
        run(config, dataset_with_brands, tmp_path / "run")
        model = SASRec.load(tmp_path / "run")
        assert model.items.modalities == ["brand"] and model.items.content("brand").mean.shape == (3,)
        recommender = Recommender.load(tmp_path / "run")
        recommender.add_items({}, ["new"], attributes={"brand": [["brand 1"]]})
        keys = torch.as_tensor(recommender.item)
        similarity = torch.cosine_similarity(keys[:22], keys[24:], dim=1)
        of_brand = torch.arange(22) % 3 == 1
        assert similarity[of_brand].mean() > similarity[~of_brand].mean() + 0.2
        if not item_id:
            torch.testing.assert_close(keys[24], keys[1])

    def test_content_names_features_and_attributes(self, dataset_with_brands):
        with pytest.raises(
            ValueError,
            match=r"content must be among the features and attributes of data set 'blocks' \(brand\), got 'x'",
        ):
            build_sasrec(replace(CONFIG, content=("x",)), dataset_with_brands)
        assert not build_sasrec(replace(CONFIG, content=()), dataset_with_brands).items.modalities
