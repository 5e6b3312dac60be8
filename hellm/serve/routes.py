"""One function an endpoint."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from hellm.serve import answers
from hellm.serve.errors import RequestError
from hellm.serve.schema import (
    MAX_K,
    Errors,
    EventsRequest,
    EventsStored,
    ExplainRequest,
    Explanation,
    History,
    HistoryRequest,
    ItemRequest,
    ItemStored,
    Lists,
    RecommendRequest,
    Reloaded,
    ReloadRequest,
    Similar,
    SimilarRequest,
)
from hellm.serve.service import Service
from hellm.serve.store import Entry
from hellm.serve.writer import Stored

__all__ = ["OF_BODIES", "new_item", "router", "service_of", "store_item"]

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": Errors, "description": "No HTTP request that can be read."},
    401: {"model": Errors, "description": "The API key is missing or another."},
    403: {"model": Errors, "description": "Sent by a page of another site, or for another host."},
    408: {"model": Errors, "description": "The request took too long to come."},
    413: {"model": Errors, "description": "The request is too large."},
    415: {"model": Errors, "description": "Another content type is needed."},
    422: {"model": Errors, "description": "Something in the request is wrong: which field, and how."},
    503: {"model": Errors, "description": "Not ready, or too much is waiting: see Retry-After."},
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": Errors, "description": "It is there already and is another, or the server cannot do that now."}
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Errors, "description": "There is none of that id."}}

router = APIRouter(responses=REFUSALS)

ItemId = Annotated[str, Path(max_length=512, description="Id of an item.")]
UserId = Annotated[str, Path(max_length=512, description="Id of a user.")]


def answer(value: dict[str, Any], status: int = 200) -> Response:
    """A plain value as JSON, not checked again."""
    return Response(answers.written(value), status, media_type="application/json")


def service_of(request: Request) -> Service:
    """What the application serves."""
    return request.app.state.service


async def ask(request: Request, question: str, asked: BaseModel) -> tuple[dict[str, Any], Response]:
    """One of `answers.QUESTIONS`, answered, and noted where the server was told to. Returns: Plain, and to be sent."""
    found = await service_of(request).read(answers.QUESTIONS[question][1], asked)
    response, log = answer(found), request.app.state.answer_log
    if log is not None:
        log.add(question, asked, found, response.body)
    return found, response


@router.post("/recommend", response_model=Lists, tags=["recommendations"])
async def recommend(request: Request, body: RecommendRequest) -> Response:
    """The best items for users or for bare histories."""
    found, response = await ask(request, "recommend", body)
    for one in found["lists"]:
        request.app.state.metrics.lists.labels(one["basis"]).inc()
    return response


@router.get("/items/{id}/similar", response_model=Similar, responses=NOT_FOUND, tags=["recommendations"])
async def similar(request: Request, id: ItemId, k: Annotated[int, Query(ge=1, le=MAX_K)] = 10) -> Response:
    """The items that are most like an item."""
    return (await ask(request, "similar", SimilarRequest(id=id, k=k)))[1]


@router.get("/users/{id}/history", response_model=History, responses=NOT_FOUND, tags=["recommendations"])
async def history(request: Request, id: UserId) -> Response:
    """What a user has done, in time order, and how the model rates it."""
    return (await ask(request, "history", HistoryRequest(id=id)))[1]


@router.post("/explain", response_model=Explanation, tags=["recommendations"])
async def explain(request: Request, body: ExplainRequest) -> Response:
    """The items of a history that tie a user to an item."""
    return (await ask(request, "explain", body))[1]


@router.post("/events", response_model=EventsStored, responses=CONFLICT, tags=["what comes"])
async def events(request: Request, body: EventsRequest) -> Response:
    """Events, on disk before this answers; they are part of their users' histories in the next request."""
    entries = [Entry("event", one.id, {"user": one.user, "item": one.item, "time": one.time}) for one in body.events]
    done = await service_of(request).add(entries)
    request.app.state.metrics.events.inc(done.stored)
    return answer({"stored": done.stored, "duplicates": done.duplicates, **done.snapshot.receipt()})


