"""Times: the one rule of what a time is, its fast path through polars, and remarks on times that cannot be.

`parse_time` is the rule. polars reads the bulk of a column by one of `_FORMATS`, all of which the rule takes too; what
that leaves over goes through the rule, so that a column may mix any of them.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from datetime import date, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import polars as pl

WANTED = "a time (seconds since 1970, or ISO 8601 such as 2024-05-31 14:00:00)"

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
# No time is longer, and patterns take their time over what is.
_LONGEST = 80
_CLOCK = r"(?:(?:[T ]\s*|,\s+)(\d{1,2})(?::?(\d\d)(?::?(\d\d)(?:[.,](\d+))?)?)?\s*([AP]M)?)?"
_ZONE = r"\s*(Z|UTC|GMT|[+-]\d\d(?::?\d\d)?)?(?:\[[\w/+-]+\])?"
_ISO = re.compile(
    r"\+?(?:(\d{4})([-/.])(\d{1,2})\2(\d{1,2})|(\d{4})(\d\d)(\d\d)(?=T)|(\d{4})-?W(\d\d)(?:-?([1-7]))?|(\d{4})-(\d{3}))"
    + _CLOCK + _ZONE, re.IGNORECASE | re.ASCII,
)  # fmt: skip
_LOCAL = re.compile(r"(\d{1,2})([/.-])(\d{1,2})\2(\d{4})" + _CLOCK + _ZONE, re.IGNORECASE | re.ASCII)
_FORMATS = (
    "%Y-%m-%d",
    "%Y-%m-%d %H:%M",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d %H:%M:%S%.f",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%d %H:%M:%S%.f UTC",
    "%Y-%m-%d %H:%M:%S%.f%#z",
    "%Y-%m-%dT%H:%M:%S%.f%#z",
)
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_UNITS = ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds"))
# Before 1990 nobody logged clicks; what stands there is a counter, a default or another unit.
_EARLIEST = 631_152_000
_DAY = 86_400
# Times that are looked at once.
_EVENTS = 1 << 20
# chrono reads years of any length.
_YEAR_1000, _YEAR_10000 = -30_610_224_000, 253_402_300_800


def is_number(text: str) -> bool:
    """Whether a text is a finite decimal number, as `parse_time` takes it."""
    return _NUMBER.fullmatch(text) is not None and math.isfinite(float(text))


def parse_time(text: str, *, day_first: bool | None = None) -> float | None:
    """Seconds since 1970 of an ISO 8601 time, or of what databases and spreadsheets write; None if it is no time.

    Args:
        text: Without a zone it is taken as UTC. A plain number is returned as it is.
        day_first: Meaning of 1/2/2024; None refuses such dates.
    """
    text = text.strip()
    if is_number(text):
        return float(text)
    if len(text) > _LONGEST:
        return None
    match = _ISO.fullmatch(text)
    local = _LOCAL.fullmatch(text) if match is None and day_first is not None else None
    try:
        if local is not None:
            first, _, second, year, *rest = local.groups()
            day, month = (first, second) if day_first else (second, first)
            start = date(int(year), int(month), int(day))
        elif match is None:
            return None
        else:
            y, _, m, d, by, bm, bd, wy, w, wd, oy, od, *rest = match.groups()
            if wy:
                start = date.fromisocalendar(int(wy), int(w), int(wd or 1))
            elif oy:
                start = date(int(oy), 1, 1) + timedelta(int(od) - 1)
                if start.year != int(oy):
                    return None
            else:
                start = date(int(y or by), int(m or bm), int(d or bd))
        return _seconds(start, *rest)
    except (ValueError, OverflowError):
        return None


def _seconds(start: date, hour, minute, second, fraction, half, zone) -> float | None:
    hours, minutes, seconds = (int(one or 0) for one in (hour, minute, second))
    if half:
        if not 1 <= hours <= 12:
            return None
        hours = hours % 12 + 12 * (half.upper() == "PM")
    if minutes > 59 or seconds > 60 or hours > 24 or (hours == 24 and (minutes or seconds or fraction)):
        return None
    if start.year < 1000:
        return None
    whole = (start.toordinal() - _EPOCH.toordinal()) * _DAY + hours * 3600 + minutes * 60 + seconds
    if zone and zone[0] in "+-":
        digits = zone[1:].replace(":", "")
        if int(digits[:2]) > 23 or int(digits[2:] or 0) > 59:
            return None
        whole -= (-1 if zone[0] == "-" else 1) * (int(digits[:2]) * 3600 + int(digits[2:] or 0) * 60)
    return whole + float(f"0.{fraction}") if fraction else float(whole)


def day_order(texts: Sequence[str]) -> tuple[bool | None, str]:
    """Whether dates such as 31/5/2024 put the day first, decided on all of a column; None where it holds none.

    Returns: The order, and how it was found; an empty string with None also where nothing tells.
    """
    short = (text.strip() for text in texts if len(text) <= _LONGEST)
    dates = [match for match in map(_LOCAL.fullmatch, short) if match]
    if not dates:
        return None, ""
    if any(int(one[1]) > 12 for one in dates) or all(one[2] == "." for one in dates):
        return True, "day first"
    if any(int(one[3]) > 12 for one in dates):
        return False, "month first"
    return None, "undecided"


def fast_expression(head: pl.Series, source: pl.Expr) -> tuple[pl.Expr, bool]:
    """Expression that turns most of a column of texts into float64 numbers, null where the rule must decide.

    Of its values only those that are `plausible` are times by the rule. It is kept to what polars computes once.

    Args:
        head: First texts of the column, by which the format is chosen.
        source: The column.

    Returns: The expression, and whether its values are plain numbers rather than seconds.
    """
    import polars as pl

    def parsed(column: pl.Expr, time_format: str | None) -> pl.Expr:
        if time_format is None:
            return column.cast(pl.Float64, strict=False)
        moment = column.str.to_datetime(time_format, strict=False, time_unit="us", time_zone="UTC")
        return moment.dt.epoch("us") / 1e6

    texts = head.drop_nulls().to_frame()
    failed = {one: texts.select(parsed(pl.first(), one)).to_series().null_count() for one in (None, *_FORMATS)}
    best = min(failed, key=failed.__getitem__)
    return parsed(source, best), best is None


def plausible(times: np.ndarray, *, plain: bool) -> np.ndarray:
    """Which of the values that polars made are those of the rule, [n] bool: finite, and years of four digits."""
    return np.isfinite(times) if plain else (times >= _YEAR_1000) & (times < _YEAR_10000)


def to_seconds(times: np.ndarray, notes: list[str], *, plain: np.ndarray | bool = True) -> np.ndarray:
    """Times as seconds, int64 where whole; milli-, micro- and nanoseconds are recognised by their size.

    Args:
        times: [n] float64, which may be written to.
        notes: Gains what was assumed.
        plain: [n] bool, which of them are plain numbers; the others are seconds already.
    """
    times = np.require(times, np.float64, ["C", "W"])
    plain = np.broadcast_to(np.asarray(plain), times.shape)
    numbers = times if plain.all() else times[plain]
    if len(numbers) and _are_dates(numbers):
        notes.append("times are taken as dates written YYYYMMDD")
        days = numbers.astype(np.int64)
        text = np.char.mod("%d", days)
        stamps = np.array([f"{one[:4]}-{one[4:6]}-{one[6:]}" for one in text.tolist()], dtype="datetime64[s]")
        times[plain] = stamps.astype(np.int64)
    elif len(numbers):
        typical = float(np.median(np.abs(numbers), overwrite_input=True))
        for limit, divisor, unit in _UNITS:
            if typical > limit:
                notes.append(f"timestamps are taken as {unit} since 1970")
                numbers /= divisor
                break
        mixed = 0
        for block in _blocks(numbers):
            for limit, divisor, _ in _UNITS:
                # Those that one unit for all leaves impossibly far away have a unit of their own.
                far = np.abs(block) > limit
                mixed += int(far.sum())
                block[far] /= divisor
        if mixed:
            notes.append(f"{mixed} timestamps are of another size than the rest and are taken as another unit")
        if numbers is not times:
            times[plain] = numbers
    with np.errstate(invalid="ignore"):
        if not all(np.array_equal(block.astype(np.int64), block) for block in _blocks(times)):
            return times
    # In the same memory.
    whole = times.view(np.int64)
    for block, seconds in zip(_blocks(whole), _blocks(times), strict=True):
        block[:] = seconds.astype(np.int64)
    return whole


def _blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Views of some values at a time."""
    return (values[start : start + _EVENTS] for start in range(0, len(values), _EVENTS))


