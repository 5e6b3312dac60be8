"""Hypergraph: both directions, degrees, scales, copies, and what is refused."""

from __future__ import annotations

import concurrent.futures
import copy
import io
import pickle
import threading

import numpy as np
import pytest
import torch

from hellm import Hypergraph, ops

#   hyperedge 0: vertices 0, 1, 2; hyperedge 1: vertices 1, 3; hyperedge 2: none; vertex 4 alone
INDEX = torch.tensor([[2, 0, 1, 3, 1], [0, 0, 0, 1, 1]])


@pytest.fixture
def graph():
    return Hypergraph(INDEX, num_vertices=5, num_hyperedges=3)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_both_directions_are_stored_in_order(dtype):
    graph = Hypergraph(INDEX.to(dtype), num_vertices=5, num_hyperedges=3)
    assert graph.vertex_indptr.tolist() == [0, 1, 3, 4, 5, 5]
    assert graph.vertex_edges.tolist() == [0, 0, 1, 0, 1]
    assert graph.edge_indptr.tolist() == [0, 3, 5, 5]
    assert graph.edge_vertices.tolist() == [0, 1, 2, 1, 3]
    assert graph.vertex_indptr.dtype == graph.edge_indptr.dtype == torch.int64
    assert graph.vertex_edges.dtype == graph.edge_vertices.dtype == torch.int32
    assert graph.vertex_values is graph.edge_values is None
    assert graph.hyperedge_index.tolist() == [[0, 1, 1, 2, 3], [0, 0, 1, 0, 1]]
    assert (graph.num_vertices, graph.num_hyperedges, graph.num_incidences) == (5, 3, 5)
    assert repr(graph) == "Hypergraph(num_vertices=5, num_hyperedges=3, num_incidences=5)"


def test_schedule_puts_like_rows_together_and_cuts_hubs():
    sizes = [3, 1025, 64, 9, 0, 1600, 8, 65, 1024]
    vertex = torch.cat([torch.arange(size) for size in sizes])
    index = torch.stack([vertex, torch.repeat_interleave(torch.arange(9), torch.tensor(sizes))])
    schedule = Hypergraph(index).edge_schedule
    # Hubs, other long rows, those over 8, the rest; each group in the order of the rows.
    assert schedule.row_order.tolist() == [1, 5, 7, 8, 2, 3, 0, 4, 6]
    assert schedule.hub_chunk_begin.tolist() == [0, 3, 7]
    assert (schedule.num_long, schedule.num_hub_chunks) == (4, 7)
    assert schedule.row_order.dtype == schedule.hub_chunk_begin.dtype == torch.int32
    nothing = Hypergraph(torch.zeros(2, 0, dtype=torch.int64)).vertex_schedule
    assert (nothing.row_order.numel(), nothing.hub_chunk_begin.tolist(), *nothing[2:]) == (0, [0], 0, 0)


def test_schedule_moves_with_the_hypergraph(graph):
    moved = graph.to("meta")
    for schedule in (moved.vertex_schedule, moved.edge_schedule, moved.with_weight(None).edge_schedule):
        assert schedule.row_order.is_meta and schedule.hub_chunk_begin.is_meta
    assert moved.vertex_schedule[2:] == graph.vertex_schedule[2:]


def test_scales_without_a_gradient_are_summed_in_order(monkeypatch):
    """index_add is not, on a GPU; what is exact in any order may use it."""
    generator = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randint(7, (90,), generator=generator), torch.randint(5, (90,), generator=generator)])
    weight = torch.rand(5, generator=generator)
    graph = Hypergraph(index, incidence_weight=torch.rand(90, generator=generator), hyperedge_weight=weight)
    learned = graph.with_weight(weight.clone().requires_grad_()).scales(dtype=torch.float64)
    monkeypatch.setattr(torch.Tensor, "index_add", None)
    for with_gradient, without in zip(learned, graph.scales(dtype=torch.float64), strict=True):
        assert with_gradient is without is None or torch.equal(with_gradient, without)
    assert graph.vertex_degree.tolist() == pytest.approx(
        [float(graph.vertex_values[a:b].double().sum()) for a, b in graph.vertex_indptr.unfold(0, 2, 1).tolist()]
    )


def test_sizes_default_to_the_largest_index():
    graph = Hypergraph(INDEX)
    assert (graph.num_vertices, graph.num_hyperedges) == (4, 2)
    nothing = Hypergraph(torch.zeros(2, 0, dtype=torch.int64))
    assert (nothing.num_vertices, nothing.num_hyperedges, nothing.num_incidences) == (0, 0, 0)


