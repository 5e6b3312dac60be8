"""Delimited files as shops export them: read right, or refused by file and line."""

from __future__ import annotations

import polars as pl
import pytest
from support.datasets import triples, write

from hellm.data import DataError, load_dataset, save_dataset
from hellm.data.forms._tables import Table

PLAIN = "user,item,timestamp\nanna,A,1700000000\nanna,B,1700000100\n"
EXPECTED = [("anna", "A", 0), ("anna", "B", 0)]


def said(dataset, words: str) -> bool:
    return any(words in note for note in dataset.notes)


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.replace(",", ";"),
        PLAIN.replace(",", "|"),
        PLAIN.replace(",", "\t"),
        "sep=;\n" + PLAIN.replace(",", ";"),
        "sep=,\r\n" + PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\r\n"),
        "\n\n" + PLAIN,
        "\ufeff" + PLAIN,
        PLAIN.encode("utf-16"),
        PLAIN.encode("utf-32"),
        PLAIN.replace("user", '"user"').replace("A", '"A"'),
        PLAIN.replace("0\n", "0,\n"),
        PLAIN.replace(",", ", "),
        PLAIN[:-1],
    ],
)
def test_every_spelling_of_one_table_is_read_alike(tmp_path, content):
    write(tmp_path, events_csv=content)
    dataset = load_dataset(tmp_path)
    assert triples(dataset) == EXPECTED
    assert dataset.timestamps.tolist() == [1700000000, 1700000100]


def test_what_was_assumed_of_a_table_is_said(tmp_path):
    write(tmp_path, events_csv=PLAIN.replace(",", ";").replace("0\n", "0;\n"))
    dataset = load_dataset(tmp_path)
    assert said(dataset, "events.csv: fields are taken as separated by ';'")
    assert said(dataset, "events.csv: 2 lines end with a separator too many")
    assert not said(load_dataset(tmp_path, separator="semicolon"), "separated")
    write(tmp_path, events_csv=PLAIN.replace(",", "~"))
    assert triples(load_dataset(tmp_path, separator="~")) == EXPECTED


def test_an_encoding_can_be_named(tmp_path):
    write(tmp_path, events_csv=PLAIN.replace("anna", "José").encode("latin-1"))
    with pytest.raises(DataError, match=r'events.csv:2: byte 0xe9 is not UTF-8; .* encoding="latin-1" \(--encoding'):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, encoding="latin-1").user_ids.ids == ["José"]
    with pytest.raises(ValueError, match=r"encoding must be one that Python knows, .* got 'klingon'"):
        load_dataset(tmp_path, encoding="klingon")
    with pytest.raises(ValueError, match=r"separator must be one character, .* got 'ab'"):
        load_dataset(tmp_path, separator="ab", encoding="latin-1")


def test_the_line_of_a_byte_is_counted_over_the_whole_file(tmp_path):
    many = "user,item\n" + "anna,A\n" * 700_000
    write(tmp_path, events_csv=many.encode() + b"\xff,B\n")
    with pytest.raises(DataError, match=r"events.csv:700002: byte 0xff is not UTF-8"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("cell", "item"),
    [('19"x', '19"x'), ('"19"" x"', '19" x'), ('"a\nb"', "a\nb"), ('"a,b"', "a,b"), ("a'b", "a'b"), ('a"b"c', 'a"b"c')],
)
def test_quotes_in_cells(tmp_path, cell, item):
    write(tmp_path, events_csv=f'user,item,timestamp\nanna,{cell},1\nanna,"C",2\nanna,D"" ,3\n')
    found = load_dataset(tmp_path)
    assert [found.item_ids.ids[index] for index in found.items] == [item, "C", 'D""']