def _are_dates(numbers: np.ndarray) -> bool:
    for block in _blocks(numbers):
        if not ((block >= 19_000_101) & (block <= 21_001_231) & (block % 1 == 0)).all():
            return False
    try:
        for one in np.unique(numbers).tolist():
            date(int(one) // 10_000, int(one) // 100 % 100, int(one) % 100)
    except ValueError:
        return False
    return True


def day(seconds: float) -> str:
    """The day of a time, as 2024-05-31; the number itself where no calendar holds it."""
    try:
        return (_EPOCH + timedelta(seconds=float(seconds))).date().isoformat()
    except (OverflowError, ValueError):
        return f"{seconds:.6g}"


def remarks(times: np.ndarray) -> list[str]:
    """What is odd about the times of events, in words.

    Args:
        times: [n] seconds since 1970.
    """
    if not len(times):
        return []
    found = []
    early, late = int((times < _EARLIEST).sum()), int((times > time.time() + 2 * _DAY).sum())
    if early == len(times):
        found.append(
            f"all times lie between {day(times.min())} and {day(times.max())}: they order the events, but seem to be "
            "no dates in seconds since 1970 (numbers such as 45292 are days of a spreadsheet)"
        )
    elif early:
        found.append(f"{early} events have times before 1990, the first {day(times.min())}")
    if late:
        found.append(f"{late} events have times in the future, the last {day(times.max())}")
    return found
