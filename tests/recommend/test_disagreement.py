"""Users whose lists differ, and items in a plane."""

from __future__ import annotations

import pytest
import torch
from support.planted_runs import DATA, make_recommender

from hellm.recommend.disagreement import common_users, disagreements
from hellm.recommend.item_map import principal_plane


@pytest.fixture(scope="module")
def two():
    return make_recommender("graph"), make_recommender("sequence")


def test_a_recommender_agrees_with_itself(two):
    for one in disagreements(two[0], two[0], ["u0", "u7"], k=5):
        assert (one.by_overlap, one.by_rank) == (0, pytest.approx(0))
        assert one.lists[0] == one.lists[1]


def test_lists_are_those_of_both(two):
    users = ["u3", "u1"]
    found = disagreements(*two, users, k=4)
    assert [one.user for one in found] == users
    for place, recommender in enumerate(two):
        assert [one.lists[place] for one in found] == recommender.recommend(users, k=4)
    for one in found:
        first, second = ({item.item for item in items} for items in one.lists)
        assert one.by_overlap == pytest.approx(1 - len(first & second) / 4)
        assert 0 <= one.by_rank <= 1


def test_lists_are_no_longer_than_the_catalogues(two):
    (one,) = disagreements(*two, ["u0"], k=500)
    assert [len(items) for items in one.lists] == [len(items) for items in (two[0].recommend("u0", k=18)[0],) * 2]


def test_users_whom_both_know(two):
    one, other = two
    other.add_events(["new"], ["p1"])
    users = common_users(one, other, 10)
    assert users == common_users(one, other, 10) and len(set(users)) == 10
    # The last user has no events, "new" is known to one alone.
    assert sorted(common_users(one, other, 1000)) == sorted(f"u{row}" for row in range(DATA.num_users - 1))


class TestPlane:
    def test_it_is_that_of_a_singular_value_decomposition(self):
        rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5, 1, 3, 1, 1, 1.0])
        plane = principal_plane(rows)
        centred = (rows - rows.mean(0)).double()
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        expected = left[:, :2] * values[:2]
        torch.testing.assert_close(plane.points.abs(), expected.abs().float(), rtol=1e-4, atol=1e-4)
        assert plane.shares == pytest.approx((values[:2] ** 2 / (values**2).sum()).tolist())

    def test_the_same_rows_come_out_the_same_way_round(self):
        rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
        order = torch.randperm(50)
        torch.testing.assert_close(principal_plane(rows).points[order], principal_plane(rows[order]).points)

    def test_too_little_to_spread(self):
        assert principal_plane(torch.ones(4, 3)).points.abs().max() == 0
        assert principal_plane(torch.ones(4, 3)).shares == (0, 0)
        line = principal_plane(torch.tensor([[0.0], [2.0]]))
        assert line.points[:, 0].tolist() == [-1, 1] and line.shares == (1, 0)
