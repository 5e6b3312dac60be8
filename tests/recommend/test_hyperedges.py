"""The run without one of its hyperedges is the trained encoder on a hypergraph that never had it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from support.planted_runs import make_recommender

from hellm.config import ModelConfig, PretrainConfig
from hellm.data import DataError, Dataset, IdMap, ItemFeatures
from hellm.hypergraph import Hypergraph
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender, ServedFused
from hellm.training.checkpoint import read_model
from hellm.training.pretrain import build_encoder, pretrain, resolve_config

NUM_USERS, NUM_ITEMS, K = 40, 30, 4
# Items without training events.
COLD = (13, 28, 29)
OLD_RUNS = Path(__file__).parents[1] / "artifact" / "fixtures" / "runs-0.1"


def make_dataset() -> Dataset:
    draw = np.random.default_rng(0)
    block = np.arange(NUM_ITEMS) % 3
    features = {
        name: (np.eye(3)[block] + 0.4 * draw.standard_normal((NUM_ITEMS, 3))).astype(np.float32)
        for name in ("image", "text")
    }
    features["image"][3] = 0
    warm = np.setdiff1d(np.arange(NUM_ITEMS), COLD)
    histories = [draw.choice(warm[block[warm] == user % 3], 6, replace=False) for user in range(NUM_USERS)]
    for user, item in zip((10, 25, 35), COLD, strict=True):
        histories[user][-1] = item
    return Dataset(
        name="blocks",
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        users=np.repeat(np.arange(NUM_USERS), 6),
        items=np.concatenate(histories),
        timestamps=None,
        split=np.tile(np.array([0, 0, 0, 0, 1, 2], dtype=np.int8), NUM_USERS),
        user_ids=IdMap(f"u{row}" for row in range(NUM_USERS)),
        item_ids=IdMap(f"i{row}" for row in range(NUM_ITEMS)),
        item_features={name: ItemFeatures.from_values(values) for name, values in features.items()},
        item_titles=[f"item {row}" for row in range(NUM_ITEMS)],
        item_fields={"brand": [f"brand {row % 5}" if row < 28 else "" for row in range(NUM_ITEMS)]},
    )


DATA = make_dataset()
SETTINGS = {
    "two layers": {},
    "one layer": {"num_item_layers": 1},
    "three layers": {"num_item_layers": 3},
    "unit items": {"loss": "softmax"},
    "features alone": {"attributes": ()},
}


def make_config(num_item_layers: int = 2, attributes=None, **settings) -> PretrainConfig:
    model = ModelConfig(embedding_dim=8, knn_k=K, num_item_layers=num_item_layers, attributes=attributes)
    loop = {"ks": (5,), "monitor": ("recall@5",), "num_threads": 1, "device": "cpu", "tensorboard": False}
    return PretrainConfig(model=model, learning_rate=0.05, batch_size=32, max_epochs=3, **settings, **loop)


@pytest.fixture(scope="module", params=SETTINGS)
def trained(request, tmp_path_factory):
    """(run directory, resolved settings)."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = make_config(**SETTINGS[request.param])
    pretrain(config, DATA, folder)
    return folder, resolve_config(config, DATA)[0]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "run"
    pretrain(make_config(), DATA, folder)
    return folder


def encoder_without(run: Path, config: PretrainConfig, hyperedge: int):
    """The trained encoder on a hypergraph that is built from the incidences that are left."""
    encoder = build_encoder(config, DATA)
    read_model(run / "checkpoint" / "best.safetensors", encoder)
    whole = encoder.item_hypergraph
    vertex, edge = whole.hyperedge_index
    left = edge != hyperedge
    weight = None
    if whole.hyperedge_weight is not None:
        weight = torch.cat([whole.hyperedge_weight[:hyperedge], whole.hyperedge_weight[hyperedge + 1 :]])
    encoder.item_hypergraph = Hypergraph(
        torch.stack([vertex[left], edge[left] - (edge[left] > hyperedge).long()]),
        num_vertices=NUM_ITEMS,
        num_hyperedges=whole.num_hyperedges - 1,
        hyperedge_weight=weight,
    )
    return encoder.eval()


