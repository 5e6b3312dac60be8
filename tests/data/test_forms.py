"""Every form: round trips, detection, and what each reader makes of the variants that occur."""

from __future__ import annotations

import gzip
import json

import numpy as np
import polars as pl
import pytest
from support.datasets import ITEMS, make_dataset, save_version_1, triples

from hellm.data import IdMap, convert, form_names, load_dataset, save_dataset

KEEP_SPLIT = ("hellm", "recbole", "mmrec", "lattice", "shop")
KEEP_ORDER_ONLY = ("json", "sasrec")
READ_ONLY = ("amazon",)


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path


def test_the_lists_above_are_all_writable_forms():
    assert sorted(form_names(writable=True)) == sorted(KEEP_SPLIT + KEEP_ORDER_ONLY)
    assert sorted(set(form_names()) - set(form_names(writable=True))) == sorted(READ_ONLY)


@pytest.mark.parametrize("numbered", [False, True], ids=["string-ids", "integer-ids"])
@pytest.mark.parametrize("timestamps", [True, False], ids=["times", "no-times"])
@pytest.mark.parametrize("form", KEEP_SPLIT)
def test_round_trip_keeps_triples_ids_and_given_split(tmp_path, form, timestamps, numbered):
    dataset = make_dataset(given=True, timestamps=timestamps, numbered=numbered)
    save_dataset(dataset, tmp_path / "toy", form=form)
    back = load_dataset(tmp_path / "toy")
    assert back.form == form
    assert back.name == "toy"
    assert sorted(triples(back)) == sorted(triples(dataset))
    assert back.split_counts() == dataset.split_counts() == {"train": 9, "valid": 2, "test": 3}
    assert set(back.user_ids.ids) == set(dataset.user_ids.ids)
    assert back.item_ids == dataset.item_ids
    assert back.split_name == "given"
    assert np.array_equal(back.item_features["image"].values, dataset.item_features["image"].values)
    assert back.item_features["image"].mask.tolist() == [True] * 4 + [False, True]
    if timestamps and form != "lattice":
        assert back.fingerprint == replace_text(dataset, back).fingerprint


def replace_text(dataset, back):
    """`dataset` with the text features that "shop" computes, so that the rest can be compared."""
    from dataclasses import replace

    return replace(dataset, item_features={**back.item_features, **dataset.item_features})


@pytest.mark.parametrize("numbered", [False, True], ids=["string-ids", "integer-ids"])
@pytest.mark.parametrize("form", KEEP_SPLIT + KEEP_ORDER_ONLY)
def test_round_trip_keeps_order_and_leave_two_out(tmp_path, form, numbered):
    dataset = make_dataset(numbered=numbered)
    save_dataset(dataset, tmp_path / "toy", form=form)
    back = load_dataset(tmp_path / "toy", split="leave-two-out")
    assert triples(back) == triples(dataset)
    assert back.item_ids == dataset.item_ids
    assert back.split_counts() == {"train": 8, "valid": 3, "test": 3}


@pytest.mark.parametrize("form", KEEP_ORDER_ONLY)
def test_a_split_that_a_form_cannot_hold_is_warned_of(tmp_path, form):
    with pytest.warns(UserWarning, match=f"form '{form}' stores no split: the 'given' split of 'toy' is lost"):
        save_dataset(make_dataset(given=True), tmp_path / "toy", form=form)


def test_built_form_keeps_everything(tmp_path):
    dataset = make_dataset(given=True)
    save_dataset(dataset, tmp_path / "x")
    back = load_dataset(tmp_path / "x")
    assert back.fingerprint == dataset.fingerprint
    assert back.name == "toy"
    assert back.user_ids == dataset.user_ids
    assert back.item_titles == dataset.item_titles
    assert back.item_fields == dataset.item_fields
    assert json.loads((tmp_path / "x" / "dataset.json").read_text())["split_counts"] == dataset.split_counts()


def test_built_form_is_mapped_and_its_files_are_never_written_to(tmp_path):
    save_dataset(make_dataset(), tmp_path / "x")
    back = load_dataset(tmp_path / "x")
    arrays = [back.users, back.items, back.split, back.timestamps, back.item_features["image"].values]
    for values in arrays:
        assert isinstance(values.base, np.memmap) or isinstance(values.base.base, np.memmap)
        values[...] = 0
    assert load_dataset(tmp_path / "x").fingerprint == make_dataset().fingerprint


