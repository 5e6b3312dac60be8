"""What is a time: one rule, its fast path, and remarks on times that cannot be."""

from __future__ import annotations

from datetime import datetime, timezone

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.datasets import write

from hellm.data import DataError, load_dataset
from hellm.data.forms import _times
from hellm.data.forms._times import parse_time, remarks, to_seconds

MOMENT = datetime(2024, 5, 31, 14, 0, tzinfo=timezone.utc).timestamp()
DAY = datetime(2024, 5, 31, tzinfo=timezone.utc).timestamp()
SPELLINGS = {
    "2024-05-31T14:00": MOMENT,
    "2024-05-31 14:00": MOMENT,
    "2024-05-31T14:00Z": MOMENT,
    "2024-05-31t14:00z": MOMENT,
    "2024-05-31 14:00:00": MOMENT,
    "2024-05-31 14:00:00 UTC": MOMENT,
    "2024-05-31 14:00:00 GMT": MOMENT,
    "2024-05-31 14:00:00.250000 UTC": MOMENT + 0.25,
    "2024-05-31T14:00:00.250Z": MOMENT + 0.25,
    "2024-05-31T14:00:00,25": MOMENT + 0.25,
    "2024-05-31 14:00:00.250000000": MOMENT + 0.25,
    "2024-05-31 14:00:00+00:00": MOMENT,
    "2024-05-31T16:00:00+02:00": MOMENT,
    "2024-05-31T16:00:00+0200": MOMENT,
    "2024-05-31T16:00:00+02": MOMENT,
    "2024-05-31T08:30:00-05:30": MOMENT,
    "2024-05-31T16:00:00+02:00[Europe/Berlin]": MOMENT,
    "20240531T140000Z": MOMENT,
    "20240531T1400": MOMENT,
    "2024-05-31": DAY,
    "2024-05-31T00": DAY,
    "2024-05-30T24:00:00": DAY,
    "2024-5-31": DAY,
    "2024/05/31": DAY,
    "2024.05.31": DAY,
    "2024-W22-5": DAY,
    "2024W225": DAY,
    "2024-152": DAY,
    "2024-05-31 02:00 PM": MOMENT,
    "  2024-05-31 14:00  ": MOMENT,
    "1717164000": MOMENT,
    "1717164000.5": MOMENT + 0.5,
    "1.717164e9": MOMENT,
    "+1717164000": MOMENT,
}
NO_TIMES = [
    "",
    "noon",
    "nan",
    "inf",
    "1_000",
    "0x10",
    "2024-02-30",
    "2024-13-01",
    "2024-05-31 25:00",
    "2024-05-31 14:61",
    "2024-05-31 24:00:01",
    "2024-05-31x14:00",
    "31/05/2024",
    "24-05-31",
    "12345-01-01",
    "2024-366x",
    "2023-366",
    "2024-05-31 13:00 PM",
    "2024-05-31T14:00+25:00",
    "\uff12024-05-31",
]


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings(text):
    assert parse_time(text) == SPELLINGS[text]


@pytest.mark.parametrize("text", NO_TIMES)
def test_what_is_no_time(text):
    assert parse_time(text) is None


def fast(text: str, head: list[str]) -> float | None:
    expression, plain = _times.fast_expression(pl.Series("x", head), pl.col("x"))
    value = pl.DataFrame({"x": [text]}).select(expression.alias("y"))["y"][0]
    return value if value is not None and _times.plausible(np.array([value]), plain=plain)[0] else None


@pytest.mark.parametrize("head", ["1", "2024-05-31", *SPELLINGS])
def test_the_fast_path_takes_nothing_that_the_rule_takes_otherwise(head):
    for text in (
        *SPELLINGS,
        *NO_TIMES,
        "2024-05-31T14:00:60",
        "10000-01-01",
        "0001-01-01",
        "2024-05-31 14:00:00.5 UTC",
    ):
        value = fast(text, [head] * 3)
        assert value is None or value == pytest.approx(parse_time(text), abs=1e-6), (head, text)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(st.text(alphabet="0123456789-:/. TZ+,WeE", max_size=24), st.sampled_from(sorted(SPELLINGS)))
