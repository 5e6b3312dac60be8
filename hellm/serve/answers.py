"""Questions to a snapshot, answered as plain values that are ready for JSON.

Every function takes a snapshot and the requests that have come together, and gives an answer or an exception for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import orjson
from pydantic import BaseModel

from hellm.data import IdMap
from hellm.recommend import Recommendations, Recommender
from hellm.serve.errors import RequestError
from hellm.serve.nearest import Nearest
from hellm.serve.schema import ExplainRequest, HistoryRequest, RecommendRequest, SimilarRequest
from hellm.serve.state import Snapshot

__all__ = ["QUESTIONS", "explain", "history", "known_ids", "recommend", "similar", "written"]

Answer = dict[str, Any] | BaseException


def one_by_one(
    question: Callable[[Snapshot, Any], Any],
) -> Callable[[Snapshot, Sequence[Any]], list[Answer]]:
    """A question that is answered for one request at a time."""

    @wraps(question)
    def answers(snapshot: Snapshot, requests: Sequence[Any]) -> list[Answer]:
        found: list[Answer] = []
        for request in requests:
            try:
                found.append(question(snapshot, request))
            except Exception as error:
                found.append(error)
        return found

    return answers


def known_ids(
    ids: Sequence[str], known: IdMap, nearest: Nearest, field: str, *, kind: str = "item", status: int = 422
) -> None:
    """Raises: RequestError, the first id that is not known, with its place and the ids that look like it."""
    for place, one in enumerate(ids):
        if one not in known:
            raise RequestError(
                status,
                f"unknown {kind} {one!r} among the {len(known)} {kind}s of the run",
                field=field.format(place=place),
                nearest=nearest(one),
            )


class _Ids:
    """The ids of a request: all known, or without those that are not."""

    def __init__(self, snapshot: Snapshot, request: RecommendRequest) -> None:
        self.snapshot, self.ignore = snapshot, request.unknown == "ignore"
        self.ignored: dict[str, int] = {}
        recommender = snapshot.recommender
        self.users: list[str | None] | None = None
        self.histories: list[list[str]] | None = None
        if request.users is not None:
            kept = set(self._kept(request.users, recommender.user_ids, snapshot.nearest_users, "users", kind="user"))
            self.users = [user if user in kept else None for user in request.users]
        else:
            self.histories = [
                self._items(one, f"histories[{number}]", "histories")
                for number, one in enumerate(request.histories or ())
            ]
        self.exclude = self._items(request.exclude, "exclude")
        self.candidates = None if request.candidates is None else self._items(request.candidates, "candidates")

    def _items(self, ids: Sequence[str], field: str, counted: str | None = None) -> list[str]:
        return self._kept(ids, self.snapshot.recommender.item_ids, self.snapshot.nearest_items, field, counted)

    def _kept(
        self,
        ids: Sequence[str],
        known: IdMap,
        nearest: Nearest,
        field: str,
        counted: str | None = None,
        kind: str = "item",
    ) -> list[str]:
        if not self.ignore:
            known_ids(ids, known, nearest, field + "[{place}]", kind=kind)
            return list(ids)
        kept = [one for one in ids if one in known]
        if len(kept) < len(ids):
            counted = counted or field
            self.ignored[counted] = self.ignored.get(counted, 0) + len(ids) - len(kept)
        return kept


def recommend(snapshot: Snapshot, requests: Sequence[RecommendRequest]) -> list[Answer]:
    """Lists of users or histories, see `Recommender.recommend`.

    Requests that ask alike are one call of it where that changes no bit, see `Snapshot.is_row_exact`.
    """
    answers: list[Answer] = [{}] * len(requests)
    calls: dict[Any, list[tuple[int, _Ids]]] = {}
    for number, request in enumerate(requests):
        try:
            ids = _checked(snapshot, request)
        except RequestError as error:
            answers[number] = error
            continue
        alike = snapshot.is_row_exact and not (request.exclude or request.candidates is not None or request.filters)
        key = (request.users is None, request.k, request.exclude_seen) if alike else number
        calls.setdefault(key, []).append((number, ids))
    waiting = list(calls.values())
    while waiting:
        call = waiting.pop()
        request = requests[call[0][0]]
        try:
            lists = iter(_lists(snapshot.recommender, request, [ids for _, ids in call]))
            for number, ids in call:
                own = [next(lists) for _ in (ids.users if ids.users is not None else ids.histories or ())]
                answers[number] = _answer(snapshot, requests[number], ids, own)
        except Exception as error:
            if len(call) > 1:
                # One that has no answer does not take others along.
                waiting += [[one] for one in call]
            else:
                answers[call[0][0]] = error
    return answers


def _checked(snapshot: Snapshot, request: RecommendRequest) -> _Ids:
    recommender = snapshot.recommender
    if request.k > recommender.num_items:
        raise RequestError(
            422, f"must be in [1, {recommender.num_items}] (the number of items), got {request.k}", field="k"
        )
    for name, values in request.filters.items():
        content = recommender.content
        known = content.attributes if content is not None else {}
        if name not in known:
            raise RequestError(
                422,
                f"must be among the attributes of the run ({', '.join(known) or 'none'}), got {name!r}",
                field="filters",
            )
        unknown = [value for value in values if value not in known[name]]
        if unknown:
            nearest = Nearest(known[name])(unknown[0])
            message = f"unknown value {unknown[0]!r} among the {len(known[name])} that the run has"
            raise RequestError(422, message, field=f"filters.{name}", nearest=nearest)
    return _Ids(snapshot, request)


def _lists(recommender: Recommender, request: RecommendRequest, asked: Sequence[_Ids]) -> list[Recommendations]:
    """Those of all that is asked alike; of unknown users, those of an empty history."""
    candidates = asked[0].candidates
    if candidates is not None and not candidates:
        # All of them are unknown and ignored.
        return [
            Recommendations(user, "popularity", [])
            for ids in asked
            for user in (ids.users or [None] * len(ids.histories or ()))
        ]
    options = {
        "k": request.k,
        "exclude_seen": request.exclude_seen,
        "exclude": asked[0].exclude,
        "candidates": candidates,
        "attributes": request.filters,
    }
    if request.users is None:
        return recommender.recommend(histories=[one for ids in asked for one in ids.histories or ()], **options)
    users = [user for ids in asked for user in ids.users or ()]
    known = [user for user in users if user is not None]
    lists = iter(recommender.recommend(known, **options) if known else [])
    if len(known) == len(users):
        return list(lists)
    (popular,) = recommender.recommend(histories=[[]], **options)
    return [popular if user is None else next(lists) for user in users]


def _answer(snapshot: Snapshot, request: RecommendRequest, ids: _Ids, lists: Sequence[Recommendations]) -> Answer:
    names = request.users or [None] * len(lists)
    values = []
    for place, (name, one) in enumerate(zip(names, lists, strict=True)):
        value = {"user": name, "basis": one.basis, "items": [vars(item) for item in one.items]}
        if request.explain:
            owner = {"user": ids.users[place]} if ids.users is not None else {"history": (ids.histories or ())[place]}
            value["items"] = [
                item | {"reasons": _reasons(snapshot, item["item"], one.basis, owner, request.explain)}
                for item in value["items"]
            ]
        values.append(value)
    return {"lists": values, "ignored": ids.ignored, **snapshot.receipt()}


def _reasons(snapshot: Snapshot, item: str, basis: str, owner: dict[str, Any], k: int) -> list[dict[str, Any]]:
    if basis == "popularity":
        return []
    return [reason.to_dict() for reason in snapshot.recommender.explain(item, **owner, k=k)]


@one_by_one
def similar(snapshot: Snapshot, request: SimilarRequest) -> dict[str, Any]:
    """Items like an item, see `Recommender.similar_items`."""
    item, k = request.id, request.k
    recommender = snapshot.recommender
    known_ids([item], recommender.item_ids, snapshot.nearest_items, "id", status=404)
    most = recommender.num_items - 1
    if k > most:
        raise RequestError(422, f"must be in [1, {most}] (the other items), got {k}", field="k")
    return {"item": item, "items": [vars(one) for one in recommender.similar_items(item, k)], **snapshot.receipt()}


@one_by_one
def history(snapshot: Snapshot, request: HistoryRequest) -> dict[str, Any]:
    """All events of a user, see `Recommender.history`."""
    recommender, user = snapshot.recommender, request.id
    known_ids([user], recommender.user_ids, snapshot.nearest_users, "id", kind="user", status=404)
    return {"user": user, "items": [vars(one) for one in recommender.history(user)], **snapshot.receipt()}


@one_by_one
def explain(snapshot: Snapshot, request: ExplainRequest) -> dict[str, Any]:
    """Why an item is recommended, see `Recommender.explain`."""
    recommender = snapshot.recommender
    known_ids([request.item], recommender.item_ids, snapshot.nearest_items, "item")
    if request.user is not None:
        known_ids([request.user], recommender.user_ids, snapshot.nearest_users, "user", kind="user")
    elif request.history is not None:
        known_ids(request.history, recommender.item_ids, snapshot.nearest_items, "history[{place}]")
    reasons = recommender.explain(request.item, user=request.user, history=request.history, k=request.k)
    return {"item": request.item, "reasons": [one.to_dict() for one in reasons], **snapshot.receipt()}


QUESTIONS: dict[str, tuple[type[BaseModel], Callable[[Snapshot, Sequence[Any]], list[Answer]]]] = {
    "recommend": (RecommendRequest, recommend),
    "similar": (SimilarRequest, similar),
    "history": (HistoryRequest, history),
    "explain": (ExplainRequest, explain),
}
"""Name -> what is asked, and what answers it: all that a state alone decides."""


def written(value: dict[str, Any]) -> bytes:
    """An answer as it is sent: JSON with all digits, so that the same bytes are the same bits."""
    return orjson.dumps(value)