@pytest.mark.parametrize("timestamps", [True, False])
def test_folders_of_version_1_are_read(tmp_path, timestamps):
    dataset = make_dataset(timestamps=timestamps)
    back = load_dataset(save_version_1(dataset, tmp_path / "x"))
    assert back.fingerprints == dataset.fingerprints
    assert (back.user_ids, back.item_fields) == (dataset.user_ids, dataset.item_fields)


def test_built_form_remembers_which_split_it_was(tmp_path):
    save_dataset(make_dataset(), tmp_path / "x")
    assert load_dataset(tmp_path / "x").split_name == "leave-two-out"
    assert load_dataset(tmp_path / "x", split="ratio").split_name == "ratio"


def test_convert_reads_one_form_and_writes_another(tmp_path):
    save_dataset(make_dataset(), tmp_path / "a", form="recbole")
    read = convert(tmp_path / "a", tmp_path / "b", "mmrec")
    assert read.form == "recbole"
    assert triples(load_dataset(tmp_path / "b")) == triples(read)


MMREC = "userID\titemID\tx_label\n0\t2\t0\n0\t0\t1\n1\t1\t0\n0\t1\t2\n"


@pytest.mark.parametrize("text", [MMREC, MMREC.replace("\n", "\r\n"), "\ufeff" + MMREC, MMREC + "\n\n"])
def test_mmrec_line_ends_and_marks(tmp_path, text):
    dataset = load_dataset(write(tmp_path, "toy.inter", text))
    assert triples(dataset) == [("0", "2", 0), ("0", "0", 1), ("0", "1", 2), ("1", "1", 0)]
    assert dataset.form == "mmrec"
    assert dataset.split_name == "given"


def test_mmrec_sorts_by_time_and_keeps_ties_in_source_order(tmp_path):
    text = "userID\titemID\trating\ttimestamp\n1\t0\t5\t9\n0\t2\t1\t7\n0\t1\t1\t3\n0\t0\t1\t7\n"
    dataset = load_dataset(write(tmp_path, "toy.inter", text))
    assert dataset.items.tolist() == [1, 2, 0, 0]
    assert dataset.timestamps.tolist() == [3, 7, 7, 9]
    assert dataset.split.tolist() == [0, 1, 2, 0]


def test_mmrec_float16_features_and_zero_row(tmp_path):
    path = write(tmp_path, "toy.inter", MMREC)
    np.save(tmp_path / "text_feat.npy", np.array([[1, 2], [0, 0], [3, 4]], np.float16))
    dataset = load_dataset(path)
    assert dataset.item_features["text"].values.tolist() == [[1, 2], [0, 0], [3, 4]]
    assert dataset.item_features["text"].mask.tolist() == [True, False, True]
    assert "text_feat.npy: 1 all-zero rows are taken as missing" in dataset.notes


def test_mmrec_feature_rows_beyond_the_events_are_unsold_items(tmp_path):
    path = write(tmp_path, "toy.inter", MMREC)
    np.save(tmp_path / "text_feat.npy", np.ones((5, 2), np.float32))
    dataset = load_dataset(path)
    assert dataset.num_items == 5
    assert "5 items by feature rows or id mapping; the largest item id is 2" in dataset.notes


def test_recbole_single_file_with_items(tmp_path):
    write(
        tmp_path, "r.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float\nu2\tb\t1\t5\nu1\ta\t1\t2\n"
    )
    write(tmp_path, "r.item", 'item_id:token\tmovie_title:token_seq\nb\tBig one\na\tAlpha "quoted\nz\t\n')
    dataset = load_dataset(tmp_path)
    assert dataset.form == "recbole"
    assert dataset.item_ids.ids == ["b", "a", "z"]
    assert dataset.user_ids.ids == ["u1", "u2"]
    assert dataset.item_titles == ["Big one", 'Alpha "quoted', ""]
    assert triples(dataset) == [("u1", "a", 0), ("u2", "b", 0)]
    assert dataset.timestamps.tolist() == [2, 5]


def test_recbole_numeric_tokens_sort_by_value(tmp_path):
    write(tmp_path, "r.inter", "user_id:token\titem_id:token\n10\t7\n9\t100\n")
    dataset = load_dataset(tmp_path)
    assert dataset.user_ids.ids == ["9", "10"]
    assert dataset.item_ids.ids == ["7", "100"]


