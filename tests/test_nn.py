"""Modules: PyTorch Geometric's layer, the loss with a learned temperature, LightGCN."""

from __future__ import annotations

import inspect

import pytest
import torch

from hellm import Hypergraph, nn, ops

INDEX = torch.tensor([[0, 1, 2, 1, 2, 3, 5], [0, 0, 0, 1, 1, 1, 3]])  # vertex 4 isolated, hyperedge 2 empty


def rows(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def documented(x, index, weight, num_edges, theta):
    """D^-1 H W B^-1 H^T X Theta with dense float64 matrices."""
    h = torch.zeros(x.shape[0], num_edges, dtype=torch.float64)
    h.index_put_((index[0], index[1]), torch.ones((), dtype=torch.float64), accumulate=True)
    weight = torch.ones(num_edges, dtype=torch.float64) if weight is None else weight.double()
    inverse = [(d > 0) / torch.where(d > 0, d, 1.0) for d in (h @ weight, h.sum(0))]
    return (
        torch.diag(inverse[0]) @ h @ torch.diag(weight) @ torch.diag(inverse[1]) @ h.T @ x.double() @ theta.double().T
    )


@pytest.mark.parametrize("channels", [(6, 3), (3, 6)], ids=["narrowing", "widening"])
@pytest.mark.parametrize("weighted", [False, True])
def test_hypergraph_conv_is_the_documented_formula(channels, weighted):
    layer = nn.HypergraphConv(*channels)
    torch.nn.init.normal_(layer.bias)
    x = rows(6, channels[0])
    weight = (rows(5, seed=1).abs() + 0.1).requires_grad_() if weighted else None
    out = layer(x, INDEX, weight, num_edges=5)
    expected = documented(x, INDEX, weight, 5, layer.lin.weight) + layer.bias
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    wanted = [layer.lin.weight, layer.bias, *([weight] if weighted else [])]
    cotangent = rows(6, channels[1], seed=2)
    found = torch.autograd.grad(out, wanted, cotangent)
    for f, e in zip(found, torch.autograd.grad(expected, wanted, cotangent.double()), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "num_vertices", "num_edges"),
    [
        pytest.param(INDEX, 6, None, id="isolated"),
        pytest.param(torch.tensor([[0, 1, 1, 2], [0, 4, 6, 7]]), 3, None, id="more-hyperedges"),
        pytest.param(torch.zeros(2, 0, dtype=torch.int64), 4, 3, id="empty-index"),
        pytest.param(torch.zeros(2, 0, dtype=torch.int64), 4, None, id="empty-index-no-hyperedge"),
        pytest.param(INDEX, 6, 9, id="trailing-hyperedges"),
    ],
)
def test_hypergraph_conv_equals_pyg_without_weights(index, num_vertices, num_edges):
    pyg = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    theirs, ours = pyg.HypergraphConv(5, 4), nn.HypergraphConv(5, 4)
    torch.nn.init.normal_(theirs.bias)
    assert theirs.state_dict().keys() == ours.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    x = rows(num_vertices, 5)
    torch.testing.assert_close(ours(x, index, num_edges=num_edges), theirs(x, index, num_edges=num_edges))


def test_hypergraph_conv_initialises_like_pyg():
    layer = nn.HypergraphConv(30, 50)
    bound = (6 / 80) ** 0.5
    assert 0.9 * bound < float(layer.lin.weight.detach().abs().max()) <= bound
    assert torch.equal(layer.bias, torch.zeros(50))
    assert nn.HypergraphConv(3, 2, bias=False).bias is None
    assert list(nn.HypergraphConv(3, 2, bias=False).state_dict()) == ["lin.weight"]


def test_hypergraph_conv_takes_a_hypergraph():
    layer, x, weight = nn.HypergraphConv(4, 3), rows(6, 4), rows(5).abs()
    graph = Hypergraph(INDEX, num_vertices=6, num_hyperedges=5)
    assert torch.equal(layer(x, graph), layer(x, INDEX, num_edges=5))
    assert torch.equal(layer(x, graph, weight), layer(x, INDEX, weight, num_edges=5))
    assert torch.equal(layer(x, graph.with_weight(weight), num_edges=5), layer(x, INDEX, weight, num_edges=5))
    assert graph.hyperedge_weight is None


def test_hypergraph_conv_refuses():
    with pytest.raises(ValueError, match="in_channels must be >= 1, got -1"):
        nn.HypergraphConv(-1, 3)
    with pytest.raises(ValueError, match="out_channels must be >= 1, got 0"):
        nn.HypergraphConv(3, 0)
    layer = nn.HypergraphConv(4, 3)
    with pytest.raises(ValueError, match="num_edges must be 4 like hyperedge_index, got 7"):
        layer(rows(6, 4), Hypergraph(INDEX), num_edges=7)
    with pytest.raises(ValueError, match=r"hyperedge_index\[0, 6\] must be < num_vertices = 4, got 5"):
        layer(rows(4, 4), INDEX)
    with pytest.raises(ValueError, match=r"hyperedge_weight must be \[4\], got shape \(3,\)"):
        layer(rows(6, 4), INDEX, torch.ones(3))


