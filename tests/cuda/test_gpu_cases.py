"""What the measuring script measures: cases, graphs and peers, on toy sizes without a GPU."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks import attention_peers, gpu_cases, gpu_entries, gpu_timing, inputs

CPU = torch.device("cpu")


def labels(case: gpu_entries.Case) -> list[str]:
    return [entry.label for entry in case.entries]


def test_labels_are_unique_and_ours_come_first():
    for name, make in gpu_cases.cases(CPU, True):
        case = make()
        assert len(set(labels(case))) == len(case.entries), name
        kinds = [gpu_entries.KINDS.index(entry.kind) for entry in case.entries]
        assert kinds == sorted(kinds), name


def test_wide_rows_are_listed_where_a_kernel_takes_them(monkeypatch):
    for backend in gpu_entries.BACKENDS.values():
        monkeypatch.setattr(type(backend), "unavailable", lambda self, device: None)
    listed = [label for label in labels(gpu_cases._info_nce(CPU, 20, 256, 0.2)) if label.startswith("hellm")]
    assert listed == [
        "hellm native, high",
        "hellm native, highest",
        "hellm cuda, high",
        "hellm triton, high",
        "hellm torch",
    ]
    assert not any("attentions" in label for label in labels(gpu_cases._info_nce(CPU, 20, 256, 0.2)))
    assert "hellm nvrtc, highest" in labels(gpu_cases._info_nce(CPU, 20, 128, 0.2, nvrtc=True))


def test_info_nce_peers_agree_with_the_definition():
    """The stock forms on the CPU; the attentions have a test of their own."""
    case = gpu_cases._info_nce(CPU, 70, 16, 0.2)
    for entry in case.entries:
        if entry.kind != "compile" and "attentions" not in entry.label:
            assert gpu_timing.worst_error([t.detach() for t in entry.run()], case.truth) <= entry.tolerance, entry.label


def test_attention_composites_agree_with_the_definition():
    """Two attentions with float16 operands, as on a GPU."""

    def attend(query, key, value, scale):
        query, key, value = (t.half().float() for t in (query, key, value))
        logits = query @ key.T * scale
        lse = torch.logsumexp(logits, 1)
        return (torch.exp(logits - lse[:, None]) @ value).half().float(), lse

    case = gpu_cases._info_nce(CPU, 300, 64, 0.2)
    views = [view.detach() for view in inputs.views(300, 64)]
    for found in (attention_peers.composite(*views, 0.2, attend), attention_peers.flex_composite(*views, 0.2)):
        assert gpu_timing.worst_error(found, case.truth) < 1e-3


@pytest.mark.parametrize("kind", inputs.VIEWS)
def test_every_kind_of_rows_is_within_the_tolerances(kind):
    case = gpu_cases._info_nce(CPU, 300, 64, 0.2, kind=kind)
    for entry in case.entries:
        if entry.hellm:
            assert gpu_timing.worst_error([t.detach() for t in entry.run()], case.truth) <= entry.tolerance, entry.label


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
    case = dict(gpu_cases.cases(CPU, True))[name]()
    labels = [entry.label for entry in case.entries]
    assert "two cached CSR products, int32" in labels
    assert ("published, clique COO" in labels) == (name in ("conv-sports-2", "conv-items-5"))
    assert ("two index_add, torch.compile" in labels) == (name == "conv-sports-2")
    for entry in case.entries:
        if entry.kind != "compile":
            assert gpu_timing.worst_error([t.detach() for t in entry.run()], case.truth) < 1e-6, (name, entry.label)


@pytest.mark.parametrize("name", ["sports", "items-5", "empty"])
def test_index_add_agrees_with_the_definition(name):
    graph, settings = gpu_cases._graph(name, CPU, True)
    x = inputs.rows(graph.num_vertices, 8)
    found = gpu_cases._index_add(graph, settings, 2)(x)
    torch.testing.assert_close(found, gpu_cases.ops.hypergraph_conv(x, graph, num_layers=2, **settings))


def test_synthetic_graphs_are_what_they_are_called():
    empty = gpu_cases._synthetic("empty", gpu_cases._SYNTHETIC["empty"])
    assert 0.3 <= (empty.hyperedge_degree == 0).double().mean() < 0.31
    alone = gpu_cases._synthetic("singletons", gpu_cases._Sizes(30, 30, 30))
    assert (alone.hyperedge_degree == 1).all() and (alone.vertex_degree == 1).all()
    hub = gpu_cases._synthetic("large", gpu_cases._Sizes(3000, 50, 900, hub=2000))
    assert hub.num_incidences == 2900 and hub.hyperedge_degree[0] >= 2000


def test_pyg_computes_what_it_is_compared_with():
    pytest.importorskip("torch_geometric")
    case = gpu_cases._conv_pyg(CPU, True)
    (peer,) = (entry for entry in case.entries if "torch_geometric" in entry.label)
    found = [t.detach() for t in peer.run()]
    assert len(found) == 2 and gpu_timing.worst_error(found, case.truth) < 1e-5


def test_a_peer_that_cannot_be_imported_costs_its_entry(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_geometric.nn", None)
    case = gpu_cases._conv_pyg(CPU, True)
    (peer,) = (entry for entry in case.entries if "torch_geometric" in entry.label)
    found = gpu_timing.measure_entry(gpu_timing.Timer(CPU, True), peer.run, case.truth, peer.tolerance, False)
    assert found["failure"].startswith("ModuleNotFoundError")
