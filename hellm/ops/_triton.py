"""Calls of the Triton kernels: allocate outputs and workspace, pass tensors in the order of the C++ launchers.

Every function mirrors one of `hellm.ops.reference`. Nothing waits for the device. Losses of float64 rows and of rows
wider than 256 columns, 128 at "highest" precision, and nearest neighbours are computed in plain torch by blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hellm.hypergraph import RowSchedule
from hellm.ops import reference
from hellm.ops._arguments import checked
from hellm.ops._backends import triton
from hellm.ops._native import _compute_dtype, _like


def _on_device_of_first(function: Callable) -> Callable:
    """Triton launches on torch's current device, whatever the device of the tensors."""

    @functools.wraps(function)
    def guarded(x: Tensor, *args):
        with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
            return function(x, *args)

    return guarded


@checked
@_on_device_of_first
def incidence_product(
    x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, schedule: RowSchedule
) -> Tensor:
    out = x.new_empty(indptr.numel() - 1, x.shape[1])
    triton().hypergraph_conv.incidence_product(x, indptr, indices, _like(values, x), out, schedule)
    return out


@checked
@_on_device_of_first
def hypergraph_conv(
    x: Tensor,
    vertex_indptr: Tensor,
    vertex_edges: Tensor,
    vertex_values: Tensor | None,
    edge_indptr: Tensor,
    edge_vertices: Tensor,
    edge_values: Tensor | None,
    in_scale: Tensor | None,
    edge_scale: Tensor | None,
    out_scale: Tensor | None,
    diagonal: Tensor | None,
    num_layers: int,
    vertex_schedule: RowSchedule,
    edge_schedule: RowSchedule,
) -> Tensor:
    if num_layers == 0:
        return x.clone()
    out = torch.empty_like(x)
    num_rows = edge_indptr.numel() - 1 + (x.shape[0] if num_layers > 1 else 0)
    workspace = x.new_empty(num_rows, x.shape[1], dtype=_compute_dtype(x))
    triton().hypergraph_conv.hypergraph_conv(
        x, vertex_indptr, vertex_edges, _like(vertex_values, x), edge_indptr, edge_vertices, _like(edge_values, x),
        *(_like(scale, x) for scale in (in_scale, edge_scale, out_scale, diagonal)), out, workspace, num_layers,
        vertex_schedule, edge_schedule,
    )  # fmt: skip
    return out


@checked
@_on_device_of_first
def bipartite_propagate(
    user_x: Tensor,
    item_x: Tensor,
    vertex_indptr: Tensor,
    vertex_edges: Tensor,
    edge_indptr: Tensor,
    edge_vertices: Tensor,
    user_scale: Tensor,
    item_scale: Tensor,
    num_layers: int,
    vertex_schedule: RowSchedule,
    edge_schedule: RowSchedule,
) -> tuple[Tensor, Tensor]:
    if num_layers == 0:
        return user_x.clone(), item_x.clone()
    user_out, item_out = torch.empty_like(user_x), torch.empty_like(item_x)
    num_rows = user_x.shape[0] + item_x.shape[0]
    workspace = user_x.new_empty(2 * num_rows, user_x.shape[1], dtype=_compute_dtype(user_x))
    triton().hypergraph_conv.bipartite_propagate(
        user_x, item_x, vertex_indptr, vertex_edges, None, edge_indptr, edge_vertices, None,
        _like(user_scale, user_x), _like(item_scale, user_x), user_out, item_out, workspace, num_layers,
        vertex_schedule, edge_schedule,
    )  # fmt: skip
    return user_out, item_out


@checked
@_on_device_of_first
def info_nce(
    anchor: Tensor,
    positive: Tensor,
    temperature: Tensor,
    rows: Tensor | None,
    row_grad: Tensor | None,
    intra_view_negatives: bool,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses, and the gradients of sum(row_grad * row loss) when `row_grad` is given (else empty tensors)."""
    num_rows = anchor.shape[0] if rows is None else rows.numel()
    if num_rows == 0 or not _fits(anchor, precision):
        return reference.info_nce_with_gradients(
            anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
        )
    rows = None if rows is None else rows.to(torch.int64)
    row_loss = anchor.new_empty(num_rows, dtype=torch.float32)
    grads = row_slope = None
    if row_grad is not None:
        grads, row_slope = [torch.empty_like(t) for t in (anchor, positive)], torch.empty_like(row_loss)
    triton().info_nce.info_nce(
        anchor, positive, rows, _like(row_grad, anchor), row_loss, *(grads or (None, None)), row_slope,
        temperature, intra_view_negatives, precision,
    )  # fmt: skip
    if grads is None:
        return row_loss, anchor.new_empty(0), positive.new_empty(0), temperature.new_empty(0)
    slope = -row_slope.sum(dtype=torch.float64) / temperature.double() ** 2
    return row_loss, *grads, slope.to(temperature.dtype)


@checked
@_on_device_of_first
def item_cross_entropy(
    hidden: Tensor,
    item_embedding: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_grad: Tensor | None,
    hidden_grad: bool,
    items_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses, and the gradients of sum(row_grad * row loss) that are wanted, if `row_grad` is given (else empty).

    Products of float32 rows follow `torch.get_float32_matmul_precision()`; 16-bit rows are multiplied as they are.
    """
    precision = torch.get_float32_matmul_precision() if hidden.dtype == torch.float32 else "high"
    if hidden.shape[0] == 0 or not _fits(hidden, precision):
        return reference.item_cross_entropy_with_gradients(
            hidden, item_embedding, target, bias, row_grad, hidden_grad, items_grad
        )
    items = item_embedding
    hidden_grad, items_grad = hidden_grad and row_grad is not None, items_grad and row_grad is not None
    row_loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    grad_hidden = torch.empty_like(hidden) if hidden_grad else None
    grad_items = torch.empty_like(items) if items_grad else None
    grad_bias = row_loss.new_empty(items.shape[0]) if items_grad and bias is not None else None
    triton().item_cross_entropy.item_cross_entropy(
        hidden, items, target, _like(bias, hidden), _like(row_grad, hidden), row_loss,
        grad_hidden, grad_items, grad_bias, precision,
    )  # fmt: skip
    found = zip((grad_hidden, grad_items, grad_bias), (hidden, items, hidden if bias is None else bias), strict=True)
    return row_loss, *(like.new_empty(0) if grad is None else grad.to(like.dtype) for grad, like in found)


@checked
def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return reference.knn_by_panels(x, k)


def _fits(x: Tensor, precision: str) -> bool:
    return x.dtype != torch.float64 and 0 < x.shape[1] <= triton().WIDEST[precision]
