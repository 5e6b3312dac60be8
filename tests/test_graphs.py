"""The hypergraphs of users and items that are made from data."""

from __future__ import annotations

import pytest
import torch

from hellm import item_hypergraph, ops, user_hypergraph

# Vertex and hyperedge of every incidence.
INDEX = torch.tensor([[2, 0, 1, 3, 1], [0, 0, 0, 1, 1]])


def test_user_hypergraph_joins_users_by_items():
    events = torch.tensor([[0, 2, 0, 2, 2], [1, 1, 1, 0, 1]])
    graph = user_hypergraph(events, 4, 3)
    assert graph.hyperedge_index.tolist() == [[0, 2, 2], [1, 0, 1]]
    assert (graph.num_vertices, graph.num_hyperedges) == (4, 3)
    assert user_hypergraph(events.int(), 4, 3).hyperedge_index.tolist() == [[0, 2, 2], [1, 0, 1]]
    assert user_hypergraph(torch.zeros(2, 0, dtype=torch.int64), 2, 0).num_incidences == 0


def published_item_incidence(features, k):
    """H of one modality: row i holds the k most similar items of item i, entries <= 0 dropped."""
    unit = torch.nn.functional.normalize(features.double())
    similarity = unit @ unit.T
    value, index = similarity.topk(k)
    return torch.zeros_like(similarity).scatter_(1, index, (value > 0).double())


def test_item_hypergraph_is_the_published_item_branch():
    """D^-1/2 H H^T D^-1/2 with H = [H_image | H_text], D its row sums."""
    generator = torch.Generator().manual_seed(0)
    features = {"image": torch.randn(30, 12, generator=generator), "text": torch.randn(30, 3, generator=generator)}
    graph = item_hypergraph(features, k=7)
    h = torch.cat([published_item_incidence(x, 7) for x in features.values()], 1)
    assert (graph.num_vertices, graph.num_hyperedges) == (30, 60)
    dense = torch.zeros(30, 60, dtype=torch.float64)
    dense[tuple(graph.hyperedge_index)] = 1.0
    assert torch.equal(dense, h)
    a = h @ h.T
    root = a.sum(1).pow(-0.5)
    x = torch.randn(30, 8, generator=generator)
    found = ops.hypergraph_conv(x, graph, hyperedge_degree=False, num_layers=2)
    operator = root[:, None] * a * root
    torch.testing.assert_close(found.double(), operator @ (operator @ x.double()), rtol=1e-5, atol=1e-5)


def test_item_hypergraph_leaves_out_items_without_the_modality():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [1.0, 0.2], [0.0, 0.0]])
    mask = torch.tensor([True, False, True, True])
    graph = item_hypergraph({"image": x, "text": x}, k=2, masks={"image": mask})
    members = [
        graph.edge_vertices[a:b].tolist() for a, b in zip(graph.edge_indptr[:-1], graph.edge_indptr[1:], strict=True)
    ]
    # The zero row 3 has no features either; in "text" items 0 and 2 list 1, and 1 lists 2.
    assert members[:4] == [[0, 2], [], [0, 2], []]
    assert members[4:] == [[0], [0, 1, 2], [1, 2], []]


def test_item_hypergraph_drops_or_keeps_nonpositive_similarities():
    x = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
    assert item_hypergraph({"image": x}, k=2).hyperedge_index.tolist() == [[0, 1], [0, 1]]
    kept = item_hypergraph({"image": x}, k=2, keep_nonpositive=True)
    assert kept.hyperedge_index.tolist() == [[0, 0, 1, 1], [0, 1, 0, 1]]
    torch.testing.assert_close(kept.vertex_values, torch.tensor([1.0, -(2**-0.5), -(2**-0.5), 1.0]))
    positive = item_hypergraph({"image": x.abs()}, k=2, keep_nonpositive=True)
    assert positive.vertex_values is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 4, 2), "user_item_index must be a tensor or an array with __dlpack__, got NoneType"),
        ((torch.zeros(3, 1).long(), 4, 2), r"user_item_index must be \[2, nnz\], got shape \(3, 1\)"),
        ((torch.zeros(2, 1), 4, 2), "user_item_index must be int32 or int64, got torch.float32"),
        ((INDEX, 3, 2), r"user_item_index\[0, 3\] must be < num_users = 3, got 3"),
        ((INDEX, 4, 1), r"user_item_index\[1, 3\] must be < num_items = 1, got 1"),
    ],
)
def test_user_hypergraph_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        user_hypergraph(*arguments)


X = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        ({}, {}, "features must hold at least one modality, got none"),
        ({"image": X}, {"masks": {"audio": X[:, 0] > 0}}, r"masks names modalities that features lacks: \['audio'\]"),
        ({"image": X[0]}, {}, r"features\['image'\] must be \[num_items, dim\], got shape \(2,\)"),
        ({"image": X, "text": X[:2]}, {}, r"features\['text'\] must have 3 rows, got 2"),
        (
            {"image": X},
            {"masks": {"image": torch.ones(3)}},
            r"masks\['image'\] must be \[3\] bool, got \(3,\) torch.float32",
        ),
        (
            {"image": X},
            {"masks": {"image": torch.ones(3, dtype=torch.bool, device="meta")}},
            r"masks\['image'\] must be on cpu like the features, got meta",
        ),
        (
            {"image": X, "text": X.to("meta")},
            {},
            r"features\['text'\] must hold numbers, got a tensor on the meta device",
        ),
        ({"image": X}, {"k": 4}, r"features\['image'\]: k must be between 1 and the number of rows 3, got 4"),
        ({"text": X / 0}, {}, r"features\['text'\]: x must be finite, got NaN or infinity first in row 0"),
    ],
)
def test_item_hypergraph_refuses(features, options, message):
    with pytest.raises(ValueError, match=message):
        item_hypergraph(features, **{"k": 2, **options})


class TestAttributes:
    INDEX = torch.tensor([[0, 1, 2, 4, 1, 3], [0, 0, 0, 0, 1, 1]])

    def test_values_are_hyperedges_behind_those_of_neighbours(self):
        features = torch.eye(5) + 0.1
        graph = item_hypergraph({"text": features}, 2, attributes={"brand": self.INDEX.int()})
        neighbours = item_hypergraph({"text": features}, 2)
        assert (graph.num_vertices, graph.num_hyperedges) == (5, 7)
        edge = graph.hyperedge_index[1]
        torch.testing.assert_close(graph.hyperedge_index[:, edge < 5], neighbours.hyperedge_index)
        assert set(zip(*graph.hyperedge_index[:, edge >= 5].tolist(), strict=True)) == {
            *((item, 5) for item in (0, 1, 2, 4)),
            *((item, 6) for item in (1, 3)),
        }

    def test_a_value_counts_as_much_in_a_degree_as_k_neighbours(self):
        graph = item_hypergraph({}, 3, attributes={"brand": self.INDEX}, num_items=6)
        assert graph.hyperedge_weight.tolist() == [3 / 4, 3 / 2]
        x = torch.randn(6, 2)
        h = torch.zeros(6, 2).index_put((self.INDEX[0], self.INDEX[1]), torch.ones(6))
        a = h @ torch.diag(torch.tensor([3 / 4, 3 / 2])) @ h.T
        assert a.sum(1).tolist() == [3, 6, 3, 3, 3, 0]
        root = torch.where(a.sum(1) > 0, a.sum(1).rsqrt(), 0)
        found = ops.hypergraph_conv(x, graph, hyperedge_degree=False)
        torch.testing.assert_close(found, root[:, None] * a @ (root[:, None] * x))

    def test_an_attribute_without_values_adds_nothing(self):
        graph = item_hypergraph({"text": torch.eye(3)}, 2, attributes={"brand": torch.zeros(2, 0, dtype=torch.int64)})
        assert (graph.num_hyperedges, graph.hyperedge_weight.tolist()) == (3, [1, 1, 1])

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_items": 4}, r"attributes\['brand'\]\[0, 3\] must be < num_items = 4, got 4"),
            ({"attributes": {}}, "features must hold at least one modality, got none"),
            ({"attributes": {"brand": torch.ones(3)}}, r"attributes\['brand'\] must be \[2, nnz\], got shape \(3,\)"),
        ],
    )
    def test_wrong_attributes_are_named(self, options, message):
        with pytest.raises(ValueError, match=message):
            item_hypergraph({}, 2, **({"attributes": {"brand": self.INDEX}} | options))
