"""Hypergraphs of other libraries: HIF, PyTorch Geometric and SciPy, there and back."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hellm import Hypergraph, nn, ops

HIF = {
    "network-type": "undirected",
    "metadata": {"name": "three tables"},
    "incidences": [
        {"edge": "lunch", "node": "ann", "weight": 2},
        {"edge": "lunch", "node": 7, "attrs": {"seat": 1}},
        {"edge": "tea", "node": "ann"},
        {"edge": "tea", "node": "bob"},
    ],
    "nodes": [{"node": "cy", "weight": 0.5, "attrs": {"age": 3}}, {"node": "ann"}],
    "edges": [{"edge": "late", "attrs": {"open": False}}, {"edge": "tea", "weight": 0.1}],
}


def test_hif_is_read_with_ids_weights_and_attributes():
    graph = Hypergraph.from_hif(HIF)
    # Those that are listed in their order, the others as they come.
    assert graph.labels.vertices == ["cy", "ann", 7, "bob"]
    assert graph.labels.hyperedges == ["late", "tea", "lunch"]
    assert graph.hyperedge_index.tolist() == [[1, 1, 2, 3], [1, 2, 2, 1]]
    assert graph.vertex_values.tolist() == [1, 2, 1, 1]
    assert graph.hyperedge_weight.tolist() == [1, 0.1, 1]
    assert (graph.num_vertices, graph.num_hyperedges) == (4, 3)
    assert graph.labels.vertex_fields == {0: {"weight": 0.5, "attrs": {"age": 3}}}
    assert graph.labels.hyperedge_fields == {0: {"attrs": {"open": False}}}
    assert graph.labels.incidence_fields == {2: {"attrs": {"seat": 1}}}
    assert graph.labels.metadata == {"name": "three tables"}
    x = torch.randn(4, 3, requires_grad=True)
    ops.hypergraph_conv(x, graph).sum().backward()
    assert x.grad[0].abs().sum() == 0 < x.grad[1].abs().sum()


def test_hif_is_written_as_it_was_read(tmp_path):
    path = tmp_path / "tables.hif.json"
    path.write_text(json.dumps(HIF), encoding="utf-8")
    written = Hypergraph.from_hif(path).to_hif(path)
    assert json.loads(path.read_text(encoding="utf-8")) == written
    assert os.listdir(tmp_path) == [path.name]
    for kind in ("incidences", "nodes", "edges"):
        for record in HIF[kind]:
            assert record in written[kind]
    assert (written["network-type"], written["metadata"]) == (HIF["network-type"], HIF["metadata"])
    assert Hypergraph.from_hif(written).to_hif() == written


def test_hif_of_a_hypergraph_has_its_positions_as_ids():
    graph = Hypergraph(torch.tensor([[2, 0], [1, 0]]), num_vertices=4, num_hyperedges=3)
    assert graph.labels is None
    assert graph.to_hif() == {
        "network-type": "undirected",
        "incidences": [{"node": 0, "edge": 0}, {"node": 2, "edge": 1}],
        "nodes": [{"node": node} for node in range(4)],
        "edges": [{"edge": edge} for edge in range(3)],
    }


def test_labels_stay_with_the_hypergraph():
    graph = Hypergraph.from_hif(HIF)
    saved = io.BytesIO()
    torch.save(graph, saved)
    saved.seek(0)
    for other in (
        graph.with_weight(None),
        copy.deepcopy(graph),
        pickle.loads(pickle.dumps(graph)),
        torch.load(saved, weights_only=True),
    ):
        assert other.labels == graph.labels
    assert pickle.loads(pickle.dumps(graph)).to_hif() == graph.to_hif()
    assert graph.to("meta").labels == graph.labels


def changed(**fields) -> dict:
    return {**HIF, **fields}


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"nodes": []}, "incidences must be there, got none"),
        (changed(nodez=[]), "a HIF object has no field 'nodez'"),
        (changed(incidences={}), "incidences must be an array, got dict"),
        (changed(incidences=[3]), r"incidences\[0\] must be an object, got int"),
        (changed(incidences=[{"edge": 0}]), r"incidences\[0\].node must be a string or an integer, got None"),
        (changed(nodes=[{"node": True}]), r"nodes\[0\].node must be a string or an integer, got True"),
        (changed(edges=[{"edge": 1.5}]), r"edges\[0\].edge must be a string or an integer, got 1.5"),
        (changed(nodes=[{"node": 1}, {"node": 1.0}]), r"nodes\[1\] must have an id of its own, got 1 again"),
        (changed(nodes=[{"node": 1, "colour": 2}]), r"nodes\[0\] has no field 'colour' in HIF"),
        (changed(edges=[{"edge": 1, "weight": "2"}]), r"edges\[0\].weight must be a finite number, got '2'"),
        (changed(edges=[{"edge": 1, "weight": float("nan")}]), r"edges\[0\].weight must be a finite number, got nan"),
        (changed(edges=[{"edge": 1, "weight": 10**400}]), r"edges\[0\].weight must be a finite number, got 1000"),
        (changed(edges=[{"edge": 1, "attrs": []}]), r"edges\[0\].attrs must be an object, got list"),
        (changed(metadata=[]), "metadata must be an object, got list"),
        (changed(**{"network-type": "directed"}), "must be 'undirected', got 'directed': its hyperedges have heads"),
        (changed(**{"network-type": "asc"}), "must be 'undirected', got 'asc': it stands for all its faces"),
        (changed(**{"network-type": []}), r"network-type must be one of .*, got \[\]"),
        (changed(incidences=[{"edge": 0, "node": 0, "direction": "head"}]), r"incidences\[0\].direction must not be"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_is_not_hif_is_refused(tmp_path, document, message):
    with pytest.raises(ValueError, match=f"^hif: .*{message}"):
        Hypergraph.from_hif(document)
    path = tmp_path / "broken.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"broken\.json: .*{message}"):
        Hypergraph.from_hif(path)


def test_other_sources_are_refused(tmp_path):
    with pytest.raises(ValueError, match="source must be a path or the content of a HIF file, got list"):
        Hypergraph.from_hif([])
    with pytest.raises(FileNotFoundError):
        Hypergraph.from_hif(tmp_path / "absent.json")
    (tmp_path / "text.json").write_text("[1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text\.json: damaged, not valid JSON"):
        Hypergraph.from_hif(str(tmp_path / "text.json"))


def test_weights_that_json_cannot_hold_are_refused_and_nothing_is_written(tmp_path):
    index = torch.tensor([[0, 1], [0, 0]])
    path = tmp_path / "graph.json"
    with pytest.raises(ValueError, match=r"incidence_weight\[1\] must be finite to stand in JSON, got inf"):
        Hypergraph(index, incidence_weight=torch.tensor([1.0, float("inf")])).to_hif(path)
    with pytest.raises(ValueError, match=r"hyperedge_weight\[0\] must be finite to stand in JSON, got nan"):
        Hypergraph(index, hyperedge_weight=torch.tensor([float("nan")])).to_hif(path)
    assert not path.exists()


@st.composite
def hypergraphs(draw) -> Hypergraph:
    """Repeats, isolated vertices, empty hyperedges; with and without weights."""
    vertices, hyperedges = draw(st.integers(0, 5)), draw(st.integers(0, 5))
    pairs = st.tuples(st.integers(0, max(vertices - 1, 0)), st.integers(0, max(hyperedges - 1, 0)))
    index = draw(st.lists(pairs, max_size=8 if vertices and hyperedges else 0))
    weights = st.floats(allow_nan=False, allow_infinity=False)

    def weight(size: int) -> torch.Tensor | None:
        if draw(st.booleans()):
            return None
        return torch.tensor(draw(st.lists(weights, min_size=size, max_size=size)), dtype=torch.float64)

    return Hypergraph(
        torch.tensor(index, dtype=torch.int64).reshape(-1, 2).T,
        num_vertices=vertices,
        num_hyperedges=hyperedges,
        hyperedge_weight=weight(hyperedges),
        incidence_weight=weight(len(index)),
    )


def ones_or(values: torch.Tensor | None, size: int) -> list[float]:
    return [1.0] * size if values is None else values.tolist()


def assert_same(one: Hypergraph, other: Hypergraph) -> None:
    assert repr(one) == repr(other)
    assert torch.equal(one.hyperedge_index, other.hyperedge_index)
    for name, size in (("hyperedge_weight", one.num_hyperedges), ("vertex_values", one.num_incidences)):
        assert ones_or(getattr(one, name), size) == ones_or(getattr(other, name), size)


@given(hypergraphs())
@settings(max_examples=100, deadline=None)
def test_hif_round_trip(graph):
    assert_same(Hypergraph.from_hif(json.loads(json.dumps(graph.to_hif()))), graph)


@given(hypergraphs())
@settings(max_examples=100, deadline=None)
def test_scipy_round_trip(graph):
    pytest.importorskip("scipy", reason="SciPy is not installed")
    assert_same(Hypergraph.from_scipy(graph.to_scipy(), graph.hyperedge_weight), graph)


@given(hypergraphs())
@settings(max_examples=50, deadline=None)
def test_pyg_round_trip(graph):
    if graph.vertex_values is not None:
        with pytest.raises(ValueError, match="incidence_weight must be None for PyTorch Geometric"):
            graph.to_pyg()
        return
    assert_same(Hypergraph.from_pyg({**graph.to_pyg(), "num_nodes": graph.num_vertices}), graph)


def test_pyg_layers_take_what_to_pyg_gives():
    pyg = pytest.importorskip("torch_geometric.nn", reason="torch_geometric is not installed")
    graph = Hypergraph(torch.tensor([[3, 0, 1, 1], [0, 0, 0, 2]]), num_vertices=5, num_hyperedges=4)
    theirs, ours = pyg.HypergraphConv(3, 2), nn.HypergraphConv(3, 2)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 3)
    torch.testing.assert_close(ours(x, **graph.to_pyg()), theirs(x, **graph.to_pyg()))


def test_pyg_data_is_read():
    data = pytest.importorskip("torch_geometric.data", reason="torch_geometric is not installed")
    from torch_geometric.data.hypergraph_data import HyperGraphData

    index = torch.tensor([[0, 1, 1], [0, 0, 1]])
    assert_same(Hypergraph.from_pyg(HyperGraphData(x=torch.ones(4, 1), edge_index=index)), graph_of(index, 4))
    weight = torch.tensor([2.0, 3.0])
    with_weight = data.Data(x=torch.ones(4, 1), hyperedge_index=index, hyperedge_weight=weight)
    assert Hypergraph.from_pyg(with_weight).hyperedge_weight is weight
    assert Hypergraph.from_pyg(with_weight).num_vertices == 4
    assert_same(Hypergraph.from_pyg(index), Hypergraph(index))
    assert_same(Hypergraph.from_pyg(index.numpy()), Hypergraph(index))
    for other in (data.Data(edge_index=index, num_nodes=4), {"edge_index": index}, "index"):
        with pytest.raises(ValueError, match=r"data must be a hyperedge_index \[2, nnz\], .*joins two vertices"):
            Hypergraph.from_pyg(other)


def graph_of(index: torch.Tensor, num_vertices: int) -> Hypergraph:
    return Hypergraph(index, num_vertices=num_vertices)


@pytest.mark.parametrize("form", ["csr_array", "csc_matrix", "coo_array", "lil_matrix", "dok_array"])
@pytest.mark.parametrize("dtype", ["bool", "int64", "float32", "float64"])
def test_scipy_of_every_form_is_read(form, dtype):
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    dense = torch.tensor([[1, 0, 0], [2, 1, 0], [0, 0, 0]]).numpy().astype(dtype)
    graph = Hypergraph.from_scipy(getattr(sparse, form)(dense))
    assert (graph.num_vertices, graph.num_hyperedges) == (3, 3)
    assert graph.hyperedge_index.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert ones_or(graph.vertex_values, 3) == dense[dense != 0].tolist()
    wanted = {"bool": "float32", "int64": "float64"}.get(dtype, dtype)
    matrix = graph.to_scipy()
    assert (matrix.dtype, matrix.shape) == (wanted, (3, 3)) and (matrix.toarray() == dense).all()
    matrix.data[:] = 9
    assert ones_or(graph.vertex_values, 3) == dense[dense != 0].tolist()


def test_learned_weights_leave_as_numbers():
    pytest.importorskip("scipy", reason="SciPy is not installed")
    weight = torch.tensor([0.5, 2.0], requires_grad=True)
    graph = Hypergraph(torch.tensor([[1, 0], [0, 0]]), incidence_weight=weight, hyperedge_weight=weight[:1])
    assert graph.to_scipy().toarray().tolist() == [[2.0], [0.5]]
    assert [record["weight"] for record in graph.to_hif()["incidences"]] == [2.0, 0.5]
    assert graph.to_hif()["edges"] == [{"edge": 0, "weight": 0.5}]


def test_other_matrices_are_refused(monkeypatch):
    sparse = pytest.importorskip("scipy.sparse", reason="SciPy is not installed")
    with pytest.raises(ValueError, match="matrix must be a sparse matrix or array of SciPy, got Tensor"):
        Hypergraph.from_scipy(torch.eye(2))
    with pytest.raises(ValueError, match=r"matrix must be \[V, M\], got shape \(2,\)"):
        Hypergraph.from_scipy(sparse.coo_array([1, 2]))
    with pytest.raises(ValueError, match=r"matrix must hold booleans, integers or floats .*, got complex128"):
        Hypergraph.from_scipy(sparse.csr_array([[1j]]))
    monkeypatch.setitem(sys.modules, "scipy.sparse", None)
    with pytest.raises(ImportError, match="to_scipy needs SciPy: pip install scipy"):
        Hypergraph(torch.tensor([[0], [0]])).to_scipy()
