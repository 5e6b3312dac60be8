"""What a recommender answers with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

__all__ = ["ContentLink", "Reason", "Recommendations", "RecommendedItem"]


@dataclass(frozen=True)
class RecommendedItem:
    """One item of a list: its id, its title if it has one, and the score it is ranked by."""

    item: str
    title: str | None
    score: float


@dataclass(frozen=True)
class Recommendations:
    """The list of one user.

    Attributes:
        user: Id, None for a bare history.
        basis: What the scores are: "user" (the trained user embedding), "history" (an embedding made from the history)
            or "popularity" (training events per item), where there is no history to go by.
        items: Best first.
    """

    user: str | None
    basis: Literal["user", "history", "popularity"]
    items: list[RecommendedItem]

    def __iter__(self) -> Iterator[RecommendedItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True)
class ContentLink:
    """How alike two items are in one modality.

    Attributes:
        similarity: Cosine of their features.
        shared_hyperedges: kNN hyperedges that hold both: items that are among the nearest of the one and of the other.
    """

    similarity: float
    shared_hyperedges: int


@dataclass(frozen=True)
class Reason:
    """What ties one history item to a recommended item.

    Attributes:
        item: Id of the history item.
        title: Its title, if it has one.
        shared_users: Users with events on both items: the vertices that the two have in common as hyperedges.
        content: Modality ("text", "image", ...) -> link, for each that both items have; None where the run holds no
            item content.
        content_similarity: Cosine in the item hypergraph's embedding; None where the run has none.
        similarity: Cosine of the two items' keys, which is all that the model itself knows of them.
    """

    item: str
    title: str | None
    shared_users: int
    content: dict[str, ContentLink] | None
    content_similarity: float | None
    similarity: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return asdict(self)
