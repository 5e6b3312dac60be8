"""Files of items, users and histories that somebody asks with, read in parts where they may be long."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from hellm._files import reading
from hellm.data import DataError

__all__ = ["Asked", "asked_in", "read_lines"]

_COLUMNS = ("user", "history")


class Asked(NamedTuple):
    """Users or histories to recommend to.

    Attributes:
        users: Ids; of histories they are labels, None where there is none.
        histories: Item ids in time order for each; None where known users are meant.
    """

    users: Sequence[str | None]
    histories: list[list[str]] | None


def read_lines(file: str | PathLike[str]) -> list[str]:
    """The lines of a text file without blanks around them; empty ones are left out. Raises: DataError, other text."""
    try:
        lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be text in UTF-8 ({error})") from None
    return [line.strip() for line in lines if line.strip()]


def asked_in(file: str | PathLike[str], size: int) -> Iterator[Asked]:
    """What a file asks for, `size` at a time, in its order.

    Args:
        file: NAME.parquet with the columns "user", "history" (a list of item ids) or both; NAME.jsonl with an object of
            these keys, or a list of item ids, on each line; any other name is a text file with a user id on each line.
            Where there are histories, they are what is recommended by, and users are labels.
        size: Most in a part, >= 1.
    Raises: DataError naming file and line, something else in it; FileNotFoundError.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: it must be a file of users or histories")
    suffix = file.suffix.lower()
    read = {".parquet": _of_parquet, ".jsonl": _of_json_lines}.get(suffix, _of_text)
    yield from read(file, size)


def _of_parquet(file: Path, size: int) -> Iterator[Asked]:
    import polars as pl

    with reading(file):
        schema = pl.scan_parquet(file, glob=False).collect_schema()
    columns = [name for name in _COLUMNS if name in schema]
    types = {"user": pl.String, "history": pl.List(pl.String)}
    if not columns or ("history" in columns and not isinstance(schema["history"], pl.List)):
        raise DataError(
            f"{file}: must have a column user, or a column history of lists of item ids, got "
            f"{', '.join(f'{name} ({kind})' for name, kind in schema.items()) or 'no column'}"
        )
    table = pl.scan_parquet(file, glob=False).select(pl.col(name).cast(types[name]) for name in columns)
    start, count = 0, size
    while count == size:
        with reading(file):
            part = table.slice(start, size).collect()
        count = len(part)
        if count:
            yield _of_columns(part.to_dict(as_series=False), file, start)
        start += size


def _of_columns(columns: dict[str, list], file: Path, start: int) -> Asked:
    for name in ("history",) if "history" in columns else ("user",):
        for row, value in enumerate(columns[name]):
            if value is None or (isinstance(value, list) and None in value):
                raise DataError(f"{file}: row {start + row + 1} must have a {name} without gaps, got {value!r}")
    count = len(next(iter(columns.values())))
    return Asked(columns.get("user", [None] * count), columns.get("history"))


def _of_json_lines(file: Path, size: int) -> Iterator[Asked]:
    with file.open(encoding="utf-8-sig") as lines:
        numbered = ((number, line) for number, line in enumerate(_decoded(lines, file), 1) if line.strip())
        kind = None
        while part := list(islice(numbered, size)):
            rows = [_object(line, f"{file}: line {number}") for number, line in part]
            for (number, _), row in zip(part, rows, strict=True):
                kind = kind or sorted(row)
                if sorted(row) != kind:
                    raise DataError(
                        f"{file}: line {number} must have {' and '.join(kind)} as the lines before, got "
                        f"{' and '.join(sorted(row))}"
                    )
            users = [row.get("user") for row in rows]
            yield Asked(users, [row["history"] for row in rows] if "history" in (kind or ()) else None)


def _object(line: str, where: str) -> dict:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise DataError(f"{where} must be JSON ({error})") from None
    row = {"history": value} if isinstance(value, list) else value
    if not isinstance(row, dict) or not row or not set(row) <= set(_COLUMNS):
        raise DataError(f"{where} must be a list of item ids, or an object with user, history or both, got {line[:80]}")
    if "history" in row:
        history = row["history"]
        if not isinstance(history, list) or not all(isinstance(item, (str, int)) for item in history):
            raise DataError(f"{where} must have a list of item ids as history, got {history!r}")
        row["history"] = [str(item) for item in history]
    if not isinstance(row.get("user", ""), (str, int)):
        raise DataError(f"{where} must have a text as user, got {row['user']!r}")
    return {name: str(value) if name == "user" else value for name, value in row.items()}


def _of_text(file: Path, size: int) -> Iterator[Asked]:
    with file.open(encoding="utf-8-sig") as lines:
        users = (line.strip() for line in _decoded(lines, file) if line.strip())
        while part := list(islice(users, size)):
            yield Asked(part, None)


def _decoded(lines: Iterator[str], file: Path) -> Iterator[str]:
    try:
        yield from lines
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: must be text in UTF-8 ({error})") from None
