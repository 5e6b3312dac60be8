from __future__ import annotations

import math

import numpy as np
import pytest
from table_scorer import csr, descending

from hellm.evaluate import PROTOCOLS, Protocol, evaluate_dataset, get_protocol, ranking_metrics


class FakeDataset:
    """Ranking 0 1 2 3 4 5 for everybody. User 0: train 0, valid 1, test 2. User 1: train 3, test 0.
    User 2: valid 0, test 1 and no train event. User 3: train 4 and nothing else.
    """

    name, num_users, num_items = "fake", 4, 6
    events = {  # noqa: RUF012
        "train": ([0, 1, 3], [0, 3, 4]),
        "valid": ([0, 2], [1, 0]),
        "test": ([0, 1, 2], [2, 0, 1]),
    }

    def pairs(self, split):
        return tuple(np.array(part, dtype=np.int64) for part in self.events[split])

    def histories(self, *splits):
        lists = [[] for _ in range(self.num_users)]
        for split in splits:
            for user, item in zip(*self.events[split], strict=True):
                lists[user].append(item)
        return csr(lists)


# mrr@3 per user, by hand. Test, unmasked: user 0 wants 2 (rank 3), user 1 wants 0 (rank 1), user 2 wants 1 (rank 2).
# Train masked: user 0 loses item 0, its target is second. Train and valid masked: user 0 loses 0 and 1, its target is
# first; user 2 loses 0, its target is first.
# Valid, train masked: user 0 wants 1, loses 0: first; user 2 wants 0: first.
PROTOCOL_TABLE = [
    ("standard", "test", {0: 1, 1: 1, 2: 1}),
    ("s3rec", "test", {0: 1, 1: 1, 2: 1}),
    ("recbole", "test", {0: 1, 1: 1, 2: 1}),
    ("official", "test", {0: 1 / 2, 1: 1, 2: 1 / 2}),
    ("mmrec", "test", {0: 1 / 2, 1: 1}),
    ("recbole-sequential", "test", {0: 1 / 3, 1: 1, 2: 1 / 2}),
    ("hellm-llm", "test", {0: 1 / 3, 1: 1, 2: 1 / 2}),
    ("standard", "valid", {0: 1, 2: 1}),
    ("official", "valid", {0: 1, 2: 1}),
    ("s3rec", "valid", {0: 1, 2: 1}),
    ("recbole", "valid", {0: 1, 2: 1}),
    ("mmrec", "valid", {0: 1}),
    ("recbole-sequential", "valid", {0: 1 / 2, 2: 1}),
    ("hellm-llm", "valid", {0: 1 / 2, 1: 0, 2: 1, 3: 0}),
    # 100 candidates are more than there are: all items that are neither known nor targets.
    ("sampled-uniform", "test", {0: 1, 1: 1, 2: 1}),
    ("sampled-popularity", "test", {0: 1, 1: 1, 2: 1}),
    ("sampled-uniform", "valid", {0: 1, 2: 1}),
]


@pytest.mark.parametrize(("protocol", "split", "expected"), PROTOCOL_TABLE)
def test_protocol_masks_and_averages_as_documented(protocol, split, expected):
    result = evaluate_dataset(descending(4, 6), FakeDataset(), split, protocol, ks=(3,))
    assert dict(zip(result.users.tolist(), result.per_user["mrr@3"].tolist(), strict=True)) == pytest.approx(expected)
    assert result.protocol is PROTOCOLS[protocol]
    assert result.split == split


def test_every_protocol_is_in_the_table():
    assert {name for name, _, _ in PROTOCOL_TABLE} == set(PROTOCOLS)


def test_target_seen_before_is_a_miss_except_in_recbole():
    # The target is item 0, which is also seen: masked it cannot be found.
    for name, expected in (("standard", 0.0), ("recbole", 1.0)):
        result = ranking_metrics(descending(1, 6), csr([[0]]), seen=csr([[0, 1]]), ks=(2,), protocol=name)
        assert result.metrics["recall@2"] == expected


def test_evaluate_dataset_reports_novelty_from_train_counts():
    # Train events: items 0, 3, 4 once each. Everybody's first candidate is never counted below once: log2(3) bits.
    result = evaluate_dataset(descending(4, 6), FakeDataset(), ks=(1,))
    assert result.metrics["novelty@1"] == pytest.approx(math.log2(3))


def test_evaluate_dataset_names_wrong_and_empty_splits():
    with pytest.raises(ValueError, match=r"split must be 'valid' or 'test', got 'train'"):
        evaluate_dataset(descending(4, 6), FakeDataset(), "train")
    empty = FakeDataset()
    empty.events = FakeDataset.events | {"valid": ([], [])}
    with pytest.raises(ValueError, match=r"split 'valid' of data set 'fake' must have events, got none"):
        evaluate_dataset(descending(4, 6), empty, "valid")


def test_get_protocol_returns_presets_and_own_protocols():
    own = Protocol("own", "mine")
    assert get_protocol(own) is own
    assert get_protocol("official").mask["test"] == ("train",)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: get_protocol("best"), r"protocol must be one of standard, official, mmrec, .*, got 'best'"),
        (
            lambda: Protocol("x", "", ideal="none"),
            r"ideal must be one of 'all positives', 'retrieved hits', got 'none'",
        ),
        (lambda: Protocol("x", "", mask={"test": ()}), r"mask must have the keys 'valid' and 'test', got \['test'\]"),
        (lambda: Protocol("x", "", users={}), r"users must have the keys 'valid' and 'test', got \[\]"),
        (
            lambda: Protocol("x", "", users={"valid": "all", "test": "some"}),
            r"users must be one of 'with target', 'with target and history', 'all', got 'some'",
        ),
        (
            lambda: Protocol("x", "", mask={"valid": (), "test": ("dev",)}),
            r"mask splits must be 'train', 'valid' or 'test', got 'dev'",
        ),
    ],
)
def test_wrong_protocols_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
