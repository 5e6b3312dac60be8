"""Recent events beside a run, worked out by hand."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import torch
from support.command_line import last_json

from hellm.recommend import Recommender, ServedGraph
from hellm.upkeep.drift import drift

ITEMS = 12
# Item 0 is the most popular one; items 10 and 11 have no training events, bert has no events at all.
EVENTS = [("anna", 0, 0), ("anna", 1, 0), ("anna", 10, 2), ("cleo", 0, 0), *(("cleo", row, 0) for row in range(2, 10))]
RECENT = [("anna", "p11"), ("anna", "p0"), ("anna", "p2"), ("bert", "p0"), ("dora", "p0"), ("dora", "new")]


@pytest.fixture
def run(tmp_path) -> Path:
    users = ["anna", "bert", "cleo"]
    keys = torch.eye(ITEMS)
    # anna likes p11 best, then p2, then p3; cleo likes p1.
    likes = torch.zeros(3, ITEMS)
    likes[0, [11, 2, 3, 0]] = torch.tensor([9.0, 8.0, 7.0, 10.0])
    likes[2, 1] = 1
    ids = pl.DataFrame(
        {
            "side": ["user"] * 3 + ["item"] * ITEMS,
            "index": [*range(3), *range(ITEMS)],
            "id": users + [f"p{row}" for row in range(ITEMS)],
            "title": pl.Series([None] * (3 + ITEMS), dtype=pl.String),
        }
    )
    rows = [(users.index(user), item, split) for user, item, split in EVENTS]
    events = pl.DataFrame(rows, schema={"user": pl.Int64, "item": pl.Int64, "split": pl.Int8}, orient="row")
    model = ServedGraph({"user": likes, "item": keys, "fold_in_source": keys.clone()}, 1.0)
    return Recommender(model, ids, events).save(tmp_path / "run")


@pytest.fixture
def recent(tmp_path) -> Path:
    pl.DataFrame(RECENT, schema=["user", "item"], orient="row").write_csv(tmp_path / "recent.csv")
    return tmp_path / "recent.csv"


def test_counts_and_shares_are_those_of_the_hand(run, recent):
    report = drift(run, recent, k=2)
    assert report["events"] == {
        "count": 6,
        "by_unknown_users": pytest.approx(2 / 6),
        "on_unknown_items": pytest.approx(1 / 6),
        "on_untrained_items": pytest.approx(1 / 6),
        "on_popular_items": pytest.approx(3 / 6),
        "on_popular_items_in_training": pytest.approx(2 / 11),
    }
    assert report["users"] == {
        "count": 3,
        "unknown": 1,
        "events_per_user": {"median": 2, "p90": pytest.approx(2.8)},
        "events_per_user_in_training": {"median": 5.5, "p90": pytest.approx(8.3)},
    }
    assert report["items"] == {"count": 4, "unknown": 1}


def test_lists_are_those_that_the_run_shows(run, recent):
    """anna is shown p11 and p2, which are new to her and which she took; bert the popular p0 and p1, and took p0."""
    shown = drift(run, recent, k=2)["shown"]
    assert shown == {
        "users": 2,
        "k": 2,
        "lists": {"popularity": 1, "user": 1},
        "coverage": pytest.approx(4 / 12),
        "untrained_items": pytest.approx(1 / 4),
        "popular_items": pytest.approx(1 / 4),
        "found": 1.0,
    }
    assert drift(run, recent, k=1)["shown"]["found"] == pytest.approx(2 / 3)
    assert drift(run, recent, k=1, num_users=1)["shown"]["users"] == 1
    assert drift(run, recent, k=99)["shown"]["k"] == ITEMS


def test_strangers_alone_have_no_lists(run, tmp_path):
    pl.DataFrame({"user": ["dora"], "item": ["new"]}).write_csv(tmp_path / "recent.csv")
    report = drift(run, tmp_path / "recent.csv")
    assert report["shown"]["lists"] == {} and report["shown"]["found"] is None and report["shown"]["coverage"] == 0
    assert report["events"]["by_unknown_users"] == 1 and report["events"]["on_popular_items"] == 0


def test_command_prints_both_tables(run, recent, call):
    code, out, err = call("drift", run, "--events", recent, "-k", 2)
    assert (code, err) == (0, "")
    assert "6 recent events of 3 users (1 unknown) on 4 items (1 unknown)" in out
    assert "50.0%     18.2%" in out and "catalogue that is shown" in out and "33.3%" in out
    code, out, _ = call("drift", run, "--events", recent, "-k", 2, "--json")
    assert last_json(out) == drift(run, recent, k=2)
    assert call("drift", run, "--events", recent, "-k", 0)[2] == "hellm: error: -k must be >= 1, got 0\n"
