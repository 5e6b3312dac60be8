"""What is refused, and with which words."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from support.datasets import make_dataset, save_version_1

from hellm.data import DataError, load_dataset, save_dataset

INTER = "userID\titemID\tx_label\n0\t0\t0\n"
RECBOLE = "user_id:token\titem_id:token\ttimestamp:float\n"
EVENTS = "user,item,time\na,x,1\n"
REVIEW = '{"reviewerID": "A", "asin": "x", "unixReviewTime": 1}\n'


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, np.ndarray):
            np.save(path, content)
        elif isinstance(content, pl.DataFrame):
            content.write_parquet(path)
        else:
            path.write_text(content, encoding="utf-8")


CASES = {
    "empty folder": ({}, "unknown form; found an empty folder"),
    "unknown form": ({"notes.md": "x", "a.bin": "y"}, r"unknown form; found a.bin, notes.md. Known forms:\n  hellm: "),
    "several sets": (
        {"a.inter": INTER, "b.inter": INTER},
        r"several data sets in one folder \(a.inter, b.inter\); give",
    ),
    "mmrec empty": ({"t.inter": ""}, "t.inter: the file is empty"),
    "mmrec header only": ({"t.inter": INTER[:21] + "\n"}, "has a header but no rows|the header must name"),
    "mmrec header": (
        {"t.inter": "user\titem\n0\t1\n"},
        "t.inter:1: the header must name userID and itemID, got user, item",
    ),
    "mmrec text id": (
        {"t.inter": INTER + "0\tabc\t0\n"},
        r"t.inter:3: column 2 \(itemID\) must be a non-negative .* 'abc'",
    ),
    "mmrec negative id": ({"t.inter": INTER + "-1\t0\t0\n"}, r"t.inter:3: column 1 \(userID\) must be a .* got '-1'"),
    "mmrec label": ({"t.inter": INTER + "0\t1\t3\n"}, r"t.inter:3: column 3 \(x_label\) must be 0, 1 or 2 .* got '3'"),
    "mmrec short line": (
        {"t.inter": INTER + "\n0\t1\n"},
        r"t.inter:4: expected 3 fields \(userID, itemID, x_label\), got 2",
    ),
    "mmrec long line": ({"t.inter": INTER + "0\t1\t0\t9\n"}, r"t.inter:3: expected 3 fields .*, got 4"),
    "mmrec time": (
        {"t.inter": "userID\titemID\ttimestamp\n0\t0\tnoon\n"},
        r"t.inter:2: column 3 \(timestamp\) must be a time .* got 'noon'",
    ),
    "mmrec nan time": (
        {"t.inter": "userID\titemID\ttimestamp\n0\t0\t1\n0\t1\tnan\n"},
        r"t.inter:3: column 3 \(timestamp\) must be a time .* got 'nan'",
    ),
    "feature rows": (
        {"t.inter": INTER + "0\t5\t0\n", "image_feat.npy": np.ones((3, 2))},
        "image_feat.npy: must have one row per item, got 3 rows for 6 items",
    ),
    "features disagree": (
        {"t.inter": INTER, "a_feat.npy": np.ones((4, 2)), "b_feat.npy": np.ones((2, 2))},
        "b_feat.npy: must have one row per item, got 2 rows for 4 items",
    ),
    "feature nan": (
        {"t.inter": INTER, "image_feat.npy": np.array([[1, 1], [2, np.nan], [np.inf, 0]])},
        "image_feat.npy: row 1, column 1: must be finite, got nan",
    ),
    "feature rank": (
        {"t.inter": INTER, "image_feat.npy": np.ones(1)},
        "must be a 2-d array of numbers, got 1-d float64",
    ),
    "feature junk": ({"t.inter": INTER, "image_feat.npy": "junk"}, "image_feat.npy: not a plain .npy array"),
    "mapping too short": (
        {"t.inter": INTER + "0\t1\t0\n", "i_id_mapping.csv": "asin\titemID\nx\t0\n"},
        "item number 1 is not in i_id_mapping.csv, which numbers 1 from 0",
    ),
    "mapping gap": (
        {"t.inter": INTER, "i_id_mapping.csv": "asin\titemID\nx\t0\ny\t2\n"},
        "i_id_mapping.csv: the numbers must be consecutive",
    ),
    "mapping cell": (
        {"t.inter": INTER, "i_id_mapping.csv": "asin\titemID\nx\t0\ny\tz\n"},
        r"i_id_mapping.csv:3: must hold an id, a tab and its number, got \['y', 'z'\]",
    ),
    "recbole type": (
        {"r.inter": "user_id:token\titem_id:str\na\tb\n"},
        "r.inter:1: header fields must read name:type with type .* got 'item_id:str'",
    ),
    "recbole field": (
        {"r.inter": "user_id:token\tx:token\na\tb\n"},
        "the header must name item_id, got user_id:token, x",
    ),
    "recbole no id": (
        {"r.inter": RECBOLE + "\tx\t1\nNULL\ty\t2\n"},
        r"r.inter: no row is left that is an event \(r.inter: 2 events without user id in column 'user_id:token'",
    ),
    "recbole time": (
        {"r.inter": RECBOLE + "a\tx\tt\n"},
        r"r.inter:2: column 3 \(timestamp:float\) must be a time .* got 't'",
    ),
    "recbole item": (
        {"r.inter": RECBOLE + "a\tx\t1\na\ty\t2\n", "r.item": "item_id:token\nx\n"},
        r"r.inter: 1 items of the events are not in r.item: y \(missing_items=",
    ),
    "recbole repeat": (
        {"r.inter": RECBOLE + "a\tx\t1\n", "r.item": "item_id:token\nx\nx\n"},
        "r.item: column item_id must hold distinct ids, got 'x' twice",
    ),
    "recbole part": ({"r.train.inter": RECBOLE + "a\tx\t1\n"}, "r.valid.inter: no such file, but r.train.inter stands"),
    "recbole features": (
        {"r.inter": RECBOLE + "a\tx\t1\n", "v_feat.npy": np.ones((1, 1))},
        "v_feat.npy: row = line of r.item, which is not there",
    ),
    "lattice type": (
        {"train.json": "[1]", "test.json": "{}"},
        r"train.json: must be an object of user: \[items\], got list",
    ),
    "lattice user": (
        {"train.json": '{"a": [1]}', "test.json": "{}"},
        "train.json: user 'a': must be a non-negative integer",
    ),
    "lattice list": (
        {"train.json": '{"0": 1}', "test.json": "{}"},
        "train.json: user '0': must be a list of items, got int",
    ),
    "lattice item": ({"train.json": '{"0": ["1"]}', "test.json": "{}"}, "user '0': items must be integers, got '1'"),
    "lattice negative": ({"train.json": '{"0": [-4]}', "test.json": "{}"}, "user '0': items must be >= 0, got -4"),
    "lattice nothing": ({"train.json": '{"0": []}', "test.json": "{}"}, "there are no events in train, val, test.json"),
    "lattice syntax": ({"train.json": '{"0":\n [1,]}', "test.json": "{}"}, "train.json:2:.*not valid JSON"),
    "lattice empty": ({"train.json": "", "test.json": "{}"}, "train.json: the file is empty"),
    "json item": (
        {"N.inter.json": '{"0": [0, 1, 2]}', "N.item.json": '{"0": {}}'},
        "N.inter.json: 2 items of the events are not in N.item.json: 1, 2 ",
    ),
    "json entry": (
        {"N.inter.json": '{"0": [0]}', "N.item.json": '{"0": 3}'},
        "N.item.json: item '0': must be an object, got int",
    ),
    "json item id": (
        {"N.inter.json": '{"0": [0]}', "N.item.json": '{"x": {}}'},
        "item 'x': must be a non-negative integer",
    ),
    "json items type": ({"N.inter.json": '{"0": [0]}', "N.item.json": "[]"}, "N.item.json: must be an object of item"),
    "json nothing": ({"N.inter.json": "{}"}, "N.inter.json: there are no events"),
    "sasrec word": ({"S.txt": "1 2 3\n2 x1 4\n"}, r"S.txt:2:3: must be non-negative integers .* got 'x1'"),
    "sasrec negative": ({"S.txt": "1 -2\n"}, r"S.txt:1:3: must be non-negative integers .* got '-2'"),
    "sasrec empty": ({"S.txt": "\n \n"}, "S.txt: the file is empty"),
    "sasrec users only": ({"S.txt": "7\n8\n"}, "S.txt:1: expected a user and at least one item, got 7"),
    "sasrec mapping": (
        {"S.txt": "1 2\n", "i_id_mapping.csv": "asin\titemID\nx\t1\n"},
        "item ids run from 2 to 2, the id mapping has 1 from 1",
    ),
    "amazon line": (
        {"reviews_T.json": REVIEW + "{'a': open('x')}\n"},
        "reviews_T.json:2: expected a JSON object or a Python lit",
    ),
    "amazon list": ({"reviews_T.json": REVIEW + "[1]\n"}, "reviews_T.json:2: expected an object, got list"),
    "amazon field": (
        {"reviews_T.json": '{"reviewerID": "A"}\n'},
        "reviews_T.json:1: expected a field parent_asin or asin, got rev",
    ),
    "amazon time": ({"reviews_T.json": REVIEW.replace("1}", '"x"}')}, "reviews_T.json:1: .* must be a number, got 'x'"),
    "amazon empty": ({"reviews_T.json": ""}, "reviews_T.json: the file is empty"),
    "amazon gz": ({"reviews_T.json.gz": "no gzip"}, "reviews_T.json.gz: not a readable file"),
    "shop columns": (
        {"events.csv": "who,item\na,b\n"},
        r"events.csv: no column for the user \(one of user, .*\); found who, item",
    ),
    "shop empty": ({"events.csv": ""}, "events.csv: the file is empty"),
    "shop no rows": ({"events.csv": "user,item\n"}, "events.csv: the table has a header but no rows"),
    "shop no id": (
        {"events.csv": "user,item\na,\nb,nan\n"},
        r"events.csv: no row is left that is an event .*2 events without item id in column 'item' .* \('nan'\)",
    ),
    "shop time": (
        {"events.csv": EVENTS + "b,x,soon\n"},
        r"events.csv:3: column 3 \(time\) must be a time .* got 'soon'",
    ),
    "shop split": (
        {"events.csv": "user,item,split\na,x,train\na,y,dev\n"},
        r"events.csv:3: column 3 \(split\) must be train, valid or test, got 'dev'",
    ),
    "shop items": (
        {"events.csv": EVENTS + "a,y,2\na,z,2\n", "items.csv": "item\nx\n"},
        r"events.csv: 2 items of the events are not in items.csv: y, z ",
    ),
    "shop item columns": ({"events.csv": EVENTS, "items.csv": "title\nx\n"}, "items.csv: no column for the item"),
    "shop parquet": ({"events.parquet": "junk"}, "events.parquet: not a readable parquet file"),
    "shop parquet null": (
        {"events.parquet": pl.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "time": ["1", "x"]})},
        "events.parquet: row 2: column 'time' must be a time",
    ),
    "shop features": (
        {"events.csv": EVENTS, "items.csv": "item\nx\nz\n", "v_feat.npy": np.ones((3, 1))},
        "v_feat.npy: must have one row per item, got 3 rows for 2 items",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_data_is_named(tmp_path, case):
    files, message = CASES[case]
    write(tmp_path, files)
    with pytest.raises(DataError, match=message):
        load_dataset(tmp_path)


def test_missing_folder(tmp_path):
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        load_dataset(tmp_path / "nowhere")


def test_form_asked_for_is_not_there(tmp_path):
    write(tmp_path, {"events.csv": EVENTS})
    with pytest.raises(DataError, match=r"form 'mmrec' not found; found events\.csv"):
        load_dataset(tmp_path, form="mmrec")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "loo"}, "split must be one of given, leave-two-out, ratio, time, item-cold, user-cold, got 'loo'"),
        ({"split": "given"}, "split=\"given\" needs a label per event, and form 'shop' of .* has none"),
        ({"features": "bert"}, "features must be one of auto, simple, none, got 'bert'"),
        ({"form": "csv"}, "form must be one of hellm, .* got 'csv'"),
        (
            {"speed": 3},
            "form 'shop' takes missing_items, event_types, columns, separator, encoding, min_rating, items, got speed",
        ),
        ({"missing_items": "skip"}, "missing_items must be one of error, keep, drop, got 'skip'"),
        ({"event_types": ["x"]}, "event_types needs a column for the type"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    write(tmp_path, {"events.csv": EVENTS, "items.csv": "item\nx\n"})
    with pytest.raises(ValueError, match=message):
        load_dataset(tmp_path, **arguments)


def damage_json(folder, **change):
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps({**about, **change}))


def replace_events(folder, **columns):
    table = pl.read_parquet(folder / "events.parquet").with_columns(**columns)
    table.write_parquet(folder / "events.parquet")


def replace_array(folder, name, change):
    np.save(folder / name, change(np.load(folder / name)))


_DAMAGE = [
    (lambda folder: damage_json(folder, version=9), "dataset.json: version must be 1 or 2, got 9"),
    (lambda folder: damage_json(folder, form="x"), "dataset.json: must be an object with form 'hellm'"),
    (lambda folder: (folder / "items.parquet").unlink(), "items.parquet: no such file, but dataset.json stands beside"),
    (
        lambda folder: np.save(folder / "features" / "image.mask.npy", np.ones(2, bool)),
        r"image.mask.npy: must be \[6\] bool",
    ),
    (
        lambda folder: replace_array(folder, "features/image.npy", lambda image: image[:, 0]),
        r"image.npy: must be \[6, dim\] float32, got \[6\] float32",
    ),
    (
        lambda folder: replace_array(folder, "features/image.npy", lambda image: image + np.inf),
        "image.npy: row 0, column 0: must be finite, got inf",
    ),
]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *_DAMAGE,
        (
            lambda folder: replace_array(folder, "events/items.npy", lambda items: items + 77),
            r"events: column 'item' must lie in 0..5, got 77..81",
        ),
        (
            lambda folder: replace_array(folder, "events/split.npy", lambda split: split + np.int8(5)),
            "column 'split' must be 0, 1 or 2",
        ),
        (
            lambda folder: replace_array(folder, "events/items.npy", lambda items: items[1:]),
            r"items.npy: must be \[\d+\] int64, got \[\d+\] int64",
        ),
        (
            lambda folder: replace_array(folder, "events/users.npy", lambda users: users.astype(np.float32)),
            r"users.npy: must be \[num_events\] int64, got \[\d+\] float32",
        ),
        (
            lambda folder: replace_array(folder, "events/timestamps.npy", lambda times: times * np.nan),
            "timestamps.npy: must be finite",
        ),
        (
            lambda folder: replace_array(folder, "users/starts.npy", lambda starts: starts[::-1].copy()),
            r"starts.npy: starts must rise from 0 to the \d+ bytes of the texts",
        ),
        (
            lambda folder: replace_array(folder, "users/text.npy", lambda text: text | 0x80),
            "text.npy: must be UTF-8",
        ),
        (
            lambda folder: replace_array(folder, "users/text.npy", lambda text: text * 0 + 65),
            "users: ids must be distinct, got 'A+' twice",
        ),
    ],
)
def test_damaged_built_form(tmp_path, damage, message):
    folder = save_dataset(make_dataset(), tmp_path / "x")
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        *_DAMAGE,
        (lambda folder: replace_events(folder, item=pl.lit(77)), "column 'item' must lie in 0..5, got 77..77"),
        (lambda folder: replace_events(folder, split=pl.lit(5)), "column 'split' must be 0, 1 or 2"),
    ],
)
def test_damaged_built_form_of_version_1(tmp_path, damage, message):
    folder = save_version_1(make_dataset(), tmp_path / "x")
    damage(folder)
    with pytest.raises(DataError, match=message):
        load_dataset(folder)


def test_save_refuses_what_is_there_and_what_it_cannot_write(tmp_path):
    folder = save_dataset(make_dataset(), tmp_path / "x")
    with pytest.raises(FileExistsError, match="x is not empty; overwrite=True replaces it, or give another"):
        save_dataset(make_dataset(), folder)
    with pytest.raises(ValueError, match="form 'amazon' cannot be written; those that can: hellm, recbole"):
        save_dataset(make_dataset(), tmp_path / "y", form="amazon")
    save_dataset(make_dataset(features=False), folder, overwrite=True)
    assert load_dataset(folder).item_features == {}
    assert [one.name for one in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "overwrite"])
def test_a_write_that_fails_leaves_the_old_state(tmp_path, monkeypatch, there):
    path = tmp_path / "x"
    if there:
        save_dataset(make_dataset(), path)

    def full(path, _):
        path.touch()
        raise OSError("no space left on device")

    monkeypatch.setattr("hellm.data.forms.built.np.save", full)
    with pytest.raises(OSError, match=r"x.events.users.npy cannot be written: the disk is full"):
        save_dataset(make_dataset(), path, overwrite=there)
    monkeypatch.undo()
    assert [one.name for one in tmp_path.iterdir()] == (["x"] if there else [])
    if there:
        assert load_dataset(path).fingerprint == make_dataset().fingerprint
