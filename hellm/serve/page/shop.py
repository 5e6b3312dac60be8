"""What a shop owner asks."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any
from urllib.parse import urlencode

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from hellm.serve.errors import RequestError
from hellm.serve.page import questions
from hellm.serve.page.catalogue import Catalogue
from hellm.serve.page.pictures import SIDES, Pictures, data_url
from hellm.serve.page.rendering import PageRoute, render
from hellm.serve.page.search import ids_like, items_like, page_of
from hellm.serve.page.surveys import Surveys
from hellm.serve.routes import new_item, service_of, store_item
from hellm.serve.schema import ItemRequest
from hellm.serve.state import Snapshot

__all__ = ["Shop", "router"]

router = APIRouter(route_class=PageRoute)

# Customers and items on a page, items of a history that are shown, of a basket, and results of a search.
_CUSTOMERS, _ITEMS, _EVENTS = 6, 48, 50
_SHOWN_HISTORY, _MOST_BASKET, _FOUND = 36, 50, 12
# Values of an attribute that are offered to choose from.
_OFFERED = 300

Id = Annotated[str, Query(min_length=1, max_length=512)]
Words = Annotated[str, Query(max_length=200)]
Page = Annotated[int, Query(ge=1, le=1_000_000)]


@dataclass
class Shop:
    """What the pages hold beside the service: `app.state.shop`.

    Attributes:
        catalogue: The data set; None where none was named.
        pictures: Of items.
        surveys: What customers at large are shown.
    """

    catalogue: Catalogue | None
    pictures: Pictures
    surveys: Surveys


def shop_of(request: Request) -> Shop:
    """That of the application."""
    return request.app.state.shop


@router.get("/")
def home(request: Request, page: Page = 1) -> Response:
    """Counts, some customers by what they bought last, and what is bought most."""
    snapshot = service_of(request).snapshot
    recommender = snapshot.recommender
    histories = recommender.histories
    users = np.flatnonzero(histories.lengths)
    part = page_of(users, page, _CUSTOMERS)
    customers = []
    for user in part["rows"].tolist():
        bought = histories.take(np.array([user])).items
        shown = questions.named(snapshot, bought[::-1][:6])
        customers.append({"user": recommender.user_ids.ids[user], "count": len(bought), "items": shown})
    best = np.argsort(-recommender.popularity.numpy(), kind="stable")[:8]
    counts = {"customers": recommender.num_users, "products": recommender.num_items, "purchases": len(histories.items)}
    return render(
        request,
        "shop.html",
        counts=counts,
        customers=customers,
        page=part,
        best=questions.named(snapshot, best.tolist()),
        has_pictures=shop_of(request).catalogue is not None,
    )


@router.get("/search")
def search(request: Request, q: Words = "") -> Response:
    """Customers and items by id, and items by a part of their title."""
    snapshot = service_of(request).snapshot
    users = [one for one, _ in zip(ids_like(snapshot.recommender.user_ids.ids, q), range(_FOUND), strict=False)]
    return render(request, "search.html", q=q, users=users, items=items_like(snapshot, q, _FOUND))


@router.get("/customer")
async def customer(request: Request, id: Id) -> Response:
    """What a customer bought, and the list beside it."""
    found = await service_of(request).read(questions.customer, id)
    basket = [one["item"] for one in found["bought"][:_MOST_BASKET]][::-1]
    return render(
        request,
        "customer.html",
        user=id,
        answer=found["list"],
        bought=found["bought"][:_SHOWN_HISTORY],
        count=len(found["bought"]),
        basket=basket,
    )


@router.get("/products")
def products(request: Request, page: Page = 1) -> Response:
    """All items, those bought most first."""
    snapshot = service_of(request).snapshot
    part = page_of(np.argsort(-snapshot.recommender.popularity.numpy(), kind="stable"), page, _ITEMS)
    return render(request, "products.html", items=questions.named(snapshot, part["rows"]), page=part)


@router.get("/product")
async def product(request: Request, id: Id, stored: bool = False) -> Response:
    """An item, the items like it, and who is shown it."""
    service, shop = service_of(request), shop_of(request)
    snapshot = service.snapshot
    found = await service.read(questions.product, id)
    survey = await shop.surveys.of_served(snapshot)
    ranks = survey.ranks(found["row"])
    return render(
        request,
        "product.html",
        product=found,
        facts=shop.catalogue.facts(id) if shop.catalogue is not None else {},
        stored=stored,
        reach=_reach(snapshot, ranks, survey),
    )


@router.get("/basket")
async def basket(
    request: Request,
    item: Annotated[list[Id], Query(max_length=_MOST_BASKET)] = [],  # noqa: B006
    q: Words = "",
) -> Response:
    """A list for whatever is put into a basket."""
    service = service_of(request)
    found = await service.read(questions.basket, item)
    snapshot = service.snapshot
    chosen = set(item)
    offered = await run_in_threadpool(items_like, snapshot, q, _FOUND) if q.strip() else _popular(snapshot, chosen)
    return render(
        request,
        "basket.html",
        answer=found["list"],
        before=found["before"],
        items=found["items"],
        ids=item,
        is_full=len(item) >= _MOST_BASKET,
        q=q,
        offered=[one for one in offered if one["item"] not in chosen],
    )


@router.get("/never-shown")
async def never_shown(request: Request, page: Page = 1) -> Response:
    """Items that are in no list of a sample of customers, and how the others share the places."""
    snapshot = service_of(request).snapshot
    survey = await shop_of(request).surveys.of_served(snapshot)
    counts = survey.counts(snapshot.recommender.num_items)
    popularity = snapshot.recommender.popularity.numpy()
    without = np.flatnonzero(counts == 0)
    part = page_of(without[np.argsort(-popularity[without], kind="stable")], page, _ITEMS)
    most = np.argsort(-counts, kind="stable")[:6]
    return render(
        request,
        "never_shown.html",
        survey=survey,
        num_items=snapshot.recommender.num_items,
        bands=_bands(counts, len(survey.lists)),
        items=questions.named(snapshot, part["rows"]),
        page=part,
        most=[
            one | {"count": int(counts[row])} for row, one in zip(most, questions.named(snapshot, most), strict=True)
        ],
    )


@router.get("/data")
def data(request: Request, finding: Words = "", page: Page = 1) -> Response:
    """What deserves a look in the data, and the rows that a finding is about."""
    catalogue = shop_of(request).catalogue
    if not finding:
        return render(request, "data.html", catalogue=catalogue)
    found = catalogue.finding(finding) if catalogue is not None else None
    if catalogue is None or found is None:
        raise RequestError(404, f"there is no finding {finding!r} in the data of this server")
    part = page_of(found.rows, page, _EVENTS if found.kind == "events" else _ITEMS)
    rows = [_row(catalogue, found.kind, row) for row in part["rows"].tolist()]
    return render(request, "finding.html", finding=found, rows=rows, page=part)


@router.get("/picture")
async def picture(request: Request, id: Id, size: str = "small") -> Response:
    """The picture of an item, or a drawing in its place."""
    recommender = service_of(request).snapshot.recommender
    catalogue = shop_of(request).catalogue
    if size not in SIDES:
        raise RequestError(422, f"size must be one of {', '.join(SIDES)}, got {size!r}")
    if id in recommender.item_ids:
        title = recommender.item_titles[recommender.item_ids.index(id)]
    elif catalogue is not None and id in catalogue.dataset.item_ids:
        title = None
    else:
        raise RequestError(404, f"there is no product {id!r}")
    made = await shop_of(request).pictures.of(id, title, size)
    return Response(made.content, media_type=made.media_type, headers={"Cache-Control": "private, max-age=600"})


@router.get("/new-product")
def new_product(request: Request) -> Response:
    """The form."""
    return _new_product(request)


@router.post("/new-product")
async def preview(request: Request) -> Response:
    """Who would be shown a new item; nothing is stored."""
    given: dict[str, Any] = {}
    try:
        item, upload = await _sent(request, given)
        entry = await new_item(request, item, upload)
        surveys = shop_of(request).surveys
        served, snapshot, found = await service_of(request).read(questions.product_to_be, entry)
        survey, now = await surveys.of(snapshot), await surveys.of_served(served)
    except ValidationError as error:
        first = error.errors()[0]
        return _new_product(request, given, wrong=f"{first['loc'][0]}: {first['msg']}", status=422)
    except RequestError as error:
        return _new_product(request, given, wrong=error.message, status=error.status)
    ranks = survey.ranks(found["row"])
    shares = now.counts(served.recommender.num_items) / max(1, len(now.lists))
    less = int((shares < len(ranks) / max(1, len(survey.lists))).sum())
    shown = {
        "product": found,
        "picture": data_url(upload) if upload else None,
        "picture64": base64.b64encode(upload).decode() if upload else "",
        "reach": _reach(snapshot, ranks, survey),
        "less": less,
        "products": served.recommender.num_items,
        "placed_by": [*entry.features, *_known_attributes(snapshot, item)],
    }
    return _new_product(request, given, preview=shown)


@router.post("/new-product/store")
async def store(request: Request) -> Response:
    """A new item, stored as `POST /items` stores it."""
    given: dict[str, Any] = {}
    try:
        item, upload = await _sent(request, given)
        await store_item(request, await new_item(request, item, upload))
    except ValidationError as error:
        first = error.errors()[0]
        return _new_product(request, given, wrong=f"{first['loc'][0]}: {first['msg']}", status=422)
    except RequestError as error:
        return _new_product(request, given, wrong=error.message, status=error.status)
    return RedirectResponse(f"/product?{urlencode({'id': item.id, 'stored': 'true'})}", 303)


# ---- what the routes share


def _popular(snapshot: Snapshot, without: set[str]) -> list[dict[str, Any]]:
    best = np.argsort(-snapshot.recommender.popularity.numpy(), kind="stable")[: _FOUND + len(without)]
    return [one for one in questions.named(snapshot, best) if one["item"] not in without][:_FOUND]


def _reach(snapshot: Snapshot, ranks: list[tuple[int, int]], survey: Any) -> dict[str, Any]:
    """Who of a sample is shown an item; some of them by name, with what they bought last."""
    recommender = snapshot.recommender
    some = []
    for user, rank in ranks[:8]:
        bought = recommender.histories.take(np.array([user])).items[::-1][:4]
        some.append({"user": recommender.user_ids.ids[user], "rank": rank, "items": questions.named(snapshot, bought)})
    return {"count": len(ranks), "asked": len(survey.lists), "all": survey.num_users, "k": survey.k, "some": some}


def _bands(counts: np.ndarray, lists: int) -> list[dict[str, Any]]:
    """How many items are in no list, in one, in up to 1% of them, 5%, and more."""
    edges = [1, 2, max(3, lists // 100 + 1), max(4, lists // 20 + 1)]
    names = ["in none", "in 1 list"]
    names += [f"in {low} to {high - 1}" if high - 1 > low else f"in {low}" for low, high in pairwise(edges[1:])]
    names.append(f"in {edges[-1]} or more")
    numbers = np.bincount(np.searchsorted(edges, counts, side="right"), minlength=len(names)).tolist()
    most = max(numbers) or 1
    return [
        {"name": name, "count": number, "share": number / most} for name, number in zip(names, numbers, strict=True)
    ]


def _row(catalogue: Catalogue, kind: str, row: int) -> dict[str, Any]:
    """A row of the data set as a template takes it."""
    dataset = catalogue.dataset
    titles = dataset.item_titles or [""] * dataset.num_items
    if kind == "users":
        return {"user": dataset.user_ids.ids[row]}
    if kind == "items":
        return {"item": dataset.item_ids.ids[row], "title": titles[row] or None}
    time = None if dataset.timestamps is None else float(dataset.timestamps[row])
    item = int(dataset.items[row])
    return {
        "user": dataset.user_ids.ids[dataset.users[row]],
        "item": dataset.item_ids.ids[item],
        "title": titles[item] or None,
        "time": time,
        "split": ("train", "validation", "test", "history")[dataset.split[row]],
    }


def _known_attributes(snapshot: Snapshot, item: ItemRequest) -> list[str]:
    content = snapshot.recommender.content
    known = content.attributes if content is not None else {}
    return [name for name, values in item.attributes.items() if any(one in known.get(name, ()) for one in values)]


def _new_product(
    request: Request,
    given: dict[str, Any] | None = None,
    *,
    wrong: str | None = None,
    preview: dict[str, Any] | None = None,
    status: int = 200,
) -> Response:
    service = service_of(request)
    content = service.snapshot.recommender.content
    attributes = {name: values if len(values) <= _OFFERED else () for name, values in _attributes(content).items()}
    return render(
        request,
        "new_product.html",
        status,
        can_place=content is not None,
        takes_pictures=content is not None and "image" in content.modalities,
        attributes=attributes,
        keeps=service.store is not None,
        given={"id": "", "title": "", "description": "", "attributes": {}} | (given or {}),
        wrong=wrong,
        preview=preview,
    )


def _attributes(content: Any) -> dict[str, tuple[str, ...]]:
    return dict(content.attributes) if content is not None else {}


async def _sent(request: Request, given: dict[str, Any]) -> tuple[ItemRequest, bytes | None]:
    """The item and picture of a form; `given` gains the texts, so that they can be shown again.

    Raises: RequestError, a picture that is none; pydantic's ValidationError.
    """
    most = request.app.state.settings.max_body
    async with request.form(max_files=1, max_fields=32, max_part_size=most) as form:
        given |= {name: _text(form, name) for name in ("id", "title", "description")}
        names = [name for name in form if name.startswith("attribute:") and _text(form, name)]
        given["attributes"] = {name.partition(":")[2]: _text(form, name) for name in names}
        file, kept = form.get("picture"), _text(form, "picture64")
        upload = await file.read() if isinstance(file, UploadFile) else b""
    if not upload and kept:
        try:
            upload = base64.b64decode(kept, validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(422, "the picture must be base64", field="picture") from None
    attributes = {name: [value] for name, value in given["attributes"].items()}
    title, description = given["title"] or None, given["description"] or None
    return ItemRequest(id=given["id"], attributes=attributes, title=title, description=description), upload or None


def _text(form: FormData, name: str) -> str:
    value = form.get(name)
    return value.strip() if isinstance(value, str) else ""
