"""How results look in a terminal."""

from __future__ import annotations

import codecs
import contextlib
import json
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["count", "difference", "duration", "one_line", "print_json", "printable", "table", "title"]

_PLAIN = {"±": "+-"}


def print_json(value: Any) -> None:
    """One line, the last of the command. Raises: ValueError, a number that JSON has not (NaN, infinity)."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value)
    print(text, flush=True)


@contextlib.contextmanager
def printable(stream: Any) -> Iterator[None]:
    """Lets a text stream of any encoding take every text: what it has no sign for is written in plain signs."""
    if not hasattr(stream, "reconfigure"):
        yield
        return
    codecs.register_error("hellm", _plain)
    before = stream.errors
    stream.reconfigure(errors="hellm")
    try:
        yield
    finally:
        stream.reconfigure(errors=before)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    plain = (_PLAIN.get(sign, sign.encode("ascii", "backslashreplace").decode()) for sign in signs)
    return "".join(plain), error.end


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, indent: int = 2) -> str:
    """Aligned columns: the first to the left, the others to the right."""
    cells = [[one_line(str(cell)) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append((" " * indent + "  ".join([first, *others])).rstrip())
    lines.insert(1, " " * indent + "-" * (sum(widths) + 2 * (len(widths) - 1)))
    return "\n".join(lines)


def title(item: str, text: str | None) -> str:
    """How an item is called, on one line."""
    return f"{one_line(text)} ({one_line(item)})" if text else one_line(item)


def one_line(text: str, most: int = 200) -> str:
    """What a user wrote, as a terminal can show it: signs that would steer it as escapes, and at most so many."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(sign if _is_shown(sign) else sign.encode("unicode_escape").decode() for sign in text)


def _is_shown(sign: str) -> bool:
    # Joiners are part of emoji and of Persian; other formats reverse or hide what stands around them.
    return sign in "\u200c\u200d" or unicodedata.category(sign) not in ("Cc", "Cf", "Cs", "Zl", "Zp")


def count(number: int) -> str:
    return f"{number:,}"


def duration(seconds: float) -> str:
    """Seconds as "42 s", "3 min 5 s" or "2 h 10 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes} min {seconds} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def difference(value: Mapping[str, Any] | None, itself: str) -> str:
    """A paired difference with its interval, where it has one; `itself` for what the others are compared with."""
    if value is None:
        return itself
    text, low, high = f"{value['difference']:+.4f}", value["low"], value["high"]
    return text if low is None else f"{text} [{low:+.4f}, {high:+.4f}]{'' if low > 0 or high < 0 else ' (tie)'}"
