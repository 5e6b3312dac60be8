from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support.table_scorer import TableScorer, csr, descending

from hellm.evaluate import Protocol, ranking_metrics, top_items


def brute_force(scores, targets, seen, ks, ideal="all positives"):
    """The definitions, one user and one rank at a time."""
    ranked = [i for _, i in sorted((-s, i) for i, s in enumerate(scores.tolist()) if i not in seen and s != -math.inf)][
        : max(ks)
    ]
    row = {}
    for k in ks:
        hit_ranks = [rank for rank, item in enumerate(ranked[:k], start=1) if item in targets]
        n, p = len(hit_ranks), len(targets)
        best = min(k, p if ideal == "all positives" else len(targets & set(ranked)))
        best_dcg = sum(1 / math.log2(rank + 1) for rank in range(1, best + 1))
        row[f"recall@{k}"] = n / p if p else 0.0
        row[f"ndcg@{k}"] = sum(1 / math.log2(rank + 1) for rank in hit_ranks) / best_dcg if best else 0.0
        row[f"precision@{k}"] = n / k
        row[f"hit_rate@{k}"] = float(n > 0)
        row[f"mrr@{k}"] = 1 / hit_ranks[0] if n else 0.0
        row[f"map@{k}"] = sum((j + 1) / rank for j, rank in enumerate(hit_ranks)) / min(p, k) if p else 0.0
    return row