def place(config: PretrainConfig, modality: str, name: str) -> int:
    """Row of a hyperedge in the hypergraph of the encoder."""
    if modality == "brand":
        return NUM_ITEMS * len(config.model.modalities) + DATA.attribute_sets["brand"].values.index(name)
    return NUM_ITEMS * config.model.modalities.index(modality) + int(name[1:])


def ranks(scores: torch.Tensor, user: int) -> dict[str, int]:
    seen = DATA.items[DATA.users == user]
    found = {}
    for item in range(NUM_ITEMS):
        own = scores.clone()
        own[[row for row in seen if row != item]] = -torch.inf
        found[f"i{item}"] = own.argsort(descending=True, stable=True).tolist().index(item) + 1
    return found


def test_it_is_the_encoder_without_the_hyperedge(trained):
    run, config = trained
    recommender, users = Recommender.load(run), torch.arange(NUM_USERS)
    assert recommender.missing_hypergraph is None
    before = recommender.scores(users)
    hyperedges = [("image", "i7"), ("text", "i3"), ("text", recommender.hyperedges("i13")[-3].name)]
    hyperedges += [("brand", "brand 2")] if config.model.attributes else []
    moved = 0
    for modality, name in hyperedges:
        encoder = encoder_without(run, config, place(config, modality, name))
        expected = encoder.scores(users)
        less = recommender.without_hyperedge(modality, name)
        torch.testing.assert_close(less.scores(users), expected, rtol=1e-5, atol=1e-6)
        # What is known of histories as well, those of items without training events among them.
        indptr, items = torch.tensor([0, 2, 4]), torch.tensor([1, 13, 28, 2])
        folded = encoder.fold_in(indptr, items)
        torch.testing.assert_close(less.model.embed(indptr, items), folded, rtol=1e-5, atol=1e-6)
        for user in (0, 1):
            wanted, was = ranks(expected[user], user), ranks(before[user], user)
            assert {item: less.rank(item, user=f"u{user}") for item in wanted} == wanted
            moved += wanted != was
        assert torch.equal(recommender.scores(users), before)
    assert moved


def test_rows_that_the_hyperedge_does_not_reach_keep_their_bits(tmp_path):
    pretrain(make_config(num_item_layers=1, attributes=()), DATA, tmp_path / "run")
    recommender = Recommender.load(tmp_path / "run")
    members = recommender.hyperedges("i7")[0].members.tolist()
    assert 7 in members
    # One layer reaches whoever shares a hyperedge with a member, whose degree is another.
    near = {row for one in members for edge in recommender.hyperedges(f"i{one}") for row in edge.members.tolist()}
    less = recommender.without_hyperedge("image", recommender.hyperedges("i7")[0].name)
    same = (less.item == recommender.item).all(dim=1)
    assert not same[members].any()
    far = sorted({*range(NUM_ITEMS)} - near)
    assert far and same[far].all()


def test_two_hyperedges_fewer_in_any_order_and_after_saving(run, tmp_path):
    recommender = Recommender.load(run)
    one = recommender.without_hyperedge("text", "i4").without_hyperedge("brand", "brand 0")
    other = recommender.without_hyperedge("brand", "brand 0")
    saved = Recommender.load(other.save(tmp_path / "less"))
    assert saved.missing_hypergraph is None
    torch.testing.assert_close(saved.without_hyperedge("text", "i4").item, one.item)
    assert [(h.modality, h.name) for h in one.hyperedges("i5")] == [
        (h.modality, h.name)
        for h in recommender.hyperedges("i5")
        if (h.modality, h.name) not in {("text", "i4"), ("brand", "brand 0")}
    ]


