"""Random files, tables and ids: a reader gives a data set or an error that names the file, and writes what it can read.

The long way, with figures: `python tests/data/fuzz_readers.py`, or HELLM_SLOW=1.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import fuzz_readers
import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.datasets import make_dataset, triples

from hellm.data import DataError, IdMap, form_names, load_dataset, save_dataset

FILES = 60
quick = settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_damaged_files(tmp_path, reader):
    for seed in range(FILES):
        end, words, seconds = fuzz_readers.try_one(reader, seed, tmp_path)
        assert end != "wrong" and seconds < fuzz_readers.MOST_SECONDS, f"seed {seed}: {words}"


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("HELLM_SLOW") != "1", reason="takes half an hour; HELLM_SLOW=1 runs it")
@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_ten_thousand_damaged_files(reader):
    well, line, _ = fuzz_readers.run_reader(reader, 10_000)
    print(line)
    assert well, line


@pytest.mark.parametrize("reader", fuzz_readers.READERS)
def test_the_files_before_the_damage_are_read(tmp_path, reader):
    fuzz_readers.make_source(reader, tmp_path / "x")
    assert fuzz_readers.read(tmp_path / "x")[0] == "data"


@quick
@given(
    st.binary(max_size=60),
    st.sampled_from([
        "events.csv", "events.tsv", "events.parquet", "x.inter", "x.txt", "x.inter.json", "reviews_x.json",
        "reviews_x.json.gz", "dataset.json", "x.jsonl",
    ]),
)  # fmt: skip
def test_any_bytes(tmp_path, content, name):
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        (Path(folder) / name).write_bytes(content)
        end, words = fuzz_readers.read(Path(folder))
    assert end != "wrong", words


cells = st.one_of(
    st.none(), st.text(max_size=8), st.sampled_from(["NULL", "1.0", "01", " a ", "2024-05-31", "1717164000", "nan"])
)
columns = st.one_of(
    st.lists(cells, min_size=3, max_size=3).map(lambda values: pl.Series(values, dtype=pl.String)),
    st.lists(st.integers(-5, 2**62), min_size=3, max_size=3).map(lambda values: pl.Series(values, dtype=pl.Int64)),
    st.lists(st.floats(), min_size=3, max_size=3).map(pl.Series),
    st.lists(st.booleans(), min_size=3, max_size=3).map(pl.Series),
    st.lists(st.datetimes(), min_size=3, max_size=3).map(pl.Series),
    st.lists(st.lists(st.text(max_size=3), max_size=3), min_size=3, max_size=3).map(
        lambda values: pl.Series(values, dtype=pl.List(pl.String))
    ),
    st.binary(max_size=4).map(lambda value: pl.Series([value] * 3)),
    st.lists(st.text(max_size=3), min_size=3, max_size=3).map(lambda values: pl.Series(values, dtype=pl.Categorical)),
    st.dates().map(lambda value: pl.Series([{"a": value}] * 3)),
    st.times().map(lambda value: pl.Series([value] * 3)),
    st.timedeltas().map(lambda value: pl.Series([value] * 3)),
)
roles = st.sampled_from(["time", "label", "quantity", "rating", "type", "split", "other", "x" * 40, ""])


@quick
@given(columns, columns, st.dictionaries(roles, columns, max_size=3), st.booleans())
def test_tables_of_any_types(tmp_path, user, item, others, delimited):
    table = pl.DataFrame({"user": user, "item": item, **others})
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        try:
            if delimited:
                table.write_csv(Path(folder) / "events.csv")
            else:
                table.write_parquet(Path(folder) / "events.parquet")
        except pl.exceptions.PolarsError:
            return
        end, words = fuzz_readers.read(Path(folder))
    assert end != "wrong", words


ids = st.lists(st.text(min_size=0, max_size=6), min_size=6, max_size=6, unique=True)


@quick
@given(ids, ids, st.lists(st.text(max_size=20), min_size=6, max_size=6), st.sampled_from(form_names(writable=True)))
def test_any_ids_and_titles_come_back_or_are_refused(tmp_path, users, items, titles, form):
    dataset = make_dataset(features=False)
    changed = {"user_ids": IdMap(users[:4]), "item_ids": IdMap(items), "item_titles": titles, "item_fields": {}}
    dataset = type(dataset)(**{**vars(dataset), **changed})
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        out = Path(folder) / "out"
        try:
            save_dataset(dataset, out, form=form)
        except ValueError as error:
            assert " id " in str(error) and not list(Path(folder).iterdir())
            return
        back = load_dataset(out, split="leave-two-out", features="none")
        assert sorted(triples(back)) == sorted(triples(dataset))
        assert back.item_ids == dataset.item_ids
        assert np.array_equal(np.sort(back.items), np.sort(dataset.items))
        if form in ("hellm", "shop", "json"):
            assert back.item_titles == titles


@quick
@given(st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), min_size=1, max_size=6))
def test_a_shop_is_read_by_polars_as_by_csv(tmp_path, rows):
    import csv
    from unittest import mock

    with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
        path = Path(folder) / "events.csv"
        with path.open("w", encoding="utf-8", errors="replace", newline="") as file:
            csv.writer(file).writerows([("user", "item"), *rows])

        def outcome():
            try:
                return triples(load_dataset(folder))
            except DataError as error:
                return str(error).split(":")[1:2]

        fast = outcome()
        with mock.patch("hellm.data.forms._tables._is_plain", return_value=False):
            assert outcome() == fast