def test_info_nce_loss_is_the_operator():
    anchor, positive, chosen = rows(9, 4), rows(9, 4, seed=1), torch.tensor([2, 5])
    assert torch.equal(nn.InfoNCELoss()(anchor, positive), ops.info_nce(anchor, positive, 0.2))
    loss = nn.InfoNCELoss(0.4, intra_view_negatives=False, reduction="none", precision="medium")
    expected = ops.info_nce(
        anchor, positive, 0.4, intra_view_negatives=False, reduction="none", precision="medium", rows=chosen
    )
    assert torch.equal(loss(anchor, positive, rows=chosen), expected)
    assert not list(loss.parameters())


def test_info_nce_loss_learns_its_temperature():
    anchor = rows(16, 8)
    positive = anchor + 0.1 * rows(16, 8, seed=1)
    loss = nn.InfoNCELoss(0.5, learnable_temperature=True)
    assert loss.temperature.item() == pytest.approx(0.5)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    values = []
    for _ in range(20):
        optimizer.zero_grad()
        value = loss(anchor, positive)
        value.backward()
        optimizer.step()
        values.append(value.item())
    # Well aligned views are told apart better the sharper the temperature.
    assert values == sorted(values, reverse=True)
    assert 0 < loss.temperature.item() < 0.45
    restored = nn.InfoNCELoss(learnable_temperature=True)
    restored.load_state_dict(loss.state_dict())
    assert torch.equal(restored.temperature, loss.temperature)


def test_info_nce_loss_refuses():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        nn.InfoNCELoss(0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        nn.InfoNCELoss(reduction="max")(rows(2, 2), rows(2, 2))


def test_lightgcn_propagation_is_the_operator():
    graph, users, items = Hypergraph(INDEX, num_vertices=6), rows(6, 4), rows(4, 4, seed=1)
    for found, expected in zip(
        nn.LightGCNPropagation(3)(users, items, graph),
        ops.bipartite_propagate(users, items, graph, num_layers=3),
        strict=True,
    ):
        assert torch.equal(found, expected)
    with pytest.raises(ValueError, match="num_layers must be >= 0, got -1"):
        nn.LightGCNPropagation(-1)


def test_modules_say_what_they_are():
    assert repr(nn.HypergraphConv(4, 3, bias=False)) == "HypergraphConv(4, 3)"
    assert "temperature=0.3" in repr(nn.InfoNCELoss(0.3, learnable_temperature=True))
    assert repr(nn.LightGCNPropagation(3)) == "LightGCNPropagation(num_layers=3)"


def test_modules_compile_to_one_graph():
    torch.compiler.reset()
    graph = Hypergraph(INDEX, num_vertices=6)
    layer, loss, propagation = (
        nn.HypergraphConv(4, 4),
        nn.InfoNCELoss(learnable_temperature=True),
        nn.LightGCNPropagation(),
    )
    weight = (rows(4).abs() + 0.1).requires_grad_()

    def step(x, items):
        users, items = propagation(x, items, graph)
        return loss(layer(x, graph, weight), users) + items.square().sum()

    parameters = [*layer.parameters(), *loss.parameters(), weight]
    values = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value = function(rows(6, 4), rows(4, 4, seed=1))
        values.append([value.detach(), *torch.autograd.grad(value, parameters)])
    for eager, compiled in zip(*values, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_hypergraph_conv_is_called_as_in_pyg():
    """(x, hyperedge_index, hyperedge_weight, hyperedge_attr, num_edges): attributes are for attention alone."""
    layer, x, weight = nn.HypergraphConv(16, 32), rows(6, 16), rows(4).abs()
    expected = layer(x, INDEX, weight)
    assert expected.shape == (6, 32)
    for arguments in ((rows(4, 16),), (None,), (None, 4), (rows(4, 16), 4)):
        assert torch.equal(layer(x, INDEX, weight, *arguments), expected)
    assert torch.equal(layer(x, INDEX, hyperedge_weight=weight, hyperedge_attr=None, num_edges=4), expected)
    wide = nn.HypergraphConv(16, 32, False, "node", 1, True, 0.2, 0.0, False)
    assert wide.bias is None and str(wide) == "HypergraphConv(16, 32)"
    with pytest.raises(ValueError, match="use_attention must be False, this layer has no attention"):
        nn.HypergraphConv(16, 32, use_attention=True, heads=2)


def test_hypergraph_conv_signature_is_that_of_pyg():
    pyg = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    for method in ("__init__", "forward"):
        theirs, ours = (list(inspect.signature(getattr(m.HypergraphConv, method)).parameters) for m in (pyg, nn))
        assert ours == [name for name in theirs if name != "kwargs"]
    assert repr(pyg.HypergraphConv(16, 32)) == repr(nn.HypergraphConv(16, 32))


def test_attention_coefficients_of_ones_own_learn():
    layer, x = nn.HypergraphConv(4, 3), rows(6, 4)
    attention = torch.rand(7, requires_grad=True)
    layer(x, Hypergraph(INDEX, incidence_weight=attention.softmax(0))).square().sum().backward()
    assert attention.grad.abs().min() > 0


def test_hypergraph_conv_of_negative_weights_is_the_formula():
    layer, x, weight = nn.HypergraphConv(4, 3, bias=False), rows(6, 4), torch.tensor([-2.0, -1.0, 1.0, 1.0])
    h = torch.zeros(6, 4).index_put((INDEX[0], INDEX[1]), torch.ones(7))
    inverse = [torch.where(d == 0, 0.0, 1 / d) for d in (h @ weight, h.sum(0))]
    expected = inverse[0][:, None] * (h @ ((weight * inverse[1])[:, None] * (h.T @ layer.lin(x))))
    torch.testing.assert_close(layer(x, INDEX, weight), expected)
