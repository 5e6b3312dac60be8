"""Ids as they come: what counts as none, text ids made clean, and integer ids that must number rows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hellm.data.dataset import DataError, Dataset, IdMap
from hellm.data.forms._tables import Table
from hellm.data.forms._text import line_with
from hellm.data.texts import Texts

if TYPE_CHECKING:
    import polars as pl

# What programs write where there is no value; compared in lower case.
MISSING = ("", "null", "none", "nan", "nat", "n/a", "na", "<na>", "#n/a", "\\n", "undefined", "(null)")
_INVISIBLE = " \t\r\n\u00a0\u200b\ufeff"
# Rows that integer ids may leave empty, whatever the data: below this a gap costs nothing.
_SPARE_ROWS = 1_000_000
_SPARE_PER_ID = 4
# Events that are looked at once.
_EVENTS = 1 << 20


@dataclass
class IdColumn:
    """The ids of a column.

    Attributes:
        ids: Map of the clean ids: known ones first and in their order, then the others, by value where all are
            plain integers, else by code point.
        raw: Distinct texts of the column.
        index: [len(raw)] int32, which id each text is; -1 = it stands for none.
    """

    ids: IdMap
    raw: pl.Series
    index: np.ndarray

    def position(self, text: pl.Expr) -> pl.Expr:
        """Expression: texts -> their place in `raw`; null stays null.

        An Enum holds the texts once and a small integer per row, so the strings of the events are never all in memory.
        """
        import polars as pl

        return text.cast(pl.Enum(self.raw), strict=False).to_physical()

    def missing(self, most: int = 4) -> str:
        """Some of the texts that stand for no id, as a note shows them."""
        texts = self.raw.filter(self.index < 0).sort().to_list()
        return ", ".join(repr(text[:20]) for text in texts[:most]) or "empty"

    def indices(self, positions: pl.Series) -> np.ndarray:
        """Places in `raw` -> indices [n] int32 of ids, -1 where there is none."""
        import polars as pl

        lookup = np.append(self.index, -1).astype(np.int32, copy=False)
        found = np.empty(len(positions), np.int32)
        for start in range(0, len(found), _EVENTS):
            block = positions.slice(start, _EVENTS).cast(pl.Int64).fill_null(len(self.index))
            found[start : start + _EVENTS] = lookup[block.to_numpy()]
        return found


def clean(raw: pl.Series, where: str = "", notes: list[str] | None = None) -> pl.Series:
    """Ids without what surrounds them; null where a text stands for no id.

    Blanks and invisible marks around an id go. "7.0" becomes "7" where all ids are numbers, as pandas
    writes a column of integers with gaps. Leading zeros and case stay.

    Args:
        raw: Distinct texts.
        where: Of the column, for notes.
        notes: Gains what was changed.
    """
    import polars as pl

    stripped = raw.str.strip_chars().str.strip_chars(_INVISIBLE)
    ids = stripped.set(stripped.str.to_lowercase().is_in(list(MISSING)).fill_null(True), None)
    present = ids.drop_nulls()
    floats = present.str.contains(r"^-?(0|[1-9]\d*)\.0+$")
    if floats.any() and present.str.contains(r"^-?(0|[1-9]\d*)(\.0+)?$").all():
        ids = ids.str.replace(r"\.0+$", "")
        _note(notes, f"{where}: ids such as {present.filter(floats)[0]} are taken without their .0")
    blanks = int((stripped != raw).sum() or 0)
    if blanks:
        _note(notes, f"{where}: blanks around {blanks} ids are left out")
    cut = present.filter(present.str.contains(r"^\d[.,]\d+[eE]\+\d+$"))
    if len(cut):
        _note(notes, f"{where}: {len(cut)} ids look like long numbers that a spreadsheet has cut, e.g. {cut[0]}")
    return ids.cast(pl.String)


def _note(notes: list[str] | None, text: str) -> None:
    if notes is not None and text not in notes:
        notes.append(text)


def read_ids(table: Table, column: str, notes: list[str], known: Iterable[str] = ()) -> IdColumn:
    """All ids of a column.

    Args:
        table: Where they stand.
        column: Its name.
        notes: Gains what was changed.
        known: Clean ids that come first.
    """
    raw = table.collect(lambda frame: frame.select(table.text(column).alias("id").unique()))["id"].drop_nulls()
    cleaned = clean(raw, f"{table.path.name}: column {column!r}", notes)
    return _numbered(raw, cleaned, list(known))


def _numbered(raw: pl.Series, cleaned: pl.Series, known: list[str]) -> IdColumn:
    """The known ids and then the others of a column, without a Python object for each."""
    import polars as pl

    frame = pl.DataFrame({"raw": raw, "id": cleaned})
    key = pl.col("id").cast(pl.Int64) if _are_numbers(cleaned) else pl.col("id")
    frame = frame.sort(key, nulls_last=True)
    # The ids that there are stand first, and the same ones together.
    ids = frame["id"].head(len(frame) - frame["id"].null_count())
    first = ids.ne_missing(ids.shift(1))
    place = np.full(len(frame), -1, np.int32)
    np.cumsum(first.to_numpy(), dtype=np.int32, out=place[: len(ids)])
    place[: len(ids)] -= 1
    distinct = ids.filter(first)
    if not known:
        return IdColumn(IdMap(Texts.of(distinct)), frame["raw"], place)
    old = pl.DataFrame({"id": known, "old": np.arange(len(known), dtype=np.int32)}, schema_overrides={"id": pl.String})
    places = distinct.to_frame("id").join(old, on="id", how="left", maintain_order="left")["old"]
    new = places.is_null().to_numpy()
    lookup = np.append(np.where(new, len(known) + np.cumsum(new) - 1, places.fill_null(0).to_numpy()), -1)
    return IdColumn(IdMap([*known, *distinct.filter(new).to_list()]), frame["raw"], lookup[place].astype(np.int32))


def without_unused(ids: IdMap, num_known: int, indices: np.ndarray) -> tuple[IdMap, np.ndarray]:
    """Drop ids of which every event was left out, and renumber.

    Args:
        ids: All ids.
        num_known: The first of them, which stay in any case.
        indices: [n] of the events that are kept.

    Returns: The smaller map, and the indices into it.
    """
    used = np.zeros(len(ids), bool)
    used[:num_known] = True
    for start in range(0, len(indices), _EVENTS):
        used[indices[start : start + _EVENTS]] = True
    if used.all():
        return ids, indices
    kept = compress(ids.ids, used)
    return IdMap(Texts.of(kept) if isinstance(ids.ids, Texts) else kept), (np.cumsum(used) - 1)[indices]


def _are_numbers(ids: pl.Series) -> bool:
    """Whether all that are there are plain integers, and there are some."""
    return ids.null_count() < len(ids) and bool(ids.str.contains(r"^(0|[1-9]\d{0,17})$").all())


def check_ids_writable(dataset: Dataset, form: str, forbidden: str = "\0") -> None:
    """Refuse ids that a form of text ids would read back as others.

    Args:
        dataset: About to be written.
        form: Its name, for the message.
        forbidden: Characters that the form has no way to write.

    Raises:
        ValueError: Naming the first such id.
    """
    for side, ids in (("user", dataset.user_ids.ids), ("item", dataset.item_ids.ids)):
        for one in ids:
            if any(mark in one for mark in forbidden) or any("\ud800" <= mark <= "\udfff" for mark in one):
                raise ValueError(f"form {form!r} cannot hold {side} id {one!r}; rename it, or write form 'hellm'")
        texts = Texts.of(ids).series()
        changed = (clean(texts) != texts).fill_null(True) | texts.str.contains(r"^-?(0|[1-9]\d*)\.0+$")
        if changed.any():
            one = ids[int(changed.to_numpy().argmax())]
            raise ValueError(
                f"form {form!r} would not give back {side} id {one!r} as it is; rename it, or write form 'hellm'"
            )


def most_rows(num_distinct: int, at_least: int = 0) -> int:
    """How many rows integer ids may number, given how many of them there are."""
    return max(_SPARE_ROWS, _SPARE_PER_ID * num_distinct, at_least)


def too_large(where: str, side: str, largest: int, rows: int) -> DataError:
    """What to say of an integer id that would need rows out of all proportion."""
    return DataError(
        f"{where}: {side} id {largest} is too large for a row number (at most {rows - 1} with so few ids): this form "
        "numbers its rows; write ids of other kinds as text, e.g. as events.csv with the header user,item,timestamp"
    )


def find_large(path: Path, side: str, values: np.ndarray, at_least: int = 0) -> None:
    """Refuse integer ids that would take memory by their value. Raises DataError naming the line where it is found."""
    if not len(values):
        return
    largest = int(values.max())
    if largest >= _SPARE_ROWS and largest >= (rows := most_rows(len(np.unique(values)), at_least)):
        line = line_with(path, str(largest))
        raise too_large(f"{path}:{line}" if line else str(path), side, largest, rows)
