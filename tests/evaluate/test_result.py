from __future__ import annotations

import json
import math
import sys

import numpy as np
import pytest

from hellm.evaluate import RankingResult, get_protocol, mean_result, paired_bootstrap, seeds_summary
from hellm.evaluate import result as result_module


def make_result(values, name="recall@10", users=None, protocol="standard", split="test"):
    values = np.asarray(values, dtype=np.float64)
    users = np.arange(len(values)) if users is None else users
    return RankingResult({name: float(values.mean())}, {name: values}, users, 100, get_protocol(protocol), split)


def test_bootstrap_interval_is_close_to_the_normal_one():
    values = np.random.default_rng(0).random(400)
    low, high = make_result(values).confidence_intervals(num_samples=4000)["recall@10"]
    half = 1.959964 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_its_level():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(300):
        low, high = make_result(rng.random(60) < 0.3).confidence_intervals(0.9, num_samples=200)["recall@10"]
        inside += low <= 0.3 <= high
    # 300 draws of probability 0.9: sd 5.2; four of them, plus what the percentile method lacks at 60 users.
    assert 240 <= inside <= 291


def test_bootstrap_is_reproducible_and_independent_of_chunks(monkeypatch):
    result = make_result(np.random.default_rng(2).random(50))
    first = result.confidence_intervals(seed=7)
    assert result.confidence_intervals(seed=7) == first
    assert result.confidence_intervals(seed=8) != first
    monkeypatch.setattr(result_module, "_BOOTSTRAP_MEMORY", 24 * 50 * 13)
    chunked = result.confidence_intervals(seed=7)
    np.testing.assert_allclose(chunked["recall@10"], first["recall@10"], rtol=1e-12)


def test_wider_level_gives_wider_interval():
    result = make_result(np.random.default_rng(2).random(50))
    narrow, wide = (result.confidence_intervals(level)["recall@10"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_paired_bootstrap_sees_a_small_steady_difference():
    base = np.random.default_rng(3).random(200)
    shifted = base + 0.01 * np.random.default_rng(4).random(200)
    comparison = paired_bootstrap(make_result(shifted), make_result(base), "recall@10")
    assert comparison.difference == pytest.approx((shifted - base).mean())
    assert comparison.low < comparison.difference < comparison.high
    assert comparison.significant
    # Unpaired, the two intervals overlap: pairing is what shows it.
    a, b = (make_result(values).confidence_intervals()["recall@10"] for values in (shifted, base))
    assert a[0] < b[1]
    assert paired_bootstrap(make_result(base), make_result(shifted), "recall@10").significant


def test_paired_bootstrap_does_not_call_noise_a_difference():
    rng = np.random.default_rng(5)
    comparison = paired_bootstrap(make_result(rng.random(100)), make_result(rng.random(100)), "recall@10")
    assert comparison.low < 0 < comparison.high
    assert not comparison.significant


@pytest.mark.parametrize(
    ("a", "b", "metric", "message"),
    [
        (make_result([1, 0]), make_result([1, 0]), "auc", r"metric must be one of recall@10 in a, got 'auc'"),
        (make_result([1, 0]), make_result([1, 0, 1]), "recall@10", r"of the same users in the same order, got 2 and 3"),
        (
            make_result([1, 0]),
            make_result([1, 0], protocol="official"),
            "recall@10",
            r"a and b must have the same split and protocol, got test/standard and test/official",
        ),
    ],
)
def test_incomparable_results_are_rejected(a, b, metric, message):
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(a, b, metric)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_level_must_be_a_share(level):
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\), got {level}"):
        make_result([1, 0]).confidence_intervals(level)
    with pytest.raises(ValueError, match=rf"level must be in \(0, 1\), got {level}"):
        seeds_summary([{"a": 1.0}], level=level)


def test_number_of_resamples_must_be_positive():
    with pytest.raises(ValueError, match=r"num_samples must be >= 1, got 0"):
        make_result([1, 0]).confidence_intervals(num_samples=0)


def test_slices_are_means_per_group():
    result = make_result([1, 0, 0.5, 1])
    slices = result.slices(np.array(["long", "short", "short", "long"]))
    assert slices == {"long": {"num_users": 2, "recall@10": 1.0}, "short": {"num_users": 2, "recall@10": 0.25}}
    with pytest.raises(ValueError, match=r"groups must have shape \(4,\), got \(3,\)"):
        result.slices(np.zeros(3))


def test_to_dict_is_plain_json():
    result = make_result(np.random.default_rng(6).random(50))
    record = json.loads(json.dumps(result.to_dict(level=0.9, num_samples=50)))
    assert record["metrics"] == result.metrics
    assert record["num_users"] == result.num_users == len(result.users)
    assert (record["protocol"], record["split"], record["num_items"]) == ("standard", "test", 100)
    assert record["confidence_level"] == 0.9
    low, high = record["confidence_intervals"]["recall@10"]
    assert low <= result.metrics["recall@10"] <= high
    assert "confidence_intervals" not in result.to_dict()


def test_seeds_summary_equals_hand_worked_interval():
    # 1, 2, 3: mean 2, sd 1, t(0.975, 2 degrees) = 4.302653, half width 4.302653 / sqrt(3) = 2.484138.
    pytest.importorskip("scipy", reason="scipy is not installed")
    summary = seeds_summary([{"recall@10": value} for value in (1.0, 2.0, 3.0)])["recall@10"]
    assert (summary["mean"], summary["sd"], summary["num_runs"]) == (2.0, 1.0, 3)
    assert summary["low"] == pytest.approx(2 - 2.484138, abs=1e-5)
    assert summary["high"] == pytest.approx(2 + 2.484138, abs=1e-5)


def test_seeds_summary_of_one_run_has_no_interval():
    summary = seeds_summary([{"a": 0.5}])["a"]
    assert summary["mean"] == 0.5
    assert all(math.isnan(summary[name]) for name in ("sd", "low", "high"))


def test_seeds_summary_rejects_missing_runs_and_metrics():
    with pytest.raises(ValueError, match=r"runs must have at least one metrics dict, got none"):
        seeds_summary([])
    with pytest.raises(ValueError, match=r"runs must have the same metrics, run 1 differs in \['b'\]"):
        seeds_summary([{"a": 1.0}, {"a": 1.0, "b": 2.0}])


def test_seeds_summary_without_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r'seeds_summary needs scipy: pip install "hellm\[baselines\]"'):
        seeds_summary([{"a": 1.0}, {"a": 2.0}])


def test_mean_of_results_is_by_user():
    mean = mean_result([make_result([0.0, 1.0, 0.5]), make_result([1.0, 1.0, 0.0])])
    assert mean.per_user["recall@10"].tolist() == [0.5, 1.0, 0.25]
    assert mean.metrics == {"recall@10": pytest.approx(7 / 12)} and mean.users.tolist() == [0, 1, 2]
    for other, match in (
        (make_result([1.0, 0.0, 1.0], split="valid"), "the same split, number 1 differs"),
        (make_result([1.0, 0.0, 1.0], protocol="official"), "the same protocol, number 1 differs"),
        (make_result([1.0, 0.0, 1.0], users=np.array([0, 1, 3])), "the same users and metrics, number 1 differs"),
        (make_result([1.0, 0.0, 1.0], name="ndcg@10"), "the same users and metrics, number 1 differs"),
    ):
        with pytest.raises(ValueError, match=match):
            mean_result([make_result([0.0, 1.0, 0.5]), other])
    with pytest.raises(ValueError, match="results must have at least one, got none"):
        mean_result([])
