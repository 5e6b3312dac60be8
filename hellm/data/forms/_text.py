"""Text files as they come: the encoding is known, recognised or refused with the line that shows it."""

from __future__ import annotations

import codecs
import json
import re
from pathlib import Path
from typing import Any

from hellm.data.dataset import DataError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CHUNK = 1 << 22


def check_encoding(encoding: str | None) -> str | None:
    """The codec's plain name. Raises ValueError for one that Python does not know, or that is none of text."""
    if encoding is None:
        return None
    try:
        "".encode(encoding)
        return codecs.lookup(encoding).name
    except (LookupError, TypeError, ValueError):
        raise ValueError(f"encoding must be one that Python knows, e.g. utf-8 or latin-1, got {encoding!r}") from None


def encoding_of(start: bytes, encoding: str | None = None) -> str:
    """Encoding of a file: the one asked for, else by its byte order mark, else UTF-8.

    Args:
        start: First bytes of the file.
        encoding: What the user says it is.
    """
    encoding = check_encoding(encoding)
    marked = next((name for mark, name in _MARKS if start.startswith(mark)), None)
    if encoding in (None, "utf-8"):
        return marked or "utf-8"
    return encoding


def undecodable(path: Path, error: UnicodeError, line: int | None = None) -> DataError:
    """What to say of bytes that are not in the encoding of their file."""
    if isinstance(error, UnicodeDecodeError):
        at = f"{path}:{line}" if line is not None else f"{path}"
        name, byte = error.encoding, f"byte 0x{error.object[error.start]:02x}"
    else:
        at, name, byte = f"{path}", "the encoding", str(error)
    return DataError(
        f'{at}: {byte} is not {name.upper()}; say which encoding the file has, e.g. encoding="latin-1" '
        "(--encoding latin-1) or utf-16"
    )


def check_decodes(path: Path, encoding: str) -> None:
    """Read a file through once, in little memory.

    Raises:
        DataError: Naming the line of the first byte that is not in the encoding, or of a NUL character.
    """
    decoder, line = codecs.getincrementaldecoder(encoding)(), 1
    with path.open("rb") as file:
        while True:
            chunk = file.read(_CHUNK)
            try:
                text = decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                before = error.object[: error.start]
                raise undecodable(path, error, line + _ends(before.decode(encoding, "replace"))) from None
            except UnicodeError as error:
                raise undecodable(path, error) from None
            if "\0" in text:
                at = line + _ends(text[: text.index("\0")])
                raise DataError(
                    f"{path}:{at}: a NUL character, so this is no text in {encoding}; if it is UTF-16 without a mark, "
                    'give encoding="utf-16-le" (--encoding utf-16-le)'
                )
            line += _ends(text)
            if not chunk:
                return


def _ends(text: str) -> int:
    return text.count("\n") or text.count("\r")


def read_text(path: Path, encoding: str | None = None) -> str:
    """A whole text file. Raises DataError naming the line that cannot be decoded."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: not a readable file ({error.strerror or error})") from None
    encoding = encoding_of(data[:4], encoding)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = 1 + _ends(error.object[: error.start].decode(encoding, "replace"))
        raise undecodable(path, error, line) from None
    except UnicodeError as error:
        raise undecodable(path, error) from None


def first_line(path: Path, encoding: str | None = None) -> str:
    """First line of a text file, without its end; bytes that cannot be decoded are replaced.

    Raises:
        DataError: The file is empty or cannot be opened.
    """
    try:
        with path.open("rb") as file:
            start = file.read(1 << 16)
    except OSError as error:
        raise DataError(f"{path}: not a readable file ({error.strerror or error})") from None
    line = start.decode(encoding_of(start, encoding), "replace").lstrip().partition("\n")[0].partition("\r")[0]
    if not line.strip():
        raise DataError(f"{path}: the file is empty")
    return line


def load_json(path: Path, encoding: str | None = None) -> Any:
    """A JSON file.

    Raises:
        DataError: Naming line and column of a syntax error, or the key that an object holds twice.
    """
    text = read_text(path, encoding)
    if not text.strip():
        raise DataError(f"{path}: the file is empty")

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise DataError(f"{path}: an object holds the key {twice[:40]!r} twice")
        return value

    try:
        return json.loads(text, object_pairs_hook=distinct)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise DataError(f"{path}: not valid data (nested too deeply)") from None
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def line_with(path: Path, word: str) -> int | None:
    """Number of the first line that holds a word of its own; None if none does."""
    with path.open("rb") as file:
        return next(
            (at for at, line in enumerate(file, 1) if re.search(rb"(?<!\w)%b(?!\w)" % word.encode(), line)), None
        )
