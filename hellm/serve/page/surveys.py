"""What customers at large are shown: the lists of a sample of them, of bounded size and time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hellm.serve.answers import one_by_one
from hellm.serve.service import Service
from hellm.serve.state import Snapshot

__all__ = ["Survey", "Surveys"]

# Customers that are asked for at most, and the seconds after which no more are.
_CUSTOMERS, _SECONDS = 1000, 4.0
_LENGTH = 10
# Lists in one turn of the model to begin with; more where a turn is short, so that nobody waits long behind one.
_CHUNK, _TURN = 8, 0.2


@dataclass(frozen=True, eq=False)
class Survey:
    """The first places of the lists of some customers, drawn evenly.

    Attributes:
        users: [n] rows of the customers.
        lists: [n, k] rows of items, -1 where a list is shorter.
        num_users: Customers that there are.
    """

    users: np.ndarray
    lists: np.ndarray
    num_users: int

    @property
    def k(self) -> int:
        """Length of the lists."""
        return self.lists.shape[1]

    def counts(self, num_items: int) -> np.ndarray:
        """[num_items] lists that each item is in."""
        return np.bincount(self.lists[self.lists >= 0], minlength=num_items)

    def ranks(self, item: int) -> list[tuple[int, int]]:
        """Rows of the customers who are shown an item, and its place in their lists from 1, the first places first."""
        rows, places = (self.lists == item).nonzero()
        order = np.lexsort((rows, places))
        return list(zip(self.users[rows[order]].tolist(), (places[order] + 1).tolist(), strict=True))


@one_by_one
def _lists(snapshot: Snapshot, request: tuple[Snapshot, Sequence[int], int]) -> np.ndarray:
    """[n, k] rows of items; of the snapshot in the request, which may be one that is not served."""
    own, users, k = request
    recommender = own.recommender
    found = np.full((len(users), k), -1, np.int64)
    for row, one in enumerate(recommender.recommend([recommender.user_ids.ids[user] for user in users], k=k)):
        found[row, : len(one)] = recommender.item_ids.indices(item.item for item in one)
    return found


class Surveys:
    """Takes surveys, one at a time; that of what is served is taken once."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._served: tuple[Snapshot, Survey] | None = None
        self._keeping, self._taking = asyncio.Lock(), asyncio.Lock()

    async def of_served(self, snapshot: Snapshot) -> Survey:
        """Of what is served, kept until something changes."""
        async with self._keeping:
            if self._served is None or self._served[0] is not snapshot:
                self._served = (snapshot, await self.of(snapshot))
            return self._served[1]

    async def of(self, snapshot: Snapshot) -> Survey:
        """Of any snapshot. Raises: Overloaded."""
        async with self._taking:
            return await self._taken(snapshot)

    async def _taken(self, snapshot: Snapshot) -> Survey:
        recommender = snapshot.recommender
        k = min(_LENGTH, recommender.num_items)
        draw = np.random.default_rng(0)
        users = draw.permutation(recommender.num_users)[:_CUSTOMERS]
        lists, done, chunk, started = [], 0, _CHUNK, time.monotonic()
        while done < len(users) and (not done or time.monotonic() - started < _SECONDS):
            part, begun = users[done : done + chunk].tolist(), time.monotonic()
            lists.append(await self._service.read(_lists, (snapshot, part, k)))
            done += len(part)
            if time.monotonic() - begun < _TURN / 2:
                chunk *= 2
        found = np.concatenate(lists) if lists else np.zeros((0, k), np.int64)
        return Survey(users[: len(found)], found, recommender.num_users)