def test_lattice_with_empty_lists(tmp_path):
    write(tmp_path, "5-core/train.json", '{"0": [3, 1], "2": [0]}')
    write(tmp_path, "5-core/val.json", '{"0": [], "2": [1], "3": []}')
    write(tmp_path, "5-core/test.json", '{"0": [2], "2": []}')
    dataset = load_dataset(tmp_path)
    assert dataset.num_users == 4
    assert triples(dataset) == [("0", "3", 0), ("0", "1", 0), ("0", "2", 2), ("2", "0", 0), ("2", "1", 1)]


def test_sasrec_from_one(tmp_path):
    write(tmp_path, "S.txt", "1 1 2 3\n2 2 1\n")
    write(tmp_path, "S_item2attributes.json", '{"1": [4]}')
    dataset = load_dataset(tmp_path)
    assert dataset.item_ids.ids == ["1", "2", "3"]
    assert dataset.items.tolist() == [0, 1, 2, 1, 0]
    assert dataset.split.tolist() == [0, 1, 2, 0, 0]
    assert "item ids are numbered from 1 (smallest 1, largest 3)" in dataset.notes
    assert "user ids are numbered from 1 (smallest 1, largest 2)" in dataset.notes


def test_sasrec_from_zero_without_final_newline(tmp_path):
    dataset = load_dataset(write(tmp_path, "S.txt", "0 0 2\r\n\r\n1 1 2 0"))
    assert dataset.item_ids == IdMap.range(3)
    assert dataset.items.tolist() == [0, 2, 1, 2, 0]
    assert "item ids are numbered from 0 (smallest 0, largest 2)" in dataset.notes


def test_sasrec_two_columns(tmp_path):
    dataset = load_dataset(write(tmp_path, "S.txt", "1 3\n1 1\n1 2\n2 1\n"))
    assert triples(dataset) == [("1", "3", 0), ("1", "1", 1), ("1", "2", 2), ("2", "1", 0)]


def test_json_pair(tmp_path):
    write(tmp_path, "N.inter.json", '{"1": [2, 0, 1], "0": [1]}')
    items = {"0": {"title": "Zero", "categories": ["a", "b"]}, "1": {"title": None}, "2": {"title": "Two"}, "3": {}}
    write(tmp_path, "N.item.json", json.dumps(items))
    dataset = load_dataset(tmp_path)
    assert dataset.name == "N"
    assert dataset.num_items == 4
    assert dataset.item_titles == ["Zero", "", "Two", ""]
    assert dataset.item_fields == {"category": ["a, b", "", "", ""]}
    assert triples(dataset) == [("0", "1", 0), ("1", "2", 0), ("1", "0", 1), ("1", "1", 2)]


def gz(folder, name, *lines):
    with gzip.open(folder / name, "wt", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in lines)


def test_amazon_2014_with_python_literals(tmp_path):
    gz(
        tmp_path,
        "reviews_Toys_5.json.gz",
        '{"reviewerID": "B", "asin": "y", "unixReviewTime": 86400, "overall": 5.0}',
        '{"reviewerID": "A", "asin": "x", "unixReviewTime": 172800}',
        "{'reviewerID': 'A', 'asin': 'y', 'unixReviewTime': 86400}",
    )
    gz(
        tmp_path,
        "meta_Toys.json.gz",
        "{'asin': 'y', 'title': 'It\\'s <b>big</b> &amp; red', 'categories': [['Toys', 'Balls']], 'imUrl': 'http://i/y.jpg'}",
        "{'asin': 'unsold', 'title': 'no'}",
    )
    dataset = load_dataset(tmp_path)
    assert dataset.form == "amazon"
    assert dataset.name == "Toys"
    assert triples(dataset) == [("A", "y", 0), ("A", "x", 0), ("B", "y", 0)]
    assert dataset.timestamps.tolist() == [86400, 172800, 86400]
    assert dataset.item_ids.ids == ["x", "y"]
    assert dataset.item_titles == ["", "It's big & red"]
    assert dataset.item_fields["category"] == ["", "Toys, Balls"]
    assert dataset.item_fields["image_url"] == ["", "http://i/y.jpg"]
    assert "1 items are not in meta_Toys.json.gz" in dataset.notes


def test_amazon_drop_items_without_meta(tmp_path):
    gz(
        tmp_path,
        "reviews_T.json.gz",
        '{"reviewerID": "A", "asin": "x", "unixReviewTime": 1}',
        '{"reviewerID": "A", "asin": "y", "unixReviewTime": 2}',
    )
    gz(tmp_path, "meta_T.json.gz", '{"asin": "y", "title": "Y"}')
    dataset = load_dataset(tmp_path, missing_items="drop")
    assert triples(dataset) == [("A", "y", 0)]
    assert dataset.item_titles == ["Y"]