def test_a_quote_that_does_not_end_is_named(tmp_path):
    write(tmp_path, events_csv='user,item\nanna,A\nanna,"B\nbob,C\n')
    with pytest.raises(DataError, match=r"events.csv:\d: unexpected end of data; a field that begins with a quote"):
        load_dataset(tmp_path)
    write(tmp_path, events_csv='user,item\nanna,A\nanna,"19" x"\n')
    with pytest.raises(DataError, match=r"events.csv:3: .*quotes inside it must be doubled"):
        load_dataset(tmp_path)


def test_lines_of_another_length_are_named(tmp_path):
    write(tmp_path, events_csv="user,item\nanna,A\nanna,B,C\n")
    with pytest.raises(DataError, match=r"events.csv:3: expected 2 fields \(user, item\), got 3; .* must be quoted"):
        load_dataset(tmp_path)


def test_quotes_that_cross_the_blocks_of_the_check(tmp_path, monkeypatch):
    monkeypatch.setattr("hellm.data.forms._tables._CHUNK", 7)
    write(tmp_path, events_csv='user,item\n"a","x ""y"""\n"b","z, z"\n')
    assert Table(tmp_path / "events.csv")._lazy
    assert load_dataset(tmp_path).item_ids.ids == ['x "y"', "z, z"]
    write(tmp_path, events_csv='user,item\nabcdefgh,x"y\nb,z\n')
    assert not Table(tmp_path / "events.csv")._lazy


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("u1,A,1700000000\nu1,B,1700000001\n", r"no column for the user .*found u1, A, 1700000000; name it with "
         r'columns=\{"user": NAME\} \(--columns user=NAME\); the first line looks like data: add a header'),
        ("user,user,item\na,b,c\n", "the header names 'user' twice, and it is the column for the user"),
        ("\0\0\0", "events.csv:1: a NUL character"),
        ("user,item\na,b\0\n", "events.csv:2: a NUL character"),
        (PLAIN.encode("utf-16-le"), 'events.csv:1: a NUL character.*encoding="utf-16-le"'),
        (b"\xff\xfe" + b"a\x00b", "byte 0x62 is not UTF-16"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_table_is_said(tmp_path, content, words):
    write(tmp_path, events_csv=content)
    with pytest.raises(DataError, match=words):
        load_dataset(tmp_path)


@pytest.mark.parametrize("name", ["shop[1]", "shop*", "what?", "{a,b}", "a b"])
def test_paths_are_no_patterns(tmp_path, name):
    for other in ("shop1", "shopx", "whatx", "a", "b"):
        write(tmp_path / other, events_csv="user,item\nother,OTHER\n")
        pl.DataFrame({"user": ["other"], "item": ["OTHER"]}).write_parquet(tmp_path / other / "events.parquet")
    pl.DataFrame({"user": ["me"], "item": ["MINE"]}).write_parquet(tmp_path / "x.parquet")
    write(tmp_path / name, events_csv="user,item\nme,MINE\n", items_csv="item\nMINE\n")
    assert load_dataset(tmp_path / name).user_ids.ids == ["me"]
    (tmp_path / name / "events.csv").unlink()
    (tmp_path / "x.parquet").rename(tmp_path / name / "events.parquet")
    dataset = load_dataset(tmp_path / name)
    assert dataset.user_ids.ids == ["me"]
    assert load_dataset(save_dataset(dataset, tmp_path / f"built {name}")).user_ids.ids == ["me"]


def test_columns_are_found_named_and_told(tmp_path):
    write(
        tmp_path,
        events_csv="who,what,sold_at,channel\na,x,2024-01-02,web\na,y,2024-01-01,web\n",
        items_csv="sku,name,colour,weight\nx,X,red|blue,3\ny,Y,,4\n",
    )
    with pytest.raises(DataError, match=r"no column for the user .* found who, what, sold_at, channel"):
        load_dataset(tmp_path)
    columns = {"user": "who", "item": "what"}
    without = load_dataset(tmp_path, columns=columns)
    assert said(without, "events.csv: columns not used: sold_at, channel; columns={role: NAME} (--columns ROLE=NAME)")
    assert said(without, "no column of times, so the events of a user count as standing oldest first; sold_at may hold")
    assert said(without, "items.csv: columns not used: colour, weight")
    dataset = load_dataset(tmp_path, columns={**columns, "time": "sold_at", "attribute": ["colour"]})
    assert triples(dataset) == [("a", "y", 0), ("a", "x", 0)]
    assert dataset.columns == {"user": "who", "item": "what", "time": "sold_at"}
    assert dataset.item_attributes == {"colour": [("red", "blue"), ()]}
    back = load_dataset(save_dataset(dataset, tmp_path / "built"))
    assert (back.item_attributes, back.columns) == (dataset.item_attributes, dataset.columns)


@pytest.mark.parametrize(
    ("columns", "kind", "words"),
    [
        ({"colour": "x"}, ValueError, "columns must name roles among user, item, .*attribute, got 'colour'"),
        ({"time": "sold"}, DataError, "events.csv: no column 'sold' for the time; found user, item, timestamp"),
        ({"item": "sold"}, DataError, "events.csv: no column 'sold' for the item; found"),
        ({"title": "name"}, DataError, "columns names name for title, but there is no table of items"),
        ({"time": ["a", "b"]}, ValueError, "columns must name one column for time, got a, b"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, kind, words):
    write(tmp_path, events_csv=PLAIN)
    with pytest.raises(kind, match=words):
        load_dataset(tmp_path, columns=columns)


@pytest.mark.parametrize("name", ["event_timestamp", "event_time", "created_at", "ts", "Order Date", "purchased-at"])
def test_times_of_a_newest_first_export_order_it(tmp_path, name):
    write(tmp_path, events_csv=f"user,item,{name}\na,z,1700000300\na,y,1700000200\na,x,1700000100\n")
    dataset = load_dataset(tmp_path)
    assert [dataset.item_ids.ids[index] for index in dataset.items] == ["x", "y", "z"]


def test_files_that_are_not_read_are_said(tmp_path):
    write(tmp_path, events_csv=PLAIN, events_tsv=PLAIN, orders_csv="x", users_csv="y")
    assert said(load_dataset(tmp_path), "not read: events.tsv, orders.csv, users.csv")


def test_columns_of_other_forms_are_said(tmp_path):
    write(tmp_path / "m", x_inter="userID\titemID\tcolour\tts\n0\t1\tred\t5\n")
    mmrec = load_dataset(tmp_path / "m")
    assert said(mmrec, "x.inter: columns not used: colour") and mmrec.columns["time"] == "ts"
    write(tmp_path / "r", y_inter="user_id:token item_id:token item_id_list:token_seq\n1 2 3\n")
    recbole = load_dataset(tmp_path / "r")
    assert said(recbole, "y.inter: fields are taken as separated by blanks")
    assert said(recbole, "the lists in item_id_list:token_seq are no events")
    write(tmp_path / "a", reviews_T_json='{"reviewerID": "A", "asin": "x", "unixReviewTime": 1, "overall": 2}\n')
    amazon = load_dataset(tmp_path / "a")
    assert said(amazon, "fields not used: overall") and said(amazon, "every review counts as an event")


def test_lists_in_parquet(tmp_path):
    pl.DataFrame({"user": ["a", "b"], "item": [["x", "y"], ["x"]], "time": [1, 2]}).write_parquet(
        tmp_path / "events.parquet"
    )
    dataset = load_dataset(tmp_path)
    assert triples(dataset) == [("a", "x", 0), ("a", "y", 0), ("b", "x", 0)]
    assert said(dataset, "column 'item' holds lists; each entry counts as an event of its row")
    pl.DataFrame({"user": [["a"], ["b"]], "item": ["x", "y"]}).write_parquet(tmp_path / "events.parquet")
    with pytest.raises(DataError, match=r"events.parquet: column 'user' must hold one value per row, got List"):
        load_dataset(tmp_path)
