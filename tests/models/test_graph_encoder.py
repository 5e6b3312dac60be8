from __future__ import annotations

from typing import Literal, get_type_hints

import pytest
import torch
import torch.nn.functional as F
from support.recommender_contract import RecommenderContract

from hellm import ops
from hellm.config import ModelConfig
from hellm.graphs import item_hypergraph, user_hypergraph
from hellm.losses import bpr_loss
from hellm.models import GraphEncoder
from hellm.models.graph.backbone import BACKBONES, MF

NUM_USERS, NUM_ITEMS, DIM, K = 13, 11, 6, 7


def generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def interactions():
    """[U, I] 0/1 float64; user 5 and item 3 have none."""
    matrix = (torch.rand(NUM_USERS, NUM_ITEMS, generator=generator(0)) < 0.3).double()
    matrix[5], matrix[:, 3] = 0, 0
    return matrix


@pytest.fixture
def features():
    return {name: torch.randn(NUM_ITEMS, 5, generator=generator(seed)) for seed, name in enumerate(("image", "text"))}


@pytest.fixture
def make(interactions, features):
    def make(*, seed=0, dtype=torch.float64, compat=False, content=True, **settings):
        torch.manual_seed(seed)
        return GraphEncoder(
            NUM_USERS,
            NUM_ITEMS,
            user_hypergraph=user_hypergraph(interactions.nonzero().T, NUM_USERS, NUM_ITEMS),
            item_hypergraph=item_hypergraph(features, K, keep_nonpositive=compat) if content else None,
            embedding_dim=DIM,
            **settings,
        ).to(dtype)

    return make


# The published definition with dense matrices.


def divide(a, b):
    return torch.where(b != 0, a / torch.where(b != 0, b, 1), 0)


def symmetric(matrix):
    root = divide(torch.ones(len(matrix), dtype=matrix.dtype), matrix.sum(1).clamp(min=0).sqrt())
    return root[:, None] * matrix * root[None, :]


def dense_bipartite(interactions):
    matrix = torch.zeros(NUM_USERS + NUM_ITEMS, NUM_USERS + NUM_ITEMS, dtype=torch.float64)
    matrix[:NUM_USERS, NUM_USERS:], matrix[NUM_USERS:, :NUM_USERS] = interactions, interactions.T
    return symmetric(matrix)


def dense_users(interactions):
    shared = interactions @ interactions.T
    shared.fill_diagonal_(0)
    return divide(shared, shared.sum(1, keepdim=True))


def dense_items(features, keep_nonpositive):
    blocks = []
    for x in features.values():
        similarity = F.normalize(x.double(), dim=1) @ F.normalize(x.double(), dim=1).T
        value, index = similarity.topk(K, dim=1)
        value = torch.where(value > 0, 1.0, value * keep_nonpositive)
        blocks.append(torch.zeros_like(similarity).scatter(1, index, value))
    incidence = torch.cat(blocks, dim=1)
    return symmetric(incidence @ incidence.T)


def dense_forward(model, interactions, features, keep_nonpositive=False):
    tables = model.user_table.weight, model.item_table.weight
    x = torch.cat(tables)
    graph, layers = dense_bipartite(interactions), []
    for _ in range(model.backbone.num_layers + 1):
        layers.append(x)
        x = graph @ x
    user, item = torch.stack(layers).mean(0).split([NUM_USERS, NUM_ITEMS])
    user_view, item_view = model.user_branch_table.weight, model.item_branch_table.weight
    for _ in range(model.num_user_layers):
        user_view = dense_users(interactions) @ user_view
    for _ in range(model.num_item_layers):
        item_view = dense_items(features, keep_nonpositive) @ item_view
    return user + F.normalize(user_view), item + F.normalize(item_view), user_view, item_view


@pytest.mark.parametrize("compat", [False, True], ids=["default", "official"])
@pytest.mark.parametrize("layers", [(2, 2, 1), (2, 3, 2), (1, 1, 1)], ids=str)
def test_graph_encoder_is_the_published_definition(make, interactions, features, layers, compat):
    model = make(compat=compat, num_layers=layers[0], num_user_layers=layers[1], num_item_layers=layers[2])
    expected = dense_forward(model, interactions, features, compat)
    output = model()
    for mine, dense in zip(output, expected, strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)
    cotangents = [torch.randn(x.shape, generator=generator(9), dtype=x.dtype) for x in expected]
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(output, parameters, cotangents)
    for mine, dense in zip(gradients, torch.autograd.grad(expected, parameters, cotangents), strict=True):
        torch.testing.assert_close(mine, dense, rtol=1e-5, atol=1e-6)


def test_graph_encoder_in_float32_is_within_its_error_budget(make, interactions, features):
    model = make()
    expected = dense_forward(model, interactions, features)
    for mine, dense in zip(model.float()(), expected, strict=True):
        torch.testing.assert_close(mine.double(), dense, rtol=0, atol=1e-5)


