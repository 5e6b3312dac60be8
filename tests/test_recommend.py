"""Recommendations from hand-made embeddings, where every list can be worked out on paper."""

from __future__ import annotations

import math

import numpy as np
import polars as pl
import pytest
import torch

import hellm.recommend.catalogue
import hellm.recommend.recommender
from hellm.data import DataError, ItemFeatures
from hellm.data.attributes import AttributeSet
from hellm.models.graph.content import ItemContent
from hellm.recommend import ContentLink, RecommendedItem, Recommender, ServedGraph

ITEMS = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.5, 0.5]])
USERS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [7.0, 7.0]])
# (user, item, split): c has no training event.
EVENTS = [(0, 0, 0), (0, 1, 0), (0, 4, 2), (1, 2, 0), (1, 1, 0), (1, 3, 1), (2, 4, 2)]


def make_recommender(view: torch.Tensor | None = None, content: ItemContent | None = None) -> Recommender:
    tensors = {"user": USERS, "item": ITEMS, "fold_in_source": ITEMS.clone()}
    if view is not None:
        tensors |= {"fold_in_view": view, "item_hypergraph": view.clone()}
    ids = pl.DataFrame(
        {
            "side": ["user"] * 3 + ["item"] * 5,
            "index": [0, 1, 2, 0, 1, 2, 3, 4],
            "id": ["anna", "bert", "cleo", "p0", "p1", "p2", "p3", "p4"],
            "title": [None, None, None, "Mug", "Cup", "Lamp", "", None],
        }
    )
    histories = pl.DataFrame(EVENTS, schema=["user", "item", "split"], orient="row")
    return Recommender(ServedGraph(tensors, 1.0), ids, histories, content)


@pytest.fixture
def recommender() -> Recommender:
    return make_recommender()


def named(recommendations) -> list[tuple[str, float]]:
    return [(one.item, pytest.approx(one.score, abs=1e-6)) for one in recommendations]


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


# p0 and p1 read alike, p2 and p3 too, p4 has no text; p0, p2 and p4 look alike, the others have no picture.
TEXTS = np.array([[1, 0, 0], [0.8, 0.6, 0], [0, 0, 2], [0, 0.6, 0.8], [0, 0, 0]], dtype=np.float32)
IMAGES = np.array([[1, 0], [0, 0], [0.6, 0.8], [0, 0], [0, 3]], dtype=np.float32)


@pytest.fixture
def content() -> ItemContent:
    """Two nearest per item and modality, itself included."""
    return ItemContent.of({"text": ItemFeatures.from_values(TEXTS), "image": ItemFeatures.from_values(IMAGES)}, k=2)


class TestContent:
    def test_neighbours_are_the_nearest_with_the_modality(self, content):
        assert content.neighbours["text"].tolist() == [[0, 1], [1, 0], [2, 3], [3, 2], [-1, -1]]
        assert content.neighbours["image"].tolist() == [[0, 2], [-1, -1], [2, 4], [-1, -1], [4, 2]]

    def test_explain_names_modality_cosine_and_shared_hyperedges(self, content):
        (reason,) = make_recommender(content=content).explain("p0", history=["p1"])
        # Both have p0 and p1 among their two nearest by text; p1 has no picture.
        assert reason.content == {"text": ContentLink(pytest.approx(0.8, abs=1e-3), 2)}
        (reason,) = make_recommender(content=content).explain("p0", history=["p2"])
        assert reason.content == {"text": ContentLink(0.0, 0), "image": ContentLink(pytest.approx(0.6, abs=1e-3), 1)}
        assert reason.to_dict()["content"]["image"]["shared_hyperedges"] == 1

    def test_explain_takes_the_best_of_each_kind_in_turn(self, content):
        recommender = make_recommender(content=content)
        # Anna alone bought p4, and with it p0 and p1, of which p1 has the nearer key; p2 looks most like p4.
        found = recommender.explain("p4", history=["p0", "p1", "p2", "p3"], k=2)
        assert [one.item for one in found] == ["p1", "p2"]
        assert recommender.explain("p4", history=["p3"])[0].content == {}

    def test_without_content_reasons_have_none(self, recommender):
        assert recommender.explain("p0", history=["p1"])[0].content is None


