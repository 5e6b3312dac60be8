"""Tables through polars: parquet, and text with fields and a header, whichever way it is written.

What polars reads safely it reads itself, lazily. Text of another encoding, with other line ends, with quotes inside
fields or with lines of other lengths goes row by row through `csv`, which is slower and says which line is wrong.
"""

from __future__ import annotations

import csv
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from hellm.data.dataset import DataError
from hellm.data.forms._text import check_decodes, encoding_of

if TYPE_CHECKING:
    import polars as pl

# What a cell must be: a predicate on its text, and the words for a message.
Rule = tuple[Callable[[str], bool], str]

NON_NEGATIVE_INTEGER: Rule = (
    lambda text: text.isascii() and text.strip().isdecimal() and len(text.strip()) < 19,
    "a non-negative integer of at most 18 digits",
)
LABEL: Rule = (lambda text: text.strip() in ("0", "1", "2"), "0, 1 or 2 (train, validation, test)")

_NAMES = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "pipe": "|", "bar": "|", "space": " "}
_WORDS = {"\t": "tabs", " ": "blanks"}
_CHUNK = 1 << 24
# Rows that the slow way holds as Python objects at once.
_ROWS = 50_000


def check_separator(separator: str | None) -> str | None:
    """The separator as one character. Raises ValueError for anything that cannot separate fields."""
    if separator is None:
        return None
    separator = _NAMES.get(separator.strip().lower() or separator, separator)
    if len(separator) != 1 or separator in '"\r\n\0':
        raise ValueError(f"separator must be one character, or tab, comma, semicolon, pipe or space, got {separator!r}")
    return separator


