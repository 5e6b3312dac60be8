"""Hypergraphs of other libraries as the arguments of `Hypergraph`, and back: HIF, PyTorch Geometric, SciPy.

HIF is the Hypergraph Interchange Format of XGI, HyperNetX, HyperGraphX and others (Coll et al. 2025,
doi:10.1017/nws.2025.10018): a JSON object with "incidences", "nodes", "edges", "network-type" and "metadata".
"""

from __future__ import annotations

import json
import math
import numbers
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hellm._arrays import as_count, as_tensor
from hellm._files import atomic_path, read_json
from hellm.ops.incidence import Incidence

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Interchange", "Labels"]

# What each kind of record may hold beside its ids, by the schema of HIF.
_FIELDS = {"nodes": ("weight", "attrs"), "edges": ("weight", "attrs"), "incidences": ("weight", "direction", "attrs")}
_IDS = {"nodes": ("node",), "edges": ("edge",), "incidences": ("node", "edge")}
_TYPES = ("undirected", "directed", "asc")


class Labels(NamedTuple):
    """What an interchange file says beside the incidence and its weights.

    Attributes:
        vertices: [V] ids in the file, strings or integers, in the order of the vertices.
        hyperedges: [M] ids in the file, in the order of the hyperedges.
        vertex_fields: vertex -> {"weight": number, "attrs": dict}, where the file has them. A `Hypergraph` has no
            weights of vertices, so they stand here.
        hyperedge_fields: hyperedge -> {"attrs": dict}.
        incidence_fields: position in `Hypergraph.hyperedge_index` -> {"attrs": dict}.
        metadata: of the whole file.
    """

    vertices: list[str | int]
    hyperedges: list[str | int]
    vertex_fields: dict[int, dict[str, Any]]
    hyperedge_fields: dict[int, dict[str, Any]]
    incidence_fields: dict[int, dict[str, Any]]
    metadata: dict[str, Any]


def _hif_arguments(source: Mapping[str, Any] | str | os.PathLike[str]) -> tuple[dict[str, Any], Labels]:
    """Arguments of `Hypergraph` and labels from a HIF file or its content. Raises: see `Hypergraph.from_hif`."""
    if isinstance(source, (str, os.PathLike)):
        document, name = read_json(source), os.fspath(source)
    elif isinstance(source, Mapping):
        document, name = source, "hif"
    else:
        raise ValueError(f"source must be a path or the content of a HIF file, got {type(source).__name__}")
    try:
        return _arguments(_checked_document(document))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _arguments(document: Mapping[str, Any]) -> tuple[dict[str, Any], Labels]:
    incidences = document["incidences"]
    nodes, vertex_fields = _positions("node", document.get("nodes", []), incidences)
    edges, edge_fields = _positions("edge", document.get("edges", []), incidences)
    # In the order in which a hypergraph stores its incidences, so that fields are found by position.
    pairs = [(nodes[record["node"]], edges[record["edge"]]) for record in incidences]
    order = sorted(range(len(pairs)), key=pairs.__getitem__)
    records = [incidences[position] for position in order]
    index = torch.tensor([pairs[position] for position in order], dtype=torch.int64).reshape(-1, 2).T
    hyperedge_weight = [edge_fields.get(edge, {}).pop("weight", 1.0) for edge in range(len(edges))]
    incidence_fields = {i: {"attrs": record["attrs"]} for i, record in enumerate(records) if record.get("attrs")}
    arguments = {
        "hyperedge_index": index,
        "num_vertices": len(nodes),
        "num_hyperedges": len(edges),
        "hyperedge_weight": _weights(hyperedge_weight),
        "incidence_weight": _weights([record.get("weight", 1.0) for record in records]),
    }
    edge_fields = {edge: fields for edge, fields in edge_fields.items() if fields}
    metadata = dict(document.get("metadata", {}))
    return arguments, Labels(list(nodes), list(edges), vertex_fields, edge_fields, incidence_fields, metadata)


