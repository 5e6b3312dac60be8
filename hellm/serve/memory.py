"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

__all__ = ["release_memory"]


def release_memory() -> None:
    """Give back what the C library keeps of freed memory, where it can.

    The tables of a catalogue that grows are copied with every new item, each a little larger than the hole that the
    one before leaves, so that the heap would grow by a table now and then. Some milliseconds (glibc's `malloc_trim`).
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Any:
    # Once: a library that is opened is a class of its own, which the collector of cycles may leave for hours.
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
