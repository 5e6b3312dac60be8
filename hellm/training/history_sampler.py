"""Batches of histories and the items that came next, for models whose cost is the number of tokens.

B = histories of a batch, N = items in all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["HistoryBatch", "HistorySampler"]


class HistoryBatch(NamedTuple):
    """One batch as CSR.

    Attributes:
        indptr: [B + 1] int64, where each history starts.
        items: [N] int64, in time order.
        targets: the next item, [N] int64 after each item, or [B] int64 after each history.
    """

    indptr: np.ndarray
    items: np.ndarray
    targets: np.ndarray

    def share(self, index: int, count: int) -> HistoryBatch:
        """The histories of one of `count` processes; all shares together are the batch, and some may be empty."""
        num_histories = len(self.indptr) - 1
        rows = slice(num_histories * index // count, num_histories * (index + 1) // count)
        places = slice(self.indptr[rows.start], self.indptr[rows.stop])
        indptr = self.indptr[rows.start : rows.stop + 1] - self.indptr[rows.start]
        return HistoryBatch(
            indptr, self.items[places], self.targets[rows if len(self.targets) == num_histories else places]
        )


class HistorySampler:
    """Histories of similar length together, so that little of a batch is padding.

    Either one history per user whose every position has a target (`per_target=False`), or one history per target, as in
    the published training loop, where a user of n events makes n - 1 of them. Sorted by length with ties in random
    order, histories are cut into batches, which come in random order. A batch is a function of (seed, epoch, step).

    Args:
        users: [num_events] int64 training events, grouped by user, in time order.
        items: [num_events] int64.
        num_users: rows of the user table.
        per_target: one history per target.
        max_length: items kept of a history, the latest; >= 1.
        batch_tokens: padded tokens per batch at most, but at least one history; >= 1.
        batch_size: histories per batch at most; None leaves it to `batch_tokens`.
        tokens_around: tokens of a history besides its items.
        tokens_per_item: tokens of an item.
        sort: False takes histories in random order, batches of `batch_size`, as published.
        seed: >= 0.

    Attributes:
        num_histories, num_targets, num_tokens: per epoch; tokens without padding.
        num_padded_tokens: with padding (for `sort=False` an upper bound).
        num_steps: batches per epoch.

    Raises: ValueError, an argument out of range, or no user with two events.
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        num_users: int,
        *,
        per_target: bool = False,
        max_length: int = 50,
        batch_tokens: int = 1024,
        batch_size: int | None = None,
        tokens_around: int = 0,
        tokens_per_item: int = 1,
        sort: bool = True,
        seed: int = 0,
    ) -> None:
        for name, value in {"max_length": max_length, "batch_tokens": batch_tokens, "batch_size": batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not sort and batch_size is None:
            raise ValueError("batch_size must be given with sort=False, got None")
        self._items, self._seed, self._sort, self._per_target = np.asarray(items), seed, sort, per_target
        count = np.bincount(users, minlength=num_users)
        first = count.cumsum() - count
        if per_target:
            # The event at `stop` is the target of the history before it.
            own_first = np.repeat(first, count)
            self._stop = np.flatnonzero(np.arange(len(items)) > own_first)
            before = self._stop - own_first[self._stop]
        else:
            self._stop = (first + count - 1)[count > 1]
            before = count[count > 1] - 1
        if not len(self._stop):
            raise ValueError("no user has two training events, so there is no next item to learn")
        self._length = np.minimum(before, max_length)
        self._around, self._per_item = tokens_around, tokens_per_item
        tokens = self.tokens_of(self._length)
        size = len(self._stop) if batch_size is None else batch_size
        # Cuts depend on the sorted lengths alone, so every epoch has the same number of steps.
        bounds = _cut(np.sort(tokens), batch_tokens, size) if sort else range(0, len(tokens) + size, size)
        self._bounds = np.minimum(np.asarray(bounds), len(tokens))
        self.num_histories, self.num_targets = len(tokens), int(len(tokens) if per_target else self._length.sum())
        self.num_tokens = int(tokens.sum())
        ordered = np.sort(tokens) if sort else np.full(len(tokens), tokens.max())
        # With random batches an upper bound: the longest of a batch is not known before.
        self.num_padded_tokens = int((np.diff(self._bounds) * ordered[self._bounds[1:] - 1]).sum())
        self.num_steps = len(self._bounds) - 1
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None

    def tokens_of(self, length):
        """Tokens of a history of `length` items."""
        return self._around + self._per_item * length

    def sample(self, epoch: int, step: int) -> HistoryBatch:
        """The batch of one step."""
        order, batches = self._order(epoch)
        rows = order[self._bounds[batches[step]] : self._bounds[batches[step] + 1]]
        length, stop = self._length[rows], self._stop[rows]
        indptr = np.concatenate([[0], length.cumsum()])
        place = np.arange(indptr[-1]) + np.repeat(stop - length - indptr[:-1], length)
        targets = self._items[stop] if self._per_target else self._items[place + 1]
        return HistoryBatch(indptr, self._items[place], targets)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng((self._seed, epoch))
            order = rng.permutation(self.num_histories)
            if self._sort:
                order = order[np.argsort(self._length[order], kind="stable")]
            self._epoch = (epoch, order, rng.permutation(self.num_steps) if self._sort else np.arange(self.num_steps))
        return self._epoch[1:]


def _cut(tokens: np.ndarray, batch_tokens: int, batch_size: int) -> list[int]:
    """Bounds of batches of rows sorted by `tokens`, whose longest row counts for all: greedy."""
    bounds, start = [0], 0
    for stop, longest in enumerate(tokens.tolist(), start=1):
        size = stop - start
        if size > 1 and (size * longest > batch_tokens or size > batch_size):
            bounds.append(stop - 1)
            start = stop - 1
    return [*bounds, len(tokens)]
