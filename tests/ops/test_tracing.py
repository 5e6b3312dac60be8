"""Operators and hypergraphs where torch does not simply compute: traced, faked, exported, compiled, checkpointed."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPHS, rows
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from hellm import Hypergraph, nn, ops

CASE = GRAPHS["odd-63"]
GRAPH = CASE.build()


class Model(torch.nn.Module):
    def __init__(self, graph: Hypergraph) -> None:
        super().__init__()
        self.graph, self.conv, self.loss = graph, nn.HypergraphConv(4, 4), nn.InfoNCELoss(learnable_temperature=True)

    def forward(self, x):
        users, _ = ops.bipartite_propagate(x, x[: self.graph.num_hyperedges], self.graph)
        spread = ops.hypergraph_conv(users, self.graph, hyperedge_degree=False, self_loops=False)
        return self.loss(self.conv(spread, self.graph), x)


def in_fake_mode(model, x):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(x))


def in_inference_mode(model, x):
    with torch.inference_mode():
        model(x)


def in_checkpoint(model, x):
    checkpoint(model, x.clone().requires_grad_(), use_reentrant=False).backward()


WAYS = {
    "export": lambda model, x: torch.export.export(model, (x,)),
    "strict export": lambda model, x: torch.export.export(model, (x,), strict=True),
    "fake tensors": in_fake_mode,
    "make_fx": lambda model, x: make_fx(model)(x),
    "symbolic make_fx": lambda model, x: make_fx(model, tracing_mode="symbolic", _allow_non_fake_inputs=True)(x),
    "jit.trace": lambda model, x: torch.jit.trace(model, (x,), check_trace=False),
    "inference mode": in_inference_mode,
    "compile": lambda model, x: torch.compile(model, fullgraph=True, backend="aot_eager")(x),
    "torch.func.grad": lambda model, x: torch.func.grad(model)(x),
    "vmap": lambda model, x: torch.vmap(model)(torch.stack([x, x])),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "checkpoint": in_checkpoint,
    "compiled checkpoint": lambda model, x: torch.compile(in_checkpoint, backend="aot_eager")(model, x),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_hypergraph_is_the_same_after(way):
    """What it keeps is plain, and another model that trains with it gets what it would have got."""
    torch.compiler.reset()
    graph, x = CASE.build(), rows(63, 4)
    WAYS[way](Model(graph), x)
    kept = [t for scales in graph._cache.values() for t in scales if t is not None]
    assert all(type(t) is torch.Tensor and not t.requires_grad and not t.is_inference() for t in kept)
    results = []
    for used in (graph, CASE.build()):
        torch.manual_seed(0)
        model, leaf = Model(used), x.clone().requires_grad_()
        value = model(leaf)
        assert type(value) is torch.Tensor
        value.backward()
        results.append((value.detach(), leaf.grad, model.conv.lin.weight.grad))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_exported_and_traced_programs_give_what_the_model_gives():
    graph, x = CASE.build(), rows(63, 4)
    torch.manual_seed(0)
    model = Model(graph)
    expected = model(x)
    for program in (torch.export.export(model, (x,)).module(), make_fx(model)(x)):
        torch.testing.assert_close(program(x), expected)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("learned", [False, True])
def test_a_checkpoint_compiles_to_one_graph(learned, warm):
    torch.compiler.reset()
    weight = (rows(17).abs() + 0.1).requires_grad_(learned)
    graph, other = (CASE.build(weight if learned else None) for _ in range(2))
    x = rows(63, 3).requires_grad_()
    if warm:
        ops.hypergraph_conv(x, graph)

    def step(z, graph):
        return checkpoint(lambda q: ops.hypergraph_conv(q, graph, num_layers=2).square().sum(), z, use_reentrant=False)

    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True, backend="aot_eager")(x, graph), x)
    (expected,) = torch.autograd.grad(step(x, other), x)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("change", ["in place", "data", "assigned", "numpy"])
def test_compiled_code_follows_a_changed_weight(change):
    torch.compiler.reset()
    weight = rows(17).abs() + 0.1
    graph, x = CASE.build(weight), rows(63, 4)
    compiled = torch.compile(
        lambda x: ops.hypergraph_conv(x, graph, normalization="none"), fullgraph=True, backend="aot_eager"
    )
    before = compiled(x)
    if change == "in place":
        weight.mul_(3)
    elif change == "data":
        weight.data = weight * 3
    elif change == "assigned":
        graph.hyperedge_weight = weight * 3
    else:
        weight.numpy()[:] *= 3
    torch.testing.assert_close(compiled(x), 3 * before)


def test_a_symbolic_temperature_compiles_to_one_graph():
    x, losses = rows(9, 4), [nn.InfoNCELoss(0.1), nn.InfoNCELoss(0.2)]
    torch.compiler.reset()
    scheduled = torch.compile(lambda x, t: ops.info_nce(x, x.flip(0), t), fullgraph=True, backend="aot_eager")
    for temperature in (0.1, 0.2, 0.3, 1):
        torch.testing.assert_close(scheduled(x, temperature), ops.info_nce(x, x.flip(0), temperature))
    of_modules = torch.compile(lambda loss, x: loss(x, x.flip(0)), fullgraph=True, backend="aot_eager")
    dynamic = torch.compile(lambda loss, x: loss(x, x.flip(0)), fullgraph=True, backend="aot_eager", dynamic=True)
    for loss in losses:
        torch.testing.assert_close(of_modules(loss, x), loss(x, x.flip(0)))
        torch.testing.assert_close(dynamic(loss, x), loss(x, x.flip(0)))
    with pytest.raises(Exception, match="temperature must be > 0"):
        scheduled(x, -1.0)
    with pytest.raises(ValueError, match=r"temperature must be > 0, got -1\.0"):
        torch.compile(lambda x, t: ops.info_nce(x, x, t), fullgraph=True, backend="aot_eager")(x, torch.tensor(-1.0))


def layer_on(device):
    with torch.device(device):
        return nn.HypergraphConv(4, 3)


def calls(device, graph):
    """Every operator on a device."""
    x, target = torch.empty(63, 4, device=device), torch.empty(63, dtype=torch.int64, device=device)
    items = x[:17]
    return {
        "hypergraph_conv": lambda: ops.hypergraph_conv(x, graph, self_loops=False),
        "weighted": lambda: ops.hypergraph_conv(x, graph.with_weight(torch.empty(17, device=device))),
        "incidence_product": lambda: ops.incidence_product(x, graph, transpose=True),
        "bipartite_propagate": lambda: ops.bipartite_propagate(x, items, graph)[1],
        "info_nce": lambda: ops.info_nce(x, x),
        "info_nce, rows": lambda: ops.info_nce(x, x, torch.empty((), device=device), rows=target, reduction="none"),
        "item_cross_entropy": lambda: ops.item_cross_entropy(x, items, target, reduction="none"),
        "knn": lambda: ops.knn(x, 5)[1],
        "HypergraphConv": lambda: layer_on(device)(x, graph),
    }


SHAPES = [(63, 4), (63, 4), (17, 4), (17, 4), (), (63,), (63,), (63, 5), (63, 3)]


@pytest.mark.parametrize(("name", "shape"), list(zip(calls("meta", GRAPH.to("meta")), SHAPES, strict=True)))
def test_operators_have_shapes_without_data(name, shape):
    found = calls("meta", GRAPH.to("meta"))[name]()
    assert found.is_meta and found.shape == shape
    with torch.autocast("cpu", torch.bfloat16):
        assert calls("meta", GRAPH.to("meta"))[name]().shape == shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert calls("cpu", GRAPH)[name]().shape == shape


def test_modules_say_what_they_are_without_data():
    for mode, temperature in ((torch.device("meta"), "?"), (FakeTensorMode(), "0.2")):
        with mode:
            modules = [nn.InfoNCELoss(learnable_temperature=True), nn.HypergraphConv(3, 2), nn.LightGCNPropagation()]
            assert repr(modules[0]).startswith(f"InfoNCELoss(temperature={temperature}, ")
            assert [repr(m) for m in modules[1:]] == ["HypergraphConv(3, 2)", "LightGCNPropagation(num_layers=2)"]


def test_knn_checks_values_in_compiled_code():
    torch.compiler.reset()
    compiled = torch.compile(lambda x: ops.knn(x, 2), fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match="x must be finite, got NaN or infinity first in row 1"):
        compiled(torch.tensor([[1.0], [float("nan")], [2.0]]))