def test_compatibility_keeps_dissimilar_neighbours(make, features):
    similarity = F.normalize(features["image"]) @ F.normalize(features["image"]).T
    assert (similarity.topk(K, dim=1).values <= 0).any(), "the test data must have such neighbours"
    assert not torch.allclose(make(compat=True)().item_view, make()().item_view)


def test_ngcf_is_the_dense_formula(make, interactions):
    model = make(backbone="ngcf", use_user_branch=False, content=False, num_layers=2).eval()
    x = torch.cat([model.user_table.weight, model.item_table.weight])
    layers = [x]
    for aggregate, interact in zip(model.backbone.aggregate, model.backbone.interact, strict=True):
        side = dense_bipartite(interactions) @ x
        x = F.leaky_relu(aggregate(side)) + F.leaky_relu(interact(x * side))
        layers.append(x / x.norm(dim=1, keepdim=True))
    expected = torch.stack(layers).mean(0)
    torch.testing.assert_close(torch.cat(model()[:2]), expected, rtol=1e-9, atol=1e-10)


def test_ngcf_drops_messages_in_training_only(make):
    model = make(backbone="ngcf", dropout=0.5)
    assert not torch.equal(model().user, model().user)
    scores = model.scores(torch.arange(3))
    assert model.training
    assert torch.equal(scores, model.scores(torch.arange(3)))
    assert torch.equal(model.eval().scores(torch.arange(3)), scores)


def test_mf_without_branches_is_its_tables(make):
    model = make(backbone="mf", use_user_branch=False, content=False)
    output = model()
    assert torch.equal(output.user, model.user_table.weight) and torch.equal(output.item, model.item_table.weight)
    assert output.user_view is None and output.item_view is None
    assert sum(1 for _ in model.parameters()) == 2


def test_left_out_branch_changes_nothing_else(make):
    whole, without_users, without_items = make(), make(use_user_branch=False), make(content=False)
    assert torch.equal(whole.item_branch_table.weight, without_users.item_branch_table.weight)
    assert torch.equal(whole().item, without_users().item)
    assert torch.equal(whole().user, without_items().user)
    assert without_users().user_view is None and without_items().item_view is None


def test_scores_are_products_and_follow_the_parameters(make, interactions):
    model = make(dtype=torch.float32)
    users = torch.tensor([4, 4, 0])
    before = model.scores(users)
    output = model()
    trained = interactions.any(0)
    torch.testing.assert_close(before[:, trained], (output.user[users] @ output.item.T)[:, trained])
    assert model.embeddings() is model.embeddings()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    bpr_loss(output.user[:2], output.item[:2], output.item[2:4]).backward()
    optimizer.step()
    assert not torch.equal(model.scores(users), before)
    model.load_state_dict(make(dtype=torch.float32).state_dict())
    assert torch.equal(model.scores(users), before)


@pytest.mark.parametrize("unit_items", [False, True])
def test_an_item_without_events_is_placed_by_those_in_its_hyperedges(make, interactions, features, unit_items):
    values = torch.zeros(2, NUM_ITEMS, dtype=torch.long)
    values[0] = torch.arange(NUM_ITEMS)
    values[1, ::2] = 1
    by_content = item_hypergraph(features, K, attributes={"colour": values})
    model = make(unit_items=unit_items)
    model.item_hypergraph = by_content
    output, placed = model(), model.embeddings()
    others = interactions.any(0)
    torch.testing.assert_close(placed.item[others], output.item[others])
    torch.testing.assert_close(placed.user, output.user)
    # Item 3 shares hyperedges with the others as often as H diag(w) H^T says.
    vertices, edges = by_content.hyperedge_index
    incidence = torch.zeros(NUM_ITEMS, by_content.num_hyperedges, dtype=torch.float64)
    incidence[vertices, edges] = 1
    shared = ((incidence * by_content.hyperedge_weight) @ incidence.T)[3] * others
    view = F.normalize(output.item_view, dim=1)
    expected = shared @ model._propagate_backbone()[1] / shared.sum() + view[3]
    expected = F.normalize(expected, dim=0) if unit_items else expected
    torch.testing.assert_close(placed.item[3], expected)
    source = model.fold_in_tables().source
    assert source[3].any() and not torch.equal(source[3], make(place_untrained=False).fold_in_tables().source[3])
    as_trained = make(unit_items=unit_items, place_untrained=False)
    assert torch.equal(as_trained.embeddings().item, as_trained().item)


