"""Columns that say whether something happened, ids that stand for nobody, integers that number rows."""

from __future__ import annotations

import json
import resource

import numpy as np
import polars as pl
import pytest
from support.datasets import make_dataset, save_version_1, triples, write

from hellm.data import DataError, IdMap, check_dataset, form_names, load_dataset, save_dataset
from hellm.data.attributes import split_values


def said(dataset, words: str) -> bool:
    return any(words in note for note in dataset.notes)


class TestMeaning:
    def test_label_0_is_no_event(self, tmp_path):
        text = "user_id:token\titem_id:token\tlabel:float\n1\t2\t0\n1\t3\t1\n2\t2\t0\n"
        write(tmp_path / "r", y_inter=text)
        write(tmp_path / "s", events_csv="user,item,label\n1,2,0\n1,3,1\n2,2,0\n")
        for name in "rs":
            dataset = load_dataset(tmp_path / name)
            # Neither the item nor the user of an event that is left out is there.
            assert triples(dataset) == [("1", "3", 0)]
            assert (dataset.num_users, dataset.num_items) == (1, 1)
            assert said(dataset, "2 events of label 0 in column 'label")

    def test_labels_other_than_0_and_1_are_left_and_said(self, tmp_path):
        write(tmp_path, events_csv="user,item,label\n1,2,0\n1,3,5\n")
        dataset = load_dataset(tmp_path)
        assert dataset.num_events == 2 and said(dataset, "column 'label' is not used")

    @pytest.mark.parametrize("name", ["quantity", "Qty"])
    def test_returns_are_no_purchases(self, tmp_path, name):
        write(tmp_path, events_csv=f"user,item,{name}\na,x,2\na,y,-1\na,z,0\nb,x,\n")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("a", "x", 0), ("b", "x", 0)]
        assert said(dataset, f"2 events of quantity 0 or less in column '{name}' are left out as returns")

    def test_types_that_undo_are_left_out(self, tmp_path):
        write(tmp_path, events_csv="user,item,event_type\na,x,purchase\na,y,Refund\nb,x,remove_from_cart\n")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("a", "x", 0)]
        assert said(dataset, "2 events of type Refund, remove_from_cart in column 'event_type' undo others")
        assert load_dataset(tmp_path, event_types=["Refund"]).num_events == 1

    def test_ratings_are_said_and_can_be_bounded(self, tmp_path):
        write(tmp_path / "s", events_csv="user,item,rating\na,x,5\na,y,1\n")
        write(tmp_path / "m", x_inter="userID\titemID\trating\n0\t0\t5\n0\t1\t1\n")
        write(tmp_path / "r", x_inter="user_id:token\titem_id:token\trating:float\n0\t0\t5\n0\t1\t1\n")
        reviews = [f'{{"reviewerID": "A", "asin": "{at}", "unixReviewTime": 1, "overall": {at}.0}}\n' for at in (1, 5)]
        write(tmp_path / "a", reviews_T_json="".join(reviews))
        for name in "smra":
            dataset = load_dataset(tmp_path / name)
            assert dataset.num_events == 2 and said(dataset, "min_rating=X (--min-rating X) leaves out lower")
            assert load_dataset(tmp_path / name, min_rating=4).num_events == 1
        write(tmp_path / "s", events_csv="user,item\na,x\n")
        with pytest.raises(ValueError, match=r"min_rating needs a column for the rating \(one of rating"):
            load_dataset(tmp_path / "s", min_rating=4)

    def test_one_user_with_a_large_share_is_remarked(self, tmp_path):
        rows = "".join(f"guest,{item},{item}\n" for item in range(90)) + "".join(f"u{n},1,5\n" for n in range(30))
        write(tmp_path, events_csv="user,item,time\n" + rows)
        largest = check_dataset(tmp_path)["largest_user"]
        assert largest == {"user": "guest", "events": 90, "share": 0.75, "suspicious": True}
        assert not check_dataset(make_dataset())["largest_user"]["suspicious"]