def test_degrees(graph):
    assert graph.vertex_degree.tolist() == [1, 2, 1, 1, 0]
    assert graph.hyperedge_degree.tolist() == [3, 2, 0]
    valued = Hypergraph(INDEX, num_vertices=5, incidence_weight=torch.tensor([0.5, 1.0, 2.0, 4.0, 8.0]))
    assert valued.vertex_degree.tolist() == [1.0, 10.0, 0.5, 4.0, 0.0]
    assert valued.hyperedge_degree.tolist() == [3.5, 12.0]
    assert valued.vertex_values.tolist() == [1.0, 2.0, 8.0, 0.5, 4.0]
    assert valued.edge_values.tolist() == [1.0, 2.0, 0.5, 8.0, 4.0]


def test_repeated_incidence_counts_each_time():
    repeated = Hypergraph(torch.tensor([[0, 0, 1], [0, 0, 0]]))
    valued = Hypergraph(torch.tensor([[0, 1], [0, 0]]), incidence_weight=torch.tensor([2.0, 1.0]))
    assert repeated.vertex_degree.tolist() == [2, 1]
    x = torch.randn(2, 3)
    for settings in ({}, {"self_loops": False}, {"normalization": "row", "hyperedge_degree": False}):
        torch.testing.assert_close(
            ops.hypergraph_conv(x, repeated, **settings), ops.hypergraph_conv(x, valued, **settings)
        )


def test_scales_by_hand(graph):
    """A = H diag(1/d_e) H^T: vertex 1 is in a hyperedge of 3 and one of 2; all row sums are numbers of hyperedges."""
    scales = graph.scales("symmetric", dtype=torch.float64)
    torch.testing.assert_close(scales.in_scale, torch.tensor([1, 2**-0.5, 1, 1, 0], dtype=torch.float64))
    torch.testing.assert_close(scales.edge_scale, torch.tensor([1 / 3, 1 / 2, 0], dtype=torch.float64))
    assert scales.out_scale is scales.in_scale
    assert scales.diagonal is None
    row = graph.scales("row", hyperedge_degree=False, self_loops=False)
    assert row.in_scale is row.edge_scale is None
    assert row.diagonal.tolist() == [1, 2, 1, 1, 0]
    torch.testing.assert_close(row.out_scale, torch.tensor([1 / 2, 1 / 3, 1 / 2, 1, 0]))
    assert graph.scales("none", hyperedge_degree=False) == (None, None, None, None)
    user, item = graph.bipartite_scales()
    torch.testing.assert_close(user, torch.tensor([1, 2**-0.5, 1, 1, 0]))
    torch.testing.assert_close(item, torch.tensor([3**-0.5, 2**-0.5, 0]))


def test_scales_accept_a_weight_made_in_inference_mode(graph):
    with torch.inference_mode():
        weight = torch.ones(3)
        assert graph.with_weight(weight).scales("row").out_scale.tolist() == [1, 0.5, 1, 1, 0]


def test_with_weight_and_to_share_the_incidence(graph):
    weighted = graph.with_weight(torch.tensor([1.0, 2.0, 3.0]))
    assert weighted.vertex_edges is graph.vertex_edges
    assert graph.hyperedge_weight is None
    assert weighted.with_weight(None).hyperedge_weight is None
    assert graph.to("cpu") is graph
    moved = weighted.to("meta")
    assert moved.device == moved.hyperedge_weight.device == torch.device("meta")
    assert weighted.device == torch.device("cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hyperedge_index": [[0], [0]]}, "hyperedge_index must be a tensor or an array with __dlpack__, got list"),
        ({"hyperedge_index": INDEX.T}, r"hyperedge_index must be \[2, nnz\], got shape \(5, 2\)"),
        ({"hyperedge_index": INDEX.float()}, "hyperedge_index must be int32 or int64, got torch.float32"),
        ({"hyperedge_index": torch.tensor([[0, -1], [0, 0]])}, r"hyperedge_index\[0, 1\] must be >= 0, got -1"),
        ({"hyperedge_index": torch.tensor([[0, 1], [-3, 0]])}, r"hyperedge_index\[1, 0\] must be >= 0, got -3"),
        ({"num_vertices": 3}, r"hyperedge_index\[0, 3\] must be < num_vertices = 3, got 3"),
        ({"num_hyperedges": 1}, r"hyperedge_index\[1, 3\] must be < num_hyperedges = 1, got 1"),
        ({"num_vertices": -1}, "num_vertices must be >= 0, got -1"),
        ({"hyperedge_weight": torch.ones(3)}, r"hyperedge_weight must be \[2\], got shape \(3,\)"),
        ({"hyperedge_weight": torch.ones(2).int()}, "hyperedge_weight must be floating point, got torch.int32"),
        (
            {"hyperedge_weight": torch.ones(2, device="meta")},
            "hyperedge_weight must be on cpu like the incidence, got meta",
        ),
        ({"incidence_weight": torch.ones(2)}, r"incidence_weight must be \[5\], got shape \(2,\)"),
        ({"incidence_weight": torch.ones(5).long()}, "incidence_weight must be floating point, got torch.int64"),
    ],
)
def test_hypergraph_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Hypergraph(**{"hyperedge_index": INDEX, **change})


