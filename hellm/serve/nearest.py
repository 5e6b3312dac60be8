"""Known ids that look like an unknown one, found fast enough to be told in an answer."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Iterable

__all__ = ["Nearest"]

# Neighbours in alphabetical order that are compared, on either side.
_COMPARED = 100
_MAX_LENGTH = 64


class Nearest:
    """Ids in alphabetical order.

    Args:
        ids: Any number; a search looks at a few of them only.
    """

    def __init__(self, ids: Iterable[str]) -> None:
        self._ids = sorted(ids)

    def __call__(self, name: str) -> list[str]:
        """Up to three ids that look like `name` and begin like it."""
        place = bisect.bisect_left(self._ids, name)
        among = self._ids[max(0, place - _COMPARED) : place + _COMPARED]
        short = [one for one in among if len(one) <= _MAX_LENGTH]
        return difflib.get_close_matches(name[:_MAX_LENGTH], short, n=3, cutoff=0.5)
