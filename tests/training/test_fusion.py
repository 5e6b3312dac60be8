"""Which towers are kept: those shown to help on users that did not make their weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hellm.evaluate import ranking_metrics
from hellm.training.fusion import TowerScores, select_towers

E, I = 600, 50  # noqa: E741


def candidates(**noise: float) -> TowerScores:
    """Towers that see the target through noise of their own; "copy" repeats the first."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(I, (E,), generator=generator)
    scores = {}
    for name, amount in noise.items():
        scores[name] = amount * torch.randn(E, I, generator=generator)
        scores[name][torch.arange(E), targets] += 2.0
    return TowerScores(scores, targets, np.arange(E) // 2)


def test_towers_that_see_different_things_are_kept_and_beat_each_alone():
    selection = select_towers(candidates(a=1.5, b=1.6))
    assert list(selection.weights) == ["a", "b"]
    assert selection.fused > max(selection.alone.values()) + 0.05
    assert [gain.kept for gain in selection.gains] == [True] and selection.gains[0].low > 0


def test_noise_and_copies_are_left_out():
    given = candidates(a=1.0)
    noise = torch.randn(E, I, generator=torch.Generator().manual_seed(1))
    given.scores["copy"], given.scores["noise"] = 3 * given.scores["a"], noise
    selection = select_towers(given)
    assert len(selection.weights) == 1 and set(selection.weights) < {"a", "copy"}
    assert selection.fused == pytest.approx(selection.alone["a"])
    # Both of the others are told, the surest first.
    assert [gain.kept for gain in selection.gains] == [False, False]
    assert selection.gains[0].low >= selection.gains[1].low and "noise" in {gain.tower for gain in selection.gains}


def test_a_tower_that_knows_new_items_is_kept_where_no_other_does_and_it_costs_nothing():
    # The second hardly sees the target: it helps too little to be shown.
    given = candidates(a=1.0, b=9.0)
    without = select_towers(given, level=0.999)
    assert list(without.weights) == ["a"] and without.gains[-1].gain > 0
    selection = select_towers(given, level=0.999, rank_new_items=["b"])
    assert list(selection.weights) == ["a", "b"]
    assert [(gain.tower, gain.kept, gain.for_new_items) for gain in selection.gains] == [
        ("b", False, False),
        ("b", True, True),
    ]
    assert selection.fused >= selection.alone["a"]
    # Nothing is wanting where one that is there knows them.
    assert list(select_towers(given, level=0.999, rank_new_items=["a", "b"]).weights) == ["a"]


def test_a_tower_that_knows_new_items_and_costs_something_is_left_out():
    given = candidates(a=1.0)
    given.scores["b"] = torch.randn(E, I, generator=torch.Generator().manual_seed(1))
    selection = select_towers(given, rank_new_items=["b"])
    assert list(selection.weights) == ["a"] and not selection.gains[-1].kept and selection.gains[-1].for_new_items


@pytest.mark.parametrize("monitor", ["ndcg@10", "recall@5"])
def test_monitored_metric_is_that_of_the_evaluator(monitor):
    given = candidates(a=1.5)
    one_each = TowerScores(given.scores, given.targets, np.arange(E))
    found = ranking_metrics(
        lambda users: given.scores["a"][users], (np.arange(E + 1), given.targets.numpy()), ks=(5, 10)
    )
    assert select_towers(one_each, monitor).alone["a"] == pytest.approx(found.metrics[monitor])


def test_masked_items_rank_nowhere():
    given = candidates(a=1.5, b=1.6)
    masked = torch.zeros(E, I, dtype=torch.bool)
    masked[:, :20] = True
    masked[torch.arange(E), given.targets] = False
    hidden = {name: one.masked_fill(masked, -torch.inf) for name, one in given.scores.items()}
    selection = select_towers(TowerScores(hidden, given.targets, given.users))
    assert selection.alone["a"] > select_towers(given).alone["a"]
    assert len(selection.weights) == 2 and np.isfinite(selection.fused)


def test_same_seed_gives_the_same_weights():
    assert select_towers(candidates(a=1.5, b=1.6), seed=3) == select_towers(candidates(a=1.5, b=1.6), seed=3)
