"""Ids, rows and histories: what is between the names a caller uses and the rows of the tables."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any, Literal, overload

import numpy as np

from hellm.data import DataError, IdMap

__all__ = ["history_lists", "id_list", "nearest_names", "rows_of"]

# Above this many ids the nearest names are looked for among those with the same beginning only.
_MAX_COMPARED = 20_000


def rows_of(ids: IdMap, names: Iterable[str], kind: str) -> np.ndarray:
    """Rows [n] int64 of ids. Raises: DataError, an unknown one, naming the nearest."""
    names = [str(one) for one in names]
    for name in names:
        if name not in ids:
            nearest = nearest_names(name, ids.ids)
            hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise DataError(f"unknown {kind} {name!r} among the {len(ids)} {kind}s of the run{hint}")
    return ids.indices(names)


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """Up to three known names that look like `name`."""
    if len(known) > _MAX_COMPARED:
        known = [one for one in known if one[:2] == name[:2]][:_MAX_COMPARED]
    return difflib.get_close_matches(name, known, n=3, cutoff=0.5)


@overload
def id_list(ids: Iterable[str], what: str) -> list[str]: ...
@overload
def id_list(ids: Iterable[str | None], what: str, *, missing: Literal[True]) -> list[str | None]: ...
def id_list(ids: Iterable[str | None], what: str, *, missing: bool = False) -> Any:
    """Ids (or with `missing`, titles, some of them None) as texts.

    Raises: ValueError, one text in place of several, whose letters would be taken for ids; or lists within.
    """
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise ValueError(f"{what} must be a list of texts, got {'the text ' * isinstance(ids, str)}{ids!r}")
    texts = []
    for one in ids:
        if isinstance(one, bytes) or _is_list(one):
            raise ValueError(f"{what} must be a list of texts, got {one!r} in it")
        texts.append(None if one is None and missing else str(one))
    return texts


def history_lists(histories: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    """One list of item ids or several, as several; none of an empty list.

    Raises: ValueError, a text, or lists and ids side by side.
    """
    if isinstance(histories, (str, bytes)) or not isinstance(histories, Iterable):
        raise ValueError(
            f"histories must be a list of item ids or of such lists, got "
            f"{'the text ' * isinstance(histories, str)}{histories!r}"
        )
    lists: list[Any] = list(histories)
    nested = [_is_list(one) for one in lists]
    if any(nested) and not all(nested):
        odd = lists[nested.index(not nested[0])]
        raise ValueError(f"histories must be a list of item ids or of such lists, got both, as {odd!r}")
    return [id_list(one, "a history") for one in (lists if any(nested) else [lists])] if lists else []


def _is_list(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes)) and getattr(value, "ndim", 1) != 0
