"""What a researcher asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from hellm.recommend.card import card_of
from hellm.serve.answers import one_by_one
from hellm.serve.page.charts import histogram
from hellm.serve.page.questions import named
from hellm.serve.page.records import (
    Course,
    interval_of,
    loss_charts,
    slice_charts,
    slice_metrics,
    validation_charts,
)
from hellm.serve.page.rendering import PageRoute, render
from hellm.serve.page.search import items_like, page_of
from hellm.serve.page.studies import Comparison, HyperedgeRequest, Studies, item_hyperedges
from hellm.serve.routes import service_of
from hellm.serve.state import Snapshot

__all__ = ["router"]

router = APIRouter(route_class=PageRoute)

_ITEMS, _USERS, _ROWS, _FOUND, _EVENTS = 48, 5, 50, 48, 36
# Metrics that are shown at once.
_MAIN = ("recall", "ndcg", "coverage", "novelty")
_GROUPS = ("popular", "middle", "rare", "cold")

Id = Annotated[str, Query(min_length=1, max_length=512)]
Given = Annotated[str, Query(max_length=512)]
Words = Annotated[str, Query(max_length=200)]
Page = Annotated[int, Query(ge=1, le=1_000_000)]


def _studies(request: Request) -> Studies:
    return request.app.state.research


async def _study(request: Request, question: Any, asked: Any = None) -> Any:
    return await service_of(request).study(question, asked)


async def _runs(request: Request) -> list[dict[str, Any]]:
    """The served run and the other one: "name", "snapshot"."""
    runs = await _study(request, _studies(request).runs)
    names = [one.folder.name for one in runs]
    if len(set(names)) < len(names):
        names = [f"{one.folder.name} {one.run_hash[:8]}" for one in runs]
    return [{"name": name, "snapshot": one} for name, one in zip(names, runs, strict=True)]


def _test(run: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of the test of a run."""
    return run["snapshot"].recommender.training.get("test") or {}


@router.get("/research")
async def home(request: Request) -> Response:
    """What the runs are, what they were tested at, and where to go from here."""
    runs = await _runs(request)
    cards, missing = await _study(request, _told, [one["snapshot"] for one in runs])
    differences = await _study(request, _studies(request).differences)
    tests = [_test(one) for one in runs]
    metrics = list(dict.fromkeys(name for test in tests for name in test.get("metrics", {})))
    rows = [(name, [interval_of(test, name) for test in tests], differences.get(name)) for name in metrics]
    kinds = [name.partition("@")[0] for name in metrics]
    main = [row for kind in _MAIN for row, own in zip(rows, kinds, strict=True) if own == kind]
    return render(
        request,
        "research.html",
        runs=runs,
        cards=cards,
        tests=tests,
        tables={"": main, "Other metrics": [row for row, own in zip(rows, kinds, strict=True) if own not in _MAIN]},
        has_differences=bool(differences),
        missing=missing,
    )


@one_by_one
def _told(snapshot: Snapshot, runs: Sequence[Snapshot]) -> Any:
    """The cards of runs, and why the served one cannot be asked about hyperedges."""
    return [card_of(one.recommender) for one in runs], runs[0].recommender.missing_hypergraph


# ---- items and their hyperedges


@router.get("/research/items")
def items(request: Request, q: Words = "", page: Page = 1) -> Response:
    """Items to begin with: those looked for, or all, those bought most first."""
    snapshot = service_of(request).snapshot
    if q.strip():
        part = page_of(items_like(snapshot, q, _FOUND), 1, _FOUND)
    else:
        rows = np.argsort(-snapshot.recommender.popularity.numpy(), kind="stable")
        part = page_of(rows, page, _ITEMS)
        part["rows"] = named(snapshot, part["rows"])
    return render(request, "research_items.html", q=q, page=part)


@router.get("/research/item")
async def item(
    request: Request, id: Id, user: Given = "", modality: Given = "", name: Given = "", all: bool = False
) -> Response:
    """An item, its hyperedges, their members, and what the run answers without one of them."""
    user = user.strip()
    asked = HyperedgeRequest(id, user or None, (modality, name) if modality else None, all)
    found = await _study(request, item_hyperedges, asked)
    snapshot, shown = service_of(request).snapshot, []
    if not user and id in snapshot.recommender.item_ids:
        survey = await request.app.state.shop.surveys.of_served(snapshot)
        ranks = survey.ranks(snapshot.recommender.item_ids.index(id))[:8]
        shown = [(snapshot.recommender.user_ids.ids[row], place) for row, place in ranks]
    chosen = next((one for group in found["groups"].values() for one in group if one["is_chosen"]), None)
    return render(request, "research_item.html", found=found, user=user, chosen=chosen, shown=shown, all=all)


# ---- users of two runs


