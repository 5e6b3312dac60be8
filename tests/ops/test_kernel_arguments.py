"""What stands in front of the kernels: nothing is read as what it is not."""

from __future__ import annotations

import pytest
import torch
from op_cases import ARGUMENTS, GRAPHS, assert_same_bits, needs_native, rows

from hellm.ops._arguments import layouts
from hellm.ops.backends.gpu import Gpu
from hellm.ops.backends.native import Native
from hellm.ops.backends.triton import Triton

GRAPH = GRAPHS["odd-63"].build()


def conv():
    return rows(63, 4), *GRAPH.vertex_csr, *GRAPH.edge_csr, *GRAPH.scales("row", self_loops=False), 1, *SCHEDULES


def propagate():
    tables = (rows(63, 4), rows(17, 4), *GRAPH.vertex_csr[:2], *GRAPH.edge_csr[:2], *GRAPH.bipartite_scales(), 1)
    return *tables, *SCHEDULES


def product():
    vertex, edge = (*GRAPH.vertex_csr, *GRAPH.vertex_schedule), (*GRAPH.edge_csr, *GRAPH.edge_schedule)
    return rows(17, 4), *vertex, *edge


def loss():
    return rows(9, 4), rows(9, 4, seed=1), torch.tensor(0.5), None, torch.ones(9), True, "highest"


def cross_entropy():
    return rows(9, 4), rows(7, 4), torch.zeros(9, dtype=torch.int64), torch.ones(7), torch.ones(9), True, True


def neighbours():
    return rows(9, 4), 3


SCHEDULES = (*GRAPH.vertex_schedule, *GRAPH.edge_schedule)
FITTING = {
    "incidence_product": product,
    "hypergraph_conv": conv,
    "bipartite_propagate": propagate,
    "info_nce": loss,
    "item_cross_entropy": cross_entropy,
    "knn": neighbours,
}
BACKENDS = {"native": Native(), "gpu": Gpu(lambda *_: pytest.fail("launched")), "triton": Triton()}
KINDS = [
    (operator, name, kind, backend)
    for operator, arguments in ARGUMENTS.items()
    for name, kind in layouts(arguments).items()
    for backend in BACKENDS
    # Schedules are for GPUs.
    if hasattr(BACKENDS[backend], operator)
    and not kind.startswith("count")
    and (backend != "native" or not kind.startswith("schedule"))
]


def fitting(operator: str, **changed):
    return ARGUMENTS[operator](*FITTING[operator]())._replace(**changed)


@needs_native
@pytest.mark.parametrize("operator", ARGUMENTS)
def test_native_takes_what_fits(operator):
    getattr(BACKENDS["native"], operator)(fitting(operator))


@needs_native
@pytest.mark.parametrize(("operator", "name", "kind", "backend"), KINDS)
def test_native_boundary_refuses_another_dtype_size_or_device(operator, name, kind, backend):
    function, tensor = getattr(BACKENDS[backend], operator), getattr(fitting(operator), name)
    if tensor is None:
        tensor = torch.zeros(9, dtype=torch.int64 if kind.startswith("index") else torch.float32)
    wrong = [tensor.to(torch.int16), tensor.to(torch.complex64), tensor.to("meta"), tensor.unsqueeze(0)]
    if kind.startswith("rows"):
        wrong.append(tensor.bool())
    if kind.startswith(("int32", "schedule")):
        wrong.append(tensor.long())
    if kind.startswith("int64"):
        wrong.append(tensor.int())
    for other in wrong:
        if other.device.type == "meta" and name == ARGUMENTS[operator]._fields[0]:
            continue  # the device of the first is that of all
        with pytest.raises(ValueError, match=f"{name} must be \\[|must be \\[.*\\] .* on"):
            function(fitting(operator, **{name: other}))


@needs_native
@pytest.mark.parametrize("operator", ARGUMENTS)
def test_native_takes_any_layout(operator):
    """Every tensor as every other element of a longer one: the same bits."""

    def spread(x):
        return torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) else x

    arguments, function = fitting(operator), getattr(BACKENDS["native"], operator)
    found, expected = function(type(arguments)(*map(spread, arguments))), function(arguments)
    pack = lambda value: value if isinstance(value, tuple) else (value,)  # noqa: E731
    assert_same_bits(pack(found), pack(expected))


