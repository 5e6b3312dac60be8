"""Many short texts as one block of bytes, which a file can hold as it stands in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, SupportsIndex, overload

import numpy as np

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Texts"]

# Texts that are Python objects at once.
_CHUNK = 1 << 16


class Texts(Sequence[str]):
    """A sequence of texts that takes their bytes and 8 bytes a text; equal to a list of the same texts.

    Text i is `data[starts[i] : starts[i + 1]]`, in UTF-8.

    Args:
        data: [num_bytes] uint8.
        starts: [n + 1] int64, rising from 0 to num_bytes.

    Raises:
        ValueError: `starts` does not rise from 0 to num_bytes, or an array has another type.
    """

    def __init__(self, data: np.ndarray, starts: np.ndarray) -> None:
        if data.dtype != np.uint8 or data.ndim != 1 or starts.dtype != np.int64 or starts.ndim != 1:
            raise ValueError(f"texts must be of uint8 and int64, got {data.dtype} and {starts.dtype}")
        whole = len(starts) and starts[0] == 0 and starts[-1] == len(data)
        if not whole or any((one[1:] < one[:-1]).any() for one in _pieces(starts)):
            raise ValueError(f"starts must rise from 0 to the {len(data)} bytes of the texts")
        self.data, self.starts = data, starts

    @classmethod
    def of(cls, texts: Iterable[str] | pl.Series) -> Texts:
        """Of texts, or of a column of polars without nulls."""
        if isinstance(texts, Texts):
            return texts
        blocks, lengths = [b""], [np.zeros(1, np.int64)]
        column: Any = texts if hasattr(texts, "to_list") else None
        rest = iter(texts) if column is None else (
            one for start in range(0, len(column), _CHUNK) for one in column.slice(start, _CHUNK).to_list()
        )  # fmt: skip
        while chunk := [one.encode("utf-8", "surrogatepass") for one in islice(rest, _CHUNK)]:
            blocks.append(b"".join(chunk))
            lengths.append(np.fromiter(map(len, chunk), np.int64, len(chunk)))
        starts = np.concatenate(lengths)
        return cls(np.frombuffer(b"".join(blocks), np.uint8), np.cumsum(starts, out=starts))

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step == 1:
                return self._between(start, max(start, stop))
            return [self[at] for at in range(start, stop, step)]
        at = int(index) + len(self) * (index < 0)
        if not 0 <= at < len(self):
            raise IndexError(f"index must be in [{-len(self)}, {len(self)}), got {index}")
        return _decoded(bytes(self.data[self.starts[at] : self.starts[at + 1]]))

    def __iter__(self) -> Iterator[str]:
        for chunk in self.chunks():
            yield from chunk

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return np.array_equal(self.starts, other.starts) and np.array_equal(self.data, other.data)
        if not isinstance(other, list):
            return NotImplemented
        return len(self) == len(other) and all(one == its for one, its in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def __repr__(self) -> str:
        return f"Texts({len(self)} texts)"

    def chunks(self) -> Iterator[list[str]]:
        """The texts in order, some of them at a time."""
        for start in range(0, len(self), _CHUNK):
            yield self._between(start, min(start + _CHUNK, len(self)))

    def series(self) -> pl.Series:
        """The texts as a column of polars.

        Raises: UnicodeEncodeError, a text that is no Unicode, such as a half of a surrogate pair.
        """
        import polars as pl

        parts = [pl.Series(chunk, dtype=pl.String) for chunk in self.chunks()]
        return pl.concat(parts) if parts else pl.Series([], dtype=pl.String)

    def take(self, kept: np.ndarray) -> Texts:
        """Those where `kept`, [n] bool, is true."""
        return Texts.of(one for one, keep in zip(self, kept.tolist(), strict=True) if keep)

    def _between(self, start: int, stop: int) -> list[str]:
        places = self.starts[start : stop + 1].tolist()
        if len(places) < 2:
            return []
        first = places[0]
        block = bytes(self.data[first : places[-1]])
        if block.isascii():
            text = block.decode("ascii")
            return [text[a - first : b - first] for a, b in pairwise(places)]
        return [_decoded(block[a - first : b - first]) for a, b in pairwise(places)]


def _decoded(block: bytes) -> str:
    return block.decode("utf-8", "surrogatepass")


def _pieces(values: np.ndarray) -> Iterator[np.ndarray]:
    """Overlapping by one, so that neighbours meet in one of them."""
    for start in range(0, len(values), _CHUNK):
        yield values[start : start + _CHUNK + 1]
