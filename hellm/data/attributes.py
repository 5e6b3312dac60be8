"""Attributes of items: sets of values in the texts of a column."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hellm.data.dataset import ItemFeatures

__all__ = ["NOT_ATTRIBUTES", "AttributeSet", "indicators", "split_values"]

# Fields of items that describe or show them, and are no values that items share.
NOT_ATTRIBUTES = frozenset({"title", "description", "image", "image_url"})


_BAR = re.compile(r"\|")
# Of equally frequent ones the first.
_OTHERS = (re.compile(";"), re.compile(", "), re.compile(r"(?<!\d),(?=\S)|,(?=[^\s\d])"))


def split_values(texts: Sequence[str], *, single: bool = False) -> list[tuple[str, ...]]:
    """The distinct values in each text of a column, in their order.

    A text is a JSON list, or values with one separator, the same for the whole column: "|" where it occurs, else the
    one that most texts have of ";", a comma before a blank, and a comma before anything else. So a path such as
    "Sensors,Test, Measure & Inspect" keeps the comma inside its last value. Commas between digits are decimal.

    Args:
        texts: [num_items]; blank = no values.
        single: A text is one value, whatever stands in it.
    """
    if single:
        return [(text.strip(),) if text.strip() else () for text in texts]
    plain = [text for text in texts if not text.lstrip().startswith("[")]
    if any("|" in text for text in plain):
        separator = _BAR
    else:
        separator = max(_OTHERS, key=lambda mark: sum(mark.search(text) is not None for text in plain))
    return [_values(text, separator) for text in texts]


def _values(text: str, separator: re.Pattern[str]) -> tuple[str, ...]:
    parts = _json_list(text)
    if parts is None:
        parts = separator.split(text)
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _json_list(text: str) -> list[str] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return [str(value) for value in values if not isinstance(value, (list, dict)) and value is not None]


# A value that nearly all items have tells nothing apart, and rare ones cost columns.
_LARGEST_SHARE = 0.5
_MOST_VALUES = 1024


@dataclass(frozen=True, eq=False)
class AttributeSet:
    """Items by the values of one attribute.

    Values that one item alone has, or more than half of all items, are left out, and so are all but the 1,024 most
    frequent.

    Attributes:
        values: The V values that are kept, sorted, so that more items with the same values leave the columns as they
            are: what is trained on goes by the place of a column.
        indicators: [I, V] float32, 1 where an item has a value; a row of zeros has none of them.
    """

    values: tuple[str, ...]
    indicators: np.ndarray

    @classmethod
    def of(cls, lists: Sequence[Sequence[str]]) -> AttributeSet:
        """From the distinct values of each item, [I]."""
        counts = Counter(value for one in lists for value in one)
        kept = [value for value, count in counts.items() if 2 <= count <= _LARGEST_SHARE * len(lists)]
        values = tuple(sorted(sorted(kept, key=lambda value: (-counts[value], value))[:_MOST_VALUES]))
        return cls(values, indicators(lists, values))

    @cached_property
    def features(self) -> ItemFeatures:
        """The indicators as features; items without a value lack them."""
        return ItemFeatures.from_values(self.indicators)


def indicators(lists: Sequence[Sequence[str]], values: Sequence[str]) -> np.ndarray:
    """[len(lists), V] float32, 1 where a list has a value; others are ignored."""
    column = {value: place for place, value in enumerate(values)}
    table = np.zeros((len(lists), len(values)), np.float32)
    for row, one in enumerate(lists):
        table[row, [column[value] for value in one if value in column]] = 1
    return table
