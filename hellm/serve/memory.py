"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes

__all__ = ["release_memory"]


def release_memory() -> None:
    """Give back what the C library keeps of freed memory, where it can.

    The tables of a catalogue that grows are copied with every new item, each a little larger than the hole that the
    one before leaves, so that the heap would grow by a table now and then. Some milliseconds (glibc's `malloc_trim`).
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return
    trim(0)