@pytest.mark.parametrize("loss", ["bpr", "softmax"])
def test_items_that_came_later_are_placed_anew(tmp_path, loss):
    pretrain(make_config(loss=loss), DATA, tmp_path / "run")
    draw = np.random.default_rng(1)
    new = {name: draw.standard_normal((2, 3)).astype(np.float32) for name in ("image", "text")}
    new["image"][1] = 0
    given = (new, ["n0", "n1"]), {"attributes": {"brand": [["brand 1"], []]}}
    first, then = Recommender.load(tmp_path / "run"), Recommender.load(tmp_path / "run")
    first.add_items(*given[0], **given[1])
    for hyperedge in [("text", first.hyperedges("n0")[-2].name), ("brand", "brand 1")]:
        added = first.without_hyperedge(*hyperedge)
        before = then.without_hyperedge(*hyperedge)
        before.add_items(*given[0], **given[1])
        assert not torch.equal(added.item[-2], first.item[-2])
        if loss == "bpr":
            torch.testing.assert_close(added.item, before.item, rtol=1e-5, atol=1e-6)
        else:
            # The mean of its neighbours stays as it was; what the hypergraph adds to it does not.
            view = added.model.tensors["item_hypergraph"]
            torch.testing.assert_close(view, before.model.tensors["item_hypergraph"], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no hyperedge around item 'n0': it was not there in training"):
        first.without_hyperedge("text", "n0")


def test_in_a_sum_it_is_that_of_its_model(run, tmp_path):
    recommender = Recommender.load(run)
    sequence = make_recommender("sequence").model
    sequence = type(sequence)(type(sequence.model)(NUM_ITEMS, embedding_dim=8, num_layers=1, num_heads=1).eval())
    ids, content = pl.read_parquet(run / "ids.parquet"), ItemContent.load(run / "content.safetensors")
    events = pl.read_parquet(run / "histories.parquet")
    towers, weights = {"graph": recommender.model, "sequence": sequence}, {"graph": 1.0, "sequence": 0.5}
    saved = Recommender(ServedFused(towers, weights), ids, events, content).save(tmp_path / "sum")
    fused = Recommender.load(saved)
    less = fused.without_hyperedge("image", "i7")
    graph = recommender.without_hyperedge("image", "i7")
    expected = ServedFused({"graph": graph.model, "sequence": sequence}, weights)
    torch.testing.assert_close(less.item, expected.item_keys())
    users = torch.arange(NUM_USERS)
    changed = less.scores(users) - fused.scores(users)
    histories = [torch.from_numpy(part) for part in DATA.histories("train")]
    alone = graph.model.embed(*histories) @ (graph.item - recommender.item).T
    torch.testing.assert_close(changed, alone, rtol=1e-4, atol=1e-5)


class TestRank:
    def test_it_is_the_place_in_the_list(self, run):
        recommender = Recommender.load(run)
        for asked in ({"users": ["u3"]}, {"histories": [["i1", "i4"]]}, {"histories": [[]]}):
            (found,) = recommender.recommend(**asked, k=NUM_ITEMS)
            name, (value,) = next(iter(asked.items()))
            single = {"users": "user", "histories": "history"}[name]
            for number, item in enumerate(found, 1):
                assert recommender.rank(item.item, **{single: value}) == number

    def test_an_item_of_the_history_competes_with_what_is_new(self, run):
        recommender = Recommender.load(run)
        item = recommender.history("u0")[0].item
        kept = [one.item for one in recommender.history("u0") if one.item != item]
        (found,) = recommender.recommend("u0", k=NUM_ITEMS, exclude_seen=False, exclude=kept)
        assert [one.item for one in found].index(item) + 1 == recommender.rank(item, user="u0")

    def test_one_of_user_and_history(self, run):
        recommender = Recommender.load(run)
        for wrong in ({}, {"user": "u0", "history": ["i1"]}):
            with pytest.raises(ValueError, match=r"give either user or history, got (neither|both)"):
                recommender.rank("i1", **wrong)
        with pytest.raises(DataError, match=r"unknown item 'i99'"):
            recommender.rank("i99", user="u0")


class TestHyperedges:
    def test_they_are_those_of_the_hypergraph(self, trained):
        run, config = trained
        recommender, whole = Recommender.load(run), build_encoder(config, DATA).item_hypergraph
        vertex, edge = whole.hyperedge_index
        weights = torch.ones(whole.num_hyperedges) if whole.hyperedge_weight is None else whole.hyperedge_weight
        for row in (0, 3, 29):
            found = recommender.hyperedges(f"i{row}")
            places = {place(config, one.modality, one.name): one for one in found}
            assert sorted(places) == edge[vertex == row].tolist()
            for number, one in places.items():
                assert sorted(one.members.tolist()) == sorted(vertex[edge == number].tolist())
                assert one.weight == pytest.approx(float(weights[number]))
                assert one.is_value == (one.modality == "brand") == (one.similarities is None)

    def test_members_go_by_likeness_with_the_centre(self, run):
        one = Recommender.load(run).hyperedges("i7")[0]
        assert one.modality == "image" and one.title == f"item {one.name[1:]}"
        assert one.members[0] == int(one.name[1:]) and one.similarities[0] == pytest.approx(1, abs=2e-3)
        assert one.similarities.diff().max() <= 0

    def test_items_that_came_later_are_members(self, run):
        recommender = Recommender.load(run)
        recommender.add_items({"text": DATA.item_features["text"].values[[7]]}, ["new"])
        (first, *_) = recommender.hyperedges("new")
        assert first.modality == "text" and NUM_ITEMS in first.members.tolist()
        # Its own hyperedge joins nothing.
        assert "new" not in [one.name for one in recommender.hyperedges("new")]

    def test_none_without_content(self):
        assert make_recommender("graph").hyperedges("p1") == []


class TestMissing:
    @pytest.mark.parametrize(
        ("kind", "words"),
        [
            ("graph", "stage 1 was trained without it"),
            ("sequence", "it is a sequence model"),
            ("transitions", "it counts what follows what"),
            ("fused", "none of its models has one"),
        ],
    )
    def test_no_hypergraph(self, kind, words):
        recommender = make_recommender(kind)
        assert words in recommender.missing_hypergraph
        with pytest.raises(ValueError, match=words):
            recommender.without_hyperedge("text", "p1")

    def test_a_run_of_before(self):
        recommender = Recommender.load(OLD_RUNS / "graph")
        assert "An earlier version wrote this run" in recommender.missing_hypergraph

    def test_no_content(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "content.safetensors").unlink()
        assert "holds no content.safetensors" in Recommender.load(tmp_path / "run").missing_hypergraph

    def test_other_neighbours(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        content = ItemContent.load(run / "content.safetensors")
        for k, words in ((3, "must have 4 neighbours"), (4, "the convolution is off by")):
            neighbours = {name: listed[:, :k].roll(k - 3, 0) for name, listed in content.neighbours.items()}
            other = ItemContent(content.features, neighbours, attributes=content.attributes)
            other.save(tmp_path / "run" / "content.safetensors")
            assert words in Recommender.load(tmp_path / "run").missing_hypergraph

    def test_more_neighbours_do_not_matter(self, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        more = ItemContent.of(DATA.item_features, 9, attributes=DATA.attribute_sets)
        more.save(tmp_path / "run" / "content.safetensors")
        found, expected = Recommender.load(tmp_path / "run"), Recommender.load(run)
        assert found.missing_hypergraph is None
        less = found.without_hyperedge("brand", "brand 1").item
        torch.testing.assert_close(less, expected.without_hyperedge("brand", "brand 1").item)

    @pytest.mark.parametrize(
        ("modality", "name", "words"),
        [
            ("sound", "i1", "modality must be among image, text, brand, got 'sound'"),
            ("brand", "acme", "attribute 'brand' has no value 'acme'"),
            ("text", "i99", "there is no hyperedge around item 'i99'"),
        ],
    )
    def test_unknown_hyperedges(self, run, modality, name, words):
        with pytest.raises(ValueError, match=words):
            Recommender.load(run).without_hyperedge(modality, name)