def test_methods_refuse(graph):
    with pytest.raises(ValueError, match=r"hyperedge_weight must be \[3\], got shape \(2,\)"):
        graph.with_weight(torch.ones(2))
    with pytest.raises(ValueError, match=r"normalization must be one of .*, got 'rw'"):
        graph.scales("rw")


def _weights():
    return {
        "tensor": torch.ones(3),
        "frozen parameter": torch.nn.Parameter(torch.ones(3), requires_grad=False),
        "parameter": torch.nn.Parameter(torch.ones(3)),
        "array": np.ones(3, dtype=np.float32),
        "inference tensor": torch.inference_mode()(lambda: torch.ones(3))(),
    }


def _in_place(graph, weight):
    with torch.no_grad():
        weight *= 5


def _in_inference_mode(graph, weight):
    with torch.inference_mode():
        weight.mul_(5)


def _loaded(graph, weight):
    holder = torch.nn.Module()
    holder.weight = torch.nn.Parameter(weight, requires_grad=False)
    holder.load_state_dict({"weight": torch.full((3,), 5.0)})


def _trained(graph, weight):
    weight.grad = torch.full((3,), -4.0)
    torch.optim.SGD([weight], lr=1.0).step()


def _assigned(graph, weight):
    graph.hyperedge_weight = torch.full((3,), 5.0)


CHANGES = {
    "in place": (_in_place, ["tensor", "frozen parameter", "parameter", "array"]),
    "in inference mode": (_in_inference_mode, ["inference tensor"]),
    ".data": (lambda graph, weight: weight.data.mul_(5), ["tensor", "frozen parameter", "parameter"]),
    ".data =": (
        lambda graph, weight: setattr(weight, "data", torch.full((3,), 5.0)),
        ["tensor", "frozen parameter", "parameter"],
    ),
    "assigned": (_assigned, ["tensor", "frozen parameter", "parameter", "array", "inference tensor"]),
    "shared memory": (lambda graph, weight: weight.numpy().__imul__(5), ["tensor"]),
    "load_state_dict": (_loaded, ["tensor"]),
    "optimizer": (_trained, ["parameter"]),
}


@pytest.mark.parametrize(("change", "kind"), [(c, k) for c, (_, kinds) in CHANGES.items() for k in kinds])
def test_a_changed_weight_counts(graph, change, kind):
    weight = _weights()[kind]
    weighted, x = graph.with_weight(weight), torch.randn(5, 3)
    for settings in ({"self_loops": False}, {"hyperedge_degree": False}):
        ops.hypergraph_conv(x, weighted, normalization="none", **settings)
    before = ops.hypergraph_conv(x, weighted, normalization="none")
    CHANGES[change][0](weighted, weight)
    torch.testing.assert_close(ops.hypergraph_conv(x, weighted, normalization="none"), 5 * before)


def test_an_assigned_weight_is_checked(graph):
    with pytest.raises(ValueError, match=r"hyperedge_weight must be \[3\], got shape \(2,\)"):
        graph.hyperedge_weight = torch.ones(2)
    graph.hyperedge_weight = np.ones(3)
    assert torch.equal(graph.hyperedge_weight, torch.ones(3, dtype=torch.float64))
    graph.hyperedge_weight = None
    assert graph.hyperedge_weight is None


def test_scales_are_kept_while_nothing_changes(graph):
    assert graph.scales() is graph.scales()
    assert graph.scales() is not graph.scales("row")
    weighted = graph.with_weight(torch.ones(3))
    before = weighted.scales("row")
    assert weighted.scales("row") is before
    assert weighted.bipartite_scales() is graph.bipartite_scales()
    assert weighted.with_weight(None).scales() is graph.scales()
    learned = graph.with_weight(torch.ones(3, requires_grad=True))
    assert learned.scales().edge_scale.requires_grad
    assert learned.scales() is not learned.scales()


