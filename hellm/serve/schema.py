"""What requests and answers hold; the OpenAPI description is made from it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "Errors",
    "EventsRequest",
    "EventsStored",
    "ExplainRequest",
    "Explanation",
    "History",
    "HistoryRequest",
    "Item",
    "ItemRequest",
    "ItemStored",
    "Lists",
    "RecommendRequest",
    "ReloadRequest",
    "Reloaded",
    "Similar",
    "SimilarRequest",
]

MAX_LISTS = 256
MAX_HISTORY = 1000
MAX_IDS = 100_000
MAX_K = 500
MAX_EVENTS = 1000
MAX_REASONS = 1000
"""Reasons in one answer: lists times k times `explain`."""

Id = Annotated[str, Field(min_length=1, max_length=512)]
Value = Annotated[str, Field(min_length=1, max_length=512)]
K = Annotated[int, Field(ge=1, le=MAX_K, strict=True)]


class _Request(BaseModel):
    # Ids are seldom the same twice, and pydantic would keep 16,384 of them.
    model_config = ConfigDict(extra="forbid", cache_strings="keys")


class RecommendRequest(_Request):
    """For whom, from what, and how many."""

    users: Annotated[list[Id], Field(min_length=1, max_length=MAX_LISTS)] | None = Field(
        None, description="Ids of users. Give this or `histories`."
    )
    histories: (
        Annotated[list[Annotated[list[Id], Field(max_length=MAX_HISTORY)]], Field(min_length=1, max_length=MAX_LISTS)]
        | None
    ) = Field(None, description="Item ids in time order, of anybody; an empty one gets the most popular items.")
    k: K = Field(10, description="Length of each list; it is shorter where fewer items are left.")
    exclude_seen: Annotated[bool, Field(strict=True)] = Field(True, description="Leave out the items of the history.")
    exclude: Annotated[list[Id], Field(max_length=MAX_IDS)] = Field([], description="Item ids to leave out for all.")
    candidates: Annotated[list[Id], Field(min_length=1, max_length=MAX_IDS)] | None = Field(
        None, description="Item ids to choose from, such as what is in stock."
    )
    filters: Annotated[
        dict[Value, Annotated[list[Value], Field(min_length=1, max_length=100)]], Field(max_length=16)
    ] = Field({}, description="Attribute -> values; an item must have one of them, for each attribute.")
    explain: Annotated[int, Field(ge=0, le=5, strict=True)] = Field(0, description="Most reasons for each item.")
    unknown: Literal["error", "ignore"] = Field(
        "error",
        description="What happens to ids that the run does not know: an error that names them, or they are left out, "
        "which `ignored` counts, and unknown users are answered like empty histories.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> RecommendRequest:
        if (self.users is None) == (self.histories is None):
            raise ValueError(f"give either users or histories, got {'neither' if self.users is None else 'both'}")
        if self.explain * self.k * len(self.users or self.histories or ()) > MAX_REASONS:
            raise ValueError(f"lists times k times explain must be at most {MAX_REASONS}")
        return self


class SimilarRequest(_Request):
    """Items like which item, and how many."""

    id: Id
    k: K = 10


class HistoryRequest(_Request):
    """Whose history."""

    id: Id


class ExplainRequest(_Request):
    """Why an item is recommended."""

    item: Id
    user: Id | None = Field(None, description="Id of a user. Give this or `history`.")
    history: Annotated[list[Id], Field(max_length=MAX_HISTORY)] | None = None
    k: Annotated[int, Field(ge=1, le=50, strict=True)] = Field(3, description="Most reasons.")

    @model_validator(mode="after")
    def _one_of_both(self) -> ExplainRequest:
        if (self.user is None) == (self.history is None):
            raise ValueError(f"give either user or history, got {'neither' if self.user is None else 'both'}")
        return self


class Event(_Request):
    """A user did something with an item, after all that is known of the user."""

    id: Id = Field(description="Chosen by the sender: an event that is sent twice counts once.")
    user: Id
    item: Id
    time: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] | None = Field(
        None, description="Seconds since 1970. It is kept; what counts is the order of arrival."
    )


class EventsRequest(_Request):
    """Events in time order."""

    events: Annotated[list[Event], Field(min_length=1, max_length=MAX_EVENTS)]


class ItemRequest(_Request):
    """A new item."""

    id: Id
    title: Annotated[str, Field(max_length=2000)] | None = None
    description: Annotated[str, Field(max_length=20_000)] | None = None
    picture: Annotated[str, Field(max_length=20_000_000)] | None = Field(
        default=None, description="An image file in base64."
    )
    attributes: Annotated[dict[Value, Annotated[list[Value], Field(max_length=100)]], Field(max_length=16)] = {}
    features: Annotated[
        dict[Value, Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=16_384)]],
        Field(max_length=16),
    ] = Field(
        default={}, description="Modality -> features, as the run's own were made, in place of what the server encodes."
    )


class Receipt(BaseModel):
    """Where an answer comes from."""

    model_version: str
    run_hash: str
    data_fingerprint: str | None
    learned: int = Field(description="The `revision` up to which what is stored is part of the run itself.")
    revision: int = Field(description="Number of the last event or item that had been stored and taken up.")
    state: str = Field(description="Digest of the run and all that was taken up: the same state answers the same.")


class ContentLink(BaseModel):
    """How alike two items are in one modality."""

    similarity: float
    shared_hyperedges: int


class Reason(BaseModel):
    """What ties one item of the history to a recommended one."""

    item: str
    title: str | None
    shared_users: int
    content: dict[str, ContentLink] | None
    content_similarity: float | None
    similarity: float


class Item(BaseModel):
    """An item of a list."""

    item: str
    title: str | None
    score: float
    reasons: list[Reason] | None = None


class List(BaseModel):
    """The list of one user or history."""

    user: str | None
    basis: Literal["user", "history", "popularity"]
    items: list[Item]


class Lists(Receipt):
    """One list for each user or history, in their order."""

    lists: list[List]
    ignored: dict[str, int] = Field(description="Field -> ids that the run does not know and that were left out.")


class Similar(Receipt):
    """Items like an item; scores are cosines."""

    item: str
    items: list[Item]


class History(Receipt):
    """What a user has done, in time order."""

    user: str
    items: list[Item]


class Explanation(Receipt):
    """The strongest reasons first."""

    item: str
    reasons: list[Reason]


class EventsStored(Receipt):
    """Events are on disk and count from the next answer on."""

    stored: int
    duplicates: int = Field(description="Events whose id had been stored before.")


class ItemStored(Receipt):
    """The item is on disk and ranks from the next answer on."""

    item: str
    stored: bool = Field(description="False where the same item had been stored before.")
    placed_by: list[str] = Field(description="Features and attributes of the item that the run knows items by.")


class ReloadRequest(_Request):
    """A run that was trained anew."""

    learned: Annotated[int, Field(ge=0, le=2**62, strict=True)] | None = Field(
        None,
        description="The `revision` up to which what is stored is part of the run already, and not taken up again.",
    )


class Reloaded(Receipt):
    """The run that is served from now on."""

    skipped: int = Field(description="Stored entries that do not fit the run, such as events of items it lacks.")


class Error(BaseModel):
    """One thing that is wrong."""

    field: str | None
    message: str
    nearest: list[str] = []


class Errors(BaseModel):
    """All that is wrong with a request."""

    errors: list[Error]
