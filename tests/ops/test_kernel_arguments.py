"""What stands in front of the kernels: nothing is read as what it is not."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPHS, needs_native, rows

from hellm.ops import _arguments, _gpu, _native, _triton

GRAPH = GRAPHS["odd-63"].build()


def conv(**changed):
    names = list(_arguments._LAYOUTS["hypergraph_conv"])[:12]
    scales = GRAPH.scales("row", self_loops=False)
    values = dict(zip(names, (rows(63, 4), *GRAPH.vertex_csr, *GRAPH.edge_csr, *scales, 1), strict=True))
    return [*(values | changed).values(), GRAPH.vertex_schedule, GRAPH.edge_schedule]


def propagate(**changed):
    names = list(_arguments._LAYOUTS["bipartite_propagate"])[:9]
    tables = (rows(63, 4), rows(17, 4), *GRAPH.vertex_csr[:2], *GRAPH.edge_csr[:2], *GRAPH.bipartite_scales(), 1)
    return [*(dict(zip(names, tables, strict=True)) | changed).values(), GRAPH.vertex_schedule, GRAPH.edge_schedule]


def product(**changed):
    values = dict(zip(("x", "indptr", "indices", "values"), (rows(17, 4), *GRAPH.vertex_csr), strict=True))
    return [*(values | changed).values(), GRAPH.vertex_schedule]


def loss(**changed):
    values = {"anchor": rows(9, 4), "positive": rows(9, 4, seed=1), "temperature": torch.tensor(0.5), "rows": None}
    return [*(values | {"row_grad": torch.ones(9)} | changed).values(), True, "highest"]


def cross_entropy(**changed):
    values = {"hidden": rows(9, 4), "item_embedding": rows(7, 4), "target": torch.zeros(9, dtype=torch.int64)}
    return [*(values | {"bias": torch.ones(7), "row_grad": torch.ones(9)} | changed).values(), True, True]


def neighbours(**changed):
    return [*({"x": rows(9, 4), "k": 3} | changed).values()]


ARGUMENTS = {
    "incidence_product": product,
    "hypergraph_conv": conv,
    "bipartite_propagate": propagate,
    "info_nce": loss,
    "item_cross_entropy": cross_entropy,
    "knn": neighbours,
}
BACKENDS = {"native": _native, "gpu": _gpu.Gpu(lambda *_: pytest.fail("launched")), "triton": _triton}
KINDS = [
    (operator, name, kind)
    for operator, layout in _arguments._LAYOUTS.items()
    for name, kind in layout.items()
    if not kind.startswith(("schedule", "count"))
]


@needs_native
@pytest.mark.parametrize("operator", ARGUMENTS)
def test_native_takes_what_fits(operator):
    getattr(_native, operator)(*ARGUMENTS[operator]())


@needs_native
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("operator", "name", "kind"), KINDS)
def test_native_boundary_refuses_another_dtype_size_or_device(operator, name, kind, backend):
    function, arguments = getattr(BACKENDS[backend], operator), ARGUMENTS[operator]
    sentinel = object()
    tensor = arguments()[next(i for i, x in enumerate(arguments(**{name: sentinel})) if x is sentinel)]
    if tensor is None:
        tensor = torch.zeros(9, dtype=torch.int64 if kind.startswith("index") else torch.float32)
    wrong = [tensor.to(torch.int16), tensor.to(torch.complex64), tensor.to("meta"), tensor.unsqueeze(0)]
    if kind.startswith("rows"):
        wrong.append(tensor.bool())
    if kind.startswith("int32"):
        wrong.append(tensor.long())
    if kind.startswith("int64"):
        wrong.append(tensor.int())
    for other in wrong:
        if other.device.type == "meta" and name == next(iter(_arguments._LAYOUTS[operator])):
            continue  # the device of the first is that of all
        with pytest.raises(ValueError, match=f"{name} must be \\[|must be \\[.*\\] .* on"):
            function(*arguments(**{name: other}))


@needs_native
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operator", "changed", "message"),
    [
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
    ],
)
def test_native_boundary_names_the_argument(operator, changed, message, backend):
    with pytest.raises(ValueError, match=message):
        getattr(BACKENDS[backend], operator)(*ARGUMENTS[operator](**changed))