def test_incidence_values_keep_their_precision_and_learn():
    value = torch.rand(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = torch.randn(4, 3, dtype=torch.float64)
    dense = torch.zeros(4, 2, dtype=torch.float64).index_put((INDEX[0], INDEX[1]), value)
    for learned in (False, True):
        leaf = value.clone().requires_grad_(learned)
        graph = Hypergraph(INDEX, incidence_weight=leaf)
        assert graph.vertex_values.dtype == graph.edge_values.dtype == torch.float64
        torch.testing.assert_close(ops.incidence_product(x, graph, transpose=True), dense.T @ x, rtol=1e-14, atol=1e-14)
        assert ops.hypergraph_conv(x, graph).requires_grad is learned
    for _ in range(2):  # one graph serves every step
        ops.hypergraph_conv(x, graph).square().sum().backward()
    assert leaf.grad.abs().min() > 0
    with torch.no_grad():
        leaf.mul_(2)
    torch.testing.assert_close(ops.incidence_product(x, graph, transpose=True), 2 * dense.T @ x)


def test_constant_incidence_values_are_copied():
    value = torch.rand(5)
    graph = Hypergraph(INDEX, incidence_weight=value)
    before = graph.vertex_values.clone()
    value.zero_()
    assert torch.equal(graph.vertex_values, before)


def saved(graph):
    file = io.BytesIO()
    torch.save(graph, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("copied", [saved, copy.copy, copy.deepcopy, lambda graph: pickle.loads(pickle.dumps(graph))])
@pytest.mark.parametrize("kind", ["plain", "weighted", "valued", "learned"])
def test_copies_are_equal(kind, copied):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "plain": {},
        "weighted": {"hyperedge_weight": torch.nn.Parameter(torch.rand(3, generator=generator))},
        "valued": {"incidence_weight": torch.rand(5, generator=generator)},
        "learned": {"incidence_weight": torch.rand(5, generator=generator).requires_grad_()},
    }[kind]
    graph = Hypergraph(INDEX, num_vertices=5, num_hyperedges=3, **weights)
    x = torch.randn(5, 3, generator=generator)
    expected = ops.hypergraph_conv(x, graph, self_loops=False)
    found = copied(graph)
    assert repr(found) == repr(graph)
    assert torch.equal(ops.hypergraph_conv(x, found, self_loops=False), expected)
    assert ops.hypergraph_conv(x, found).requires_grad is expected.requires_grad


def test_a_copied_model_shares_its_weight_with_its_graph():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.value = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(5))
            self.graph = Hypergraph(INDEX, hyperedge_weight=self.weight, incidence_weight=self.value)

    for copied in (copy.deepcopy(Model()), pickle.loads(pickle.dumps(Model().graph.__getstate__()))):
        if isinstance(copied, torch.nn.Module):
            assert copied.graph.hyperedge_weight is copied.weight
            ops.hypergraph_conv(torch.randn(4, 2), copied.graph).square().sum().backward()
            assert copied.weight.grad is not None and copied.value.grad is not None
        else:
            assert isinstance(copied["incidence_weight"], torch.nn.Parameter)


def test_a_file_cannot_bring_an_index_out_of_range(graph):
    state = graph.__getstate__() | {"num_vertices": 2}
    with pytest.raises(ValueError, match=r"hyperedge_index\[0, 3\] must be < num_vertices = 2, got 2"):
        object.__new__(Hypergraph).__setstate__(state)


def test_many_threads_use_one_fresh_hypergraph():
    generator = torch.Generator().manual_seed(0)
    index = torch.stack(
        [torch.randint(300, (2000,), generator=generator), torch.randint(90, (2000,), generator=generator)]
    )
    x, weight = torch.randn(300, 8, generator=generator), torch.rand(90, generator=generator)

    def results(graph):
        weighted = graph.with_weight(weight.clone().requires_grad_())
        return [
            ops.hypergraph_conv(x, graph, self_loops=False),
            ops.hypergraph_conv(x, graph.with_weight(weight), normalization="row"),
            *ops.bipartite_propagate(x, x[:90], graph),
            *torch.autograd.grad(ops.hypergraph_conv(x, weighted).square().sum(), weighted.hyperedge_weight),
        ]

    expected = results(Hypergraph(index, num_vertices=300, num_hyperedges=90))
    for _ in range(5):
        fresh, barrier = Hypergraph(index, num_vertices=300, num_hyperedges=90), threading.Barrier(8)

        def together(_, fresh=fresh, barrier=barrier):
            barrier.wait()
            return results(fresh)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(together, range(8)))
        for one in found:
            assert all(torch.equal(f, e) for f, e in zip(one, expected, strict=True))


