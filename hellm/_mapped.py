"""Arrays in mapped files: rows that have been read need not stay in memory."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator

import numpy as np

__all__ = ["HELD_BYTES", "read_blocks"]

HELD_BYTES = 1 << 28
"""Of an array in a mapped file, bytes that may stay in memory once they have been read."""
# Linux: as if memory were short. Unlike MADV_DONTNEED, it keeps what was written into a private mapping.
_PAGE_OUT = 21


def read_blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """First row of each block of at most a sixteenth of `HELD_BYTES`, and its rows, over the memory of `values`.

    Of an array in a mapped file with more than `HELD_BYTES`, pages leave this process before the next block, where the
    system allows it.
    """
    rows = max(1, HELD_BYTES // 16 * len(values) // max(values.nbytes, 1))
    for start in range(0, len(values), rows):
        yield start, values[start : start + rows]
        release(values)


def release(values: np.ndarray) -> None:
    """Let the pages of a large array in a mapped file leave memory; its values stay what they are."""
    if values.nbytes <= HELD_BYTES:
        return
    base = values
    while isinstance(base, (np.ndarray, memoryview)):
        base = base.obj if isinstance(base, memoryview) else base.base
    if isinstance(base, mmap.mmap) and hasattr(base, "madvise"):
        with contextlib.suppress(OSError):
            base.madvise(_PAGE_OUT)