def test_amazon_2018(tmp_path):
    gz(tmp_path, "Beauty_5.json.gz", '{"reviewerID": "A", "asin": "x", "unixReviewTime": 3}')
    gz(tmp_path, "meta_Beauty.json.gz", '{"asin": "x", "category": ["c"], "description": ["a", "b"], "brand": "br"}')
    dataset = load_dataset(tmp_path)
    assert dataset.name == "Beauty"
    assert dataset.item_fields == {"category": ["c"], "description": ["a b"], "brand": ["br"]}


def test_amazon_2023_milliseconds_and_parent(tmp_path):
    write(tmp_path, "All.jsonl", '{"user_id": "A", "asin": "v1", "parent_asin": "p", "timestamp": 1588687728923}\n')
    write(tmp_path, "meta_All.jsonl", '{"parent_asin": "p", "store": "S", "images": [{"large": "http://l"}]}\n')
    dataset = load_dataset(tmp_path)
    assert dataset.item_ids.ids == ["p"]
    assert dataset.timestamps.tolist() == [1588687728.923]
    assert "timestamps are taken as milliseconds since 1970" in dataset.notes
    assert dataset.item_fields == {"brand": ["S"], "image_url": ["http://l"]}


EVENTS = "Customer ID,sku,created_at,price\nann,007,2024-01-02,1\nbob,9,2024-01-01,1\nann,9,2024-01-01,1\n"


def test_shop_synonyms_dates_and_padded_ids(tmp_path):
    write(tmp_path, "events.csv", EVENTS)
    write(tmp_path, "items.csv", 'id,Name,category\n007,"Lamp, tall",home\n9,Mug,\n')
    dataset = load_dataset(tmp_path)
    assert dataset.form == "shop"
    assert dataset.item_ids.ids == ["007", "9"]
    assert triples(dataset) == [("ann", "9", 0), ("ann", "007", 0), ("bob", "9", 0)]
    assert dataset.timestamps.tolist() == [1704067200, 1704153600, 1704067200]
    assert dataset.item_titles == ["Lamp, tall", "Mug"]
    assert dataset.item_features["text"].mask.all()


@pytest.mark.parametrize(
    ("times", "seconds"),
    [
        (["2024-01-01 00:00:01", "2024-01-01 00:00:02"], [1704067201, 1704067202]),
        (["2024-01-01T00:00:01.5Z", "2024-01-01T01:00:02+01:00"], [1704067201.5, 1704067202]),
        (["2024-01-01T00:00:01+0000", "2024-01-01T00:00:02+0000"], [1704067201, 1704067202]),
        (["1704067201", "1704067202.25"], [1704067201, 1704067202.25]),
        (["1704067201000", "1704067202000"], [1704067201, 1704067202]),
        (["1704067201000000", "1704067202000000"], [1704067201, 1704067202]),
    ],
)
def test_shop_time_spellings(tmp_path, times, seconds):
    write(tmp_path, "events.csv", f"user,item,time\na,x,{times[0]}\na,y,{times[1]}\n")
    assert load_dataset(tmp_path).timestamps.tolist() == seconds


def test_shop_parquet_with_integer_ids_and_datetimes(tmp_path):
    from datetime import datetime

    times = [datetime(2024, 1, 2), datetime(2024, 1, 1)]
    pl.DataFrame({"user_id": [5, 5], "item_id": [10, 9], "ts": times}).write_parquet(tmp_path / "events.parquet")
    dataset = load_dataset(tmp_path)
    assert triples(dataset) == [("5", "9", 0), ("5", "10", 0)]
    assert dataset.timestamps.tolist() == [1704067200, 1704153600]


def test_shop_event_types(tmp_path):
    write(tmp_path, "events.tsv", "user\titem\tevent\na\tx\tview\na\ty\tbuy\nb\tx\tview\n")
    everything = load_dataset(tmp_path)
    assert everything.num_events == 3
    assert any(
        note.startswith("events of all types in column 'event' are used: buy, view;") for note in everything.notes
    )
    bought = load_dataset(tmp_path, event_types=["buy"])
    assert triples(bought) == [("a", "y", 0)]
    with pytest.raises(ValueError, match="event_types must be among buy, view, got sold"):
        load_dataset(tmp_path, event_types=["sold"])


