"""Attributes of items: sets of values in the texts of a column."""

from __future__ import annotations

import json
from collections.abc import Sequence

__all__ = ["NOT_ATTRIBUTES", "split_values"]

# Fields of items that describe or show them, and are no values that items share.
NOT_ATTRIBUTES = frozenset({"title", "description", "image", "image_url"})


def split_values(texts: Sequence[str], *, single: bool = False) -> list[tuple[str, ...]]:
    """The distinct values in each text of a column, in their order.

    A text is a JSON list, or values with one separator, the same for the whole column: "|" where it occurs, else ";",
    else a comma followed by a blank, else none.

    Args:
        texts: [num_items]; blank = no values.
        single: A text is one value, whatever stands in it.
    """
    if single:
        return [(text.strip(),) if text.strip() else () for text in texts]
    plain = [text for text in texts if not text.lstrip().startswith("[")]
    separator = next((mark for mark in ("|", ";", ", ") if any(mark in text for text in plain)), None)
    return [_values(text, separator) for text in texts]


def _values(text: str, separator: str | None) -> tuple[str, ...]:
    parts = _json_list(text)
    if parts is None:
        parts = text.split(separator) if separator else [text]
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _json_list(text: str) -> list[str] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [str(value) for value in values if not isinstance(value, (list, dict)) and value is not None]
