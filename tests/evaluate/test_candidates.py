"""Protocols that rank the targets among drawn candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.table_scorer import TableScorer, csr

from hellm.evaluate import PROTOCOLS, Candidates, Protocol, get_protocol, ranking_metrics
from hellm.evaluate.candidates import draw_candidates

NUM_USERS, NUM_ITEMS = 150, 41


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.standard_normal((NUM_USERS, NUM_ITEMS)).astype(np.float32))
    targets = [list(rng.choice(NUM_ITEMS, size=rng.integers(1, 4), replace=False)) for _ in range(NUM_USERS)]
    seen = [list(rng.choice(NUM_ITEMS, size=rng.integers(0, 12), replace=False)) for _ in range(NUM_USERS)]
    return scores, targets, seen


def sampled(count, weighting="uniform", seed=0):
    return Protocol("sampled", "", unmask_targets=True, candidates=Candidates(count, weighting, seed))


def drawn_of(case, candidates, users=None, counts=None):
    users = np.arange(NUM_USERS) if users is None else users
    excluded = [csr(case[1]), csr(case[2])]
    return draw_candidates(candidates, users, NUM_ITEMS, excluded=excluded, item_counts=counts)


def test_candidates_are_distinct_and_neither_targets_nor_seen(case):
    drawn = drawn_of(case, Candidates(15))
    assert drawn.shape == (NUM_USERS, 15) and (drawn >= 0).all()
    for user, row in enumerate(drawn.tolist()):
        assert len(set(row)) == 15 and not set(row) & {*case[1][user], *case[2][user]}


def test_candidates_depend_on_user_and_seed_alone(case):
    whole = drawn_of(case, Candidates(7))
    users = np.array([140, 3, 64, 63, 65])
    assert np.array_equal(drawn_of(case, Candidates(7), users), whole[users])
    assert not np.array_equal(drawn_of(case, Candidates(7, seed=1)), whole)
    assert len({tuple(sorted(row)) for row in whole.tolist()}) > NUM_USERS * 0.9
    scores, targets, seen = case
    options = {"seen": csr(seen), "protocol": sampled(7), "ks": (3,)}
    one, other = (ranking_metrics(TableScorer(scores), csr(targets), batch_size=b, **options) for b in (1024, 11))
    assert np.array_equal(one.per_user["ndcg@3"], other.per_user["ndcg@3"])


def test_few_items_leave_few_candidates(case):
    drawn = drawn_of(case, Candidates(100))
    for user, row in enumerate(drawn.tolist()):
        left = set(range(NUM_ITEMS)) - {*case[1][user], *case[2][user]}
        assert {item for item in row if item >= 0} == left and row.count(-1) == NUM_ITEMS - len(left)


def test_weights_are_those_of_a_draw_without_replacement():
    # First of two by weights 1 2 3 4 0: in proportion. Pairs: P(a then b) = w_a / 10 * w_b / (10 - w_a).
    users, counts = np.arange(20_000), np.array([1, 2, 3, 4, 0])
    one = draw_candidates(Candidates(1, "popularity"), users, 5, item_counts=counts)[:, 0]
    shares = np.bincount(one, minlength=5) / len(users)
    two = np.sort(draw_candidates(Candidates(2, "popularity", seed=5), users, 5, item_counts=counts), axis=1)
    halves = draw_candidates(Candidates(1, "popularity"), users, 5, item_counts=counts / 10)[:, 0]
    assert np.array_equal(halves, one)
    pair = np.mean((two == [2, 3]).all(axis=1))
    even = np.bincount(draw_candidates(Candidates(1), users, 5)[:, 0], minlength=5) / len(users)
    # Four standard deviations of a share of 20,000 draws are at most 0.0142.
    np.testing.assert_allclose(shares, counts / 10, atol=0.0142)
    assert shares[4] == 0 and (two >= 0).all()
    assert pair == pytest.approx(0.3 * 4 / 7 + 0.4 * 3 / 6, abs=0.0142)
    np.testing.assert_allclose(even, 0.2, atol=0.0142)


@pytest.mark.parametrize("weighting", ["uniform", "popularity"])
def test_ranking_is_that_of_targets_and_candidates_by_brute_force(case, weighting):
    scores, targets, seen = case
    counts = np.random.default_rng(2).integers(0, 9, NUM_ITEMS)
    protocol = sampled(9, weighting, seed=3)
    result = ranking_metrics(
        TableScorer(scores), csr(targets), seen=csr(seen), protocol=protocol, ks=(4,), item_counts=counts
    )
    drawn = drawn_of(case, protocol.candidates, counts=counts)
    for user in range(NUM_USERS):
        wanted = set(targets[user])
        ranked = sorted({*wanted, *(i for i in drawn[user].tolist() if i >= 0)}, key=lambda i: -scores[user, i].item())
        hits = [rank for rank, item in enumerate(ranked[:4], start=1) if item in wanted]
        best = sum(1 / math.log2(rank + 1) for rank in range(1, min(4, len(wanted)) + 1))
        assert result.per_user["recall@4"][user] == len(hits) / len(wanted)
        assert result.per_user["ndcg@4"][user] == pytest.approx(sum(1 / math.log2(r + 1) for r in hits) / best)


def test_enough_candidates_are_the_whole_catalogue(case):
    scores, targets, seen = case
    whole, all_drawn = (
        ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen), ks=(5, 10), protocol=protocol)
        for protocol in (PROTOCOLS["recbole"], sampled(NUM_ITEMS))
    )
    for name, values in all_drawn.per_user.items():
        assert np.array_equal(values, whole.per_user[name]), name


def test_fewer_rivals_only_help(case):
    scores, targets, seen = case
    options = {"seen": csr(seen), "ks": (5,)}
    few = ranking_metrics(TableScorer(scores), csr(targets), protocol=sampled(10), **options)
    whole = ranking_metrics(TableScorer(scores), csr(targets), protocol="recbole", **options)
    assert (few.per_user["recall@5"] >= whole.per_user["recall@5"]).all()
    assert few.metrics["recall@5"] > 1.5 * whole.metrics["recall@5"]


def test_presets_say_that_they_are_biased_and_say_nothing_of_lists(case):
    scores, targets, _ = case
    for name in ("sampled-uniform", "sampled-popularity"):
        assert PROTOCOLS[name].description.startswith("BIASED") and PROTOCOLS[name].candidates.count == 100
    options = {"item_counts": np.ones(NUM_ITEMS), "item_vectors": np.ones((NUM_ITEMS, 2)), "ks": (5,)}
    result = ranking_metrics(TableScorer(scores), csr(targets), protocol="sampled-uniform", **options)
    names = ("coverage", "gini", "novelty", "diversity")
    assert not [one for one in result.metrics if one.startswith(names)] and "recall@5" in result.metrics


def test_number_of_candidates_stands_after_a_colon():
    protocol = get_protocol("sampled-popularity:999")
    assert protocol.candidates == Candidates(999, "popularity") and protocol.name == "sampled-popularity:999"
    assert "BIASED" in protocol.description and "999 items drawn by their train events" in protocol.description
    assert replace(get_protocol("sampled-uniform:100"), name="sampled-uniform") == PROTOCOLS["sampled-uniform"]
    for name in ("sampled-uniform:", "sampled-uniform:ten", "sampled-uniform:-1"):
        with pytest.raises(ValueError, match=f"must have a number of candidates after the colon, got '{name}'"):
            get_protocol(name)
    for name in ("standard:100", "sampled"):
        with pytest.raises(ValueError, match=f"protocol must be one of standard, .*, got '{name}'"):
            get_protocol(name)
    with pytest.raises(ValueError, match=r"candidates.count must be >= 1, got 0"):
        get_protocol("sampled-uniform:0")


def test_wrong_candidates_are_named():
    with pytest.raises(ValueError, match=r"candidates.count must be >= 1, got 0"):
        Candidates(0)
    with pytest.raises(ValueError, match=r"candidates.weighting must be one of 'uniform', 'popularity', got 'rare'"):
        replace(Candidates(), weighting="rare")