@router.post(
    "/items",
    response_model=ItemStored,
    responses=CONFLICT,
    tags=["what comes"],
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/ItemRequest"}},
                "multipart/form-data": {
                    "schema": {
                        "type": "object",
                        "required": ["item"],
                        "properties": {
                            "item": {
                                "type": "string",
                                "contentMediaType": "application/json",
                                "description": "The same as JSON, without the picture.",
                            },
                            "picture": {"type": "string", "format": "binary"},
                        },
                    }
                },
            },
        }
    },
)
async def items(request: Request) -> Response:
    """A new item, on disk before this answers; it ranks in the next request."""
    item, picture = await _item_of(request)
    entry = await new_item(request, item, picture)
    done = await store_item(request, entry)
    content = done.snapshot.recommender.content
    by = [*entry.features, *(name for name in item.attributes if content is not None and name in content.attributes)]
    return answer({"item": item.id, "stored": bool(done.stored), "placed_by": by, **done.snapshot.receipt()})


async def new_item(request: Request, item: ItemRequest, picture: bytes | None) -> Entry:
    """An item as it would be stored, with its features."""
    service = service_of(request)
    features = await service.encode(item, picture)
    content = service.snapshot.recommender.content
    known = {} if content is None else content.encoders
    encoders = {name: known[name] for name in features if name in known}
    given = json.dumps(item.features, sort_keys=True).encode()
    body = {
        "title": item.title,
        "description": item.description,
        "attributes": item.attributes,
        "given": hashlib.sha256(given).hexdigest() if item.features else None,
    }
    return Entry("item", item.id, body, features, picture, encoders=encoders)


async def store_item(request: Request, entry: Entry) -> Stored:
    """An item on disk, and in the lists from the next request on."""
    done = await service_of(request).add([entry])
    request.app.state.metrics.new_items.inc(done.stored)
    return done


async def _item_of(request: Request) -> tuple[ItemRequest, bytes | None]:
    """The item and its picture, of JSON or of a form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    upload: bytes | None = None
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=1) as form:
            text, file = form.get("item"), form.get("picture")
            if not isinstance(text, str):
                raise RequestError(422, "must be a field with the item as JSON", field="item")
            if file is not None and not isinstance(file, UploadFile):
                raise RequestError(422, "must be a file", field="picture")
            upload = await file.read() if file is not None else None
        content: str | bytes = text
    elif kind == "application/json":
        content = await request.body()
    else:
        raise RequestError(415, "must be application/json or multipart/form-data", field="content-type")
    try:
        item = ItemRequest.model_validate_json(content)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_input=False)
        raise RequestValidationError([one | {"loc": ("body", *one["loc"])} for one in errors]) from None
    if item.picture is None:
        return item, upload
    if upload is not None:
        raise RequestError(422, "must be given once, in base64 or as a file", field="picture")
    try:
        return item, base64.b64decode(item.picture, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(422, "must be base64", field="picture") from None


@router.post("/admin/reload", response_model=Reloaded, responses=CONFLICT, tags=["operation"])
async def reload(request: Request, body: ReloadRequest | None = None) -> Response:
    """The run is read again from where the server was told at its start, and takes over between two requests."""
    done = await service_of(request).reload(body.learned if body is not None else None)
    request.app.state.metrics.skipped.inc(done.skipped)
    return answer({"skipped": done.skipped, **done.snapshot.receipt()})


OF_BODIES = {
    "/recommend": (RecommendRequest, recommend),
    "/explain": (ExplainRequest, explain),
    "/events": (EventsRequest, events),
}
"""Endpoints that take a body and nothing else, and what it is, see `hellm.serve.shortcut`."""
