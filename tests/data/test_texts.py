"""Texts as one block of bytes, and ids that are kept as such."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hellm.data import DataError, IdMap
from hellm.data.texts import Texts

# Of any length in UTF-8, empty ones and halves of surrogate pairs included.
TEXTS = st.lists(st.text(st.characters(), max_size=6), max_size=12)
DISTINCT = st.lists(st.text(st.characters(), max_size=4), max_size=12, unique=True)


class TestTexts:
    @settings(deadline=None, max_examples=50)
    @given(TEXTS)
    def test_it_is_the_sequence_that_it_was_made_of(self, texts):
        found = Texts.of(texts)
        assert list(found) == texts and found == texts and len(found) == len(texts)
        assert [found[at] for at in range(-len(texts), len(texts))] == texts + texts
        assert found == Texts.of(iter(texts)) and found != [*texts, "x"]
        assert [one in found for one in texts] == [True] * len(texts)

    @settings(deadline=None, max_examples=50)
    @given(TEXTS, st.slices(12))
    def test_slices(self, texts, part):
        assert Texts.of(texts)[part] == texts[part]

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.text(max_size=6), max_size=12))
    def test_column_of_polars_and_back(self, texts):
        column = pl.Series(texts, dtype=pl.String)
        assert Texts.of(column) == texts and Texts.of(texts).series().equals(column)

    def test_chunks(self, monkeypatch):
        monkeypatch.setattr("hellm.data.texts._CHUNK", 3)
        texts = [f"é{one}" for one in range(8)]
        assert list(Texts.of(texts).chunks()) == [texts[:3], texts[3:6], texts[6:]]
        assert Texts.of(pl.Series(texts)) == texts and Texts.of(texts).series().to_list() == texts

    @pytest.mark.parametrize("starts", [[0, 2], [1, 3], [0, 2, 1, 3], []])
    def test_starts_that_do_not_fit(self, starts):
        with pytest.raises(ValueError, match="starts must rise from 0 to the 3 bytes"):
            Texts(np.zeros(3, np.uint8), np.array(starts, np.int64))

    def test_other_types(self):
        with pytest.raises(ValueError, match="texts must be of uint8 and int64, got int8 and int64"):
            Texts(np.zeros(0, np.int8), np.zeros(1, np.int64))

    def test_no_such_place(self):
        with pytest.raises(IndexError, match=r"index must be in \[-1, 1\), got 1"):
            Texts.of(["x"])[1]


class TestIdsThatAreTexts:
    """A map of `Texts` answers like one of a list, whether they rise and are looked up by halving or not."""

    @settings(deadline=None, max_examples=50)
    @given(DISTINCT, st.sampled_from([None, "text", "length"]), TEXTS)
    def test_it_answers_as_a_map_of_a_list(self, ids, order, asked):
        if order is not None:
            ids.sort(key=(lambda one: one) if order == "text" else (lambda one: (len(one), one)))
        ours, plain = IdMap(Texts.of(ids)), IdMap(ids)
        assert ours == plain and plain == ours and len(ours) == len(ids)
        assert [one in ours for one in asked] == [one in plain for one in asked]
        assert [ours.index(one) for one in ids] == list(range(len(ids))) and 7 not in ours
        assert ours.indices(ids).tolist() == ours.indices(ours.ids).tolist() == list(range(len(ids)))
        for one in asked:
            if one not in plain:
                with pytest.raises(DataError, match="is not one of the"):
                    ours.index(one)

    @settings(deadline=None, max_examples=50)
    @given(DISTINCT, TEXTS)
    def test_what_is_added_follows_and_copies_are_apart(self, ids, more):
        ids.sort()
        ours, plain = IdMap(Texts.of(ids)), IdMap(ids)
        copied = ours.copy()
        assert ours.add(more).tolist() == plain.add(more).tolist()
        assert ours == plain and copied == IdMap(ids)
        assert copied.add(more).tolist() == plain.indices(more).tolist() and copied == plain

    def test_ids_that_rise_are_not_copied(self):
        for ids in (["a", "b", "ba"], ["9", "10", "100"]):
            texts = Texts.of(ids)
            assert IdMap(texts).ids is texts and IdMap(texts).copy().ids is texts
        empty = IdMap()
        assert empty.add(texts).tolist() == [0, 1, 2] and empty.ids is texts

    @pytest.mark.parametrize("ids", [["a", "b", "a"], ["a", "a"], ["", ""]])
    def test_ids_that_occur_twice(self, ids):
        with pytest.raises(DataError, match=f"ids must be distinct, got '{ids[0]}' twice"):
            IdMap(Texts.of(ids))

    def test_neighbours_in_two_chunks(self, monkeypatch):
        monkeypatch.setattr("hellm.data.texts._CHUNK", 2)
        with pytest.raises(DataError, match="'b' twice"):
            IdMap(Texts.of(["a", "b", "b", "c"]))
        assert IdMap(Texts.of(["a", "b", "c", "d", "e"])).index("e") == 4