def random_case(seed=0, num_users=57, num_items=63, levels=9):
    """Scores with many ties, several targets and seen items per user, some users with none of either."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.integers(levels, size=(num_users, num_items)).astype(np.float32))
    targets = [list(rng.integers(num_items, size=rng.integers(0, 30) if u % 5 else 0)) for u in range(num_users)]
    seen = [list(rng.integers(num_items, size=rng.integers(0, 40))) for _ in range(num_users)]
    return scores, targets, seen


# ---- hand-worked values --------------------------------------------------------------------------------------------

# Ranking 0 1 2 3 4 5. User 0 wants {1, 3, 5}: hits at ranks 2, 4, 6. User 1 wants {0}: hit at rank 1.
# User 2 wants {4, 5}: ranks 5, 6, none in the first 4. With l(r) = 1 / log2(r + 1):
# l(1) = 1, l(2) = 0.63093, l(3) = 0.5, l(4) = 0.43068.
HAND_TARGETS = [[1, 3, 5], [0], [4, 5]]
HAND = {
    # k = 2: user 0 has one hit (rank 2), user 1 one (rank 1), user 2 none.
    "recall@2": [1 / 3, 1, 0],
    "precision@2": [1 / 2, 1 / 2, 0],
    "hit_rate@2": [1, 1, 0],
    "mrr@2": [1 / 2, 1, 0],
    "map@2": [(1 / 2) / 2, 1, 0],  # precision 1/2 at the hit, over min(3, 2) = 2
    "ndcg@2": [0.6309297536 / 1.6309297536, 1, 0],  # l(2) / (l(1) + l(2))
    # k = 4: user 0 has hits at 2 and 4.
    "recall@4": [2 / 3, 1, 0],
    "precision@4": [2 / 4, 1 / 4, 0],
    "hit_rate@4": [1, 1, 0],
    "mrr@4": [1 / 2, 1, 0],
    "map@4": [(1 / 2 + 2 / 4) / 3, 1, 0],
    "ndcg@4": [(0.6309297536 + 0.4306765581) / (1 + 0.6309297536 + 0.5), 1, 0],
}


@pytest.mark.parametrize("name", HAND)
def test_metric_equals_hand_worked_table(name):
    result = ranking_metrics(descending(3, 6), csr(HAND_TARGETS), ks=(2, 4))
    np.testing.assert_allclose(result.per_user[name], HAND[name], rtol=1e-9)
    assert result.metrics[name] == pytest.approx(np.mean(HAND[name]))


def test_official_ndcg_divides_by_hits_retrieved_within_the_largest_k():
    # User 0 retrieves 2 of 3 targets in the first 4 (ranks 2, 4).
    # k = 4: ideal of 2 hits, l(1) + l(2). k = 2: still 2 retrieved hits, cut at 2. k = 1: no hit: 0.
    result = ranking_metrics(descending(1, 6), csr(HAND_TARGETS[:1]), ks=(1, 2, 4), protocol="official")
    ideal = 1 + 0.6309297536
    assert result.metrics["ndcg@4"] == pytest.approx((0.6309297536 + 0.4306765581) / ideal)
    assert result.metrics["ndcg@2"] == pytest.approx(0.6309297536 / ideal)
    assert result.metrics["ndcg@1"] == 0.0


def test_official_ndcg_depends_on_the_largest_k():
    # With 3 as the largest k only rank 2 is retrieved, so the ideal is one hit on top: l(2) / l(1).
    result = ranking_metrics(descending(1, 6), csr(HAND_TARGETS[:1]), ks=(2, 3), protocol="official")
    assert result.metrics["ndcg@2"] == pytest.approx(0.6309297536)


def test_official_ndcg_equals_standard_for_one_target():
    scores, _, _ = random_case()
    targets = csr([[u % scores.shape[1]] for u in range(len(scores))])
    standard, official = (
        ranking_metrics(TableScorer(scores), targets, ks=(5, 20), protocol=name) for name in ("standard", "official")
    )
    assert 0 < standard.metrics["ndcg@20"] == official.metrics["ndcg@20"]


def test_coverage_gini_and_novelty_equal_hand_worked_values():
    # Two users, ranking 0 1 2 3 and 3 2 1 0. k = 1 recommends {0}, {3}: 2 of 4 items, counts [1, 0, 0, 1].
    # Gini of sorted 0 0 1 1: sum (2i - n - 1) c_i / (n sum) = (1 * 1 + 3 * 1) / (4 * 2) = 1/2.
    # k = 2 recommends {0, 1}, {3, 2}: all items once: coverage 1, Gini 0.
    # Train counts 4 2 2 0, sum 8, item 3 counted as 1: information 1, 2, 2, 3 bits.
    # k = 1: users 1 and 3 bits. k = 2: (1 + 2) / 2 and (3 + 2) / 2.
    scorer = TableScorer([[4.0, 3, 2, 1], [1, 2, 3, 4]])
    result = ranking_metrics(scorer, csr([[0], [0]]), ks=(1, 2), item_counts=[4, 2, 2, 0])
    assert (result.metrics["coverage@1"], result.metrics["coverage@2"]) == (0.5, 1.0)
    assert (result.metrics["gini@1"], result.metrics["gini@2"]) == (0.5, 0.0)
    assert result.per_user["novelty@1"].tolist() == [1.0, 3.0]
    assert result.per_user["novelty@2"].tolist() == [1.5, 2.5]


def test_novelty_is_absent_without_item_counts():
    result = ranking_metrics(descending(1, 4), csr([[0]]), ks=(2,))
    assert not any(name.startswith("novelty") for name in result.metrics)


def test_diversity_equals_hand_worked_values():
    # Directions of items 0..3: east, north, north-east, none. Cosines: 0-1 is 0, 0-2 and 1-2 are sqrt(1/2).
    # Lists 0 1 2 3 and 3 2 1 0. k = 2: 1 - 0, and (no vector, one) 0. k = 3: 1 - (0 + 2 sqrt(1/2)) / 3, and the
    # pair 2-1: 1 - sqrt(1/2). k = 4: of three items each.
    scorer, half = TableScorer([[4.0, 3, 2, 1], [1, 2, 3, 4]]), math.sqrt(0.5)
    vectors = np.array([[2, 0], [0, 1], [3, 3], [0, 0]], dtype=np.float32)
    result = ranking_metrics(scorer, csr([[0], [0]]), ks=(1, 2, 3, 4), item_vectors=vectors)
    three = 1 - 2 * half / 3
    expected = {1: [0, 0], 2: [1, 0], 3: [three, 1 - half], 4: [three, three]}
    for k, values in expected.items():
        np.testing.assert_allclose(result.per_user[f"diversity@{k}"], values, atol=1e-6)
    assert "diversity@2" not in ranking_metrics(scorer, csr([[0], [0]]), ks=(2,)).metrics


def test_diversity_equals_brute_force():
    scores, targets, seen = random_case()
    vectors = np.random.default_rng(1).standard_normal((63, 5)).astype(np.float32)
    vectors[::7] = 0
    ks = (1, 3, 10)
    result = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen), ks=ks, item_vectors=vectors)
    for place, user in enumerate(result.users):
        masked = scores[user].clone()
        masked[seen[user]] = -torch.inf
        ranked = top_items(masked[None], 10)[0].numpy()
        for k in ks:
            rows = [vectors[i] / np.linalg.norm(vectors[i]) for i in ranked[:k] if i >= 0 and vectors[i].any()]
            pairs = [1 - float(a @ b) for n, a in enumerate(rows) for b in rows[:n]]
            expected = np.mean(pairs) if pairs else 0
            assert result.per_user[f"diversity@{k}"][place] == pytest.approx(expected, abs=1e-5)


# ---- ranking -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 2, 7, 62, 63])
@pytest.mark.parametrize("levels", [1, 2, 9, 1000])
def test_top_items_equals_a_full_stable_sort(levels, k, dtype):
    scores = random_case(levels=levels)[0].to(dtype)
    expected = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_items(scores, k), expected)


def test_top_items_takes_lowest_indices_of_a_tie_across_the_border():
    scores = torch.tensor([[1.0, 2, 1, 3, 1, 1]])
    assert top_items(scores, 3).tolist() == [[3, 1, 0]]
    assert top_items(scores, 4).tolist() == [[3, 1, 0, 2]]


def test_top_items_takes_negative_and_positive_zero_as_equal():
    assert top_items(torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), 3).tolist() == [[0, 1, 2]]


def test_top_items_marks_missing_candidates():
    inf = float("inf")
    scores = torch.tensor([[-inf, 1, -inf, inf], [-inf, -inf, -inf, -inf]])
    assert top_items(scores, 3).tolist() == [[3, 1, -1], [-1, -1, -1]]


@pytest.mark.parametrize("k", [0, 5])
def test_top_items_rejects_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 4\], got {k}"):
        top_items(torch.zeros(1, 4), k)


@pytest.mark.parametrize("ideal", ["all positives", "retrieved hits"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_rankings_with_ties_equal_brute_force(seed, ideal):
    scores, targets, seen = random_case(seed)
    ks = (1, 3, 10, 40)
    protocol = Protocol("test", "", ideal=ideal)
    result = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen), ks=ks, protocol=protocol)
    expected = {u: brute_force(scores[u], set(t), set(seen[u]), ks, ideal) for u, t in enumerate(targets) if t}
    assert result.users.tolist() == list(expected)
    for name, values in result.per_user.items():
        np.testing.assert_allclose(values, [row[name] for row in expected.values()], atol=1e-12, err_msg=name)


def test_agrees_with_ir_measures():
    ir_measures = pytest.importorskip("ir_measures", reason="ir_measures is not installed")
    rng = np.random.default_rng(3)
    num_users, num_items, k = 20, 50, 10
    scores = torch.from_numpy(np.stack([rng.permutation(num_items) for _ in range(num_users)]).astype(np.float32))
    targets = [sorted(rng.choice(num_items, size=rng.integers(1, 16), replace=False)) for _ in range(num_users)]
    result = ranking_metrics(TableScorer(scores), csr(targets), ks=(k,))
    qrels = [ir_measures.Qrel(str(u), str(i), 1) for u, items in enumerate(targets) for i in items]
    run = [
        ir_measures.ScoredDoc(str(u), str(i), float(scores[u, i])) for u in range(num_users) for i in range(num_items)
    ]
    names = {"recall": "R", "ndcg": "nDCG", "precision": "P", "hit_rate": "Success", "mrr": "RR", "map": "AP"}
    for ours, theirs in names.items():
        measure = ir_measures.parse_measure(f"{theirs}@{k}")
        values = np.zeros(num_users)
        for metric in ir_measures.iter_calc([measure], qrels, run):
            values[int(metric.query_id)] = metric.value
        if ours == "map":  # trec_eval divides by the number of targets, also where more than k
            sizes = np.array([len(items) for items in targets])
            values *= sizes / np.minimum(sizes, k)
        np.testing.assert_allclose(result.per_user[f"{ours}@{k}"], values, atol=1e-4, err_msg=ours)


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 7}, {"max_memory": 1}])
def test_batching_does_not_change_anything(options):
    scores, targets, seen = random_case()
    whole = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen))
    parts = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen), **options)
    assert whole.metrics == parts.metrics
    for name in whole.per_user:
        assert np.array_equal(whole.per_user[name], parts.per_user[name])


def test_max_memory_bounds_the_batch():
    scorer = descending(50, 10)
    scorer.num_items = 10
    ranking_metrics(scorer, csr([[0]] * 50), ks=(1,), max_memory=24 * 10 * 4)
    assert max(scorer.batches) == 4 and sum(scorer.batches) == 50


def test_users_are_evaluated_in_the_given_order():
    scores, targets, seen = random_case()
    whole = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen))
    chosen = whole.users[[5, 0, 3]]
    some = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen), users=torch.from_numpy(chosen))
    assert some.users.tolist() == chosen.tolist()
    assert some.per_user["ndcg@20"].tolist() == whole.per_user["ndcg@20"][[5, 0, 3]].tolist()


def test_callables_torch_csr_and_integer_scores_are_accepted():
    scores, targets, seen = random_case()
    expected = ranking_metrics(TableScorer(scores), csr(targets), seen=csr(seen))
    target_csr, seen_csr = (tuple(map(torch.from_numpy, csr(lists))) for lists in (targets, seen))
    for call in (lambda users: scores[users], lambda users: scores[users].long(), lambda users: scores[users].numpy()):
        assert ranking_metrics(call, target_csr, seen=seen_csr).metrics == expected.metrics


def test_repeated_targets_count_once():
    once = ranking_metrics(descending(1, 6), csr([[1, 3]]), ks=(2,))
    twice = ranking_metrics(descending(1, 6), csr([[3, 1, 3, 1]]), ks=(2,))
    assert once.metrics == twice.metrics


def test_scores_of_the_scorer_are_not_written_to():
    scores, targets, seen = random_case()
    before = scores.clone()
    ranking_metrics(lambda users: scores[: len(users)], csr(targets), seen=csr(seen), batch_size=100, users=range(57))
    row = torch.arange(63.0)
    ranking_metrics(lambda users: row.expand(len(users), -1), csr(targets), seen=csr(seen))
    assert torch.equal(scores, before)
    assert torch.equal(row, torch.arange(63.0))


def test_gradients_are_not_recorded():
    table = torch.zeros(1, 4, requires_grad=True)
    seen_grad = []

    def score(users):
        block = table[users] * 2
        seen_grad.append(block.requires_grad)
        return block

    ranking_metrics(score, csr([[0]]), ks=(1,))
    assert not any(seen_grad)


# ---- masking and protocols -----------------------------------------------------------------------------------------


def test_masked_items_never_appear():
    scores, _, seen = random_case()
    num_items = scores.shape[1]
    has_seen = [items or [0] for items in seen]
    masked = ranking_metrics(TableScorer(scores), csr(has_seen), seen=csr(has_seen), ks=(num_items,))
    assert masked.metrics[f"recall@{num_items}"] == 0
    open_ = ranking_metrics(TableScorer(scores), csr(has_seen), seen=csr(has_seen), ks=(num_items,), mask_seen=False)
    assert open_.metrics[f"recall@{num_items}"] == 1


def test_user_with_fewer_candidates_than_k():
    # Items 0..3 masked: the ranking is 4, 5 only, and target 5 is second of two.
    result = ranking_metrics(descending(1, 6), csr([[5]]), seen=csr([[0, 1, 2, 3]]), ks=(4,), item_counts=[1] * 6)
    assert result.metrics["mrr@4"] == 0.5
    assert result.metrics["precision@4"] == 0.25
    assert result.metrics["coverage@4"] == pytest.approx(2 / 6)
    assert result.metrics["novelty@4"] == pytest.approx(math.log2(6))


def test_user_with_everything_masked_counts_as_zero():
    result = ranking_metrics(descending(1, 3), csr([[1]]), seen=csr([[0, 1, 2]]), ks=(2,), item_counts=[1, 1, 1])
    assert {name: value for name, value in result.metrics.items() if value} == {}


# ---- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ks": ()}, r"ks must be integers >= 1, at least one, got \(\)"),
        ({"ks": (0, 5)}, r"ks must be integers >= 1, at least one, got \(0, 5\)"),
        ({"ks": (1.5,)}, r"ks must be integers >= 1, at least one, got \(1.5,\)"),
        ({"ks": (2, 7)}, r"k must be <= num_items = 6, got 7"),
        ({"split": "train"}, r"split must be 'valid' or 'test', got 'train'"),
        ({"batch_size": 0}, r"batch_size must be >= 1, got 0"),
        ({"max_memory": 0}, r"max_memory must be >= 1 byte, got 0"),
        ({"seen": csr([[0]])}, r"seen must cover the 3 users of targets, got 1"),
        ({"seen": csr([[0], [9], []])}, r"seen items must be in \[0, 6\), got 9"),
        ({"seen": ([0, 1, 0, 1], [0])}, r"seen indptr must rise from 0 to len\(items\) = 1, got 0..1"),
        ({"users": [0, 3]}, r"users must be in \[0, 3\), got 3"),
        ({"users": [[0]]}, r"users must be 1-dimensional, got shape \(1, 1\)"),
        ({"users": []}, r"no user to evaluate: the protocol averages over users 'with target' and there is none"),
        ({"item_counts": [1, 2]}, r"item_counts must have shape \(6,\), got \(2,\)"),
        ({"item_counts": [-1] * 6}, r"item_counts must be finite, >= 0 and not all 0"),
        ({"item_vectors": np.ones((5, 2))}, r"item_vectors must have shape \[6, D\], got \[5, 2\]"),
        ({"item_vectors": np.full((6, 2), np.nan)}, r"item_vectors must be finite"),
        (
            {"protocol": "sampled-popularity", "item_counts": [1, 2]},
            r"item_counts must have shape \(6,\), got \(2,\)",
        ),
        (
            {"protocol": "sampled-popularity"},
            r"protocol 'sampled-popularity' draws candidates by item_counts, got none",
        ),
        ({"protocol": "x"}, r"protocol must be one of standard"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(descending(3, 6), csr(HAND_TARGETS), **({"ks": (2,)} | options))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (([0, 1], [6]), r"targets items must be in \[0, 6\), got 6"),
        (([0, 1], [-1]), r"targets items must be in \[0, 6\), got -1"),
        (([0, 2], [1]), r"targets indptr must rise from 0 to len\(items\) = 1, got 0..2"),
        (([[0, 1]], [1]), r"targets must be \(indptr \[num_users \+ 1\], items \[n\]\), got \(1, 2\), \(1,\)"),
        (([0, 0], []), r"no user to evaluate"),
    ],
)
def test_wrong_targets_are_named(targets, message):
    with pytest.raises(ValueError, match=message):
        ranking_metrics(descending(1, 6), targets, ks=(2,))


def test_nan_scores_name_the_first_user():
    table = torch.zeros(6, 4)
    table[3, 2] = table[5, 0] = float("nan")
    with pytest.raises(ValueError, match=r"scores must not be NaN, got NaN for user 3"):
        ranking_metrics(TableScorer(table), csr([[0]] * 6), ks=(1,), batch_size=4)


def test_nan_at_a_masked_item_is_reported_as_well():
    with pytest.raises(ValueError, match=r"got NaN for user 0"):
        ranking_metrics(TableScorer([[float("nan"), 1.0]]), csr([[1]]), seen=csr([[0]]), ks=(1,))


def test_wrong_score_shapes_are_named():
    with pytest.raises(ValueError, match=r"scorer must return scores of shape \[1, num_items\], got \[4\]"):
        ranking_metrics(lambda users: torch.zeros(4), csr([[0]]), ks=(1,))
    scorer = descending(2, 6)
    scorer.num_items = 5
    with pytest.raises(ValueError, match=r"scorer must return scores of shape \[2, 5\], got \[2, 6\]"):
        ranking_metrics(scorer, csr([[0], [0]]), ks=(1,))


# ---- published numbers ---------------------------------------------------------------------------------------------


def test_popularity_on_beauty_equals_the_published_poprec(shared_data):
    """S3-Rec's table: PopRec recall@10 .0152, ndcg@10 .0068, recall@20 .0217; it counts all events, test included."""
    lines = (shared_data / "beauty" / "Beauty.txt").read_text().splitlines()
    histories = [np.array(line.split()[1:], dtype=np.int64) - 1 for line in lines]
    counts = torch.from_numpy(np.bincount(np.concatenate(histories)).astype(np.float32))
    result = ranking_metrics(
        lambda users: counts.expand(len(users), -1),
        csr([items[-1:] for items in histories]),
        seen=csr([items[:-1] for items in histories]),
        protocol="s3rec",
    )
    assert result.num_users == 22363
    rounded = {name: round(result.metrics[name], 4) for name in ("recall@10", "ndcg@10", "recall@20")}
    assert rounded == {"recall@10": 0.0152, "ndcg@10": 0.0068, "recall@20": 0.0217}