def test_a_hypergraph_made_in_inference_mode_trains():
    with torch.inference_mode():
        graph = Hypergraph(INDEX.clone(), hyperedge_weight=torch.ones(2), incidence_weight=torch.ones(5))
    x = torch.randn(4, 2, requires_grad=True)
    for used in (graph, graph.with_weight(torch.ones(2, requires_grad=True))):
        ops.hypergraph_conv(x, used).square().sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize("device", ["cpu", "cpu:0", torch.device("cpu", 0)])
def test_a_hypergraph_that_is_there_is_not_moved(graph, device):
    assert graph.to(device) is graph


def test_a_moved_hypergraph_keeps_learned_values():
    value = torch.rand(5, requires_grad=True)
    moved = Hypergraph(INDEX, incidence_weight=value).to("meta")
    assert moved.vertex_values.is_meta and moved.edge_values.requires_grad


def test_negative_degrees_are_scaled_not_dropped():
    """D^-1 A x, and the root of |D| on both sides: nothing is NaN, only a zero degree gives zero."""
    weight = torch.tensor([-2.0, -1.0, 1.0])
    index = torch.cat([INDEX, torch.tensor([[4], [2]])], 1)
    x = torch.randn(6, 3)
    h = torch.zeros(6, 3).index_put((index[0], index[1]), torch.ones(6))
    a = h @ torch.diag(weight / h.sum(0)) @ h.T
    degree = a.sum(1)
    assert (degree < 0).any() and degree[5] == 0
    inverse = torch.where(degree == 0, 0.0, 1 / degree)
    graph = Hypergraph(index, num_vertices=6, hyperedge_weight=weight)
    row = ops.hypergraph_conv(x, graph, normalization="row")
    torch.testing.assert_close(row, inverse[:, None] * a @ x)
    root = inverse.abs().sqrt()
    torch.testing.assert_close(ops.hypergraph_conv(x, graph), root[:, None] * a @ (root[:, None] * x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"hyperedge_index": [[0, 10**12], [0, 0]]},
            r"\[0, 1\] = 1000000000000 makes num_vertices 1000000000001 for 2",
        ),
        ({"hyperedge_index": [[0, 1], [2**31, 0]]}, r"\[1, 0\] = 2147483648 makes num_hyperedges .*: relabel the ids"),
        ({"hyperedge_index": [[0, 2 * 10**9], [0, 0]]}, "relabel the ids to 0, 1, 2, ..., or give num_vertices"),
        ({"num_vertices": 2**31}, r"num_vertices must be < 2\*\*31, got 2147483648"),
        ({"num_hyperedges": 10**12}, r"num_hyperedges must be < 2\*\*31, got 1000000000000"),
        ({"num_vertices": 6.0}, "num_vertices must be an integer, got 6.0"),
        ({"num_vertices": True}, "num_vertices must be an integer, got True"),
        ({"num_vertices": torch.tensor(6.0)}, "num_vertices must be an integer, got Tensor"),
        ({"num_hyperedges": torch.tensor(True)}, r"num_hyperedges must be an integer, got tensor\(True\)"),
        ({"num_hyperedges": np.True_}, "num_hyperedges must be an integer, got"),
        ({"num_hyperedges": "3"}, "num_hyperedges must be an integer, got str"),
        ({"num_vertices": torch.tensor(-1)}, "num_vertices must be >= 0, got -1"),
    ],
)
def test_hypergraph_refuses_sizes(arguments, message):
    if "hyperedge_index" in arguments:
        arguments = arguments | {"hyperedge_index": torch.tensor(arguments["hyperedge_index"])}
    with pytest.raises(ValueError, match=message):
        Hypergraph(**{"hyperedge_index": INDEX, **arguments})


@pytest.mark.parametrize("size", [6, np.int64(6), np.int32(6), torch.tensor(6), np.array(6)])
def test_hypergraph_takes_whole_numbers(size):
    graph = Hypergraph(INDEX, num_vertices=size)
    assert type(graph.num_vertices) is int and graph.num_vertices == 6


def test_large_ids_are_taken_where_the_size_is_given():
    graph = Hypergraph(torch.tensor([[0, 11_000_000], [0, 0]]), num_vertices=11_000_001)
    assert graph.num_vertices == 11_000_001