def test_shop_missing_items_policies(tmp_path):
    write(tmp_path, "events.csv", "user,item\na,x\na,ghost\nb,ghost\n")
    write(tmp_path, "items.csv", "item,title\nx,X\n")
    kept = load_dataset(tmp_path, missing_items="keep")
    assert kept.item_ids.ids == ["x", "ghost"]
    assert kept.item_titles == ["X", ""]
    assert kept.item_features["text"].mask.tolist() == [True, False]
    dropped = load_dataset(tmp_path, missing_items="drop")
    assert triples(dropped) == [("a", "x", 0)]


def test_shop_images_by_column_by_id_and_by_address(tmp_path):
    from PIL import Image

    write(tmp_path, "events.csv", "user,item\na,x\na,y\na,z\n")
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images" / "x.png")
    write(tmp_path, "images/y.png", "not a picture")
    by_id = load_dataset(tmp_path)
    assert by_id.item_features["image"].mask.tolist() == [True, False, False]
    assert any("1 images cannot be read" in note and "y.png" in note for note in by_id.notes)
    write(tmp_path, "items.csv", "item,image\nx,https://x/y.png\ny,gone.png\nz,x.png\n")
    by_column = load_dataset(tmp_path)
    # "z" has the picture that the table names; "x" and "y" have those of their ids, "y" a broken one.
    assert by_column.item_features["image"].mask.tolist() == [True, False, True]
    assert "1 images named in the item table are not there: gone.png" in by_column.notes
    assert any(note.startswith("1 images are web addresses") for note in by_column.notes)
    assert load_dataset(tmp_path, features="none").item_features == {}


def test_simple_features_on_request_for_other_forms(tmp_path):
    save_dataset(make_dataset(features=False), tmp_path / "x")
    assert load_dataset(tmp_path / "x").item_features == {}
    features = load_dataset(tmp_path / "x", features="simple").item_features
    assert list(features) == ["text"]
    assert features["text"].mask.all()


def test_known_ids_keep_their_indices_as_a_shop_grows(tmp_path):
    write(tmp_path, "events.csv", "user,item\nm,k\nm,q\n")
    write(tmp_path, "items.csv", "item,title\nk,Kite\nq,Quilt\n")
    before = load_dataset(tmp_path)
    write(tmp_path, "events.csv", "user,item\nm,k\nm,q\na,c\nm,c\n")
    write(tmp_path, "items.csv", "item,title\nc,Cup\nq,Quilt\n")
    after = load_dataset(tmp_path, user_ids=before.user_ids, item_ids=before.item_ids, missing_items="keep")
    assert after.user_ids.ids == ["m", "a"]
    assert after.item_ids.ids == ["k", "q", "c"]
    assert after.item_titles == ["", "Quilt", "Cup"]
    assert triples(after) == [("a", "c", 0), ("m", "k", 0), ("m", "q", 1), ("m", "c", 2)]
    assert before.item_ids.ids == ["k", "q"]
    assert after.item_features["text"].mask.tolist() == [False, True, True]


def test_features_move_with_the_ids(tmp_path):
    dataset = make_dataset()
    save_dataset(dataset, tmp_path / "x")
    moved = load_dataset(tmp_path / "x", item_ids=IdMap(["new", "q"]))
    assert moved.item_ids.ids == ["new", "q", *ITEMS[:5]]
    image = moved.item_features["image"]
    assert image.values[1].tolist() == dataset.item_features["image"].values[5].tolist()
    assert image.mask.tolist() == [False, True, True, True, True, True, False]
    assert triples(moved) == triples(dataset)


def test_split_methods_through_load(tmp_path):
    save_dataset(make_dataset(), tmp_path / "x")
    assert load_dataset(tmp_path / "x", split="ratio", ratios=(0.5, 0.25, 0.25)).split.tolist()[:4] == [0, 0, 1, 2]
    by_time = load_dataset(tmp_path / "x", split="time", ratios=(0.5, 0.25, 0.25))
    assert by_time.split.tolist() == [0] * 7 + [1] * 3 + [2] * 4
    cold = load_dataset(tmp_path / "x", split="item-cold", cold_share=0.4, seed=3)
    train, test = (set(cold.pairs(part)[1].tolist()) for part in ("train", "test"))
    assert test
    assert not train & test
    assert cold.split_name == "item-cold"
