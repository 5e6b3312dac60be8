"""Whatever is given for an argument, the error names it; nothing reaches a kernel that it was not made for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hellm import Hypergraph, item_hypergraph, nn, ops, user_hypergraph

INDEX = torch.tensor([[0, 1, 2, 2, 3, 4, 5], [0, 0, 0, 1, 1, 2, 2]])
GRAPH, X, TARGET = Hypergraph(INDEX), torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)

WRONG = {
    "none": None,
    "list": [1.0],
    "text": "a",
    "integer": 3,
    "negative": -3,
    "number": 2.5,
    "nan": float("nan"),
    "boolean": True,
    "dictionary": {},
    "hypergraph": GRAPH,
    "vector": torch.zeros(9),
    "cube": torch.zeros(2, 2, 2),
    "complex": torch.zeros(6, 4, dtype=torch.complex64),
    "integers": torch.zeros(6, 4, dtype=torch.int32),
    "booleans": torch.zeros(6, 4, dtype=torch.bool),
    "float8": torch.zeros(6, 4, dtype=torch.float8_e4m3fn),
    "sparse": torch.zeros(6, 4).to_sparse(),
    "nested": torch.nested.as_nested_tensor([torch.zeros(2, 3), torch.zeros(4, 3)], layout=torch.jagged),
    "objects": np.zeros((6, 4), dtype=object),
    "meta": torch.zeros(6, 4, device="meta"),
}

# Argument -> the call that it goes into, and the wrong values that are right there.
CALLS = {
    "hypergraph_conv x": (lambda a: ops.hypergraph_conv(a, GRAPH), ()),
    "hypergraph_conv hypergraph": (lambda a: ops.hypergraph_conv(X, a), ("hypergraph",)),
    "hypergraph_conv normalization": (lambda a: ops.hypergraph_conv(X, GRAPH, normalization=a), ()),
    "hypergraph_conv hyperedge_degree": (lambda a: ops.hypergraph_conv(X, GRAPH, hyperedge_degree=a), ("boolean",)),
    "hypergraph_conv self_loops": (lambda a: ops.hypergraph_conv(X, GRAPH, self_loops=a), ("boolean",)),
    "hypergraph_conv num_layers": (lambda a: ops.hypergraph_conv(X, GRAPH, num_layers=a), ("integer",)),
    "incidence_product x": (lambda a: ops.incidence_product(a, GRAPH), ()),
    "incidence_product hypergraph": (lambda a: ops.incidence_product(X[:3], a), ("hypergraph",)),
    "incidence_product transpose": (lambda a: ops.incidence_product(X, GRAPH, transpose=a), ("boolean",)),
    "bipartite_propagate user_x": (lambda a: ops.bipartite_propagate(a, X[:3], GRAPH), ()),
    "bipartite_propagate item_x": (lambda a: ops.bipartite_propagate(X, a, GRAPH), ()),
    "bipartite_propagate hypergraph": (lambda a: ops.bipartite_propagate(X, X[:3], a), ("hypergraph",)),
    "bipartite_propagate num_layers": (lambda a: ops.bipartite_propagate(X, X[:3], GRAPH, num_layers=a), ("integer",)),
    "info_nce anchor": (lambda a: ops.info_nce(a, X), ()),
    "info_nce positive": (lambda a: ops.info_nce(X, a), ()),
    "info_nce temperature": (lambda a: ops.info_nce(X, X, a), ("integer", "number")),
    "info_nce intra_view_negatives": (lambda a: ops.info_nce(X, X, intra_view_negatives=a), ("boolean",)),
    "info_nce reduction": (lambda a: ops.info_nce(X, X, reduction=a), ()),
    "info_nce precision": (lambda a: ops.info_nce(X, X, precision=a), ("none",)),
    "info_nce rows": (lambda a: ops.info_nce(X, X, rows=a), ("none",)),
    "item_cross_entropy hidden": (lambda a: ops.item_cross_entropy(a, X, TARGET), ()),
    "item_cross_entropy item_embedding": (lambda a: ops.item_cross_entropy(X, a, TARGET), ()),
    "item_cross_entropy target": (lambda a: ops.item_cross_entropy(X, X, a), ()),
    "item_cross_entropy bias": (lambda a: ops.item_cross_entropy(X, X, TARGET, bias=a), ("none",)),
    "item_cross_entropy reduction": (lambda a: ops.item_cross_entropy(X, X, TARGET, reduction=a), ()),
    "knn x": (lambda a: ops.knn(a, 1), ("meta",)),
    "knn k": (lambda a: ops.knn(X, a), ("integer",)),
    "knn metric": (lambda a: ops.knn(X, 1, metric=a), ()),
    "Hypergraph hyperedge_index": (Hypergraph, ()),
    "Hypergraph num_vertices": (lambda a: Hypergraph(INDEX, num_vertices=a), ("none",)),
    "Hypergraph num_hyperedges": (lambda a: Hypergraph(INDEX, num_hyperedges=a), ("none", "integer")),
    "Hypergraph hyperedge_weight": (lambda a: Hypergraph(INDEX, hyperedge_weight=a), ("none",)),
    "Hypergraph incidence_weight": (lambda a: Hypergraph(INDEX, incidence_weight=a), ("none",)),
    "with_weight hyperedge_weight": (GRAPH.with_weight, ("none",)),
    "to device": (GRAPH.to, ()),
    "scales normalization": (GRAPH.scales, ()),
    "scales dtype": (lambda a: GRAPH.scales(dtype=a), ()),
    "bipartite_scales dtype": (GRAPH.bipartite_scales, ()),
    "user_hypergraph user_item_index": (lambda a: user_hypergraph(a, 6, 3), ()),
    "user_hypergraph num_users": (lambda a: user_hypergraph(INDEX, a, 3), ()),
    "user_hypergraph num_items": (lambda a: user_hypergraph(INDEX, 6, a), ("integer",)),
    "item_hypergraph features": (item_hypergraph, ()),
    "item_hypergraph features['a']": (lambda a: item_hypergraph({"a": a}, k=1), ()),
    "item_hypergraph k": (lambda a: item_hypergraph({"a": X}, k=a), ("integer",)),
    "item_hypergraph masks": (lambda a: item_hypergraph({"a": X}, k=1, masks=a), ("none", "dictionary")),
    "item_hypergraph masks['a']": (lambda a: item_hypergraph({"a": X}, k=1, masks={"a": a}), ()),
    "item_hypergraph keep_nonpositive": (lambda a: item_hypergraph({"a": X}, k=1, keep_nonpositive=a), ("boolean",)),
    "HypergraphConv in_channels": (lambda a: nn.HypergraphConv(a, 3), ("integer",)),
    "HypergraphConv out_channels": (lambda a: nn.HypergraphConv(3, a), ("integer",)),
    "HypergraphConv bias": (lambda a: nn.HypergraphConv(3, 3, bias=a), ("boolean",)),
    "HypergraphConv x": (lambda a: nn.HypergraphConv(4, 3)(a, INDEX), ()),
    "HypergraphConv hyperedge_index": (lambda a: nn.HypergraphConv(4, 3)(X, a), ("hypergraph",)),
    "HypergraphConv hyperedge_weight": (lambda a: nn.HypergraphConv(4, 3)(X, INDEX, a), ("none",)),
    "HypergraphConv num_edges": (lambda a: nn.HypergraphConv(4, 3)(X, INDEX, num_edges=a), ("none", "integer")),
    "InfoNCELoss temperature": (nn.InfoNCELoss, ("integer", "number")),
    "LightGCNPropagation num_layers": (nn.LightGCNPropagation, ("integer",)),
}
# What an argument is called where another checks it, or where it is missing for all others.
ALSO = {"num_edges": "num_hyperedges", "features['a']": "features", "anchor": "positive", "user_x": "hypergraph"}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("argument", CALLS)
def test_a_wrong_argument_is_named(argument, kind):
    call, right = CALLS[argument]
    if kind in right:
        call(WRONG[kind])
        return
    name = argument.split(" ", 1)[1]
    with pytest.raises(ValueError) as raised:
        call(WRONG[kind])
    message = str(raised.value)
    assert (
        name in message
        or ALSO.get(name, "hypergraph" if kind == "meta" else name) in message
        or (kind == "meta" and "on cpu" in message)
    ), message


@pytest.mark.parametrize("number", [np.float32(0.2), np.float64(0.2), np.array(0.2), torch.tensor(0.2), 1, np.int64(1)])
def test_info_nce_takes_any_number_for_temperature(number):
    found = ops.info_nce(X, X.flip(0), number if not isinstance(number, np.ndarray) else number.astype(np.float64))
    torch.testing.assert_close(found, ops.info_nce(X, X.flip(0), float(number)))


@pytest.mark.parametrize("temperature", [-1.0, 0.0, float("nan")])
def test_info_nce_refuses_a_temperature_in_a_tensor(temperature, backend):
    for value in (temperature, torch.tensor(temperature), np.float32(temperature)):
        with pytest.raises(ValueError, match="temperature must be > 0, got"):
            ops.info_nce(X, X, value)


def test_knn_takes_whole_numbers_of_other_libraries():
    for k in (2, np.int64(2), torch.tensor(2)):
        assert ops.knn(X, k)[0].shape == (6, 2)
    with pytest.raises(ValueError, match=r"k must be an integer, got 2\.0"):
        ops.knn(X, 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_similarities_are_at_most_one(dtype, kernel):
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    similarity = ops.knn(torch.cat([x, -x]), 600)[1]
    assert similarity.max() <= 1 and similarity.min() >= -1


@pytest.mark.parametrize("given", ["hyperedge_weight", "incidence_weight"])
def test_bipartite_propagate_does_not_ignore_weights(given):
    graph = Hypergraph(INDEX, **{given: torch.ones(3 if given == "hyperedge_weight" else 7)})
    with pytest.raises(ValueError, match=f"hypergraph must have no {given} here, got one"):
        ops.bipartite_propagate(X, X[:3], graph)


@pytest.mark.parametrize(
    ("hidden", "items"),
    [(torch.float32, torch.float64), (torch.float64, torch.float32), (torch.bfloat16, torch.float64)],
)
def test_autocast_does_not_hide_float64(hidden, items, backend):
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=f"item_embedding must be {hidden} like hidden, got {items}"):
            ops.item_cross_entropy(X.to(hidden), X.to(items), TARGET)
        with pytest.raises(ValueError, match=f"positive must be {hidden} like anchor, got {items}"):
            ops.info_nce(X.to(hidden), X.to(items))
        with pytest.raises(ValueError, match=f"item_x must be {hidden} like user_x, got {items}"):
            ops.bipartite_propagate(X.to(hidden), X[:3].to(items), GRAPH)
        assert ops.item_cross_entropy(X.double(), X.double(), TARGET).dtype == torch.float64
        assert ops.item_cross_entropy(X.bfloat16(), X, TARGET).isfinite()


def test_plain_torch_sums_hyperedges_in_float32(backend):
    """A mean of 70 in float16, of 1,000 rows whose sum it does not hold."""
    graph = Hypergraph(torch.stack([torch.arange(1000), torch.zeros(1000, dtype=torch.int64)]))
    x = torch.full((1000, 4), 70.0, dtype=torch.float16)
    assert torch.equal(ops.hypergraph_conv(x, graph, normalization="row"), x)
    ones = torch.ones(1000, 2, dtype=torch.bfloat16)
    assert (ops.incidence_product(ones, graph, transpose=True) == 1000).all()
