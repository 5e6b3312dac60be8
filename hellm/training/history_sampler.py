"""Batches of histories and the items that came next: for models that cost by the token, and for SASRec.

B = histories of a batch, N = items in all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hellm.training.processes import Processes
from hellm.training.samplers import TripleSampler

__all__ = ["HistoryBatch", "HistorySampler", "SequenceSampler"]


class HistoryBatch(NamedTuple):
    """One batch as CSR.

    Attributes:
        indptr: [B + 1] int64, where each history starts.
        items: [N] int64, in time order.
        targets: the next item, [N] int64 after each item, or [B] int64 after each history.
        negatives: an item that the user has no training event with, as `targets`; None if none were asked for.
    """

    indptr: np.ndarray
    items: np.ndarray
    targets: np.ndarray
    negatives: np.ndarray | None = None

    def part(self, rows: slice) -> HistoryBatch:
        """Some of the histories."""
        places = slice(self.indptr[rows.start], self.indptr[rows.stop])
        targets = rows if len(self.targets) == len(self.indptr) - 1 else places
        return HistoryBatch(
            self.indptr[rows.start : rows.stop + 1] - self.indptr[rows.start],
            self.items[places],
            self.targets[targets],
            None if self.negatives is None else self.negatives[targets],
        )

    def share(self, processes: Processes) -> tuple[HistoryBatch, float]:
        """The histories of this process, and what part of all targets they have.

        Where there are fewer histories than processes, some have one that counts for nothing: all run the model alike.
        """
        rows = processes.share(len(self.indptr) - 1)
        own = self.part(rows)
        return (own, len(own.targets) / len(self.targets)) if len(own.targets) else (self.part(slice(0, 1)), 0.0)


class _NextItems:
    """Histories in a new order every epoch, and what came next; a batch depends on seed, epoch and step alone.

    Args:
        items: [num_events] int64 training events, grouped by user, in time order.
        stop: [num_histories] int64, the event after the last of each history.
        length: [num_histories] int64, items of each, >= 1.
        per_target: a target after each history only, not after each item.
        seed: >= 0.
    Raises: ValueError, no history.
    """

    num_steps: int

    def __init__(self, items: np.ndarray, stop: np.ndarray, length: np.ndarray, *, per_target: bool, seed: int) -> None:
        if not len(stop):
            raise ValueError("no user has two training events, so there is no next item to learn")
        self._items, self._stop, self._length = np.asarray(items), stop, length
        self._per_target, self._seed = per_target, seed
        self._epoch: tuple[int, tuple[np.ndarray, np.ndarray, np.ndarray]] | None = None

    def sample(self, epoch: int, step: int) -> HistoryBatch:
        """The batch of one step."""
        rows = self._rows(epoch, step)
        length, stop = self._length[rows], self._stop[rows]
        indptr = np.concatenate([[0], length.cumsum()])
        place = np.arange(indptr[-1]) + np.repeat(stop - length - indptr[:-1], length)
        targets = self._items[stop] if self._per_target else self._items[place + 1]
        return HistoryBatch(indptr, self._items[place], targets)

    def _rows(self, epoch: int, step: int) -> np.ndarray:
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (epoch, self._arrange(np.random.default_rng((self._seed, epoch))))
        order, first, last = self._epoch[1]
        return order[first[step] : last[step]]

    def _arrange(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The histories in the order of an epoch, and the bounds of every step's among them."""
        raise NotImplementedError


