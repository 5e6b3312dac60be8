"""Recommendations from hand-made embeddings, where every list can be worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch
from support.paper_recommender import TEXTS, make_recommender, named

import hellm.recommend.catalogue
import hellm.recommend.recommender
from hellm.data import DataError, ItemFeatures
from hellm.models.graph.content import ItemContent
from hellm.recommend import RecommendedItem, Recommender


class TestRecommend:
    def test_known_user_gets_best_unseen_items_of_all_splits(self, recommender):
        (only,) = recommender.recommend("anna", k=5)
        assert only.user == "anna" and only.basis == "user"
        assert named(only) == [("p3", 0.1), ("p2", 0.0)]

    def test_seen_items_come_first_when_not_excluded(self, recommender):
        (only,) = recommender.recommend(["anna"], k=2, exclude_seen=False)
        assert only.items == [RecommendedItem("p0", "Mug", 1.0), RecommendedItem("p1", "Cup", pytest.approx(0.9))]

    def test_empty_title_counts_as_none(self, recommender):
        assert recommender.recommend("anna", k=1)[0].items[0].title is None

    def test_user_without_training_events_gets_popular_items_and_is_told(self, recommender):
        (only,) = recommender.recommend("cleo", k=3)
        assert only.basis == "popularity"
        assert named(only) == [("p1", 2.0), ("p0", 1.0), ("p2", 1.0)]

    def test_several_users_keep_their_order(self, recommender):
        lists = recommender.recommend(["cleo", "anna", "bert"], k=1)
        assert [(one.user, one.basis) for one in lists] == [("cleo", "popularity"), ("anna", "user"), ("bert", "user")]
        assert [one.items[0].item for one in lists] == ["p1", "p3", "p4"]

    def test_batches_do_not_change_the_lists(self, recommender, monkeypatch):
        together = recommender.recommend(["cleo", "anna", "bert"], k=2)
        monkeypatch.setattr(hellm.recommend.recommender, "_BATCH", 2)
        assert recommender.recommend(["cleo", "anna", "bert"], k=2) == together

    def test_bare_history_is_the_mean_of_its_distinct_items(self, recommender):
        (only,) = recommender.recommend(histories=["p2", "p2", "p3"], k=2)
        # mean of (0, 1) and (0.1, 0.9) is (0.05, 0.95)
        assert only.user is None and only.basis == "history"
        assert named(only) == [("p4", 0.5), ("p1", 0.05 * 0.9 + 0.95 * 0.1)]

    def test_bare_history_adds_the_normalised_view(self):
        view = torch.zeros(5, 2)
        view[0] = torch.tensor([0.0, 5.0])
        (only,) = make_recommender(view).recommend(histories=["p0"], k=1, exclude_seen=False)
        # source (1, 0) plus view (0, 1)
        assert named(only) == [("p0", 1.0)]

    def test_empty_history_gets_popular_items_and_is_told(self, recommender):
        (only,) = recommender.recommend(histories=[[]], k=2)
        assert only.basis == "popularity"
        assert named(only) == [("p1", 2.0), ("p0", 1.0)]

    def test_several_histories(self, recommender):
        lists = recommender.recommend(histories=[["p0"], [], ["p2"]], k=1)
        assert [one.basis for one in lists] == ["history", "popularity", "history"]
        assert [one.items[0].item for one in lists] == ["p1", "p1", "p3"]

    def test_candidates_restrict_and_shorten_the_list(self, recommender):
        (only,) = recommender.recommend("anna", k=3, candidates=["p0", "p3"])
        assert [one.item for one in only] == ["p3"]

    def test_filter_is_asked_once_for_each_candidate(self, recommender):
        asked = []
        (only,) = recommender.recommend(
            "anna", k=3, candidates=["p3", "p2", "p2"], filter=lambda item: asked.append(item) or item == "p2"
        )
        assert [one.item for one in only] == ["p2"] and asked == ["p2", "p3"]

    def test_filter_may_leave_nothing(self, recommender):
        assert len(recommender.recommend("anna", k=3, filter=lambda item: False)[0]) == 0

    def test_to_dict_is_plain(self, recommender):
        assert recommender.recommend("anna", k=1)[0].to_dict() == {
            "user": "anna",
            "basis": "user",
            "items": [{"item": "p3", "title": None, "score": pytest.approx(0.1)}],
        }

    @pytest.mark.parametrize("k", [0, 6])
    def test_k_out_of_range(self, recommender, k):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 5\] \(the number of items\), got {k}"):
            recommender.recommend("anna", k=k)

    def test_unknown_user_names_the_nearest(self, recommender):
        with pytest.raises(DataError, match="unknown user 'ana' among the 3 users of the run; nearest: anna"):
            recommender.recommend("ana", k=1)

    def test_unknown_item_names_the_nearest(self, recommender):
        with pytest.raises(DataError, match=r"unknown item 'p9' among the 5 items of the run; nearest: p\d"):
            recommender.recommend(histories=["p1", "p9"], k=1)

    def test_nearest_of_very_many_ids_share_the_beginning(self, monkeypatch):
        monkeypatch.setattr(hellm.recommend.catalogue, "_MAX_COMPARED", 2)
        assert hellm.recommend.catalogue.nearest_names("anna1", ["anna", "xnna1", "bert"]) == ["anna"]

    def test_users_and_histories_exclude_each_other(self, recommender):
        with pytest.raises(ValueError, match="give either users or histories, got both"):
            recommender.recommend("anna", ["p0"])
        with pytest.raises(ValueError, match="give either users or histories, got neither"):
            recommender.recommend()

    def test_history_must_be_a_list(self, recommender):
        with pytest.raises(
            ValueError, match="histories must be a list of item ids or of such lists, got the text 'p0'"
        ):
            recommender.recommend(histories="p0", k=1)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"users": "anna", "candidates": "p2"}, "candidates must be a list of texts, got the text 'p2'"),
            ({"users": "anna", "candidates": b"p2"}, r"candidates must be a list of texts, got b'p2'"),
            ({"users": "anna", "candidates": [["p2"]]}, r"candidates must be a list of texts, got \['p2'\] in it"),
            ({"users": 3}, "users must be a list of texts, got 3"),
            ({"users": [["anna"]]}, r"users must be a list of texts, got \['anna'\] in it"),
            ({"histories": b"p0"}, r"histories must be a list of item ids or of such lists, got b'p0'"),
            ({"histories": [["p0"], "p1"]}, "of item ids or of such lists, got both, as 'p1'"),
            ({"histories": ["p0", ["p1"]]}, r"of item ids or of such lists, got both, as \['p1'\]"),
            ({"histories": [[["p0"]]]}, r"a history must be a list of texts, got \['p0'\] in it"),
            ({"users": "anna", "k": 2.5}, r"k must be in \[1, 5\] \(the number of items\), got 2.5"),
        ],
    )
    def test_what_is_no_list_is_not_taken_apart(self, recommender, given, message):
        with pytest.raises(ValueError, match=message):
            recommender.recommend(**{"k": 1} | given)

    def test_other_lists_that_are_no_list(self, recommender):
        with pytest.raises(ValueError, match="history must be a list of texts, got the text 'p0'"):
            recommender.explain("p1", history="p0")
        with pytest.raises(ValueError, match="titles must be a list of texts, got the text 'ab'"):
            make_recommender(content=ItemContent.of({"text": ItemFeatures.from_values(TEXTS)}, k=2)).add_items(
                {"text": TEXTS[:2]}, ["a", "b"], "ab"
            )

    def test_every_kind_of_list_is_one(self, recommender):
        expected = recommender.recommend(["anna", "bert"], k=2, candidates=["p2", "p3"])
        for kind in (tuple, np.array, iter, pl.Series):
            assert recommender.recommend(kind(["anna", "bert"]), k=2, candidates=kind(["p2", "p3"])) == expected
            of_one = recommender.recommend(histories=kind(["p0", "p1"]), k=2)
            assert recommender.recommend(histories=[kind(["p0", "p1"])], k=2) == of_one and len(of_one) == 1

    def test_an_empty_batch_has_an_empty_answer(self, recommender):
        assert recommender.recommend([], k=1) == recommender.recommend(histories=[], k=1) == []
        assert recommender.recommend(np.array([], dtype=str), k=1, candidates=["p1"]) == []

    @pytest.mark.parametrize("number", [math.nan, math.inf])
    def test_a_score_that_is_not_finite_is_no_answer(self, recommender, number):
        recommender.model.user = torch.tensor([[number, 0.0], [0.0, 1.0], [7.0, 7.0]])
        for question in (recommender.recommend, recommender.history):
            with pytest.raises(ValueError, match=r"score of item 'p[0-4]' must be finite, got (nan|inf)"):
                question("anna", **({"k": 2} if question == recommender.recommend else {}))
        assert math.isfinite(recommender.recommend("bert", k=2)[0].items[0].score)

    def test_no_candidates(self, recommender):
        with pytest.raises(ValueError, match="candidates must hold at least one item, got none"):
            recommender.recommend("anna", k=1, candidates=[])


class TestNeighbours:
    def test_similar_items_by_cosine_without_itself(self, recommender):
        found = recommender.similar_items("p0", 2)
        assert named(found) == [("p1", 0.9 / math.sqrt(0.82)), ("p4", math.sqrt(0.5))]

    def test_similar_items_k_out_of_range(self, recommender):
        with pytest.raises(ValueError, match=r"k must be in \[1, 4\] \(the other items\), got 5"):
            recommender.similar_items("p0", 5)

    def test_explain_counts_shared_users_of_the_training_history(self, recommender):
        (reason,) = recommender.explain("p1", user="bert")
        # bert's training items are p2 and p1 itself; bert is the only one with both.
        assert (reason.item, reason.title, reason.shared_users, reason.content_similarity) == ("p2", "Lamp", 1, None)
        assert reason.similarity == pytest.approx(0.1 / math.sqrt(0.82))

    def test_explain_orders_by_shared_users_then_similarity(self, recommender):
        reasons = recommender.explain("p1", history=["p4", "p3", "p0", "p2"], k=4)
        assert [(one.item, one.shared_users) for one in reasons] == [("p0", 1), ("p4", 1), ("p3", 1), ("p2", 1)]
        assert [one.item for one in recommender.explain("p4", history=["p2", "p0"])] == ["p0", "p2"]

    def test_explain_gives_content_similarity_where_there_is_any(self):
        view = torch.eye(5)[:, :2] + 1
        (reason,) = make_recommender(view).explain("p0", history=["p1"])
        assert reason.content_similarity == pytest.approx(4 / 5)

    def test_explain_of_nothing_is_nothing(self, recommender):
        assert recommender.explain("p0", history=[]) == []
        assert recommender.explain("p0", user="cleo") == []

    def test_explain_errors(self, recommender):
        with pytest.raises(ValueError, match="give either user or history, got neither"):
            recommender.explain("p0")
        with pytest.raises(ValueError, match="give either user or history, got both"):
            recommender.explain("p0", user="anna", history=["p1"])
        with pytest.raises(ValueError, match="k must be >= 1, got 0"):
            recommender.explain("p0", user="anna", k=0)

    def test_history_is_in_time_order_with_scores(self, recommender):
        assert named(recommender.history("bert")) == [("p2", 1.0), ("p1", 0.1), ("p3", 0.9)]


class TestScorer:
    def test_stage_one_knows_its_users(self, recommender):
        assert recommender.scorer("test") is recommender

    def test_split_must_be_held_out(self, recommender):
        with pytest.raises(ValueError, match="split must be 'valid' or 'test', got 'train'"):
            recommender.scorer("train")


class TestFiles:
    def test_saved_and_loaded_answers_are_equal(self, recommender, tmp_path):
        path = recommender.save(tmp_path / "saved")
        loaded = Recommender.load(path)
        users = torch.arange(3)
        assert torch.equal(loaded.scores(users), recommender.scores(users))
        assert loaded.recommend(["anna", "cleo"], k=3) == recommender.recommend(["anna", "cleo"], k=3)
        assert loaded.recommend(histories=["p2"], k=3) == recommender.recommend(histories=["p2"], k=3)
        assert sorted(one.name for one in tmp_path.iterdir()) == ["saved"]

    def test_save_refuses_what_is_there(self, recommender, tmp_path):
        path = recommender.save(tmp_path / "saved")
        with pytest.raises(FileExistsError, match="is not empty; overwrite=True replaces it"):
            recommender.save(path)
        assert recommender.save(path, overwrite=True) == path

    def test_save_overwrites_recommenders_only(self, recommender, tmp_path):
        (tmp_path / "letters").mkdir()
        (tmp_path / "letters" / "embeddings.safetensors").touch()
        with pytest.raises(FileExistsError, match=r"holds no \.hellm\.json, so hellm did not make it"):
            recommender.save(tmp_path / "letters", overwrite=True)

    def test_nothing_is_left_when_saving_fails(self, recommender, tmp_path, monkeypatch):
        def fail(*args, **named):
            raise OSError("disk full")

        monkeypatch.setattr(pl.DataFrame, "write_parquet", fail)
        with pytest.raises(OSError, match="disk full"):
            recommender.save(tmp_path / "saved")
        assert list(tmp_path.iterdir()) == []

    def test_load_errors(self, recommender, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"run directory .*nowhere does not exist"):
            Recommender.load(tmp_path / "nowhere")
        with pytest.raises(FileNotFoundError, match=r"holds no embeddings.safetensors: it is no run directory, or"):
            Recommender.load(tmp_path)
        path = recommender.save(tmp_path / "saved")
        (path / "embeddings.safetensors").write_bytes(b"garbage")
        with pytest.raises(DataError, match=r"embeddings.safetensors: damaged, or not the file that must be there"):
            Recommender.load(path)

    def test_load_names_the_damaged_table(self, recommender, tmp_path):
        path = recommender.save(tmp_path / "saved")
        (path / "ids.parquet").write_bytes(b"garbage")
        with pytest.raises(DataError, match=r"ids.parquet: damaged, or not the file that must be there"):
            Recommender.load(path)

    def test_load_checks_that_tables_fit(self, recommender, tmp_path):
        path = recommender.save(tmp_path / "saved")
        ids = pl.read_parquet(path / "ids.parquet")
        extra = pl.DataFrame({"side": ["user"], "index": [3], "id": ["dora"], "title": [None]}, schema=ids.schema)
        pl.concat([ids, extra]).write_parquet(path / "ids.parquet")
        with pytest.raises(DataError, match=r"saved: ids must name the 3 users of the model, got 4"):
            Recommender.load(path)

    def test_training_events_are_compared(self, recommender):
        users, items = np.array([0, 0, 1, 1]), np.array([0, 1, 2, 1])
        assert recommender.has_training_events(users, items)
        assert not recommender.has_training_events(users, items[::-1])
