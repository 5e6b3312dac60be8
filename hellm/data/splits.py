"""Ways to divide events into train (0), validation (1) and test (2), and what is only history of its user (3).

All functions take events grouped by user and in time order within a user, as `Dataset` keeps them. **Ties:** events of
one user with the same time stay in the order of the source, so with day-granular times the held-out item depends on
that order; `check_dataset` reports how many events are tied. A global time cut never separates events of the same time.
"""

from __future__ import annotations

import numpy as np

from hellm.data.histories import user_counts

SPLIT_NAMES = ("given", "leave-two-out", "ratio", "time", "item-cold", "user-cold")
MIN_EVENTS = 3


# Events that are looked at once.
_EVENTS = 1 << 20


def _ends(users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Length of each user's history, and the place of the event after its last, both [largest user + 1] int64."""
    lengths = user_counts(users, int(users[-1]) + 1 if len(users) else 0)
    return lengths, np.cumsum(lengths)


def leave_two_out(users: np.ndarray) -> np.ndarray:
    """Last event of each user = test, the one before = validation, the rest train.

    Users with fewer than 3 events are all train, as they would otherwise have no history to be scored from.

    Args:
        users: [num_events] int64, grouped.

    Returns: [num_events] int8.
    """
    length, end = _ends(users)
    end = end[length >= MIN_EVENTS]
    split = np.zeros(len(users), np.int8)
    split[end - 1], split[end - 2] = 2, 1
    return split


def ratio(users: np.ndarray, ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> np.ndarray:
    """First part of each user's history = train, the next validation, the last test.

    Shares are rounded down, but each asked-for held-out part gets at least one event and train keeps at least one.
    Users with fewer than 3 events are all train.

    Args:
        users: [num_events] int64, grouped.
        ratios: Shares of train, validation and test; they add up to 1.

    Returns: [num_events] int8.
    Raises: ValueError: Shares that are negative, leave train empty or do not add up to 1.
    """
    _check_ratios(ratios)
    length, end = _ends(users)
    # 1e-9: 0.1 * 30 must count as 3 although the product may lie just below it.
    valid = np.maximum(np.floor(length * ratios[1] + 1e-9), ratios[1] > 0)
    test = np.maximum(np.floor(length * ratios[2] + 1e-9), ratios[2] > 0)
    valid = np.minimum(valid, length - 1 - (ratios[2] > 0))
    test = np.minimum(test, length - valid - 1)
    enough = length >= MIN_EVENTS
    first, second = (np.where(enough, end - held, end).astype(np.int64) for held in (valid + test, test))
    split = np.zeros(len(users), np.int8)
    for start in range(0, len(users), _EVENTS):
        owner = users[start : start + _EVENTS]
        place = np.arange(start, start + len(owner))
        split[start : start + _EVENTS] = (place >= first[owner]).astype(np.int8) + (place >= second[owner])
    return split


def time_cut(timestamps: np.ndarray | None, ratios: tuple[float, float, float] = (0.8, 0.1, 0.1)) -> np.ndarray:
    """Cut all events at two moments: what comes before the first is train, after the second test.

    The moments are those of the events at which the shares are reached; an event at that time is on the later side.

    Args:
        timestamps: [num_events] seconds.
        ratios: As `ratio`.

    Returns: [num_events] int8.
    Raises: ValueError: No timestamps, or bad shares.
    """
    _check_ratios(ratios)
    if timestamps is None:
        raise ValueError('split="time" needs timestamps, and the source has none')
    if not len(timestamps):
        return np.zeros(0, np.int8)
    ordered = np.sort(timestamps)
    first, second = (min(int(len(ordered) * share + 1e-9), len(ordered) - 1) for share in np.cumsum(ratios[:2]))
    split = (timestamps >= ordered[first]).astype(np.int8) + (timestamps >= ordered[second])
    if ratios[2] == 0:
        split = np.minimum(split, 1)
    if ratios[1] == 0:
        split = np.where(split == 1, 2, split)
    return split.astype(np.int8)


def item_cold(items: np.ndarray, num_items: int, *, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Keep a seeded share of the items out of train: half of them are validation items, half test items.

    A held-out event may be older than the train events of its user: this split measures new items, not the future.

    Args:
        items: [num_events] int64.
        num_items: Number of items.
        share: Share of the items with events that are held out, 0 < share < 1.
        seed: Of the choice.

    Returns: [num_events] int8.
    Raises: ValueError: Share out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"cold_share must lie between 0 and 1, got {share}")
    sold = np.flatnonzero(user_counts(items, num_items))
    chosen = np.random.default_rng(seed).permutation(sold)[: max(2, round(share * len(sold)))]
    label = np.zeros(num_items, np.int8)
    label[chosen[: len(chosen) // 2]] = 1
    label[chosen[len(chosen) // 2 :]] = 2
    return _of_each(label, items)


def user_cold(users: np.ndarray, *, share: float = 0.2, seed: int = 0) -> np.ndarray:
    """Keep a seeded share of the users out of train: half of them are validation users, half test users.

    The last event of each of them is held out, and those before are history (3): known when it is to be found, but not
    trained on. Only users with 3 events or more are kept out, so that there is a history to go by.

    Args:
        users: [num_events] int64, grouped.
        share: Share of these users that are kept out, 0 < share < 1.
        seed: Of the choice.

    Returns: [num_events] int8.
    Raises: ValueError: Share out of range.
    """
    if not 0 < share < 1:
        raise ValueError(f"cold_share must lie between 0 and 1, got {share}")
    length, end = _ends(users)
    enough = np.flatnonzero(length >= MIN_EVENTS)
    chosen = np.random.default_rng(seed).permutation(enough)[: max(2, round(share * len(enough)))]
    history = np.zeros(len(length), np.int8)
    history[chosen] = 3
    split = _of_each(history, users)
    split[end[chosen[: len(chosen) // 2]] - 1] = 1
    split[end[chosen[len(chosen) // 2 :]] - 1] = 2
    return split


def _of_each(label: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """[n] int8: the label of the owner of each event."""
    split = np.empty(len(owners), np.int8)
    for start in range(0, len(owners), _EVENTS):
        split[start : start + _EVENTS] = label[owners[start : start + _EVENTS]]
    return split


def _check_ratios(ratios: tuple[float, float, float]) -> None:
    if len(ratios) != 3 or ratios[0] <= 0 or min(ratios) < 0 or abs(sum(ratios) - 1) > 1e-6:
        raise ValueError(f"ratios must be three shares that add up to 1, the first above 0, got {tuple(ratios)}")