def _positions(
    key: str, listed: list[Mapping[str, Any]], incidences: list[Mapping[str, Any]]
) -> tuple[dict[str | int, int], dict[int, dict[str, Any]]]:
    """Id -> position: those listed in their order, then those that only incidences name; and position -> fields."""
    positions: dict[str | int, int] = {}
    fields = {}
    for number, record in enumerate(listed):
        if record[key] in positions:
            raise ValueError(f"{key}s[{number}] must have an id of its own, got {record[key]!r} again")
        found = {field: record[field] for field in ("weight", "attrs") if field in record and record[field] != {}}
        if found:
            fields[len(positions)] = found
        positions[record[key]] = len(positions)
    for record in incidences:
        positions.setdefault(record[key], len(positions))
    return positions, fields


def _weights(weights: list[float]) -> Tensor | None:
    """[n] float64; None for all ones, which is what no weight means."""
    return None if all(weight == 1 for weight in weights) else torch.tensor(weights, dtype=torch.float64)


def _checked_document(document: Mapping[str, Any]) -> Mapping[str, Any]:
    unknown = set(document) - {"network-type", "metadata", *_FIELDS}
    if unknown:
        raise ValueError(f"a HIF object has no field {sorted(map(str, unknown))[0]!r}")
    network = document.get("network-type", "undirected")
    if network not in _TYPES:
        raise ValueError(f"network-type must be one of {_TYPES}, got {network!r}")
    if network != "undirected":
        instead = "its hyperedges have heads and tails" if network == "directed" else "it stands for all its faces too"
        raise ValueError(f"network-type must be 'undirected', got {network!r}: {instead}, which a Hypergraph has not")
    if not isinstance(document.get("metadata", {}), Mapping):
        raise ValueError(f"metadata must be an object, got {type(document['metadata']).__name__}")
    if "incidences" not in document:
        raise ValueError("incidences must be there, got none")
    return {**document, **{kind: _checked_records(kind, document[kind]) for kind in _FIELDS if kind in document}}


def _checked_records(kind: str, records: Any) -> list[dict[str, Any]]:
    if not isinstance(records, (list, tuple)):
        raise ValueError(f"{kind} must be an array, got {type(records).__name__}")
    return [_checked_record(kind, f"{kind}[{number}]", record) for number, record in enumerate(records)]


def _checked_record(kind: str, name: str, record: Any) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise ValueError(f"{name} must be an object, got {type(record).__name__}")
    checked = dict(record)
    for key in _IDS[kind]:
        value = record.get(key)
        # JSON knows no difference between 1 and 1.0.
        if isinstance(value, numbers.Integral) or (isinstance(value, float) and value.is_integer()):
            checked[key] = int(value)
        if isinstance(value, bool) or not isinstance(checked.get(key), (str, int)):
            raise ValueError(f"{name}.{key} must be a string or an integer, got {value!r}")
    unknown = set(record) - {*_IDS[kind], *_FIELDS[kind]}
    if unknown:
        raise ValueError(
            f"{name} has no field {sorted(map(str, unknown))[0]!r} in HIF; what is one's own stands in attrs"
        )
    weight = record.get("weight", 1)
    if isinstance(weight, bool) or not isinstance(weight, numbers.Real) or not _finite(weight):
        raise ValueError(f"{name}.weight must be a finite number, got {weight!r}")
    if "direction" in record:
        raise ValueError(f"{name}.direction must not be there in an undirected hypergraph, got {record['direction']!r}")
    if not isinstance(record.get("attrs", {}), Mapping):
        raise ValueError(f"{name}.attrs must be an object, got {type(record['attrs']).__name__}")
    return checked


def _finite(number: Any) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # a whole number beyond float64
        return False


