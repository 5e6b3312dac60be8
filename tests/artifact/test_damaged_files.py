"""Files that are damaged: the error is a ValueError that names the file, whoever reads it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from hellm.artifact import read_histories, read_ids
from hellm.artifact.test_users import read_test_users
from hellm.evaluate.ab import read_exposures
from hellm.recommend.batch import read_metadata
from hellm.training.checkpoint import load_checkpoint, save_checkpoint


def users(folder):
    save_file({"users": np.arange(3), "recall@20": np.ones(3)}, folder / "test_users.safetensors")
    return folder / "test_users.safetensors", lambda: read_test_users(folder)


def checkpoint(folder):
    save_checkpoint(folder / "last.safetensors", {"a": torch.ones(2)}, {"epoch": 1})
    return folder / "last.safetensors", lambda: load_checkpoint(folder / "last.safetensors")


@pytest.mark.parametrize("make", [users, checkpoint])
@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_file_that_was_cut_short(tmp_path, make, kept):
    file, read = make(tmp_path)
    read()
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{file.name}: damaged, or not the file that must be there"):
        read()


def test_users_without_their_column(tmp_path):
    save_file({"recall@20": np.ones(3)}, tmp_path / "test_users.safetensors")
    with pytest.raises(ValueError, match=r"test_users\.safetensors: damaged"):
        read_test_users(tmp_path)


def test_a_state_that_is_no_json(tmp_path):
    save_file({"a": np.ones(2)}, tmp_path / "last.safetensors", metadata={"state": "{"})
    with pytest.raises(ValueError, match=r"last\.safetensors: damaged"):
        load_checkpoint(tmp_path / "last.safetensors")


def test_a_table_whose_notes_are_no_json(tmp_path):
    import polars as pl

    pl.DataFrame({"user": ["a"]}).write_parquet(tmp_path / "lists.parquet", metadata={"hellm.batch": "{"})
    with pytest.raises(ValueError, match=r"lists\.parquet: damaged"):
        read_metadata(tmp_path / "lists.parquet")


def test_exposures_of_other_types(tmp_path):
    import polars as pl

    names = ["experiment", "arm", "user", "item", "time", "propensity"]
    pl.DataFrame({name: ["x"] for name in names}).write_parquet(tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"x\.parquet"):
        read_exposures(tmp_path / "x.parquet")


@pytest.mark.parametrize("metadata", [{"modalities": "text"}, {"modalities": "text", "num_placing": "x"}])
def test_content_without_what_it_must_hold(tmp_path, metadata):
    from hellm.models.graph.content import ItemContent

    values = {"features.text": np.ones((2, 2), np.float32), "neighbours.text": np.zeros((2, 1), np.int32)}
    save_file(values, tmp_path / "content.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=r"content\.safetensors: damaged"):
        ItemContent.load(tmp_path / "content.safetensors")


@pytest.mark.parametrize("stored", [{"modalities": "{"}, {"sasrec": "{"}, {"sasrec": json.dumps({"other": 1})}])
def test_settings_of_a_model_that_are_none(tmp_path, stored):
    from hellm.artifact import read_embeddings, write_embeddings
    from hellm.models import SASRec

    SASRec(3, embedding_dim=4, num_layers=1, num_heads=1, feedforward_dim=4).save(tmp_path)
    kind, tensors, metadata = read_embeddings(tmp_path)
    write_embeddings(tmp_path, kind, tensors, metadata | stored)
    with pytest.raises(ValueError, match=r"embeddings\.safetensors: damaged"):
        SASRec.load(tmp_path)


IDS = [("user", 0, "a"), ("user", 1, "b"), ("item", 0, "x"), ("item", 1, "y")]


def tables(folder, ids=IDS, **events):
    import polars as pl

    pl.DataFrame([(*one, None) for one in ids], ["side", "index", "id", "title"], orient="row").write_parquet(
        folder / "ids.parquet"
    )
    pl.DataFrame({"user": [0, 1], "item": [1, 0], "split": [0, 0]} | events).write_parquet(folder / "histories.parquet")


@pytest.mark.parametrize(
    "ids",
    [
        [*IDS[:3], ("item", 1, "x")],
        [*IDS[:3], ("item", 1, None)],
        [*IDS[:3], ("item", 0, "y")],
        [*IDS[:3], ("item", 2, "y")],
        [*IDS[:3], ("item", -1, "y")],
    ],
)
def test_ids_that_are_no_numbering(tmp_path, ids):
    tables(tmp_path)
    read_ids(tmp_path)
    tables(tmp_path, ids)
    with pytest.raises(ValueError, match=r"ids\.parquet: damaged.*(distinct|from 0 on)"):
        read_ids(tmp_path)


@pytest.mark.parametrize(
    "events", [{"item": [1, 2]}, {"item": [1, 2**60]}, {"item": [-1, 0]}, {"user": [0, None]}, {"user": ["a", "b"]}]
)
def test_events_of_nobody(tmp_path, events):
    tables(tmp_path)
    ids = read_ids(tmp_path)
    assert len(read_histories(tmp_path, ids)) == 2
    tables(tmp_path, **events)
    with pytest.raises(ValueError, match=r"histories\.parquet: damaged"):
        read_histories(tmp_path, ids)


@pytest.mark.parametrize(
    ("name", "left"),
    [("item", None), ("user", None), ("fold_in_source", None), ("user", (3, 5)), ("fold_in_source", (2, 4))],
)
def test_a_graph_without_what_it_must_hold(tmp_path, name, left):
    from hellm.artifact import write_embeddings
    from hellm.recommend.served import load_served

    tensors = {"user": torch.ones(2, 4), "item": torch.ones(3, 4), "fold_in_source": torch.ones(3, 4)}
    write_embeddings(tmp_path, "graph", tensors, {"fold_in_exponent": "0.5"})
    load_served(tmp_path, [], None)
    tensors |= {name: torch.ones(left or ())}
    if left is None:
        del tensors[name]
    write_embeddings(tmp_path, "graph", tensors, {"fold_in_exponent": "0.5"})
    with pytest.raises(ValueError, match=rf"embeddings\.safetensors: damaged.*{name}"):
        load_served(tmp_path, [], None)


@pytest.mark.parametrize("name", ["items.usearch", "index.json", "items.json"])
@pytest.mark.parametrize("left", [b"", b"{}", b'["a"]', b"\xff"])
def test_an_index_that_is_none(tmp_path, name, left):
    pytest.importorskip("usearch")
    from hellm.export.index import ItemIndex, build_index

    build_index(torch.ones(3, 4)).index.save(str(tmp_path / "items.usearch"))
    (tmp_path / "index.json").write_text('{"expansion_search": 128}')
    (tmp_path / "items.json").write_text('["a", "b", "c"]')
    assert ItemIndex.load(tmp_path)[1] == ["a", "b", "c"]
    (tmp_path / name).write_bytes(left)
    with pytest.raises(ValueError, match=name):
        ItemIndex.load(tmp_path)


@pytest.mark.parametrize("column", ["body", "features"])
@pytest.mark.parametrize("content", [b"", b"{", b"\x08" + bytes(7) + b'{"a": 1}'], ids=["empty", "short", "other"])
def test_an_entry_that_sqlite_takes_for_whole(tmp_path, column, content):
    import sqlite3

    from hellm.serve.store import Entry, Store, read_entries

    file = tmp_path / "store.sqlite"
    store = Store(file)
    store.append([Entry("item", "new", {"title": "New"}, {"text": np.ones(2, np.float32)})])
    store.close()
    with sqlite3.connect(file) as database:
        database.execute(f"UPDATE entries SET {column} = ?", [content])
    with pytest.raises(ValueError, match=r"store\.sqlite: damaged, or not the file that must be there"):
        list(read_entries(file))


@pytest.mark.parametrize("opened", [False, True], ids=["read", "opened"])
def test_a_store_whose_tables_have_damaged_names(tmp_path, opened):
    from hellm.serve.store import Store, read_entries

    file = tmp_path / "store.sqlite"
    Store(file).close()
    # A name that is no text, in a statement that is none: SQLite's message has the name.
    broken = file.read_bytes().replace(b"entries", b"\xbfntries").replace(b"CREATE TABLE", b"CREATE (((((")
    file.write_bytes(broken)
    with pytest.raises(ValueError, match=r"store\.sqlite: not a log of hellm serve, or damaged"):
        Store(file) if opened else list(read_entries(file))
