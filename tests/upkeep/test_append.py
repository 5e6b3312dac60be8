"""Newer events and items: what was there keeps its rows."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from support.command_line import last_json

from hellm.data import DataError, ItemFeatures, load_dataset, save_dataset, splits
from hellm.data.append import append_events
from hellm.features.dataset import encode_like
from hellm.upkeep.append import append, data_of

OLD = "user,item,timestamp\nanna,mug,10\nanna,cup,20\nanna,lamp,30\nbert,mug,15\nbert,lamp,25\n"
NEW = "user,item,timestamp\nbert,lamp,25\nanna,pen,40\nabel,mug,50\nbert,cup,5\nabel,book,60\n"
ITEMS = "item,title,brand\nmug,Blue mug,acme\ncup,Red cup,acme\nlamp,Desk lamp,lux\n"


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "events.csv").write_text(OLD)
    (folder / "items.csv").write_text(ITEMS)
    return load_dataset(folder)


@pytest.fixture
def new(tmp_path) -> Path:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "week.csv").write_text(NEW)
    return tmp_path / "new" / "week.csv"


def events(dataset) -> list[tuple[str, str, float]]:
    rows = zip(dataset.users, dataset.items, dataset.timestamps, strict=True)
    return [(dataset.user_ids.ids[user], dataset.item_ids.ids[item], float(time)) for user, item, time in rows]


def test_rows_stay_and_new_ones_follow(old, new):
    grown, report = append_events(old, new)
    assert grown.user_ids.ids == ["anna", "bert", "abel"] and grown.item_ids.ids[:3] == old.item_ids.ids
    assert set(grown.item_ids.ids[3:]) == {"pen", "book"}
    assert events(grown) == [
        ("anna", "mug", 10),
        ("anna", "cup", 20),
        ("anna", "lamp", 30),
        ("anna", "pen", 40),
        ("bert", "cup", 5),
        ("bert", "mug", 15),
        ("bert", "lamp", 25),
        ("abel", "mug", 50),
        ("abel", "book", 60),
    ]
    assert {name: report[name] for name in ("new_events", "new_users", "new_items", "repeated_events")} == {
        "new_events": 4,
        "new_users": 1,
        "new_items": 2,
        "repeated_events": 1,
    }
    assert grown.item_titles == ["Blue mug", "Red cup", "Desk lamp", "", ""]
    np.testing.assert_array_equal(grown.split, splits.leave_two_out(grown.users))
    # Nothing of the old one has changed.
    assert old.num_items == 3 and len(old.item_ids) == 3 and old.num_events == 5


def test_items_of_a_table_have_titles_fields_pictures_and_features(old, new, tmp_path):
    from PIL import Image

    (tmp_path / "new" / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "new" / "images" / "pen.png")
    table = "item,title,brand,image\npen,Red pen,acme,images/pen.png\nmug,Other name,x,\nball,Ball,lux,\n"
    (tmp_path / "new" / "catalogue.csv").write_text(table)
    grown, report = append_events(old, new, tmp_path / "new" / "catalogue.csv")
    row = {item: place for place, item in enumerate(grown.item_ids.ids)}
    assert set(row) == {"mug", "cup", "lamp", "pen", "ball", "book"}
    assert grown.item_titles[row["pen"]] == "Red pen" and grown.item_titles[row["mug"]] == "Blue mug"
    assert grown.item_fields["brand"][row["ball"]] == "lux" and grown.item_fields["brand"][row["mug"]] == "acme"
    assert grown.item_fields["image"][row["pen"]] == str(tmp_path / "new" / "images" / "pen.png")
    text, before = grown.item_features["text"], old.item_features["text"]
    np.testing.assert_array_equal(text.values[:3], before.values)
    assert text.mask.tolist() == [name != "book" for name in grown.item_ids.ids]
    assert text.values[row["pen"]] @ text.values[row["cup"]] > text.values[row["pen"]] @ text.values[row["lamp"]]
    assert report["without_features"] == {"text": 1}


def test_features_of_another_encoder_are_made_by_it_or_missing(old, new, tmp_path):
    (tmp_path / "new" / "items.csv").write_text("item,title\npen,Red pen\n")
    draw = np.random.default_rng(0)
    other = dataclasses.replace(old, item_features={"text": ItemFeatures.from_values(draw.normal(size=(3, 512)))})
    grown, report = append_events(other, new)
    assert report["without_features"] == {"text": 2} and not grown.item_features["text"].values[3:].any()
    asked = []

    def encode(items):
        asked.append((items.item_ids.ids, items.item_titles))
        return {"text": ItemFeatures.from_values(np.ones((2, 512)))}

    grown, report = append_events(other, new, tmp_path / "new" / "items.csv", encode=encode)
    assert sorted(asked[0][0]) == ["book", "pen"] and sorted(asked[0][1]) == ["", "Red pen"]
    assert report["without_features"] == {"text": 0} and (grown.item_features["text"].values[3:] == 1).all()


class Encoder:
    """Rows of a number, and what was asked for."""

    def __init__(self, number: float) -> None:
        self.number, self.asked = number, []

    def features(self, values, **options):
        self.asked.append((list(values), sorted(options)))
        return ItemFeatures.from_values(np.full((len(values), 2), self.number))


def test_new_items_are_encoded_as_the_old_ones_were(old, monkeypatch):
    import hellm.features.image
    import hellm.features.text

    loaded, text, image = [], Encoder(6), Encoder(7)
    monkeypatch.setattr(
        hellm.features.text, "load_text_encoder", lambda *given, **named: loaded.append((given, named)) or text
    )
    monkeypatch.setattr(
        hellm.features.image, "load_image_encoder", lambda *given, **named: loaded.append((given, named)) or image
    )
    about = {"words": {"encoder": "minilm", "text_fields": ["title"], "max_length": 9}, "image": {"encoder": "some/id"}}
    known = dataclasses.replace(old, encoders=about)
    found = encode_like(known, dataclasses.replace(old, item_fields=old.item_fields | {"image": ["a.png", "", ""]}))
    assert {name: one.values.tolist() for name, one in found.items()} == {"words": [[6, 6]] * 3, "image": [[7, 7]] * 3}
    assert loaded == [(("minilm",), {"device": "auto", "max_length": 9}), (("some/id",), {"device": "auto"})]
    assert text.asked == [(old.item_titles, ["cache"])]
    assert image.asked == [(["a.png", "", ""], ["cache", "on_unreadable"])]
    # Built in, not noted, or nothing to encode.
    for about in ({"text": {"encoder": "hashed"}}, {"text": {}}, {"image": {"encoder": "efficientnet"}}, {}):
        assert encode_like(dataclasses.replace(old, encoders=about), old) == {}


def test_training_events_stay_training_events(tmp_path):
    """Of users with enough events: those with fewer have no held-out ones to begin with."""
    draw = np.random.default_rng(0)
    rows = [(f"u{user}", f"i{draw.integers(0, 30)}", time) for user in range(20) for time in range(0, 60, 10)]
    later = [(f"u{draw.integers(0, 20)}", f"i{draw.integers(0, 30)}", int(draw.integers(0, 90))) for _ in range(50)]
    for name, part in (("events", rows), ("later", later)):
        frame = pl.DataFrame(part, schema=["user", "item", "timestamp"], orient="row")
        frame.write_csv(tmp_path / f"{name}.csv")
    old = load_dataset(tmp_path / "events.csv")
    grown, _ = append_events(old, tmp_path / "later.csv")
    trained = {one for one, label in zip(events(grown), grown.split, strict=True) if label == 0}
    assert {one for one, label in zip(events(old), old.split, strict=True) if label == 0} <= trained


def test_data_without_times_keep_the_order_of_arrival(tmp_path):
    (tmp_path / "old.csv").write_text("user,item\nb,1\na,1\na,2\n")
    (tmp_path / "new.csv").write_text("user,item\na,1\nc,3\n")
    grown, report = append_events(load_dataset(tmp_path / "old.csv"), tmp_path / "new.csv")
    rows = [(grown.user_ids.ids[u], grown.item_ids.ids[i]) for u, i in zip(grown.users, grown.items, strict=True)]
    assert rows == [("a", "1"), ("a", "2"), ("a", "1"), ("b", "1"), ("c", "3")] and report["repeated_events"] == 0


def test_other_forms_are_read(old, tmp_path):
    (tmp_path / "week.inter").write_text("user_id:token\titem_id:token\ttimestamp:float\nanna\tpen\t40\n")
    grown, report = append_events(old, tmp_path / "week.inter")
    assert events(grown)[3] == ("anna", "pen", 40) and report["new_items"] == 1


def test_what_does_not_fit_is_refused(old, new, tmp_path):
    (tmp_path / "timeless.csv").write_text("user,item\nanna,pen\n")
    with pytest.raises(DataError, match=r"timeless\.csv: must have times, as the events of data set 'old' have"):
        append_events(old, tmp_path / "timeless.csv")
    for name in ("given", "item-cold", "user-cold"):
        with pytest.raises(ValueError, match=f"split must be one of leave-two-out, ratio, time .* got '{name}'"):
            append_events(dataclasses.replace(old, split_name=name), new)
    with pytest.raises(DataError, match=r"none\.csv: no such file; items must be the table of items"):
        append_events(old, new, tmp_path / "none.csv")
    (tmp_path / "items.csv").write_text("name\nx\n")
    with pytest.raises(DataError, match=rf"^{tmp_path / 'items.csv'}: no column for the item"):
        append_events(old, new, tmp_path / "items.csv")


def test_split_can_be_chosen(old, new):
    grown, _ = append_events(old, new, split="time")
    assert grown.split_name == "time" and grown.split[grown.timestamps == 60] == 2


class TestFolders:
    def test_new_folder_is_read_back_and_the_old_one_stays(self, old, new, tmp_path, call):
        save_dataset(old, tmp_path / "run" / "data")
        before = (tmp_path / "run" / "data" / "events" / "items.npy").read_bytes()
        assert data_of(tmp_path / "run") == tmp_path / "run" / "data" and data_of(new) == new
        argv = ["append", tmp_path / "run", "--events", new, "--out", tmp_path / "grown"]
        code, out, err = call(*argv, "--json")
        assert (code, err) == (0, "")
        report = last_json(out)
        assert report["new_events"] == 4 and report["num_items"] == 5
        grown = load_dataset(tmp_path / "grown")
        assert grown.fingerprint == append_events(old, new)[0].fingerprint and grown.split_name == "leave-two-out"
        assert (tmp_path / "run" / "data" / "events" / "items.npy").read_bytes() == before
        code, _, err = call(*argv)
        assert code == 2 and "is not empty" in err
        code, out, _ = call(*argv, "--overwrite")
        assert code == 0 and "new: 4 events, 1 users, 2 items; 1 events were there already" in out
        assert "2 new items have no text features" in out

    def test_twice_in_parts_is_once_as_a_whole(self, old, new, tmp_path):
        lines = NEW.splitlines()
        for name, part in (("first", lines[1:3]), ("second", lines[2:])):
            (tmp_path / f"{name}.csv").write_text("\n".join([lines[0], *part]) + "\n")
        save_dataset(old, tmp_path / "data")
        append(tmp_path / "data", tmp_path / "first.csv", tmp_path / "one")
        append(tmp_path / "one", tmp_path / "second.csv", tmp_path / "two")
        whole, _ = append_events(old, new)
        assert events(load_dataset(tmp_path / "two")) == events(whole)

    def test_reading_options_are_about_the_new_events(self, old, tmp_path, call):
        save_dataset(old, tmp_path / "data")
        (tmp_path / "week.csv").write_text("client;thing;timestamp\nanna;pen;40\n")
        code, out, _ = call(
            *("append", tmp_path / "data", "--events", tmp_path / "week.csv", "--out", tmp_path / "grown"),
            *("--columns", "user=client", "item=thing", "--separator", ";", "--json"),
        )
        assert code == 0 and json.loads(out)["new_events"] == 1