def _hif_document(
    hyperedge_index: Tensor,
    hyperedge_weight: Tensor | None,
    incidence_weight: Tensor | None,
    labels: Labels,
) -> dict[str, Any]:
    """The content of a HIF file; `hyperedge_index` and `incidence_weight` in the order of a `Hypergraph`."""
    hyperedges, incidences = ([{} for _ in range(size)] for size in (len(labels.hyperedges), hyperedge_index.shape[1]))
    for name, records, weight in (
        ("hyperedge_weight", hyperedges, hyperedge_weight),
        ("incidence_weight", incidences, incidence_weight),
    ):
        for position, number in enumerate([] if weight is None else weight.tolist()):
            if not math.isfinite(number):
                raise ValueError(f"{name}[{position}] must be finite to stand in JSON, got {number}")
            if number != 1:
                records[position]["weight"] = number
    vertex, edge = hyperedge_index.tolist()
    nodes = [{"node": node, **labels.vertex_fields.get(i, {})} for i, node in enumerate(labels.vertices)]
    edges = [
        {"edge": name, **hyperedges[i], **labels.hyperedge_fields.get(i, {})}
        for i, name in enumerate(labels.hyperedges)
    ]
    pairs = zip(vertex, edge, incidences, strict=True)
    incidences = [
        {"node": labels.vertices[v], "edge": labels.hyperedges[e], **weight, **labels.incidence_fields.get(i, {})}
        for i, (v, e, weight) in enumerate(pairs)
    ]
    document = {"network-type": "undirected", "incidences": incidences, "nodes": nodes, "edges": edges}
    return {**document, "metadata": labels.metadata} if labels.metadata else document