def test_a_state_from_before_backbones_had_classes_is_loaded(make):
    model = make(backbone="ngcf")
    old = {name.replace("backbone.", ""): value for name, value in model.state_dict().items()}
    assert "aggregate.1.weight" in old
    state = model.renamed_state_dict(old)
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_a_backbone_of_ones_own_is_a_class_in_one_place(make, monkeypatch):
    class Neighbours(MF):
        def forward(self, user, item, hypergraph):
            return user + ops.incidence_product(item, hypergraph), item

    monkeypatch.setitem(BACKBONES, "neighbours", Neighbours)
    model = make(backbone="neighbours", use_user_branch=False, content=False)
    item = model.item_table.weight
    summed = model.user_table.weight + ops.incidence_product(item, model.user_hypergraph)
    assert torch.equal(model().user, summed)
    torch.testing.assert_close(model.user_embedding([1, 6]), item[[1, 6]].mean(0).detach())


def test_settings_name_the_backbones_that_there_are():
    assert get_type_hints(ModelConfig)["backbone"] == Literal[tuple(BACKBONES)]


# Folding in a user: the encoder of a data set that has this user as well, with own embeddings of zero.


@pytest.mark.parametrize("layers", [(1, 1), (2, 2), (3, 3)], ids=str)
def test_fold_in_is_a_new_user_who_changes_nobody(make, interactions, layers):
    model = make(num_layers=layers[0], num_user_layers=layers[1], content=False)
    history = torch.zeros(NUM_ITEMS, dtype=torch.float64)
    history[[0, 2, 7]] = 1
    degree = interactions.sum(0).clamp(min=1)
    x = torch.cat([model.user_table.weight, model.item_table.weight])
    graph, total = dense_bipartite(interactions), torch.zeros(DIM, dtype=torch.float64)
    for _ in range(layers[0]):
        total += (history / (3 * degree).sqrt()) @ x[NUM_USERS:]
        x = graph @ x
    view = model.user_branch_table.weight
    for _ in range(layers[1] - 1):
        view = dense_users(interactions) @ view
    shared = interactions @ history
    expected = total / (layers[0] + 1) + F.normalize(shared @ view / shared.sum(), dim=0)
    torch.testing.assert_close(model.user_embedding([0, 2, 7, 2]), expected.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("backbone", ["mf", "ngcf"])
def test_fold_in_of_other_backbones_is_the_mean_item(make, backbone):
    model = make(backbone=backbone, use_user_branch=False, content=False)
    items = model.eval()().item
    torch.testing.assert_close(model.train().user_embedding([1, 6]), items[[1, 6]].mean(0).detach())
    assert model.training


def test_fold_in_batch_equals_single_and_empty_is_zero(make):
    model = make()
    batch = model.fold_in(torch.tensor([0, 2, 2, 5]), torch.tensor([1, 4, 0, 1, 9]))
    for row, history in enumerate(([1, 4], [], [0, 1, 9])):
        torch.testing.assert_close(batch[row], model.user_embedding(history))
    assert not batch[1].any() and not batch.requires_grad


@pytest.mark.parametrize("item", [-1, NUM_ITEMS])
def test_fold_in_refuses_unknown_items(make, item):
    with pytest.raises(ValueError, match=rf"items must be in \[0, {NUM_ITEMS}\), got {item}"):
        make().user_embedding([0, item])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone": "gcn"}, r"backbone must be one of 'lightgcn', 'ngcf', 'mf', got 'gcn'"),
        ({"num_layers": 0}, r"num_layers must be >= 1, got 0"),
        ({"num_item_layers": -1}, r"num_item_layers must be >= 1, got -1"),
    ],
)
def test_wrong_settings_are_named(make, settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


def test_hypergraphs_must_fit(features):
    graph = user_hypergraph(torch.tensor([[0], [0]]), 3, 2)
    with pytest.raises(ValueError, match=r"user_hypergraph must have 3 vertices and 11 hyperedges, got \(3, 2\)"):
        GraphEncoder(3, 11, user_hypergraph=graph)
    with pytest.raises(ValueError, match=r"item_hypergraph must have 2 vertices, got 11"):
        GraphEncoder(3, 2, user_hypergraph=graph, item_hypergraph=item_hypergraph(features, 2))


class TestRecommender(RecommenderContract):
    @torch.enable_grad()
    def fit(self, data, seed=0):
        model = self.new(data, seed)
        users, items = map(torch.from_numpy, data.train)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        draw = generator(seed)
        for _ in range(60):
            output = model()
            negatives = torch.randint(data.num_items, items.shape, generator=draw)
            loss = bpr_loss(output.user[users], output.item[items], output.item[negatives])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return model.eval()

    def new(self, data, seed=0):
        torch.manual_seed(seed)
        index = torch.tensor(data.train[0]), torch.tensor(data.train[1])
        graph = user_hypergraph(torch.stack(index), data.num_users, data.num_items)
        return GraphEncoder(data.num_users, data.num_items, user_hypergraph=graph, embedding_dim=8)

    def reload(self, scorer, folder):
        from safetensors.torch import load_file, save_file
        from support.recommender_contract import planted_blocks

        save_file(scorer.state_dict(), folder / "model.safetensors")
        model = self.new(planted_blocks(), seed=1)
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()