class TestIds:
    @pytest.mark.parametrize("empty", ['""', "NULL", "nan", "None", "N/A", "null", " ", "<NA>", "\\N", "\u00a0"])
    @pytest.mark.parametrize("side", ["user", "item"])
    def test_what_stands_for_nobody_is_left_out(self, tmp_path, empty, side):
        row = f"{empty},x,1" if side == "user" else f"a,{empty},1"
        write(tmp_path, events_csv=f"user,item,time\n{row}\n{row}\na,x,2\n")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("a", "x", 0)]
        assert said(dataset, f"2 events without {side} id in column '{side}' are left out (")

    def test_blank_lines_are_no_rows_without_ids(self, tmp_path):
        write(tmp_path, events_csv="user,item,time\n\na,x,2\n\n")
        assert not said(load_dataset(tmp_path), "left out")
        write(tmp_path, events_csv="user,item,time\n\na,x,2\n,,3\n")
        assert said(load_dataset(tmp_path), "1 rows without user and item are left out")

    def test_nan_of_parquet(self, tmp_path):
        table = {"user": [1.0, None, float("nan"), 2.0], "item": [7, 8, 9, 7]}
        pl.DataFrame(table, strict=False).write_parquet(tmp_path / "events.parquet")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("1", "7", 0), ("2", "7", 0)]

    def test_floats_that_were_integers_meet_the_item_table(self, tmp_path):
        write(tmp_path, events_csv="user,item\n1.0,7.0\n2,8\n", items_csv="item,title\n7,X\n8,Y\n")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("1", "7", 0), ("2", "8", 0)]
        assert said(dataset, "events.csv: column 'user': ids such as 1.0 are taken without their .0")

    def test_leading_zeros_case_and_versions_stay(self, tmp_path):
        write(tmp_path, events_csv="user,item\n007,A\n7,a\n07,v1.0\n")
        dataset = load_dataset(tmp_path)
        assert set(dataset.user_ids.ids) == {"007", "07", "7"}
        assert set(dataset.item_ids.ids) == {"A", "a", "v1.0"}

    def test_blanks_around_ids_go(self, tmp_path):
        write(tmp_path, events_csv="user, item\nu1, A\n u1,A \n")
        dataset = load_dataset(tmp_path)
        assert triples(dataset) == [("u1", "A", 0), ("u1", "A", 0)]
        assert said(dataset, "events.csv: column 'item': blanks around 2 ids are left out")

    def test_numbers_that_a_spreadsheet_cut_are_said(self, tmp_path):
        write(tmp_path, events_csv="user,item\n1.23E+12,A\nb,A\n")
        assert said(load_dataset(tmp_path), "1 ids look like long numbers that a spreadsheet has cut, e.g. 1.23E+12")

    @pytest.mark.parametrize("content", [b'"Jos\xe9"', b'"Jos\xe8"'])
    def test_amazon_users_of_another_encoding_do_not_merge(self, tmp_path, content):
        line = b'{"reviewerID": %b, "asin": "x", "unixReviewTime": 1}\n'
        (tmp_path / "reviews_T.json").write_bytes(line % b'"A"' + line % content)
        with pytest.raises(DataError, match=r"reviews_T.json:2: byte 0xe[89] is not UTF-8; .*--encoding latin-1"):
            load_dataset(tmp_path)
        assert "Jos" in load_dataset(tmp_path, encoding="latin-1").user_ids.ids[1]

    def test_amazon_reads_marks_and_leaves_out_nobody(self, tmp_path):
        lines = [{"reviewerID": user, "asin": "x", "unixReviewTime": 1} for user in ("A", "", None, "NULL", 5.0)]
        text = "\ufeff" + "\n".join(map(json.dumps, lines))
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "reviews_T.json").write_bytes(text.encode(encoding))
            dataset = load_dataset(tmp_path)
            assert dataset.user_ids.ids == ["5", "A"]
            assert said(dataset, "3 reviews without user or item are left out")


LARGE = {
    "mmrec": {"x.inter": "userID\titemID\n0\t4000000000\n0\t7\n"},
    "mmrec beyond 64 bits": {"x.inter": "userID\titemID\n0\t1\n" + "0\t" + "9" * 30 + "\n"},
    "mmrec user": {"x.inter": "userID\titemID\n5000000000\t4\n"},
    "sasrec": {"x.txt": "1 2 3\n2 978300760\n"},
    "sasrec beyond 64 bits": {"x.txt": "1 2 3\n2 " + "9" * 30 + "\n"},
    "sasrec user": {"x.txt": "978300760 2 3\n"},
    "json": {"x.inter.json": '{"0": [1, 4000000000]}'},
    "json user": {"x.inter.json": '{"4000000000": [1, 2]}'},
    "json item": {"x.inter.json": '{"0": [1]}', "x.item.json": '{"1": {}, "4000000000": {}}'},
    "json beyond 64 bits": {"x.inter.json": '{"0": [1, %s]}' % ("9" * 30)},
    "lattice": {"train.json": '{"0": [1, 4000000000]}', "test.json": "{}"},
    "lattice user": {"train.json": '{"4000000000": []}', "test.json": '{"0": [1]}'},
}


