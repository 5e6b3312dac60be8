"""The comparison of scorers as plain values."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.table_scorer import TableScorer

from hellm.evaluate import METRICS, Row, compare, evaluate_dataset, paired_bootstrap

NUM_USERS, NUM_ITEMS = 120, 90


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    from hellm.data import load_dataset, write_sample_shop

    shop = tmp_path_factory.mktemp("shop") / "shop"
    write_sample_shop(shop, num_users=NUM_USERS, num_items=NUM_ITEMS, num_groups=4)
    return load_dataset(shop)


@pytest.fixture(scope="module")
def scorers(dataset):
    """Scorers that know more and more of the test items."""
    users, items = dataset.pairs("test")
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4, NUM_USERS, NUM_ITEMS)).astype(np.float32))
    for place, known in enumerate((0.0, 1.0, 1.5, 4.0)):
        noise[place, users, items] += known
    return [TableScorer(one) for one in noise]


def without_times(value):
    if isinstance(value, dict):
        return {
            k: without_times(v) for k, v in value.items() if k not in ("users_per_second", "seconds_per_1000_users")
        }
    return [without_times(one) for one in value] if isinstance(value, list) else value


def test_rows_are_the_evaluations_and_differences_are_paired(dataset, scorers):
    report = compare({"poor": scorers[0], "good": scorers[3]}, dataset, ks=(5, 10), metrics=("ndcg", "coverage"))
    poor, good = (evaluate_dataset(one, dataset, ks=(5, 10)) for one in (scorers[0], scorers[3]))
    assert (report["best"], report["compared"]) == ("good", "ndcg@10")
    assert report["shown"] == ["ndcg@5", "coverage@5", "ndcg@10", "coverage@10"]
    assert [row["name"] for row in report["models"]] == ["poor", "good"]
    for row, result in zip(report["models"], (poor, good), strict=True):
        assert row["metrics"] == result.metrics and row["kind"] == "scorer" and row["stage"] is None
        intervals = {name: tuple(one) for name, one in row["confidence_intervals"].items()}
        assert intervals == result.confidence_intervals()
        assert row["seconds_per_1000_users"] == pytest.approx(1000 / row["users_per_second"])
    assert report["models"][0]["difference_to_best"] == vars(paired_bootstrap(poor, good, "ndcg@10"))
    assert report["models"][1]["difference_to_best"] is None
    assert report["verdicts"] == [] and report["notes"] == [] and report["other_protocols"] == []
    assert (report["fingerprint"], report["num_users"]) == (dataset.fingerprint, NUM_USERS)
    json.dumps(report)
    again = compare({"poor": scorers[0], "good": scorers[3]}, dataset, ks=(5, 10), metrics=("ndcg", "coverage"))
    assert without_times(again) == without_times(report)


def test_several_seeds_are_one_row_with_a_t_interval(dataset, scorers):
    pytest.importorskip("scipy", reason="scipy is not installed")
    report = compare({"two": scorers[1:3], "one": scorers[0]}, dataset, slices=True)
    two = report["models"][0]
    a, b = (seed["ndcg@10"] for seed in two["seeds"])
    assert two["metrics"]["ndcg@10"] == pytest.approx((a + b) / 2)
    # t of one degree of freedom, times the standard error |a - b| / 2.
    low, high = two["confidence_intervals"]["ndcg@10"]
    assert (high - low) / 2 == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
    results = [evaluate_dataset(one, dataset) for one in scorers[1:3]]
    difference = results[0].per_user["recall@20"] + results[1].per_user["recall@20"]
    poor = evaluate_dataset(scorers[0], dataset).per_user["recall@20"]
    found = report["models"][1]["difference_to_best"]
    assert found["difference"] == pytest.approx((poor - difference / 2).mean())
    for parts in two["slices"].values():
        total = sum(part["num_users"] * part["metrics"]["ndcg@10"] for part in parts.values())
        assert total / NUM_USERS == pytest.approx((a + b) / 2)


def test_protocols_are_side_by_side(dataset, scorers):
    models, names = {"a": scorers[0], "b": scorers[3]}, ["standard", "recbole-sequential", "sampled-uniform"]
    for scorer in scorers:
        scorer.num_items, scorer.batches = NUM_ITEMS, []
    report = compare(models, dataset, protocol=names, metrics=("recall", "gini"))
    assert sum(scorers[3].batches) == NUM_USERS
    assert [report["protocol"], *(one["protocol"] for one in report["other_protocols"])] == names
    for name, found in zip(names, [report, *report["other_protocols"]], strict=True):
        alone = compare(models, dataset, protocol=name, metrics=("recall", "gini"))
        for key in found.keys() & alone.keys() - {"notes", "other_protocols"}:
            assert without_times(found[key]) == without_times(alone[key]), (name, key)
    drawn = report["other_protocols"][1]
    assert drawn["candidates"] == {"count": 100, "weighting": "uniform", "seed": 0} and report["candidates"] is None
    assert drawn["shown"] == ["recall@10", "recall@20"] and report["shown"][1] == "gini@10"
    assert report["notes"] == ["gini left out with protocol sampled-uniform, which ranks drawn candidates"]


def test_slices_have_counts_and_intervals(dataset, scorers):
    report = compare({"good": scorers[3]}, dataset, slices=True)
    slices = report["models"][0]["slices"]
    assert list(slices) == list(report["slices"]) == ["item popularity", "history length"]
    for kind, parts in slices.items():
        assert list(parts) == list(report["slices"][kind])
        assert sum(part["num_users"] for part in parts.values()) == NUM_USERS
        for part in parts.values():
            low, high = part["confidence_intervals"]["recall@20"]
            assert low <= part["metrics"]["recall@20"] <= high and part["confidence_level"] == 0.95
    assert "train events" in report["slices"]["item popularity"]["popular"]
    json.dumps(report)


def test_diversity_is_measured_on_request_and_left_out_by_a_word(dataset, scorers):
    assert "diversity@10" not in compare({"a": scorers[0]}, dataset)["models"][0]["metrics"]
    report = compare({"a": scorers[0]}, dataset, metrics=("recall", "diversity"))
    assert 0 < report["models"][0]["metrics"]["diversity@10"] < 2 and "diversity@10" in report["shown"]
    bare = replace(dataset, item_features={})
    report = compare({"a": scorers[0]}, bare, metrics=("recall", "diversity"))
    assert report["shown"] == ["recall@10", "recall@20"]
    assert report["notes"] == ["diversity left out: data set 'shop' has no item features"]
    with pytest.raises(ValueError, match="diversity needs item features, and data set 'shop' has none"):
        compare({"a": scorers[0]}, bare, metrics=("diversity", "recall"))


def test_every_metric_can_be_shown(dataset, scorers):
    report = compare({"a": scorers[0]}, dataset, metrics=METRICS, ks=(10,))
    assert report["shown"] == [f"{name}@10" for name in METRICS]


def test_language_models_get_a_verdict(dataset, scorers):
    made = []

    def row(name, scorer, stage=None):
        return Row(name, [lambda: made.append(name) or scorer], "run", stage)

    rows = [row("llm", scorers[3], "finetune"), row("poor", scorers[0]), row("fair", scorers[1])]
    report = compare(rows, dataset)
    assert made == ["llm", "poor", "fair"] and report["models"][0]["stage"] == "finetune"
    assert (
        len(report["verdicts"]) == 1
        and "The language model llm is better than fair (recall@20 +" in (report["verdicts"][0])
    )
    rows = [row("llm", scorers[0], "finetune"), row("good", scorers[3])]
    assert "llm is worse than good" in compare(rows, dataset)["verdicts"][0]
    rows = [row("llm", scorers[0], "finetune"), row("same", scorers[0])]
    assert "llm is not shown to be better than same" in compare(rows, dataset)["verdicts"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("auc",)}, r"metrics must be among recall, ndcg, .*, got 'auc'"),
        ({"metrics": ()}, r"metrics must begin with one that is a mean over users, .*, got none"),
        ({"metrics": ("gini", "recall")}, r"metrics must begin with .* not with coverage or gini, got gini, recall"),
        (
            {"metrics": ("novelty",), "protocol": "sampled-uniform"},
            r"one that protocol 'sampled-uniform' has, got 'nov",
        ),
        ({"protocol": ["standard", "standard"]}, r"protocol must be one or several different ones, got \['standard', "),
        ({"protocol": []}, r"protocol must be one or several different ones, got \[\]"),
        ({"split": "train"}, r"split must be 'valid' or 'test', got 'train'"),
    ],
)
def test_wrong_arguments_are_named(dataset, scorers, options, message):
    with pytest.raises(ValueError, match=message):
        compare({"a": scorers[0]}, dataset, **options)


def test_a_row_needs_a_scorer(dataset):
    for models in ({}, {"a": []}):
        with pytest.raises(ValueError, match="models must have at least one row, each with at least one scorer"):
            compare(models, dataset)
