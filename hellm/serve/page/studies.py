"""What a researcher asks of a snapshot, answered in the thread of studies (`Service.study`), one after another."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hellm.artifact.files import TOWERS
from hellm.artifact.run_directory import read_metrics
from hellm.artifact.test_users import read_test_users
from hellm.evaluate import paired_gain, popularity_groups
from hellm.recommend import Recommender, ServedFused
from hellm.recommend.disagreement import Disagreement, common_users, disagreements
from hellm.recommend.hyperedges import Hyperedge
from hellm.recommend.item_map import principal_plane
from hellm.serve.answers import known_ids, one_by_one
from hellm.serve.errors import RequestError
from hellm.serve.page.questions import named
from hellm.serve.service import Service
from hellm.serve.state import Snapshot

__all__ = ["Comparison", "ItemMap", "Studies", "item_hyperedges"]

LENGTH = 10
# Members of a hyperedge that are shown.
_MEMBERS = 48
# Seconds after which no more hyperedges are tried, or users compared, in one answer.
_SECONDS = 3.0
# Users that are compared in all, and at once to begin with.
_USERS, _CHUNK = 1000, 16
_POINTS = 1500


# ---- the hyperedges of an item


@dataclass(frozen=True)
class HyperedgeRequest:
    """What is asked of an item.

    Attributes:
        item: Id.
        user: Id of the user that ranks are of; None asks for none.
        chosen: Modality and name of the hyperedge to look into; None is the first.
        try_all: Whether to try the run without each hyperedge.
    """

    item: str
    user: str | None = None
    chosen: tuple[str, str] | None = None
    try_all: bool = False


@one_by_one
def item_hyperedges(snapshot: Snapshot, request: HyperedgeRequest) -> dict[str, Any]:
    """An item, the hyperedges it is in, the members of one of them, and what the run answers without it.

    Returns:
        "item"; "events" (of training); "missing" (why no hyperedge can be taken away, or None);
        "groups": modality -> hyperedges, each with "modality", "name", "title", "is_value", "weight", "size",
        "is_chosen" and "rank" (of the item without it, where that was tried);
        "members" and "more" (how many are not among them) of the chosen hyperedge;
        "rank" and "has_it" (whether it is in the history), where a user is asked for;
        "effect" of the chosen hyperedge: "rank", and "basis", "scores", "before" and "after" as `_effect` has them;
        "untried": hyperedges that there was no time for.
    """
    recommender = snapshot.recommender
    known_ids([request.item], recommender.item_ids, snapshot.nearest_items, "id", status=404)
    if request.user is not None:
        known_ids([request.user], recommender.user_ids, snapshot.nearest_users, "user", kind="user", status=404)
    row = recommender.item_ids.index(request.item)
    hyperedges = recommender.hyperedges(request.item)
    chosen = _chosen(hyperedges, request)
    missing = recommender.missing_hypergraph
    ranks: dict[tuple[str, str], int] = {}
    found: dict[str, Any] = {"item": named(snapshot, [row])[0], "missing": missing, "effect": None, "rank": None}
    if request.user is not None:
        found["rank"] = recommender.rank(request.item, user=request.user)
        user = recommender.user_ids.index(request.user)
        found["has_it"] = bool((recommender.histories.take(np.array([user])).items == row).any())
    if request.user is not None and missing is None and chosen is not None:
        less = recommender.without_hyperedge(chosen.modality, chosen.name)
        ranks[chosen.modality, chosen.name] = less.rank(request.item, user=request.user)
        found["effect"] = _effect(recommender, less, request.item, request.user) | {
            "rank": ranks[chosen.modality, chosen.name]
        }
        if request.try_all:
            ranks |= _ranks_without(recommender, request, hyperedges)
    return found | {
        "groups": _grouped(hyperedges, chosen, ranks),
        "members": [] if chosen is None else _members(snapshot, chosen, request),
        "more": 0 if chosen is None else max(0, len(chosen.members) - _MEMBERS),
        "untried": len(hyperedges) - len(ranks) if request.try_all and ranks else 0,
        "events": int(recommender.popularity[row]),
    }


def _chosen(hyperedges: Sequence[Hyperedge], request: HyperedgeRequest) -> Hyperedge | None:
    """Raises: RequestError, one that the item is not in."""
    if request.chosen is None:
        return hyperedges[0] if hyperedges else None
    for one in hyperedges:
        if (one.modality, one.name) == request.chosen:
            return one
    modality, name = request.chosen
    raise RequestError(404, f"item {request.item!r} is in no hyperedge {name!r} of {modality!r}", field="name")


def _ranks_without(
    recommender: Recommender, request: HyperedgeRequest, hyperedges: Sequence[Hyperedge]
) -> dict[tuple[str, str], int]:
    """Ranks of the item without each hyperedge, as many as there is time for."""
    ranks, until = {}, time.monotonic() + _SECONDS
    for one in hyperedges:
        if time.monotonic() > until:
            break
        less = recommender.without_hyperedge(one.modality, one.name)
        ranks[one.modality, one.name] = less.rank(request.item, user=request.user)
    return ranks


def _grouped(
    hyperedges: Sequence[Hyperedge], chosen: Hyperedge | None, ranks: Mapping[tuple[str, str], int]
) -> dict[str, list[dict[str, Any]]]:
    groups: dict[str, list[dict[str, Any]]] = {}
    for one in hyperedges:
        told = {name: getattr(one, name) for name in ("modality", "name", "title", "is_value", "weight")}
        told |= {"size": len(one.members), "is_chosen": one is chosen, "rank": ranks.get((one.modality, one.name))}
        groups.setdefault(one.modality, []).append(told)
    return groups


def _members(snapshot: Snapshot, chosen: Hyperedge, request: HyperedgeRequest) -> list[dict[str, Any]]:
    recommender = snapshot.recommender
    rows = chosen.members[:_MEMBERS].numpy()
    similarities = [None] * len(rows) if chosen.similarities is None else chosen.similarities[: len(rows)].tolist()
    had = set()
    if request.user is not None:
        user = recommender.user_ids.index(request.user)
        had = set(recommender.histories.take(np.array([user])).items.tolist())
    return [
        one
        | {
            "similarity": similarity,
            "is_centre": not chosen.is_value and one["item"] == chosen.name,
            "is_had": row in had,
            "is_asked": one["item"] == request.item,
        }
        for row, one, similarity in zip(rows.tolist(), named(snapshot, rows), similarities, strict=True)
    ]


def _effect(recommender: Recommender, less: Recommender, item: str, user: str) -> dict[str, Any]:
    """Scores of an item and lists of a user, as they are and without a hyperedge.

    Each item of a list has its place in the other list, if it is there.
    """
    k = min(LENGTH, recommender.num_items)
    lists = [one.recommend(user, k=k)[0] for one in (recommender, less)]
    alone = [one.recommend(user, k=1, candidates=[item], exclude_seen=False)[0] for one in (recommender, less)]
    before, after = ([vars(one) for one in items] for items in lists)
    return {
        "basis": lists[0].basis,
        "scores": [items.items[0].score for items in alone],
        "before": _beside(before, after),
        "after": _beside(after, before),
    }


def _beside(items: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    places = {other["item"]: place for place, other in enumerate(others, 1)}
    return [dict(item) | {"other": places.get(item["item"])} for item in items]


# ---- two runs


@dataclass
class Comparison:
    """The lists of two snapshots for the same users, made a few at a time.

    Attributes:
        snapshots: The served one, and the other.
        users: Ids of those who are compared.
        found: Of the first users.
        metrics: For each run, test metrics of its users: user -> value; of the one metric that `metric` names.
        metric: Name of a metric that both runs have kept for each user; None where there is none.
    """

    snapshots: tuple[Snapshot, Snapshot]
    users: list[str]
    found: list[Disagreement] = field(default_factory=list)
    metrics: tuple[dict[str, float], dict[str, float]] = ({}, {})
    metric: str | None = None
    _chunk: int = field(default_factory=lambda: _CHUNK)

    @classmethod
    def of(cls, one: Snapshot, other: Snapshot) -> Comparison:
        """Of two snapshots; nothing is compared yet."""
        comparison = cls((one, other), common_users(one.recommender, other.recommender, _USERS))
        tested = _tested_users(one, other)
        if tested:
            comparison.metric = next((name for name in tested if name.startswith("ndcg")), next(iter(tested)))
            users, *values = tested[comparison.metric]
            first, second = (dict(zip(users, one, strict=True)) for one in values)
            comparison.metrics = first, second
        return comparison

    def advance(self) -> None:
        """Compare some more users."""
        until = time.monotonic() + _SECONDS / 2
        first, second = (snapshot.recommender for snapshot in self.snapshots)
        while not self.is_done:
            begun, part = time.monotonic(), self.users[len(self.found) :][: self._chunk]
            # Another list each time: a page may be reading the one before.
            self.found = self.found + disagreements(first, second, part, LENGTH)
            if time.monotonic() > until:
                break
            if time.monotonic() - begun < _SECONDS / 20:
                self._chunk *= 2

    @property
    def is_done(self) -> bool:
        return len(self.found) == len(self.users)

    def of_user(self, user: str) -> Disagreement:
        """That of one user, made now if it is not there. Raises: RequestError, whom one of the runs does not know."""
        for one in self.found:
            if one.user == user:
                return one
        for snapshot in self.snapshots:
            known_ids([user], snapshot.recommender.user_ids, snapshot.nearest_users, "user", kind="user", status=404)
        first, second = (snapshot.recommender for snapshot in self.snapshots)
        return disagreements(first, second, [user], LENGTH)[0]


def _tested_users(one: Snapshot, other: Snapshot) -> dict[str, tuple[list[str], np.ndarray, np.ndarray]]:
    """Metric -> users whom the tests of both trainings had, and their values in the one and in the other.

    Nothing where the trainings did not test the same events in the same way.
    """
    facts = [snapshot.recommender.training for snapshot in (one, other)]
    same = [(fact.get("data") or {}).get("fingerprint") for fact in facts]
    protocols = [(fact.get("test") or {}).get("protocol") for fact in facts]
    here, there = read_test_users(one.folder), read_test_users(other.folder)
    if here is None or there is None or same[0] is None or same[0] != same[1] or protocols[0] != protocols[1]:
        return {}
    places = []
    for snapshot, (rows, _) in ((one, here), (other, there)):
        ids = snapshot.recommender.user_ids.ids
        places.append({ids[row]: place for place, row in enumerate(rows.tolist())})
    users = [user for user in places[0] if user in places[1]]
    if not users:
        return {}
    index = [[place[user] for user in users] for place in places]
    names = [name for name in here[1] if name in there[1]]
    return {name: (users, here[1][name][index[0]], there[1][name][index[1]]) for name in names}


# ---- items in a plane


@dataclass(frozen=True, eq=False)
class ItemMap:
    """Items as points.

    Attributes:
        places: [I, 2] float32 in [0, 1].
        groups: [I] labels: how popular each is, see `hellm.evaluate.popularity_groups`.
        rows: [n] of the items that are drawn, those bought most first.
        shares: Of the variance of all keys, along both directions.
    """

    places: np.ndarray
    groups: np.ndarray
    rows: np.ndarray
    shares: tuple[float, float]

    @classmethod
    def of(cls, snapshot: Snapshot) -> ItemMap:
        """All items, of which a large catalogue has a sample drawn."""
        recommender = snapshot.recommender
        plane, counts = principal_plane(recommender.item), recommender.popularity.numpy()
        low, high = plane.points.amin(0), plane.points.amax(0)
        places = (plane.points - low) / torch.where(high > low, high - low, 1.0)
        rows = np.random.default_rng(0).permutation(recommender.num_items)[:_POINTS]
        groups = np.full(len(counts), "", dtype=object)
        for label, among in popularity_groups(counts).items():
            groups[among] = label
        return cls(places.numpy(), groups, rows[np.lexsort((rows, -counts[rows]))], plane.shares)

    @property
    def num_items(self) -> int:
        return len(self.places)


def _near(snapshot: Snapshot, item: str) -> dict[str, list[int]]:
    """Modality -> rows of the items that share a hyperedge with an item; values of attributes join too many to draw."""
    recommender = snapshot.recommender
    known_ids([item], recommender.item_ids, snapshot.nearest_items, "item", status=404)
    near: dict[str, dict[int, None]] = {}
    for one in recommender.hyperedges(item):
        if not one.is_value:
            near.setdefault(one.modality, {}).update(dict.fromkeys(one.members.tolist()))
    row = recommender.item_ids.index(item)
    return {modality: [one for one in rows if one != row][:_MEMBERS] for modality, rows in near.items()}


# ---- what is kept between two answers


class Studies:
    """Studies of what is served; each is made once and kept until something changes.

    All methods with a snapshot are questions for `Service.study`.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._comparison: Comparison | None = None
        self._differences: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {}
        self._map: tuple[tuple[str, int], ItemMap] | None = None

    @property
    def has_other(self) -> bool:
        """Whether there is a run to compare with."""
        return self._service.has_other

    def comparison(self, snapshot: Snapshot, requests: Sequence[bool]) -> list[Comparison | None]:
        """The comparison as far as it is, a little further each time; None without another run.

        What comes meanwhile is not part of it, until a request, which says whether to, starts it again.
        """
        other = self._service.compared_with(snapshot)
        if other is None:
            return [None] * len(requests)
        comparison, runs = self._comparison, [snapshot.run_hash, other.run_hash]
        if any(requests) or comparison is None or [one.run_hash for one in comparison.snapshots] != runs:
            comparison = self._comparison = Comparison.of(snapshot, other)
        comparison.advance()
        return [comparison] * len(requests)

    def differences(self, snapshot: Snapshot, requests: Sequence[Any]) -> list[dict[str, tuple[float, float, float]]]:
        """Metric -> mean paired difference of the served run and the other in the test, with its interval.

        Of those metrics that are means over users, where both trainings have kept them by user.
        """
        other = self._service.compared_with(snapshot)
        if other is None:
            return [{}] * len(requests)
        key = (snapshot.run_hash, other.run_hash)
        if key not in self._differences:
            tested = _tested_users(snapshot, other)
            self._differences = {key: {name: paired_gain(a, b) for name, (_, a, b) in tested.items()}}
        return [self._differences[key]] * len(requests)

    def item_map(self, snapshot: Snapshot, requests: Sequence[str | None]) -> list[Any]:
        """Where the items lie and, for an item that is asked about, what `_near` says; or what is wrong with its id."""
        key = (snapshot.run_hash, snapshot.recommender.num_items)
        if self._map is None or self._map[0] != key:
            self._map = key, ItemMap.of(snapshot)
        near = one_by_one(lambda of, item: {} if item is None else _near(of, item))(snapshot, requests)
        return [one if isinstance(one, BaseException) else (self._map[1], one) for one in near]

    def runs(self, snapshot: Snapshot, requests: Sequence[Any]) -> list[list[Snapshot]]:
        """What is served, and the other run where there is one."""
        other = self._service.compared_with(snapshot)
        return [[snapshot] if other is None else [snapshot, other]] * len(requests)

    def courses(self, snapshot: Snapshot, requests: Sequence[Any]) -> list[list[dict[str, list[dict[str, Any]]]]]:
        """Of each run, the records of its training; of a sum, of the trainings of its models that it has kept."""
        return [[_courses(run) for run in runs] for runs in self.runs(snapshot, requests)]


def _courses(snapshot: Snapshot) -> dict[str, list[dict[str, Any]]]:
    folders = {"": snapshot.folder}
    if isinstance(snapshot.recommender.model, ServedFused):
        folders = {name: snapshot.folder / TOWERS / name for name in snapshot.recommender.model.towers}
    found = {name: read_metrics(folder) for name, folder in folders.items()}
    return {name: records for name, records in found.items() if records}