class HistorySampler(_NextItems):
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
        max_steps: batches per epoch at most, every epoch others; >= 1. None takes all.
        seed: >= 0.

    Attributes:
        num_histories, num_targets, num_tokens: per epoch, on average where `max_steps` leaves some out; tokens without
            padding.
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
        max_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        at_least_1 = {"max_length": max_length, "batch_tokens": batch_tokens, "batch_size": batch_size}
        for name, value in (at_least_1 | {"max_steps": max_steps}).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if not sort and batch_size is None:
            raise ValueError("batch_size must be given with sort=False, got None")
        first, last = _events_of_users(users, num_users)
        if per_target:
            # The event at `stop` is the target of the history before it.
            first = np.repeat(first, last - first + 1)
            stop = np.flatnonzero(np.arange(len(items)) > first)
            before = stop - first[stop]
        else:
            stop = last[last > first]
            before = (last - first)[last > first]
        super().__init__(items, stop, np.minimum(before, max_length), per_target=per_target, seed=seed)
        self._sort, self._around, self._per_item = sort, tokens_around, tokens_per_item
        tokens = self.tokens_of(self._length)
        size = len(stop) if batch_size is None else batch_size
        # Cuts depend on the sorted lengths alone, so every epoch has the same number of steps.
        bounds = _cut(np.sort(tokens), batch_tokens, size) if sort else range(0, len(tokens) + size, size)
        self._bounds = np.minimum(np.asarray(bounds), len(tokens))
        batches = len(self._bounds) - 1
        self.num_steps = batches if max_steps is None else min(max_steps, batches)
        ordered = np.sort(tokens) if sort else np.full(len(tokens), tokens.max())
        # With random batches an upper bound: the longest of a batch is not known before.
        padded = (np.diff(self._bounds) * ordered[self._bounds[1:] - 1]).sum()
        targets = len(tokens) if per_target else self._length.sum()
        self.num_histories, self.num_targets, self.num_tokens, self.num_padded_tokens = (
            round(int(all_of_them) * self.num_steps / batches)
            for all_of_them in (len(tokens), targets, tokens.sum(), padded)
        )

    def tokens_of(self, length):
        """Tokens of a history of `length` items."""
        return self._around + self._per_item * length

    def _arrange(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order, batches = rng.permutation(len(self._length)), np.arange(len(self._bounds) - 1)
        if self._sort:
            order, batches = order[np.argsort(self._length[order], kind="stable")], rng.permutation(batches)
        batches = batches[: self.num_steps]
        return order, self._bounds[batches], self._bounds[batches + 1]


class SequenceSampler(_NextItems):
    """Batches of training sequences; every position of every sequence is a target once per epoch.

    Users are shuffled per epoch and cut into steps of about equally many positions, never a part of a user. A step is a
    pure function of (seed, epoch, step).

    Args:
        users, items: [num_events] int64 training events, grouped by user, in time order.
        num_users, num_items: Counts.
        max_length: positions per user, the latest; >= 1.
        batch_size: positions per step, >= max_length; on average slightly more, all if there are fewer.
        negatives: whether to draw a negative per position, uniformly.
        seed: >= 0.
    Raises: ValueError, an argument out of range, or no user with two events (and, for negatives, a free item).
    """

    def __init__(
        self,
        users: np.ndarray,
        items: np.ndarray,
        num_users: int,
        num_items: int,
        *,
        max_length: int = 50,
        batch_size: int = 2048,
        negatives: bool = False,
        seed: int = 0,
    ) -> None:
        if max_length < 1:
            raise ValueError(f"max_length must be >= 1, got {max_length}")
        if batch_size < max_length:
            raise ValueError(f"batch_size must be >= max_length {max_length} positions, got {batch_size}")
        first, last = _events_of_users(users, num_users)
        eligible = last > first
        self._triples = TripleSampler(users, items, num_users, num_items, seed=seed) if negatives else None
        if negatives:
            distinct = np.bincount(np.unique(users * num_items + items) // num_items, minlength=num_users)
            eligible &= distinct < num_items
        length = np.minimum(last - first, max_length)[eligible]
        super().__init__(items, last[eligible], length, per_target=False, seed=seed)
        self._users = np.flatnonzero(eligible)
        self.num_positions = int(length.sum())
        self.num_steps = max(1, self.num_positions // batch_size)

    def sample(self, epoch: int, step: int) -> HistoryBatch:
        """The sequences of one step."""
        batch = super().sample(epoch, step)
        if self._triples is None:
            return batch
        rng = np.random.default_rng((self._seed, epoch, step))
        users = np.repeat(self._users[self._rows(epoch, step)], np.diff(batch.indptr))
        return batch._replace(negatives=self._triples.sample_negatives(users, rng))

    def _arrange(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order = rng.permutation(len(self._users))
        length = self._length[order]
        # Steps are at least batch_size >= max_length positions wide, so a sequence starts in each of them.
        edges = np.arange(self.num_steps + 1) * self.num_positions / self.num_steps
        bounds = np.searchsorted(length.cumsum() - length, edges)
        return order, bounds[:-1], bounds[1:]


def _events_of_users(users: np.ndarray, num_users: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last event [num_users] of every user; the last is one before the first where there is none."""
    count = np.bincount(users, minlength=num_users)
    stop = count.cumsum()
    return stop - count, stop - 1


def _cut(tokens: np.ndarray, batch_tokens: int, batch_size: int) -> list[int]:
    """Bounds of batches of rows sorted by `tokens`, whose longest row counts for all: greedy."""
    bounds, start = [0], 0
    for stop, longest in enumerate(tokens.tolist(), start=1):
        size = stop - start
        if size > 1 and (size * longest > batch_tokens or size > batch_size):
            bounds.append(stop - 1)
            start = stop - 1
    return [*bounds, len(tokens)]