def test_any_text_is_the_same_to_both(text, head):
    value, rule = fast(text, [head] * 3), parse_time(text)
    assert value is None or (rule is not None and abs(value - rule) <= 1e-6 * max(1, abs(rule)))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(st.datetimes(datetime(1971, 1, 1), datetime(2200, 1, 1)), st.timezones())
def test_what_python_writes_is_read(moment, zone):
    moment = moment.replace(tzinfo=zone)
    for text in (moment.isoformat(), moment.isoformat(" "), moment.astimezone(timezone.utc).isoformat()):
        found = parse_time(text)
        if moment.utcoffset().total_seconds() % 60 == 0 or "+00:00" in text:
            assert found == pytest.approx(moment.timestamp(), abs=1e-5)


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (["1704067200", "1704067300", "2024-05-31 14:00:00"], [1704067200, 1704067300, MOMENT]),
        (["2024-05-31", "2024-05-31T14:00Z", "1717164000000"], [DAY, MOMENT, MOMENT]),
        (["1717164000000", "1717164000000", "2024-05-31 14:00:00"], [MOMENT, MOMENT, MOMENT]),
        (["1717164000", "1717164000", "1717164000000"], [MOMENT, MOMENT, MOMENT]),
        (["1717164000000000", "1717164000000000000", "1717164000000000"], [MOMENT, MOMENT, MOMENT]),
        (["31/5/2024", "1/6/2024 00:00", "31/5/2024 2:00 PM"], [DAY, DAY + 86400, MOMENT]),
        (["5/31/2024", "6/1/2024 00:00", "5/31/2024 14:00"], [DAY, DAY + 86400, MOMENT]),
        (["31.05.2024", "01.06.2024", "31.05.2024 14:00:00"], [DAY, DAY + 86400, MOMENT]),
        (["20240531", "20240601", "20240531"], [DAY, DAY + 86400, DAY]),
    ],
)
def test_columns_may_mix(tmp_path, times, seconds):
    rows = "".join(f"u{at},x,{text}\n" for at, text in enumerate(times))
    write(tmp_path, events_csv="user,item,time\n" + rows)
    assert load_dataset(tmp_path).timestamps.tolist() == seconds


def test_a_cell_that_is_no_time_is_named(tmp_path):
    rows = "".join(f"u,x{at},2024-05-31 14:00:00\n" for at in range(1500))
    write(tmp_path, events_csv=f"user,item,time\n{rows}u,y,soon\n")
    with pytest.raises(DataError, match=r"events.csv:1502: column 3 \(time\) must be a time .*, got 'soon'"):
        load_dataset(tmp_path)
    write(tmp_path, events_csv="user,item,time\nu,x,2024-05-31\nu,y,\n")
    with pytest.raises(DataError, match=r"events.csv:3: column 3 \(time\) must be a time .*, got ''"):
        load_dataset(tmp_path)
    write(tmp_path, events_csv="user,item,time\nu,x,1/2/2024\nu,y,3/4/2024\n")
    with pytest.raises(DataError, match=r"events.csv:2: .*; 1/2/2024 may be two days, got '1/2/2024'"):
        load_dataset(tmp_path)
    pl.DataFrame({"user": ["a"], "item": ["x"], "time": [True]}).write_parquet(tmp_path / "events.parquet")
    (tmp_path / "events.csv").unlink()
    with pytest.raises(DataError, match=r"events.parquet: column 'time' must be a time .*, got Boolean"):
        load_dataset(tmp_path)


def test_impossible_times_are_remarked(tmp_path):
    good = [1.7e9] * 5
    assert remarks(np.array(good)) == []
    assert remarks(np.array([*good, 0.0])) == ["1 events have times before 1990, the first 1970-01-01"]
    assert remarks(np.array([*good, 3.3e10])) == ["1 events have times in the future, the last 3015-09-24"]
    assert "seem to be no dates" in remarks(np.array([1.0, 2.0]))[0]
    assert remarks(np.array([*good, 1e300]))[0].endswith("the last 1e+300")
    write(tmp_path, events_csv="user,item,time\na,x,2024-05-31\na,y,3024-05-31\n")
    assert "1 events have times in the future, the last 3024-05-31" in load_dataset(tmp_path).notes


def test_seconds_are_whole_where_they_can_be():
    assert to_seconds(np.array([1.0, 2.0]), []).dtype == np.int64
    assert to_seconds(np.array([1.0, 2.5]), []).dtype == np.float64