WRONG = [
    ("item_cross_entropy", {"item_embedding": rows(7, 4).double()}, r"item_embedding must be \[7, 4\] float32 on"),
    ("info_nce", {"positive": rows(9, 4).bfloat16()}, r"positive must be \[9, 4\] float32 on cpu, got .* bfloat16"),
    ("info_nce", {"positive": rows(8, 4)}, r"positive must be \[9, 4\] float32 on cpu, got \(8, 4\)"),
    ("info_nce", {"row_grad": torch.ones(8)}, r"row_grad must be \[9\]"),
    ("hypergraph_conv", {"in_scale": torch.ones(62)}, r"in_scale must be \[63\]"),
    ("hypergraph_conv", {"x": rows(62, 4)}, r"vertex_indptr must be \[63\] int64"),
    ("hypergraph_conv", {"num_layers": -1}, "num_layers must be >= 0, got -1"),
    ("bipartite_propagate", {"item_x": rows(17, 5)}, r"item_x must be \[17, 4\] float32"),
    ("knn", {"k": 0}, "k must be between 1 and 9, got 0"),
    ("knn", {"k": 10}, "k must be between 1 and 9, got 10"),
]


@needs_native
@pytest.mark.parametrize(
    ("operator", "changed", "message", "backend"),
    [(*case, backend) for case in WRONG for backend in BACKENDS if hasattr(BACKENDS[backend], case[0])],
)
def test_native_boundary_names_the_argument(operator, changed, message, backend):
    with pytest.raises(ValueError, match=message):
        getattr(BACKENDS[backend], operator)(fitting(operator, **changed))


SCHEMAS = {
    "incidence_product": "Tensor x, Tensor indptr, Tensor indices, Tensor? values, Tensor row_order,"
    " Tensor hub_chunk_begin, int num_long, int num_hub_chunks, Tensor t_indptr, Tensor t_indices, Tensor? t_values,"
    " Tensor t_row_order, Tensor t_hub_chunk_begin, int t_num_long, int t_num_hub_chunks) -> Tensor",
    "hypergraph_conv": "Tensor x, Tensor vertex_indptr, Tensor vertex_edges, Tensor? vertex_values,"
    " Tensor edge_indptr, Tensor edge_vertices, Tensor? edge_values, Tensor? in_scale, Tensor? edge_scale,"
    " Tensor? out_scale, Tensor? diagonal, int num_layers, Tensor vertex_row_order, Tensor vertex_hub_chunk_begin,"
    " int vertex_num_long, int vertex_num_hub_chunks, Tensor edge_row_order, Tensor edge_hub_chunk_begin,"
    " int edge_num_long, int edge_num_hub_chunks) -> Tensor",
    "bipartite_propagate": "Tensor user_x, Tensor item_x, Tensor vertex_indptr, Tensor vertex_edges,"
    " Tensor edge_indptr, Tensor edge_vertices, Tensor user_scale, Tensor item_scale, int num_layers,"
    " Tensor vertex_row_order, Tensor vertex_hub_chunk_begin, int vertex_num_long, int vertex_num_hub_chunks,"
    " Tensor edge_row_order, Tensor edge_hub_chunk_begin, int edge_num_long, int edge_num_hub_chunks)"
    " -> (Tensor, Tensor)",
    "info_nce": "Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, bool intra_view_negatives,"
    " str reduction, str precision, bool compute_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    "info_nce_backward": "Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, Tensor row_grad,"
    " bool intra_view_negatives, str precision) -> (Tensor, Tensor, Tensor)",
    "item_cross_entropy": "Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias, str reduction,"
    " bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    "item_cross_entropy_backward": "Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias,"
    " Tensor row_grad, bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor)",
    "knn": "Tensor x, int k) -> (Tensor, Tensor)",
}


@pytest.mark.parametrize("operator", SCHEMAS)
def test_schemas_are_those_of_exported_programs(operator):
    """A program that was exported calls an operator by its schema, in whatever version it was."""
    schema = getattr(torch.ops.hellm, operator).default._schema
    assert str(schema) == f"hellm::{operator}({SCHEMAS[operator]}"
