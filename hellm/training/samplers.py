"""Training triples (user, positive item, negative item) for pairwise losses.

Every step is a pure function of (seed, epoch, step): an interrupted run continues with the same triples, and there is
no generator state to keep.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm.data import Histories
from hellm.data.histories import user_counts
from hellm.training.device_random import RandomWords, distinct_below, step_keys, uniform_below

__all__ = ["SAMPLERS", "DeviceTripleSampler", "TripleSampler", "Triples"]

SAMPLERS = ("user-uniform", "interaction-uniform")
NEGATIVES = ("uniform", "popularity")
# Exponent of the popularity of negatives (word2vec's noise distribution, Mikolov et al. 2013).
_POPULARITY_POWER = 0.75
# Rounds of rejection before a user's free items are listed: only users with nearly the whole catalogue get there.
_MAX_REJECTIONS = 64


class Triples(NamedTuple):
    """One batch: three arrays or tensors [B] int64."""

    users: np.ndarray | Tensor
    positives: np.ndarray | Tensor
    negatives: np.ndarray | Tensor


class TripleSampler:
    """Batches of training triples.

    "user-uniform" (published): distinct users, uniformly, then one of the user's training events, uniformly; an epoch
    has num_events // batch_size + 1 steps. "interaction-uniform": every event once per epoch in random order; the last
    batch may be smaller. A negative is an item that the user has no training event with ("uniform" over those, or
    proportional to training popularity^0.75); held-out items may be drawn, as nothing in training may know them.

    Args:
        users: [num_events] int64 users of the training events.
        items: [num_events] int64 items of the training events.
        num_users: rows of the user table.
        num_items: rows of the item table.
        batch_size: users (or events) per step; fewer where there are fewer.
        strategy: "user-uniform" or "interaction-uniform".
        negatives: "uniform" or "popularity".
        seed: >= 0.

    Raises:
        ValueError: an unknown strategy, batch_size < 1, differing lengths, an id out of range, or no user with both a
            training event and a free item.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        num_users: int,
        num_items: int,
        *,
        batch_size: int = 1024,
        strategy: str = "user-uniform",
        negatives: str = "uniform",
        seed: int = 0,
    ) -> None:
        users, items = np.asarray(users, dtype=np.int64), np.asarray(items, dtype=np.int64)
        _check(users, items, num_users, num_items, batch_size, strategy, negatives)
        self.num_items, self.strategy, self.seed = num_items, strategy, seed
        if (users[1:] < users[:-1]).any():
            order = np.argsort(users, kind="stable")
            users, items = users[order], items[order]
        self._users, self._items = users, items
        self._keys = _distinct_keys(users, items, num_items)
        distinct = user_counts(self._keys, num_users, divisor=num_items)
        eligible = (distinct > 0) & (distinct < num_items)
        if not eligible.any():
            raise ValueError("no user has both a training event and an item without one, so no triple can be drawn")
        self._eligible = np.flatnonzero(eligible)
        self._indptr = Histories.of_events(users, items, num_users).indptr
        self._events = np.flatnonzero(eligible[users]) if strategy == "interaction-uniform" else None
        limit = len(self._eligible) if self._events is None else len(self._events)
        self.batch_size = min(batch_size, limit)
        self._permutation: tuple[int, np.ndarray] | None = None
        self._cumulative = None
        if negatives == "popularity":
            weight = np.bincount(items, minlength=num_items) ** _POPULARITY_POWER
            self._cumulative = np.cumsum(weight) / weight.sum()

    @property
    def is_published(self) -> bool:
        """Whether triples are drawn as published, which `DeviceTripleSampler` can do as well."""
        return self.strategy == "user-uniform" and self._cumulative is None

    @property
    def num_steps(self) -> int:
        """Steps per epoch."""
        if self._events is None:
            return len(self._users) // self.batch_size + 1
        return -(-len(self._events) // self.batch_size)

    def sample(self, epoch: int, step: int) -> Triples:
        """The triples of one step, B <= batch_size of them."""
        rng = np.random.default_rng((self.seed, epoch, step))
        if self.strategy == "user-uniform":
            users = self._eligible[rng.choice(len(self._eligible), self.batch_size, replace=False, shuffle=False)]
            start, stop = self._indptr[users], self._indptr[users + 1]
            positives = self._items[rng.integers(start, stop)]
        else:
            events = self._epoch_order(epoch)[step * self.batch_size : (step + 1) * self.batch_size]
            users, positives = self._users[events], self._items[events]
        return Triples(users, positives, self.sample_negatives(users, rng))

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            assert self._events is not None  # of "interaction-uniform"
            order = np.random.default_rng((self.seed, epoch)).permutation(self._events)
            self._permutation = (epoch, order)
        return self._permutation[1]

    def sample_negatives(self, users: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One item [B] int64 for each of `users` [B], of those that the user has no training event with."""
        negatives = self._draw_items(len(users), rng)
        open_rows = np.arange(len(users))
        for _ in range(_MAX_REJECTIONS):
            open_rows = open_rows[self._is_known(users[open_rows], negatives[open_rows])]
            if not len(open_rows):
                return negatives
            negatives[open_rows] = self._draw_items(len(open_rows), rng)
        for row in open_rows[self._is_known(users[open_rows], negatives[open_rows])]:
            negatives[row] = self._draw_free_item(int(users[row]), rng)
        return negatives

    def _draw_items(self, size: int, rng: np.random.Generator) -> np.ndarray:
        if self._cumulative is None:
            return rng.integers(self.num_items, size=size)
        return np.searchsorted(self._cumulative, rng.random(size), side="right").clip(max=self.num_items - 1)

    def _draw_free_item(self, user: int, rng: np.random.Generator) -> int:
        known = self._items[self._indptr[user] : self._indptr[user + 1]]
        free = np.setdiff1d(np.arange(self.num_items), known)
        weight = None
        if self._cumulative is not None:
            weight = np.diff(self._cumulative, prepend=0.0)[free]
            # Free items nobody has: popularity says nothing, so all count the same.
            weight = weight / weight.sum() if weight.sum() > 0 else None
        return rng.choice(free, p=weight)

    def _is_known(self, users: np.ndarray, items: np.ndarray) -> np.ndarray:
        keys = users * self.num_items + items
        place = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return self._keys[place] == keys


class DeviceTripleSampler:
    """The published triples of a `TripleSampler`, drawn on the device: the same distribution, other numbers.

    "user-uniform" with "uniform" negatives only. A negative is the r-th of the user's free items, r uniform, so there
    is nothing to reject and nothing to wait for. A step is a function of (seed, epoch, step), the same on every device.

    Args:
        sampler: whose events, batch size and seed are used.
        device: where triples are drawn.
        choices: per further stream (of how many rows, how many of them): distinct rows drawn beside the triples.

    Raises:
        ValueError: a sampler of another strategy or other negatives.
    """

    def __init__(
        self, sampler: TripleSampler, device: torch.device | str, choices: tuple[tuple[int, int], ...] = ()
    ) -> None:
        if not sampler.is_published:
            raise ValueError('sampler must be "user-uniform" with "uniform" negatives to be drawn on the device')
        self.batch_size, self.num_steps, self._seed = sampler.batch_size, sampler.num_steps, sampler.seed
        self._num_items, self._sizes = sampler.num_items, [size for _, size in choices]
        known_user, known_item = np.divmod(sampler._keys, sampler.num_items)
        first = np.searchsorted(known_user, np.arange(len(sampler._indptr)))
        # Free items of the user before each known one, ascending over all users as a whole.
        free_before = sampler._keys - (np.arange(len(known_item)) - first[known_user])
        arrays = (sampler._eligible, sampler._indptr, sampler._items, first, free_before)
        self._eligible, self._indptr, self._items, self._first, self._free_before = (
            torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays
        )
        lengths = [len(sampler._eligible), *[self.batch_size] * 4, *(count for count, _ in choices)]
        self._words = RandomWords(lengths, device)
        self._num_streams = len(lengths)

    def keys(self, epoch: int, step: int) -> Tensor:
        """What `draw` needs to draw one step, [S, 2] int64 on the CPU."""
        return step_keys(self._seed, epoch, step, self._num_streams)

    def draw(self, keys: Tensor) -> tuple[Triples, list[Tensor]]:
        """The triples of `keys` (on the device), and the rows of each of `choices`."""
        all_users, *words = self._words.draw(keys)
        users = self._eligible[distinct_below(all_users, self.batch_size)]
        start = self._indptr[users]
        positives = self._items[start + uniform_below(self._indptr[users + 1] - start, *words[:2])]
        first = self._first[users]
        rank = uniform_below(self._num_items - (self._first[users + 1] - first), *words[2:4])
        passed = torch.searchsorted(self._free_before, users * self._num_items + rank, right=True) - first
        rows = [distinct_below(word, size) for word, size in zip(words[4:], self._sizes, strict=True)]
        return Triples(users, positives, rank + passed), rows


def _distinct_keys(users: np.ndarray, items: np.ndarray, num_items: int) -> np.ndarray:
    """Distinct users * num_items + items, ascending, [n] int64; sorted in place, as `np.unique` does not."""
    keys = users * num_items
    keys += items
    keys.sort()
    new = np.ones(len(keys), bool)
    np.not_equal(keys[1:], keys[:-1], out=new[1:])
    return keys if new.all() else keys[new]


def _check(users, items, num_users, num_items, batch_size, strategy, negatives) -> None:
    if strategy not in SAMPLERS:
        raise ValueError(f"strategy must be one of {', '.join(map(repr, SAMPLERS))}, got {strategy!r}")
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives must be one of {', '.join(map(repr, NEGATIVES))}, got {negatives!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if users.shape != items.shape or users.ndim != 1:
        raise ValueError(f"users and items must be [num_events] alike, got {users.shape} and {items.shape}")
    for name, ids, size in (("users", users, num_users), ("items", items, num_items)):
        if len(ids) and (ids.min() < 0 or ids.max() >= size):
            raise ValueError(f"{name} must be in [0, {size}), got {ids[(ids < 0) | (ids >= size)][0]}")
