"""What the measuring script measures: cases, graphs and peers, on toy sizes without a GPU."""

from __future__ import annotations

import contextlib
import sys

import pytest
import torch

from benchmarks import gpu_timing, inputs
from benchmarks.cases import CASES
from benchmarks.entries import BACKENDS
from benchmarks.ops import attention, hypergraph_conv
from benchmarks.registry import GPU, KINDS, Outputs, Setup, Workload, on_device
from hellm import ops

CPU = torch.device("cpu")
TRIED = Setup(CPU, gpu=True, tiny=True)


def info_nce(num_rows: int, dim: int, **arguments) -> Workload:
    build = CASES["info_nce-10000"].build
    return build(Setup(CPU, gpu=True), **{"num_rows": num_rows, "dim": dim, **arguments})


def labels(workload: Workload) -> list[str]:
    return [entry.label for entry in workload.entries]


def error(workload: Workload, found: Outputs) -> float:
    return workload.verify([t.detach() for t in found], workload.truth())


def test_labels_are_unique_and_ours_come_first():
    for name, registered in on_device(CASES, GPU).items():
        case = registered.workload(TRIED)
        assert len(set(labels(case))) == len(case.entries), name
        kinds = [KINDS.index(entry.kind) for entry in case.entries]
        assert kinds == sorted(kinds), name


def test_wide_rows_are_listed_where_a_kernel_takes_them(monkeypatch):
    for backend in BACKENDS.values():
        monkeypatch.setattr(type(backend), "unavailable", lambda self, device: None)
    listed = [label for label in labels(info_nce(20, 256)) if label.startswith("hellm")]
    assert listed == [
        "hellm native, high",
        "hellm native, highest",
        "hellm cuda, high",
        "hellm triton, high",
        "hellm torch, highest",
    ]
    assert not any("attentions" in label for label in labels(info_nce(20, 256)))
    assert "hellm nvrtc, highest" in labels(info_nce(20, 128, nvrtc=True))


# float32 keeps no digits of the published form's small loss, and its gradient at zeros is 1e12.
PEERS_FAIL = ("info_nce-t0.05", "info_nce-zeros")


@pytest.mark.parametrize("name", [name for name in on_device(CASES, GPU) if not name.startswith("ceiling")])
def test_every_implementation_agrees_with_the_definition(name):
    """Without those that are compiled and those for GPUs only; the attentions have a test of their own."""
    case = CASES[name].workload(TRIED)
    tried = []
    for entry in case.entries:
        if entry.kind != "compile" and "attentions" not in entry.label and (entry.hellm or name not in PEERS_FAIL):
            with contextlib.suppress(ImportError):
                assert error(case, entry.run()) <= entry.tolerance, entry.label
                tried.append(entry.hellm)
    assert True in tried


def test_attention_composites_agree_with_the_definition():
    """Two attentions with float16 operands, as on a GPU."""

    def attend(query, key, value, scale):
        query, key, value = (t.half().float() for t in (query, key, value))
        logits = query @ key.T * scale
        lse = torch.logsumexp(logits, 1)
        return (torch.exp(logits - lse[:, None]) @ value).half().float(), lse

    case = info_nce(300, 64)
    views = [view.detach() for view in inputs.views(300, 64)]
    for found in (attention.composite(*views, 0.2, attend), attention.flex_composite(*views, 0.2)):
        assert error(case, found) < 1e-3


@pytest.mark.parametrize("kind", inputs.VIEWS)
def test_every_kind_of_rows_is_within_the_tolerances(kind):
    case = info_nce(300, 64, kind=kind)
    for entry in case.entries:
        if entry.hellm:
            assert error(case, entry.run()) <= entry.tolerance, entry.label


def test_kinds_of_rows_are_what_they_are_called():
    anchors, cosine = {}, {}
    for kind in inputs.VIEWS:
        anchor, positive = (view.detach() for view in inputs.views(400, 64, kind=kind))
        anchors[kind] = anchor
        cosine[kind] = torch.nn.functional.cosine_similarity(anchor, positive).mean().item()
    assert abs(cosine["random"]) < 0.1 < 0.6 < cosine["related"] < 0.8 < 0.99 < cosine["aligned"]
    unit = torch.nn.functional.normalize(anchors["collapsed"])
    assert (unit @ unit.T).mean() > 0.98
    assert len(anchors["duplicates"].unique(dim=0)) == 50
    assert (anchors["zeros"] == 0).all(1).sum() == 40


@pytest.mark.parametrize("name", ["conv-sports-2", "conv-items-5", "conv-middle", "conv-empty", "conv-singletons"])
def test_convolution_peers_agree_with_the_definition(name):
    case = CASES[name].workload(TRIED)
    listed = labels(case)
    assert "two cached CSR products, int32" in listed
    assert ("published, clique COO" in listed) == (name in ("conv-sports-2", "conv-items-5"))
    assert ("two index_add, torch.compile" in listed) == (name == "conv-sports-2")
    for entry in case.entries:
        if entry.kind != "compile":
            assert error(case, entry.run()) < 1e-6, (name, entry.label)


@pytest.mark.parametrize("name", ["sports", "items-5", "empty"])
def test_index_add_agrees_with_the_definition(name):
    graph, settings = hypergraph_conv.named_graph(name, CPU, True)
    x = inputs.rows(graph.num_vertices, 8)
    found = hypergraph_conv.index_add(graph, settings, 2)(x)
    torch.testing.assert_close(found, ops.hypergraph_conv(x, graph, num_layers=2, **settings))


def test_synthetic_graphs_are_what_they_are_called():
    empty = hypergraph_conv.synthetic("empty", hypergraph_conv.SYNTHETIC["empty"])
    assert 0.3 <= (empty.hyperedge_degree == 0).double().mean() < 0.31
    alone = hypergraph_conv.synthetic("singletons", hypergraph_conv.Sizes(30, 30, 30))
    assert (alone.hyperedge_degree == 1).all() and (alone.vertex_degree == 1).all()
    hub = hypergraph_conv.synthetic("large", hypergraph_conv.Sizes(3000, 50, 900, hub=2000))
    assert hub.num_incidences == 2900 and hub.hyperedge_degree[0] >= 2000


def test_pyg_computes_what_it_is_compared_with():
    pytest.importorskip("torch_geometric")
    case = CASES["conv-pyg"].workload(TRIED)
    (peer,) = (entry for entry in case.entries if "torch_geometric" in entry.label)
    found = peer.run()
    assert len(found) == 2 and error(case, found) < 1e-5


def test_a_peer_that_cannot_be_imported_costs_its_entry(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    case = CASES["conv-pyg"].workload(TRIED)
    (peer,) = (entry for entry in case.entries if "torch_geometric" in entry.label)
    found = gpu_timing.measure_entry(gpu_timing.Timer(CPU, True), peer, case, case.truth())
    assert found["failure"].startswith("ModuleNotFoundError")