def _write_hif(path: str | os.PathLike[str], document: dict[str, Any]) -> None:
    """Write a HIF document, whole or not at all. Raises: WriteError."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def _pyg_arguments(data: Any) -> dict[str, Any]:
    """Arguments of `Hypergraph` from what PyTorch Geometric has. Raises: see `Hypergraph.from_pyg`."""
    if not isinstance(data, Mapping) and (isinstance(data, Tensor) or hasattr(data, "__dlpack__")):
        return {"hyperedge_index": as_tensor("data", data)}

    def value(name: str) -> Any:
        return data.get(name) if isinstance(data, Mapping) else getattr(data, name, None)

    index = value("hyperedge_index")
    if index is None and any(kind.__name__ == "HyperGraphData" for kind in type(data).__mro__):
        index = value("edge_index")  # of this class, vertex and hyperedge
    if index is None:
        raise ValueError(
            f"data must be a hyperedge_index [2, nnz], a HyperGraphData or hold hyperedge_index, got "
            f"{type(data).__name__}; the edge_index of other data joins two vertices"
        )
    num_hyperedges = value("num_hyperedges")
    if num_hyperedges is None and isinstance(data, Mapping):
        num_hyperedges = value("num_edges")  # as the layer calls it; of a Data it counts pairs
    return {
        "hyperedge_index": index,
        "num_vertices": _size("num_nodes", value("num_nodes")),
        "num_hyperedges": _size("num_hyperedges", num_hyperedges),
        "hyperedge_weight": value("hyperedge_weight"),
    }


def _size(name: str, size: Any) -> int | None:
    return None if size is None else as_count(name, size)


def _scipy_arguments(matrix: Any) -> dict[str, Any]:
    """Arguments of `Hypergraph` from a sparse incidence matrix. Raises: see `Hypergraph.from_scipy`."""
    if not hasattr(matrix, "tocoo"):
        raise ValueError(f"matrix must be a sparse matrix or array of SciPy, got {type(matrix).__name__}")
    if len(matrix.shape) != 2:
        raise ValueError(f"matrix must be [V, M], got shape {tuple(matrix.shape)}")
    if matrix.dtype.kind not in "biuf" or matrix.dtype.itemsize > 8:
        raise ValueError(f"matrix must hold booleans, integers or floats of at most 64 bits, got {matrix.dtype}")
    entries = matrix.tocoo()
    index = torch.stack([torch.from_numpy(ids.astype("int64")) for ids in (entries.row, entries.col)])
    value = None
    if not (entries.data == 1).all():
        value = torch.from_numpy(entries.data.astype("float32" if entries.dtype.itemsize < 8 else "float64"))
    sizes = {"num_vertices": matrix.shape[0], "num_hyperedges": matrix.shape[1]}
    return {"hyperedge_index": index, "incidence_weight": value, **sizes}


def _scipy_matrix(indptr: Tensor, columns: Tensor, values: Tensor | None, num_columns: int) -> Any:
    """A `scipy.sparse.csr_array` with copies of a CSR matrix. Raises: ImportError without SciPy."""
    try:
        from scipy.sparse import csr_array
    except ImportError as error:
        raise ImportError("to_scipy needs SciPy: pip install scipy") from error
    values = torch.ones(columns.shape) if values is None else values.detach()
    arrays = [tensor.cpu().numpy().copy() for tensor in (values, columns, indptr)]
    return csr_array(tuple(arrays), shape=(indptr.numel() - 1, num_columns))


class Interchange(Incidence):
    """What a `hellm.Hypergraph` is read from and written to."""

    labels: Labels | None = None

    @property
    def hyperedge_index(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def from_hif(cls, source: Mapping[str, Any] | str | os.PathLike[str]) -> Self:
        """Read the Hypergraph Interchange Format, JSON that XGI, HyperNetX and others write.

        Vertices and hyperedges stand in the order of "nodes" and "edges"; those that only incidences name follow as
        they come. Their ids, attributes and the metadata are in `labels`, and `to_hif` writes them again. Weights of
        incidences and hyperedges are float64; where all are 1 there is none.

        Args:
            source: path of a file, or its content.

        Raises:
            FileNotFoundError: no such file.
            ValueError: what is not HIF, naming the file and the field; a directed hypergraph or a simplicial complex.
        """
        arguments, labels = _hif_arguments(source)
        hypergraph = cls(**arguments)
        hypergraph.labels = labels
        return hypergraph

    def to_hif(self, path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
        """The hypergraph in the Hypergraph Interchange Format; ids are 0, 1, 2, ... without `labels`.

        Args:
            path: a file to write it to as well; replaced whole if it is there.

        Returns:
            The JSON object as a dict. Gradients of learned weights do not travel.

        Raises:
            WriteError: the file cannot be written.
            ValueError: a weight that is not finite.
        """
        labels = self.labels
        if labels is None:
            labels = Labels(list(range(self.num_vertices)), list(range(self.num_hyperedges)), {}, {}, {}, {})
        weights = self.hyperedge_weight, self.vertex_values
        document = _hif_document(self.hyperedge_index, *weights, labels)
        if path is not None:
            _write_hif(path, document)
        return document

    @classmethod
    def from_pyg(cls, data: Any) -> Self:
        """From PyTorch Geometric, which need not be installed.

        Args:
            data: a hyperedge_index [2, nnz]; a `HyperGraphData`; or a `Data` or mapping with `hyperedge_index` and
                optionally `num_nodes`, `num_hyperedges` and `hyperedge_weight` [M].

        Raises:
            ValueError: data without a hyperedge_index; as the constructor does.
        """
        return cls(**_pyg_arguments(data))

    def to_pyg(self) -> dict[str, Any]:
        """What the layer of PyTorch Geometric is called with: `conv(x, **hypergraph.to_pyg())`.

        Returns:
            `hyperedge_index` [2, nnz] int64 in order of vertex, then hyperedge; `hyperedge_weight` [M] or None;
            `num_edges` M.

        Raises:
            ValueError: the incidence has weights, which PyTorch Geometric has no place for.
        """
        if self.vertex_values is not None:
            raise ValueError("incidence_weight must be None for PyTorch Geometric, whose incidences have no weights")
        weight = self.hyperedge_weight
        return {
            "hyperedge_index": self.hyperedge_index,
            "hyperedge_weight": weight,
            "num_edges": self.num_hyperedges,
        }

    @classmethod
    def from_scipy(cls, matrix: Any, hyperedge_weight: Tensor | None = None) -> Self:
        """From an incidence matrix of SciPy, whose entries are the weights of the incidences; all ones are none.

        Args:
            matrix: [V, M] sparse matrix or array of any format; booleans, integers or floats. Copied.
            hyperedge_weight: [M], as for the constructor.

        Raises:
            ValueError: not sparse, not two-dimensional, or another dtype.
        """
        arguments = _scipy_arguments(matrix) | {"hyperedge_weight": hyperedge_weight}
        return cls(**arguments)

    def to_scipy(self) -> Any:
        """The incidence matrix as a `scipy.sparse.csr_array` [V, M], a copy; weights of hyperedges are not in it.

        Raises:
            ImportError: SciPy is not installed.
        """
        return _scipy_matrix(*self.vertex_csr, self.num_hyperedges)