class Table:
    """A table in a file.

    Args:
        path: A .parquet file; or text with a header, whose columns are all read as text.
        separator: Of fields; None finds it in the header.
        encoding: None recognises it by a byte order mark, and takes UTF-8 otherwise.
        quote: Quote character; None where the form knows no quotes.

    Attributes:
        columns: Names, without surrounding blanks; a nameless column is called "column N".
        repeated: Names that stand more than once in the header; only the first of each can be read.
        notes: What had to be assumed to read it.

    Raises:
        DataError: Naming file and line.
    """

    def __init__(
        self, path: Path, *, separator: str | None = None, encoding: str | None = None, quote: str | None = '"'
    ) -> None:
        self.path, self.notes, self.repeated = path, [], set()
        self._quote, self._parquet, self._lazy = quote, path.suffix.lower() == ".parquet", True
        if self._parquet:
            self._open_parquet()
        else:
            self._open_text(check_separator(separator), encoding)

    def _open_parquet(self) -> None:
        import polars as pl

        with self._readable():
            self.frame = pl.scan_parquet(self.path, glob=False)
            self._schema: dict[str, pl.DataType] = dict(self.frame.collect_schema())
        self.columns = list(self._schema)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        import polars as pl

        # The parquet decoder panics on some damaged files, and a panic is no Exception.
        try:
            yield
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self.path}: not a readable parquet file ({_first_line(error)})") from None

    def _open_text(self, separator: str | None, encoding: str | None) -> None:
        import polars as pl

        try:
            with self.path.open("rb") as file:
                start = file.read(1 << 20)
        except OSError as error:
            raise DataError(f"{self.path}: not a readable file ({error.strerror or error})") from None
        if not start.strip():
            raise DataError(f"{self.path}: the file is empty")
        self._encoding = encoding_of(start[:4], encoding)
        check_decodes(self.path, self._encoding)
        text = start.decode(self._encoding, "ignore").lstrip("\ufeff")
        lines = text.splitlines()
        self._skip = next((at for at, line in enumerate(lines) if line.strip()), None)
        if self._skip is None:
            raise DataError(f"{self.path}: the file is empty")
        header, asked = lines[self._skip], separator
        if header.lower().startswith("sep=") and len(header.rstrip()) <= 5:
            separator = separator or header[4:5] or ","
            self._skip += 1
        self._separator = separator or self._find_separator(header)
        if asked is None and self._separator != self._usual_separators()[0]:
            word = _WORDS.get(self._separator, repr(self._separator))
            self.notes.append(f"{self.path.name}: fields are taken as separated by {word}")
        _, names = next(self._lines(), (0, []))
        if not any(name.strip() for name in names):
            raise DataError(f"{self.path}: the file is empty")
        self.columns = self._name(names)
        self._schema = dict.fromkeys(self.columns, pl.String())
        self._lazy = self._encoding in ("utf-8", "utf-8-sig") and not self._skip and _is_plain(
            self.path, self._separator, self._quote
        )  # fmt: skip
        if self._lazy:
            self.frame = pl.scan_csv(
                self.path, separator=self._separator, schema=self._schema, quote_char=self._quote, glob=False
            )
        else:
            self._read_rows()

    def _usual_separators(self) -> str:
        """Those that a file of this name may have, the usual one first."""
        return {".csv": ",;\t|", ".tsv": "\t,;|"}.get(self.path.suffix.lower(), "\t ,;|")

    def _find_separator(self, header: str) -> str:
        usual = self._usual_separators()
        return max(usual, key=lambda one: (len(next(csv.reader([header], delimiter=one), [])), -usual.index(one)))

    def _name(self, names: list[str]) -> list[str]:
        columns: list[str] = []
        for number, name in enumerate(names, 1):
            name = name.strip(" \t\r\n\ufeff") or f"column {number}"
            if name in columns:
                self.repeated.add(name)
                name = next(f"{name} ({n})" for n in range(2, len(names) + 2) if f"{name} ({n})" not in columns)
            columns.append(name)
        return columns

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Line number and cells of the header and of each row that is not blank."""
        quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if self._quote is None else {"strict": True}
        with self.path.open(encoding=self._encoding, newline="") as file:
            skipped = list(islice(file, self._skip))
            rows = csv.reader(file, delimiter=self._separator, **quoting)
            try:
                for cells in rows:
                    if not cells or (len(cells) == 1 and not cells[0].strip()):
                        continue
                    if cells[0].startswith("\ufeff"):
                        cells[0] = cells[0].lstrip("\ufeff")
                    yield rows.line_num + len(skipped), cells
            except csv.Error as error:
                raise DataError(
                    f"{self.path}:{rows.line_num + len(skipped)}: {error}; a field that begins with a quote must end "
                    "with one, and quotes inside it must be doubled"
                ) from None

    def _read_rows(self) -> None:
        """Take the table row by row instead of by polars."""
        import polars as pl

        width, parts, trailing, rows = len(self.columns), [], 0, self._lines()
        next(rows)
        while True:
            columns: list[list[str | None]] = [[] for _ in self.columns]
            for line, cells in islice(rows, _ROWS):
                if len(cells) > width:
                    if any(cell.strip() for cell in cells[width:]):
                        raise DataError(self._other_length(line, cells))
                    trailing += 1
                for column, cell in zip(columns, cells, strict=False):
                    column.append(cell)
                for column in columns[len(cells) :]:
                    column.append(None)
            if not columns[0]:
                break
            parts.append(pl.DataFrame(dict(zip(self.columns, columns, strict=True)), schema=self._schema))
        if trailing:
            self.notes.append(f"{self.path.name}: {trailing} lines end with a separator too many, which is overlooked")
        self.frame = (pl.concat(parts) if parts else pl.DataFrame(schema=self._schema)).lazy()
        self._lazy = False

    def _other_length(self, line: int, cells: list[str]) -> str:
        expected = ", ".join(self.columns)
        return (
            f"{self.path}:{line}: expected {len(self.columns)} fields ({expected}), got {len(cells)}; "
            "a field that holds the separator must be quoted"
        )

    def collect(self, build: Callable[[pl.LazyFrame], pl.LazyFrame]) -> pl.DataFrame:
        """Run a query on the table.

        Raises:
            DataError: The file turns out to be damaged; naming the line where it is text.
        """
        import polars as pl

        if self._parquet:
            with self._readable():
                return build(self.frame).collect(engine="streaming")
        if not self._lazy:
            return build(self.frame).collect()
        try:
            return build(self.frame).collect(engine="streaming")
        except (pl.exceptions.PolarsError, pl.exceptions.PanicException):
            self._read_rows()
            return build(self.frame).collect()

    def text(self, column: str) -> pl.Expr:
        """A column as text, null where it is empty; whole numbers are written without a point.

        Raises:
            DataError: The cells are lists or other structures.
        """
        import polars as pl

        dtype, cell = self._schema[column], pl.col(column)
        if dtype.is_float():
            value = cell.cast(pl.Float64)
            whole = value.cast(pl.Int64, strict=False)
            exact = whole.cast(pl.Float64) == value
            return pl.when(exact).then(whole.cast(pl.String)).when(value.is_finite()).then(value.cast(pl.String))
        if dtype.is_nested() or dtype in (pl.Object, pl.Null):
            if dtype == pl.Null:
                return pl.lit(None, pl.String)
            raise DataError(f"{self.path}: column {column!r} must hold one value per row, got {dtype}")
        return cell.cast(pl.String)

    def numbers(self, column: str) -> pl.Expr:
        """A column as float64, null where it is no finite number."""
        import polars as pl

        dtype = self._schema[column]
        cell = pl.col(column) if dtype.is_numeric() else self.text(column).str.strip_chars()
        value = cell.cast(pl.Float64, strict=False)
        return pl.when(value.is_finite()).then(value)

    def dtype(self, column: str) -> pl.DataType:
        return self._schema[column]

    def explode(self, column: str) -> None:
        """Give each entry of a column of lists a row of its own."""
        self.frame = self.frame.explode(column)
        self._schema[column] = self.frame.collect_schema()[column]

    def num_blank(self) -> int:
        """Number of rows that are blank lines; polars gives those and rows of empty cells alike."""
        if self._parquet or not self._lazy:
            return 0
        with self.path.open("rb") as file:
            return sum(not line.strip(b" \t\r\n") for line in file)

    def refuse(self, rules: dict[str, Rule], otherwise: str) -> NoReturn:
        """Walk the file to the first cell that breaks its rule and raise for it; the slow way, taken once for an error.

        Args:
            rules: Column -> what its cells must be.
            otherwise: What to say where no line can be named.

        Raises:
            DataError: Always.
        """
        if self._parquet:
            raise DataError(f"{self.path}: {otherwise}")
        rows = self._lines()
        next(rows)
        for line, cells in rows:
            if len(cells) > len(self.columns) and any(cell.strip() for cell in cells[len(self.columns) :]):
                raise DataError(self._other_length(line, cells))
            for number, (column, cell) in enumerate(zip(self.columns, cells, strict=False), 1):
                accepts, wanted = rules.get(column, (None, ""))
                if accepts is not None and not accepts(cell):
                    raise DataError(
                        f"{self.path}:{line}: column {number} ({column}) must be {wanted}, got {_short(cell)}"
                    )
            if len(cells) < len(self.columns) and not all(column in self.columns[: len(cells)] for column in rules):
                raise DataError(self._other_length(line, cells))
        raise DataError(f"{self.path}: {otherwise}")


def _is_plain(path: Path, separator: str, quote: str | None) -> bool:
    """Whether a UTF-8 file has only line ends of LF or CRLF, and only fields that are quoted whole or not at all.

    Quotes alternate between opening and closing: an opening one follows a field's or line's begin or a quote, a closing
    one is followed by their end or a quote. What keeps to that, polars and `csv` read alike.
    """
    if not path.stat().st_size:
        return True
    before = np.frombuffer(b"\n\r" + separator.encode() + b'"', np.uint8)
    opened = True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        begin = 3 if data[:3] == b"\xef\xbb\xbf" else 0
        for start in range(begin, len(data), _CHUNK):
            # One byte more on both sides, a line end where the file has none.
            block = b"".join([
                data[start - 1 : start] if start > begin else b"\n",
                data[start : start + _CHUNK],
                data[start + _CHUNK : start + _CHUNK + 1] or b"\n",
            ])  # fmt: skip
            if b"\r" in block:
                bytes_ = np.frombuffer(block, np.uint8)
                if (bytes_[1:][bytes_[:-1] == 13] != 10).any():
                    return False
            if quote is None or b'"' not in block[1:-1]:
                continue
            bytes_ = np.frombuffer(block, np.uint8)
            at = np.flatnonzero(bytes_[1:-1] == 34) + 1
            opening, closing = (at[0::2], at[1::2]) if opened else (at[1::2], at[0::2])
            if not np.isin(bytes_[opening - 1], before).all() or not np.isin(bytes_[closing + 1], before).all():
                return False
            opened ^= bool(len(at) % 2)
    return opened


def _short(cell: str) -> str:
    return repr(cell if len(cell) <= 60 else f"{cell[:57]}...")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