class TestIntegerIds:
    @pytest.mark.parametrize("case", LARGE)
    def test_one_large_number_is_refused_by_line(self, tmp_path, case):
        for name, text in LARGE[case].items():
            (tmp_path / name).write_text(text)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        words = r"\.(inter|txt|json)(:\d|: user).*(too large for a row number|must be)"
        with pytest.raises(DataError, match=words):
            load_dataset(tmp_path)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000

    def test_gaps_that_cost_little_stay(self, tmp_path):
        write(tmp_path, x_inter="userID\titemID\n0\t90000\n0\t7\n")
        assert load_dataset(tmp_path).num_items == 90001

    def test_third_column_of_two(self, tmp_path):
        write(tmp_path, S_txt="1 3 978300761\n1 2 978300760\n2 2 978300762\n")
        timed = load_dataset(tmp_path)
        assert triples(timed) == [("1", "2", 0), ("1", "3", 0), ("2", "2", 0)]
        assert timed.timestamps.tolist() == [978300760, 978300761, 978300762]
        write(tmp_path, S_txt="1 3 5\n1 2 1\n2 2 4\n")
        rated = load_dataset(tmp_path)
        assert triples(rated) == [("1", "3", 0), ("1", "2", 0), ("2", "2", 0)]
        assert said(rated, "lines are taken as user item rating")
        write(tmp_path, S_txt="1 3 5 978300761\n1 2 1 978300760\n2 2 4 978300762\n")
        assert triples(load_dataset(tmp_path)) == triples(timed)
        write(tmp_path, S_txt="1 3 50\n1 2 11\n2 2 40\n")
        with pytest.raises(DataError, match=r"S.txt:1: users stand on several lines of 3 numbers, which are neither"):
            load_dataset(tmp_path)
        # One line for each user: lists of two items, as ever.
        write(tmp_path, S_txt="1 3 5\n2 2 1\n")
        assert load_dataset(tmp_path).num_events == 4

    def test_sasrec_attributes_are_categories(self, tmp_path):
        write(tmp_path, S_txt="1 1 2\n", S_item2attributes_json='{"1": [4, 5], "9": [1]}')
        dataset = load_dataset(tmp_path)
        assert dataset.item_attributes == {"category": [("4", "5"), ()]}
        assert said(dataset, "1 items that have no events are left out")
        # Numbers of categories are no text to describe an item by.
        assert load_dataset(tmp_path, features="simple").item_features == {}


class TestRoundTrips:
    @pytest.mark.parametrize("form", form_names(writable=True))
    @pytest.mark.parametrize(
        "odd", ["A\tB", "A\nB", 'A"B', "A B", " A", "A,B", "A\rB", "NULL", "é", "1.0", "A;B", "'A", "", "\x0b", "A|B"]
    )
    def test_odd_ids_come_back_or_are_refused(self, tmp_path, form, odd):
        dataset = make_dataset(features=False)
        ids = [odd, *dataset.item_ids.ids[1:]]
        dataset = type(dataset)(**{**vars(dataset), "item_ids": IdMap(ids), "user_ids": IdMap([odd, "b", "c", "d"])})
        try:
            save_dataset(dataset, tmp_path / "out", form=form)
        except ValueError as error:
            assert f"id {odd!r}" in str(error) and form in ("recbole", "shop")
            assert not list(tmp_path.iterdir())
            return
        back = load_dataset(tmp_path / "out", split="leave-two-out")
        assert sorted(triples(back)) == sorted(triples(dataset))
        assert back.item_ids == dataset.item_ids

    @pytest.mark.parametrize("form", form_names(writable=True))
    def test_rows_without_events_come_back(self, tmp_path, form):
        dataset = make_dataset(features=False, numbered=True)
        keep = dataset.users < 3
        columns = {name: getattr(dataset, name)[keep] for name in ("users", "items", "split", "timestamps")}
        dataset = type(dataset)(**{**vars(dataset), **columns})
        save_dataset(dataset, tmp_path / "out", form=form)
        back = load_dataset(tmp_path / "out", split="leave-two-out")
        assert (back.num_items, back.item_ids) == (6, dataset.item_ids)
        assert back.num_users == (3 if form == "shop" else 4)

    @pytest.mark.parametrize("name", ["a/b", ".hidden", "x_sample", "a.b", "[1]"])
    @pytest.mark.parametrize("form", form_names(writable=True))
    def test_names_that_are_no_file_names(self, tmp_path, form, name):
        dataset = make_dataset(features=False)
        save_dataset(type(dataset)(**{**vars(dataset), "name": name}), tmp_path / "out", form=form)
        assert triples(load_dataset(tmp_path / "out", split="leave-two-out")) == triples(dataset)