@router.get("/research/users")
async def users(
    request: Request, by: Literal["rank", "overlap"] = "rank", page: Page = 1, again: bool = False
) -> Response:
    """Users by how much the lists of two runs differ."""
    runs = await _runs(request)
    comparison = await _study(request, _studies(request).comparison, again)
    if comparison is None:
        return render(request, "research_users.html", runs=runs, comparison=None)
    found = comparison.found
    values = [one.by_rank if by == "rank" else one.by_overlap for one in found]
    part = page_of(np.argsort(-np.array(values), kind="stable"), page, _USERS)
    return render(
        request,
        "research_users.html",
        runs=runs,
        comparison=comparison,
        stale=comparison.snapshots[0].revision != service_of(request).snapshot.revision,
        by=by,
        page=part,
        pairs=[_pair(comparison, found[place]) for place in part["rows"].tolist()],
        mean=float(np.mean(values)) if values else None,
        same=sum(value < 1e-9 for value in values),
        chart=histogram("spread", "Users by disagreement", values) if values else None,
    )


@router.get("/research/user")
async def user(request: Request, id: Id) -> Response:
    """Both lists of one user, and what both were made from."""
    runs = await _runs(request)
    comparison = await _study(request, _studies(request).comparison, False)
    if comparison is None:
        return render(request, "research_users.html", runs=runs, comparison=None)
    found = await _study(request, _of_user, (comparison, id.strip()))
    recommender = comparison.snapshots[0].recommender
    events = recommender.histories.take(np.array([recommender.user_ids.index(found.user)])).items[::-1]
    return render(
        request,
        "research_user.html",
        runs=runs,
        pair=_pair(comparison, found),
        history=named(comparison.snapshots[0], events[:_EVENTS]),
        count=len(events),
        metric=comparison.metric,
    )


@one_by_one
def _of_user(snapshot: Snapshot, request: tuple[Comparison, str]) -> Any:
    comparison, user = request
    return comparison.of_user(user)


def _pair(comparison: Comparison, one: Any) -> dict[str, Any]:
    """Two lists as the template takes them: each item with its place in the other list."""
    places = [{item.item: place for place, item in enumerate(items, 1)} for items in one.lists]
    lists = [
        [vars(item) | {"other": places[1 - which].get(item.item)} for item in items]
        for which, items in enumerate(one.lists)
    ]
    values = [metrics.get(one.user) for metrics in comparison.metrics]
    return {
        "user": one.user,
        "rank": one.by_rank,
        "overlap": one.by_overlap,
        "lists": lists,
        "bases": [items.basis for items in one.lists],
        "values": None if None in values else values,
    }


# ---- what the trainings have recorded


@router.get("/research/slices")
async def slices(request: Request, metric: Words = "") -> Response:
    """The test by popularity of the target and by length of the history, as the trainings recorded it."""
    runs = await _runs(request)
    names = [one["name"] for one in runs]
    recorded = [_test(one).get("slices") or {} for one in runs]
    metrics = slice_metrics(recorded)
    if metric not in metrics:
        metric = next((name for name in metrics if name.startswith("ndcg")), next(iter(metrics), ""))
    return render(
        request,
        "research_slices.html",
        runs=runs,
        kinds=slice_charts(recorded, metric, names) if metric else {},
        metric=metric,
        metrics=metrics,
        missing=[name for name, there in zip(names, recorded, strict=True) if not there],
    )


@router.get("/research/training")
async def training(request: Request) -> Response:
    """The course of the trainings: validation metrics of all in one chart each, losses of each in one of its own."""
    runs = await _runs(request)
    found = await _study(request, _studies(request).courses)
    courses = [
        Course(f"{run['name']}: {model}" if model else run["name"], number, records)
        for number, (run, of_run) in enumerate(zip(runs, found, strict=True))
        for model, records in of_run.items()
    ]
    return render(
        request,
        "research_training.html",
        charts=validation_charts(courses),
        losses=loss_charts(courses),
        missing=[run["name"] for run, of_run in zip(runs, found, strict=True) if not of_run],
    )


# ---- where the items lie


@router.get("/research/map")
async def item_map(request: Request, item: Given = "", page: Page = 1) -> Response:
    """Items in a plane, and the same as a list."""
    item = item.strip()
    found, asked = await _study(request, _studies(request).item_map, item or None)
    recommender = service_of(request).snapshot.recommender

    def point(row: int) -> dict[str, Any]:
        x, y = found.places[row].tolist()
        told = {
            "item": recommender.item_ids.ids[row],
            "title": recommender.item_titles[row],
            "group": found.groups[row],
        }
        return told | {"x": 20 + 560 * x, "y": 580 - 560 * y, "events": int(recommender.popularity[row])}

    drawn = [point(row) for row in found.rows.tolist()]
    near = {modality: [point(row) for row in rows] for modality, rows in asked.items()}
    return render(
        request,
        "research_map.html",
        map=found,
        points=drawn,
        groups=[name for name in _GROUPS if name in found.groups],
        page=page_of(drawn, page, _ROWS),
        asked=point(recommender.item_ids.index(item)) if item else None,
        near=near,
    )
