from __future__ import annotations

import math

import pytest
from support.protocol_table import PROTOCOL_TABLE, FakeDataset
from support.table_scorer import csr, descending

from hellm.evaluate import PROTOCOLS, Protocol, evaluate_dataset, get_protocol, ranking_metrics


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