class TestNewItems:
    FEATURES = {"text": np.array([[2.0, 0, 0], [0, 0, 0]]), "image": np.array([[0, 0], [0.6, 0.8]])}  # noqa: RUF012

    @pytest.fixture
    def recommender(self, content) -> Recommender:
        return make_recommender(content=content)

    def test_new_items_are_like_their_trained_neighbours(self, recommender):
        recommender.add_items(self.FEATURES, ["new", "p9"], ["Beaker", None])
        # K = 2 counts the item itself, so each has one neighbour: "new" p0 by text, "p9" p2 by image.
        np.testing.assert_allclose(recommender.item[5:], ITEMS[[0, 2]], atol=1e-6)
        assert recommender.item_titles[5:] == ["Beaker", None]

    def test_they_rank_at_once_and_old_scores_stay(self, recommender):
        before = recommender.scores(torch.arange(3))
        recommender.add_items(self.FEATURES, ["new", "p9"], ["Beaker", None])
        (only,) = recommender.recommend("anna", k=3)
        assert named(only) == [("new", 1.0), ("p3", 0.1), ("p2", 0.0)]
        torch.testing.assert_close(recommender.scores(torch.arange(3))[:, :5], before)
        (history,) = recommender.recommend(histories=["new"], k=1)
        assert named(history) == [("p0", 1.0)]
        assert [one.item for one in recommender.similar_items("p9", 2)] == ["p2", "p3"]
        assert recommender.recommend("cleo", k=7, candidates=["new"])[0].items[0].score == 0

    def test_mean_is_weighted_by_cosine_among_trained_items(self):
        content = ItemContent.of({"text": ItemFeatures.from_values(TEXTS)}, k=4)
        recommender = make_recommender(content=content)
        recommender.add_items({"text": np.array([[0, 0.6, 0.8]])}, ["new"])
        # Cosines with p1, p2, p3: 0.36, 0.8, 1; p3 has no training event, only a validation event.
        expected = (0.36 * ITEMS[1] + 0.8 * ITEMS[2]) / 1.16
        torch.testing.assert_close(recommender.item[5], expected, atol=1e-3, rtol=0)

    def test_content_view_is_what_the_convolution_gives_a_new_vertex(self):
        """Against the dense formula: append the vertex, apply D^-1/2 H H^T D^-1/2 once, read its row."""
        generator = torch.Generator().manual_seed(0)
        features = {name: torch.rand(12, 4, generator=generator) for name in ("text", "image")}
        content = ItemContent.of({name: ItemFeatures.from_values(x.numpy()) for name, x in features.items()}, k=4)
        x = torch.randn(12, 3, generator=generator)
        nearest = content.nearest({name: x[:2] + 0.01 for name, x in features.items()})
        found = content.convolve(x, nearest, {})
        for new in range(2):
            incidence = torch.zeros(13, 24)
            for block, name in enumerate(features):
                for item, row in enumerate(content.neighbours[name].tolist()):
                    incidence[item, [block * 12 + j for j in row]] = 1
            degree = (incidence @ incidence.T).sum(1)
            for block, name in enumerate(features):
                incidence[12, block * 12 + nearest[name].rows[new]] = 1
            product = (incidence @ incidence.T)[12, :12] @ (x / degree[:12].sqrt().unsqueeze(1))
            torch.testing.assert_close(found[new], product)

    def test_attributes_are_hyperedges_of_their_own_in_the_content_view(self):
        """Against the dense formula with hyperedges of values of weight k / size."""
        generator = torch.Generator().manual_seed(0)
        text = torch.rand(12, 4, generator=generator)
        brands = AttributeSet.of([("a",), ("a", "b"), ("b",), ("c",)] * 3)
        content = ItemContent.of({"text": ItemFeatures.from_values(text.numpy())}, k=4, attributes={"brand": brands})
        assert brands.values == ("a", "b", "c")
        features = {"text": torch.rand(2, 4), **content.indicators({"brand": [["b", "new", "c"], []]})}
        assert features["brand"].tolist() == [[0, 1, 1], [0, 0, 0]]
        x, nearest = torch.randn(12, 3, generator=generator), content.nearest(features)
        found = content.convolve(x, nearest, features)
        for new in range(2):
            incidence = torch.zeros(13, 15)
            for item, row in enumerate(content.neighbours["text"].tolist()):
                incidence[item, row] = 1
            incidence[:12, 12:] = torch.from_numpy(brands.indicators)
            weight = torch.cat([torch.ones(12), 4 / incidence[:, 12:].sum(0)])
            degree = (incidence * weight @ incidence.T).sum(1)
            incidence[12, nearest["text"].rows[new]] = 1
            incidence[12, 12:] = features["brand"][new]
            product = (incidence * weight @ incidence.T)[12, :12] @ (x / degree[:12].sqrt().unsqueeze(1))
            torch.testing.assert_close(found[new], product)
        without = content.convolve(x, nearest, features, ["text"])
        alone = ItemContent.of({"text": ItemFeatures.from_values(text.numpy())}, k=4)
        torch.testing.assert_close(without, alone.convolve(x, {"text": nearest["text"]}, features))

    def test_new_items_may_come_with_attributes_alone(self, tmp_path):
        brands = AttributeSet.of([("a",), ("b",), ("a",), ("b",), ()])
        content = ItemContent.of({"text": ItemFeatures.from_values(TEXTS)}, k=3, attributes={"brand": brands})
        recommender = make_recommender(content=content)
        recommender.add_items({}, ["new"], attributes={"brand": [["b"]]})
        # p1 and p3 have the brand, and p3 no training event.
        torch.testing.assert_close(recommender.item[5], torch.as_tensor(ITEMS[1]))
        (reason,) = recommender.explain("new", history=["p3"])
        assert reason.content == {"brand": ContentLink(pytest.approx(1, abs=1e-3), 1)}
        loaded = Recommender.load(recommender.save(tmp_path / "saved"))
        loaded.add_items({}, ["again"], attributes={"brand": [["b"]]})
        torch.testing.assert_close(loaded.item[6], loaded.item[5])

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            ({"colour": [["red"]]}, r"attributes must be among those of the run \(brand\), got 'colour'"),
            ({"brand": [["unheard of"]]}, "features must place every item, but item 'new' has none in brand"),
            ({"brand": [["a"], ["b"]]}, r"features\['brand'\] must be of the 1 new items, got 2"),
        ],
    )
    def test_wrong_attributes_of_new_items_are_named(self, attributes, message):
        brands = AttributeSet.of([("a",), ("b",), ("a",), ("b",), ()])
        recommender = make_recommender(content=ItemContent.of({}, k=3, attributes={"brand": brands}))
        with pytest.raises(ValueError, match=message):
            recommender.add_items({}, ["new"], attributes=attributes)
        assert len(recommender.item_ids) == 5

    def test_view_and_backbone_of_stage_one(self, content):
        view = torch.tensor([[3.0, 0], [0, 2], [0, 4], [1, 0], [0, 1]])
        recommender = make_recommender(view, content)
        recommender.add_items({"text": np.array([[1.0, 0, 0]])}, ["new"])
        # p0 alone is near. Its hyperedge holds p0, of degree 2 + 2 by text and 1 + 3 by image, and p1, of 2 + 2.
        expected = torch.nn.functional.normalize(view[0] / 8**0.5 + view[1] / 4**0.5, dim=0)
        torch.testing.assert_close(recommender.item[5], ITEMS[0] - torch.tensor([1.0, 0]) + expected)

    def test_in_one_go_or_in_two(self, content):
        one, two = make_recommender(content=content), make_recommender(content=content)
        one.add_items(self.FEATURES, ["a", "b"])
        two.add_items({name: x[:1] for name, x in self.FEATURES.items()}, ["a"])
        two.add_items({name: x[1:] for name, x in self.FEATURES.items()}, ["b"])
        torch.testing.assert_close(one.item, two.item)
        assert one.item_ids == two.item_ids and one.recommend("bert", k=7) == two.recommend("bert", k=7)

    def test_explained_and_saved(self, recommender, tmp_path):
        recommender.add_items(self.FEATURES, ["new", "p9"], ["Beaker", None])
        (reason,) = recommender.explain("new", history=["p1"])
        assert reason.shared_users == 0
        assert reason.content["text"] == ContentLink(pytest.approx(0.8, abs=1e-3), 1)
        loaded = Recommender.load(recommender.save(tmp_path / "saved"))
        assert loaded.recommend("anna", k=3) == recommender.recommend("anna", k=3)
        assert loaded.explain("new", history=["p1"]) == [reason]
        loaded.add_items({"text": np.array([[1.0, 0, 0]])}, ["again"])
        torch.testing.assert_close(loaded.item[7], loaded.item[5])

    def test_item_features_leave_masked_rows_out(self, recommender):
        masked = ItemFeatures(np.ones((2, 2), np.float32), np.array([False, True]))
        recommender.add_items({"text": TEXTS[:2], "image": masked}, ["a", "b"])
        assert not recommender.content.has("image")[5] and recommender.content.has("image")[6]

    def test_an_item_like_no_other_is_told(self, recommender, caplog):
        recommender.add_items({"text": -np.abs(TEXTS).sum(0, keepdims=True)}, ["odd"])
        assert (
            "1 new items, odd first, are like no item with training events: they rank by content alone" in caplog.text
        )
        assert torch.isfinite(recommender.item).all()

    def test_nothing_to_add(self, recommender):
        recommender.add_items({"text": np.zeros((0, 3))}, [])
        assert recommender.num_items == 5

    @pytest.mark.parametrize(
        ("features", "ids", "titles", "message"),
        [
            ({}, ["a"], None, "features must hold at least one of text, image, got none"),
            ({"audio": np.ones((1, 2))}, ["a"], None, "features must be among text, image, got 'audio'"),
            ({"text": np.ones((1, 2))}, ["a"], None, r"features\['text'\] must be \[1, 3\], got \[1, 2\]"),
            ({"text": np.full((1, 3), np.nan)}, ["a"], None, r"features\['text'\] must be finite, got NaN .* in row 0"),
            ({"text": np.ones((2, 3))}, ["a"], None, r"features\['text'\] must be of the 1 new items, got 2"),
            ({"text": np.ones((1, 3))}, ["a"], ["A", "B"], "titles must be of the 1 new items, got 2"),
            ({"text": np.ones((1, 3))}, ["p1"], None, "ids must be new and distinct, got 'p1' again"),
            ({"text": np.ones((2, 3))}, ["a", "a"], None, "ids must be new and distinct, got 'a' twice"),
            ({"text": np.zeros((1, 3))}, ["a"], None, "features must place every item, but item 'a' has none in text"),
        ],
    )
    def test_errors_change_nothing(self, recommender, features, ids, titles, message):
        with pytest.raises(ValueError, match=message):
            recommender.add_items(features, ids, titles)
        assert recommender.num_items == len(recommender.item) == recommender.content.num_items == 5

    def test_run_without_content(self):
        with pytest.raises(ValueError, match=r"new items need item content, and the run holds no content.safetensors"):
            make_recommender().add_items({"text": np.ones((1, 3))}, ["a"])

    def test_damaged_content(self, recommender, tmp_path):
        path = recommender.save(tmp_path / "saved")
        (path / "content.safetensors").write_bytes(b"garbage")
        with pytest.raises(DataError, match=r"content.safetensors: damaged or no item content"):
            Recommender.load(path)


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
