"""What is looked for, and pages of what was found."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hellm.serve.page.questions import named
from hellm.serve.state import Snapshot

__all__ = ["ids_like", "items_like", "page_of"]


def page_of(rows: Any, page: int, size: int) -> dict[str, Any]:
    """One page of many rows, an array or a list: "rows", "number", "pages" and "total"."""
    pages = max(1, -(-len(rows) // size))
    page = min(page, pages)
    return {"rows": rows[(page - 1) * size : page * size], "number": page, "pages": pages, "total": len(rows)}


def ids_like(ids: Sequence[str], words: str) -> Iterator[str]:
    """Ids that begin with what was typed; the very one comes first."""
    words = words.strip()
    if not words:
        return
    lower = words.casefold()
    exact = [one for one in ids if one == words]
    yield from exact
    yield from (one for one in ids if one != words and one.casefold().startswith(lower))


def items_like(snapshot: Snapshot, words: str, most: int) -> list[dict[str, Any]]:
    """Items whose id begins with what was typed, then those whose title holds all of its words."""
    recommender, found = snapshot.recommender, {}
    parts = words.casefold().split()
    if not parts:
        return []
    for one in ids_like(recommender.item_ids.ids, words):
        found.setdefault(recommender.item_ids.index(one))
        if len(found) >= most:
            break
    for row, title in enumerate(recommender.item_titles):
        if len(found) >= most:
            break
        if title and all(part in title.casefold() for part in parts):
            found.setdefault(row)
    return named(snapshot, list(found))
