"""What the pages ask a snapshot for, each answered on one: the questions of the API, put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from hellm.serve import answers
from hellm.serve.answers import known_ids, one_by_one
from hellm.serve.errors import RequestError
from hellm.serve.schema import RecommendRequest
from hellm.serve.state import Snapshot
from hellm.serve.store import Entry
from hellm.serve.writer import with_item

__all__ = ["basket", "customer", "named", "product", "product_to_be"]

LENGTH = 10
_REASONS = 2
# Places in which an item that moves is looked for.
_BEFORE = 100


def named(snapshot: Snapshot, rows: Sequence[int] | np.ndarray) -> list[dict[str, Any]]:
    """Items by row, as the templates take them."""
    recommender = snapshot.recommender
    return [{"item": recommender.item_ids.ids[row], "title": recommender.item_titles[row]} for row in rows]


def _answer(snapshot: Snapshot, **request: Any) -> dict[str, Any]:
    """The one list of a request, with its reasons, exactly as `POST /recommend` answers it."""
    request = {"k": min(LENGTH, snapshot.recommender.num_items), "explain": _REASONS} | request
    (answer,) = answers.recommend(snapshot, [RecommendRequest(**request)])
    if isinstance(answer, BaseException):
        raise answer
    return answer["lists"][0]


@one_by_one
def customer(snapshot: Snapshot, user: str) -> dict[str, Any]:
    """A list with reasons, and what was bought, the last first."""
    recommender = snapshot.recommender
    known_ids([user], recommender.user_ids, snapshot.nearest_users, "id", kind="customer", status=404)
    bought = recommender.histories.take(np.array([recommender.user_ids.index(user)])).items[::-1]
    return {"list": _answer(snapshot, users=[user]), "bought": named(snapshot, bought)}


@one_by_one
def basket(snapshot: Snapshot, items: Sequence[str]) -> dict[str, Any]:
    """A list for a history, and where its items stood before the last of the history was added.

    "before" is rank -> rank of the items of the list, without those that were not among the first hundred.
    """
    recommender = snapshot.recommender
    titles = recommender.item_titles
    found = _answer(snapshot, histories=[list(items)])
    before = {}
    if items:
        k = min(_BEFORE, recommender.num_items)
        old = _answer(snapshot, histories=[list(items[:-1])], k=k, explain=0)
        before = {one["item"]: rank for rank, one in enumerate(old["items"], 1)}
    return {
        "list": found,
        "before": before,
        "items": [{"item": one, "title": titles[recommender.item_ids.index(one)]} for one in items],
    }


@one_by_one
def product(snapshot: Snapshot, item: str) -> dict[str, Any]:
    """An item, the items like it, and who bought it."""
    return _product(snapshot, item)


@one_by_one
def product_to_be(snapshot: Snapshot, entry: Entry) -> tuple[Snapshot, Snapshot, dict[str, Any]]:
    """What is served, the same with an item that nobody stores, and that item as `product` tells of it."""
    if entry.key in snapshot.recommender.item_ids:
        raise RequestError(409, f"product {entry.key!r} is in the shop already", field="id")
    new = with_item(snapshot, entry)
    return snapshot, new, _product(new, entry.key)


def _product(snapshot: Snapshot, item: str) -> dict[str, Any]:
    recommender = snapshot.recommender
    known_ids([item], recommender.item_ids, snapshot.nearest_items, "id", kind="product", status=404)
    row, histories = recommender.item_ids.index(item), recommender.histories
    events = np.flatnonzero(histories.items == row)
    buyers = np.unique(np.searchsorted(histories.indptr, events, side="right") - 1)
    alike = recommender.similar_items(item, min(LENGTH, recommender.num_items - 1)) if recommender.num_items > 1 else []
    return {
        **named(snapshot, [row])[0],
        "row": row,
        "events": len(events),
        "buyers": [recommender.user_ids.ids[one] for one in buyers],
        "alike": [vars(one) for one in alike],
    }
