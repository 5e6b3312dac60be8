"""Tables through polars: scan, parse, index ids without a Python object per row, and say where a bad cell stands."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import numpy as np

from hellm.data.dataset import DataError, IdMap

if TYPE_CHECKING:
    import polars as pl

# What a cell must be: a predicate on its text, and the words for a message.
Rule = tuple[Callable[[str], bool], str]


def _is_time(text: str) -> bool:
    try:
        datetime.fromisoformat(text.removesuffix("Z"))
    except ValueError:
        return _is_number(text)
    return True


def _is_number(text: str) -> bool:
    try:
        return np.isfinite(float(text))
    except ValueError:
        return False


NON_NEGATIVE_INTEGER: Rule = (lambda text: text.isascii() and text.isdecimal(), "a non-negative integer")
LABEL: Rule = (lambda text: text in ("0", "1", "2"), "0, 1 or 2 (train, validation, test)")
NUMBER: Rule = (_is_number, "a number")
ID: Rule = (lambda text: text != "", "an id")

TIME_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
)
TIME: Rule = (_is_time, "a time (seconds since 1970, or ISO 8601 such as 2024-05-31 14:00:00)")


def separator_of(path: Path) -> str:
    """Field separator, from the file's name."""
    return "\t" if path.suffix in (".tsv", ".inter", ".item", ".user") else ","


def scan(path: Path, *, quote: str | None = '"') -> pl.LazyFrame:
    """Lazy table of a .parquet file, or of a delimited file with a header, whose columns are all read as text."""
    import polars as pl

    if path.suffix == ".parquet":
        try:
            frame = pl.scan_parquet(path)
            frame.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise DataError(f"{path}: not a readable parquet file ({_first_line(error)})") from None
        return frame
    try:
        frame = pl.scan_csv(path, separator=separator_of(path), infer_schema=False, quote_char=quote)
        frame.collect_schema()
    except pl.exceptions.NoDataError:
        raise DataError(f"{path}: the file is empty") from None
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path}: not a readable table ({_first_line(error)})") from None
    return frame


def without_blank_lines(frame: pl.LazyFrame, columns: Iterable[str]) -> pl.LazyFrame:
    """Drop rows that are empty in all of the columns, as blank lines are."""
    import polars as pl

    return frame.filter(pl.any_horizontal(pl.col(*columns).is_not_null()))


def columns_of(frame: pl.LazyFrame) -> list[str]:
    return frame.collect_schema().names()


def collect(frame: pl.LazyFrame, path: Path, rules: dict[str, Rule], *, quote: str | None = '"') -> pl.DataFrame:
    """Run a lazy table whose columns have been cast leniently; an empty cell of a column with a rule is an error.

    Args:
        frame: Its columns are named as in the file.
        path: The file, for messages.
        rules: Column -> what its cells must be.
        quote: As for `scan`.

    Raises:
        DataError: Naming file, line, column, what was expected and what stands there.
    """
    import polars as pl

    try:
        table = frame.collect(engine="streaming")
    except pl.exceptions.PolarsError as error:
        raise_first_bad_cell(path, rules, _first_line(error), quote=quote)
    if not table.height:
        raise DataError(f"{path}: the table has a header but no rows")
    for column in rules:
        if column not in table.columns:
            continue
        bad = table[column].is_null()
        if table[column].dtype.is_float():
            bad |= ~table[column].is_finite().fill_null(False)
        if bad.any():
            row = int(bad.arg_max())
            otherwise = f"row {row + 1}: column {column!r} must be {rules[column][1]}"
            raise_first_bad_cell(path, rules, otherwise, quote=quote)
    return table


def raise_first_bad_cell(path: Path, rules: dict[str, Rule], otherwise: str, *, quote: str | None = '"') -> NoReturn:
    """Read a delimited file line by line up to the first cell that breaks its rule, and raise for it.

    The slow way round is only taken once polars has refused the file, as it does not say where.
    """
    if path.suffix == ".parquet":
        raise DataError(f"{path}: {otherwise}")
    quoting = {"quoting": csv.QUOTE_NONE} if quote is None else {}
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=separator_of(path), **quoting)
        header = next(reader, [])
        for cells in filter(None, reader):
            if len(cells) != len(header):
                raise DataError(
                    f"{path}:{reader.line_num}: expected {len(header)} fields ({', '.join(header)}), got {len(cells)}"
                )
            for number, (column, cell) in enumerate(zip(header, cells, strict=True), 1):
                accepts, wanted = rules.get(column, (None, ""))
                if accepts is not None and not accepts(cell):
                    raise DataError(
                        f"{path}:{reader.line_num}: column {number} ({column}) must be {wanted}, got {cell!r}"
                    )
    raise DataError(f"{path}: {otherwise}")


def sorted_ids(ids: pl.Series) -> list[str]:
    """Distinct ids in a fixed order: by value where all are plain integers, else by code point."""
    import polars as pl

    ids = ids.drop_nulls().unique()
    if len(ids) and ids.str.contains(r"^(0|[1-9]\d{0,17})$").all():
        ids = ids.cast(pl.Int64).sort().cast(pl.String)
    else:
        ids = ids.sort()
    return ids.to_list()


def index_ids(frame: pl.LazyFrame, column: str, known: Iterable[str] = ()) -> IdMap:
    """Map of all ids of a column: the known ones first and in their order, then the others in `sorted_ids` order."""
    import polars as pl

    found = sorted_ids(frame.select(pl.col(column).unique()).collect(engine="streaming")[column])
    ids = IdMap(known)
    ids.add(found)
    return ids


def to_index(column: str, ids: IdMap) -> pl.Expr:
    """Expression that turns a column of ids into indices; an unknown or empty id becomes null.

    An Enum holds the ids once and a small integer per row, so the strings of the events are never all in memory.
    """
    import polars as pl

    return pl.col(column).cast(pl.Enum(ids.ids), strict=False).to_physical().alias(column)


def time_expression(frame: pl.LazyFrame, column: str) -> pl.Expr:
    """Expression that turns a column of times into numbers: seconds for dates, the number itself for numbers.

    Which of the two it is, is decided on the first 1,000 rows.
    """
    import polars as pl

    dtype = frame.collect_schema()[column]
    source = pl.col(column)
    if dtype.is_temporal():
        return source.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    if dtype.is_numeric():
        return source.cast(pl.Float64)
    head = frame.select(source).head(1000).collect()[column].drop_nulls()
    numbers = source.cast(pl.Float64, strict=False)
    if head.cast(pl.Float64, strict=False).null_count() * 2 < len(head) or not len(head):
        return numbers
    best, least = numbers, len(head)
    for time_format in TIME_FORMATS:
        parse = source.str.to_datetime(time_format, strict=False, time_unit="us", time_zone="UTC")
        failed = head.to_frame().select(parse).to_series().null_count()
        if failed < least:
            best, least = parse.dt.epoch("us") / 1e6, failed
    return best


def to_seconds(times: np.ndarray, notes: list[str]) -> np.ndarray:
    """Times as seconds, int64 where whole; milli-, micro- and nanoseconds are recognised by their size."""
    typical = float(np.median(np.abs(times[:100_000]))) if len(times) else 0.0
    for limit, divisor, unit in ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds")):
        if typical > limit:
            notes.append(f"timestamps are taken as {unit} since 1970")
            times = times / divisor
            break
    whole = times.astype(np.int64)
    return whole if np.array_equal(whole, times) else times.astype(np.float64)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
