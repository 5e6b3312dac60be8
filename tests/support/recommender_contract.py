"""What every recommender must do, whatever its model; see `RecommenderContract`."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hellm.evaluate import ranking_metrics


@dataclass(frozen=True)
class PlantedBlocks:
    """Users of block b like only the items of block b; each has one of them left out.

    Attributes:
        train: (users, items), sorted by user.
        best_item: [num_users] the item a recommender should find: the one left out of the user's own block.
    """

    num_users: int
    num_items: int
    train: tuple[np.ndarray, np.ndarray]
    best_item: np.ndarray
    block_of_user: np.ndarray
    block_of_item: np.ndarray

    @property
    def targets(self) -> tuple[np.ndarray, np.ndarray]:
        """CSR of the left-out items."""
        return np.arange(self.num_users + 1), self.best_item

    @property
    def seen(self) -> tuple[np.ndarray, np.ndarray]:
        """CSR of the training items."""
        users, items = self.train
        return np.concatenate([[0], np.bincount(users, minlength=self.num_users).cumsum()]), items


def planted_blocks(num_blocks: int = 3, users_per_block: int = 12, items_per_block: int = 6) -> PlantedBlocks:
    """Blocks of users and items, interleaved (user u is in block u % num_blocks, likewise items).

    User number n of a block misses item number n % items_per_block of it and has all its others, so within a block
    all items are about equally popular, and the missing one is the only unseen item of the block.
    """
    num_users, num_items = num_blocks * users_per_block, num_blocks * items_per_block
    block_of_user, block_of_item = np.arange(num_users) % num_blocks, np.arange(num_items) % num_blocks
    best_item = (np.arange(num_users) // num_blocks % items_per_block) * num_blocks + block_of_user
    likes = block_of_user[:, None] == block_of_item[None, :]
    likes[np.arange(num_users), best_item] = False
    return PlantedBlocks(num_users, num_items, likes.nonzero(), best_item, block_of_user, block_of_item)


@cache
def _fitted_once(contract: type[RecommenderContract]) -> Any:
    return contract().fit(planted_blocks())


class RecommenderContract:
    """Derive a class named Test..., give `fit` (and `reload` if the model is not saved by pickle).

    `personal` is False for a model that gives everybody the same list: it cannot find the planted items.
    """

    personal = True

    def fit(self, data: PlantedBlocks, seed: int = 0) -> Any:
        """A scorer trained on `data.train` only."""
        raise NotImplementedError

    def reload(self, scorer: Any, folder: Path) -> Any:
        """The scorer, saved into `folder` and loaded again."""
        path = folder / "scorer.pickle"
        path.write_bytes(pickle.dumps(scorer))
        return pickle.loads(path.read_bytes())

    @pytest.fixture
    def data(self) -> PlantedBlocks:
        return planted_blocks()

    @pytest.fixture
    def scorer(self) -> Any:
        return _fitted_once(type(self))

    @pytest.fixture
    def all_scores(self, data: PlantedBlocks, scorer: Any) -> torch.Tensor:
        with torch.no_grad():
            return scorer.scores(torch.arange(data.num_users)).clone()

    def test_scores_are_finite_float32_per_user_and_item(self, data, all_scores):
        assert all_scores.shape == (data.num_users, data.num_items)
        assert all_scores.dtype == torch.float32
        assert torch.isfinite(all_scores).all()

    def test_planted_item_is_best_unseen_item(self, data, scorer):
        if not self.personal:
            pytest.skip("the same list for everybody cannot follow blocks")
        result = ranking_metrics(scorer, data.targets, seen=data.seen, ks=(1,))
        assert result.metrics["recall@1"] == 1.0

    def test_single_user_equals_batch(self, data, scorer, all_scores):
        with torch.no_grad():
            single = torch.cat([scorer.scores(torch.tensor([user])) for user in range(data.num_users)])
        torch.testing.assert_close(single, all_scores, rtol=1e-5, atol=1e-6)

    def test_order_of_users_does_not_matter(self, data, scorer, all_scores):
        users = torch.arange(data.num_users).flip(0)
        with torch.no_grad():
            torch.testing.assert_close(scorer.scores(users), all_scores[users], rtol=1e-5, atol=1e-6)

    def test_seen_items_are_never_returned(self, data, scorer):
        seen_as_targets = data.seen
        k = data.num_items
        masked = ranking_metrics(scorer, seen_as_targets, seen=data.seen, ks=(k,))
        unmasked = ranking_metrics(scorer, seen_as_targets, ks=(k,))
        assert masked.metrics[f"recall@{k}"] == 0.0
        assert unmasked.metrics[f"recall@{k}"] == 1.0

    def test_same_seed_gives_same_scores(self, data, all_scores):
        with torch.no_grad():
            again = self.fit(data).scores(torch.arange(data.num_users))
        assert torch.equal(again, all_scores)

    def test_saved_and_loaded_scores_are_equal(self, data, scorer, all_scores, tmp_path):
        with torch.no_grad():
            assert torch.equal(self.reload(scorer, tmp_path).scores(torch.arange(data.num_users)), all_scores)
