"""Transposed, expanded and sliced inputs: the outputs of every backend have the layout that those without data have."""

from __future__ import annotations

import pytest
import torch
from op_cases import GRAPHS, rows

from hellm import ops

CASE = GRAPHS["odd-63"]
TARGET = torch.arange(63) % 17

LAYOUTS = {
    "transposed": lambda x: x.T.contiguous().T,
    "sliced": lambda x: torch.stack([x, -x], 2)[..., 0],
    "rows of another": lambda x: torch.cat([x, x])[: len(x)],
    "expanded": lambda x: x[:1].expand_as(x),
    "expanded columns": lambda x: x[:, :1].expand_as(x),
}


def operator_calls(lay):
    """Operator -> arguments, whose matrices have been laid out; those that it is differentiable in first."""
    graph = CASE.build()
    x, items = lay(rows(63, 6)).requires_grad_(), lay(rows(17, 6, seed=1)).requires_grad_()
    csr, schedules = (*graph.vertex_csr, *graph.edge_csr), (*graph.vertex_schedule, *graph.edge_schedule)
    vertex, edge = (*graph.vertex_csr, *graph.vertex_schedule), (*graph.edge_csr, *graph.edge_schedule)
    op = torch.ops.hellm
    positive, temperature = lay(rows(63, 6, seed=2)), torch.tensor(0.3)
    bias = torch.stack([rows(17), rows(17)], 1)[:, 0].requires_grad_()
    return {
        "incidence_product": (op.incidence_product, (x, *edge, *vertex)),
        "hypergraph_conv": (op.hypergraph_conv, (x, *csr, *graph.scales(self_loops=False), 2, *schedules)),
        "hypergraph_conv-0": (op.hypergraph_conv, (x, *csr, *graph.scales(), 0, *schedules)),
        "bipartite_propagate": (
            op.bipartite_propagate,
            (x, items, *csr[:2], *csr[3:5], *graph.bipartite_scales(), 2, *schedules),
        ),
        "bipartite_propagate-0": (
            op.bipartite_propagate,
            (x, items, *csr[:2], *csr[3:5], *graph.bipartite_scales(), 0, *schedules),
        ),
        "info_nce": (op.info_nce, (x, positive, temperature, None, True, "mean", "highest", True)),
        "info_nce-one-view": (op.info_nce, (x, positive, temperature, None, False, "none", "highest", True)),
        "info_nce_backward": (
            op.info_nce_backward,
            (x, positive, temperature, None, rows(1)[0].expand(63), False, "highest"),
        ),
        "item_cross_entropy": (op.item_cross_entropy, (x, items, TARGET, bias, "sum", True, True)),
        "item_cross_entropy_backward": (
            op.item_cross_entropy_backward,
            (x, items, TARGET, bias, rows(1)[0].expand(63), True, True),
        ),
        "knn": (op.knn, (x.detach(), 5)),
    }


def as_tuple(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", operator_calls(LAYOUTS["transposed"]))
def test_opcheck(name, layout, backend):
    operator, arguments = operator_calls(LAYOUTS[layout])[name]
    every_check = layout == "transposed"  # compiling takes a second
    checks = {} if every_check else {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
    torch.library.opcheck(operator.default, arguments, **checks)
    contiguous = [a.contiguous() if isinstance(a, torch.Tensor) else a for a in arguments]
    for found, expected in zip(as_tuple(operator(*arguments)), as_tuple(operator(*contiguous)), strict=True):
        assert found.is_contiguous()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["info_nce", "bipartite_propagate", "hypergraph_conv", "hypergraph_conv-0"])
def test_inductor_takes_transposed_inputs(name, backend):
    torch.compiler.reset()
    operator, arguments = operator_calls(LAYOUTS["transposed"])[name]

    def step(x):
        return as_tuple(operator(x, *arguments[1:]))[0].sum() * 2

    (expected,) = torch.autograd.grad(step(arguments[0]), arguments[0])
    (found,) = torch.autograd.grad(torch.compile(step, fullgraph=True)(arguments[0]), arguments[0])
    torch.testing.assert_close(found, expected)


def test_views_of_complex_numbers_are_read_as_their_values():
    """The imaginary part of a conjugate is a view whose memory holds the negated numbers."""
    z = torch.complex(rows(63, 4), rows(63, 4, seed=1)).conj()
    assert z.imag.is_neg()
    graph = CASE.build()
    torch.testing.assert_close(ops.hypergraph_conv(z.imag, graph), -ops.hypergraph_conv(rows(63, 4, seed=1), graph))
    assert torch.equal(ops.knn(z.imag, 3)[0], ops.knn(-rows(63, 4, seed=1), 3)[0])