class TestSmall:
    def test_no_events_and_one_user(self):
        empty = np.zeros(0, np.int64)
        nothing = type(make_dataset())(
            "none", 0, 0, empty, empty, None, np.zeros(0, np.int8), IdMap(), IdMap(), {}, None
        )
        report = check_dataset(nothing)
        assert (report["density"], report["history_length"], report["largest_user"]) == (0, None, None)
        json.dumps(report, allow_nan=False)

    def test_one_event(self, tmp_path):
        write(tmp_path, events_csv="user,item\na,x\n")
        report = check_dataset(tmp_path)
        assert report["events"]["total"] == 1
        json.dumps(report, allow_nan=False)

    @pytest.mark.parametrize("text", ["user,item\n", "user,item\n,\n", "user,item\nNULL,x\n"])
    def test_no_event_at_all(self, tmp_path, text):
        write(tmp_path, events_csv=text)
        with pytest.raises(DataError, match=r"events.csv: (the table has a header but no rows|no row is left)"):
            load_dataset(tmp_path)


def test_categories_and_numbers_of_json(tmp_path):
    entries = {"0": {"title": 7, "categories": [["x", "y"], ["z", "x"]], "price": 3}, "1": {"title": None}}
    (tmp_path / "N.inter.json").write_text('{"0": [0, 1]}')
    (tmp_path / "N.item.json").write_text(json.dumps(entries))
    dataset = load_dataset(tmp_path)
    assert dataset.item_titles == ["7", ""] and dataset.item_fields == {"category": ["x, y, z", ""]}
    assert dataset.item_attributes == {"category": [("x", "y", "z"), ()]}
    assert said(dataset, "N.item.json: fields not used: price")
    (tmp_path / "N.item.json").write_text('{"0": {"title": {"en": "x"}}, "1": {}}')
    with pytest.raises(
        DataError, match=r"N.item.json: item '0': title must be text, a number or a list, got an object"
    ):
        load_dataset(tmp_path)
    (tmp_path / "N.item.json").write_bytes('{"0": {"title": "é"}, "1": {}}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"N.item.json:1: byte 0xe9 is not UTF-8"):
        load_dataset(tmp_path)
    assert load_dataset(tmp_path, encoding="latin-1").item_titles == ["é", ""]
    (tmp_path / "N.inter.json").write_text('{"0": [0], "0": [1]}')
    with pytest.raises(DataError, match=r"N.inter.json: an object holds the key '0' twice"):
        load_dataset(tmp_path, encoding="latin-1")


@pytest.mark.parametrize("save", [save_dataset, save_version_1])
def test_damaged_files_are_named(tmp_path, save):
    files = {
        save_dataset: ("events/users.npy", "events/timestamps.npy", "users/text.npy", "users/starts.npy"),
        save_version_1: ("events.parquet", "users.parquet"),
    }
    save(make_dataset(), tmp_path / "x")
    for name in (*files[save], "items.parquet", "features/image.npy", "features/image.mask.npy", "dataset.json"):
        path = tmp_path / "x" / name
        whole = path.read_bytes()
        for cut in (0, 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:cut])
            if name == "dataset.json" and cut == len(whole) - 1:
                continue
            with pytest.raises(DataError, match=path.name):
                load_dataset(tmp_path / "x")
        path.write_bytes(whole)
    header = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (6, 99999999999), }"
    (tmp_path / "x" / "features" / "image.npy").write_bytes(header.ljust(127) + b"\n")
    with pytest.raises(DataError, match=r"image.npy: not a plain .npy array"):
        load_dataset(tmp_path / "x")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        pytest.param(
            ["A & B,Test, Measure & Inspect,Sensors", "A & B,C", "x"],
            [("A & B", "Test, Measure & Inspect", "Sensors"), ("A & B", "C"), ("x",)],
            id="a path whose values hold commas",
        ),
        pytest.param(["red, blue", "green, red", "a,b"], [("red", "blue"), ("green", "red"), ("a,b",)], id="blanks"),
        pytest.param(["a|b, c", "b, c", "d, e"], [("a", "b, c"), ("b, c",), ("d, e",)], id="bars before all"),
        pytest.param(["a,b", "b,c", "x &amp; y,c"], [("a", "b"), ("b", "c"), ("x &amp; y", "c")], id="an entity"),
        pytest.param(["a;b", "b;c", "c, d"], [("a", "b"), ("b", "c"), ("c, d",)], id="semicolons"),
        pytest.param(["1,5 l", "0,75 l"], [("1,5 l",), ("0,75 l",)], id="decimal commas"),
    ],
)
def test_values_of_an_attribute_are_told_apart_by_what_most_texts_have(texts, expected):
    assert split_values(texts) == expected
