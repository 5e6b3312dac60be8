"""Calls into the compiled extension: allocate the outputs, pass addresses, sizes and a dtype code.

Every function mirrors one of `hellm.ops.reference` and runs on the CPU with `torch.get_num_threads()` threads.
Schedules of matrices are for GPUs and ignored here as there.
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from hellm.ops._arguments import checked
from hellm.ops._backends import native

_DTYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _num_threads() -> int:
    """Threads of a kernel: one in a forked process, where OpenMP would wait for those that the fork left behind."""
    return 1 if _forked else torch.get_num_threads()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _like(values: Tensor | None, x: Tensor) -> Tensor | None:
    """Scales and values, which are contiguous, in the accumulation dtype of x."""
    dtype = _compute_dtype(x)
    return values if values is None or values.dtype == dtype else values.to(dtype)


_kept = threading.local()
_KEPT_BYTES = 32 * 2**20


def _take_workspace(num_bytes: int) -> Tensor:
    """Uninitialised memory of at least this size, the caller's alone until `_keep_workspace`.

    Faulting in fresh pages takes about as long as a convolution in cache, so a thread keeps up to 32 MiB. It is taken
    away for the call: a signal handler that Python runs meanwhile may call an operator as well.
    """
    kept = _kept.__dict__.pop("workspace", None)
    return torch.empty(num_bytes, dtype=torch.uint8) if kept is None or len(kept) < num_bytes else kept


def _keep_workspace(workspace: Tensor) -> None:
    if len(workspace) <= _KEPT_BYTES:
        _kept.workspace = workspace


@checked
def incidence_product(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, *_: object) -> Tensor:
    values = _like(values, x)
    out = x.new_empty(indptr.numel() - 1, x.shape[1])
    native().incidence_product(
        _address(x), _address(indptr), _address(indices), _address(values), _address(out),
        out.shape[0], x.shape[1], _DTYPE_CODE[x.dtype], _num_threads(),
    )  # fmt: skip
    return out


@checked
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
    *_: object,
) -> Tensor:
    if num_layers == 0:
        return x.clone()
    factors = [_like(t, x) for t in (vertex_values, edge_values, in_scale, edge_scale, out_scale, diagonal)]
    num_hyperedges = edge_indptr.numel() - 1
    out = torch.empty_like(x)
    num_rows = num_hyperedges + (x.shape[0] if num_layers > 1 else 0)
    workspace = _take_workspace(num_rows * x.shape[1] * _compute_dtype(x).itemsize)
    native().hypergraph_conv(
        _address(x), _address(vertex_indptr), _address(vertex_edges), _address(edge_indptr), _address(edge_vertices),
        *map(_address, factors), _address(out), _address(workspace),
        x.shape[0], num_hyperedges, x.shape[1], num_layers, _DTYPE_CODE[x.dtype], _num_threads(),
    )  # fmt: skip
    _keep_workspace(workspace)
    return out


@checked
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
    *_: object,
) -> tuple[Tensor, Tensor]:
    if num_layers == 0:
        return user_x.clone(), item_x.clone()
    scales = [_like(t, user_x) for t in (user_scale, item_scale)]
    user_out, item_out = torch.empty_like(user_x), torch.empty_like(item_x)
    # The layer that is read and the one that is written.
    num_rows = 2 * (user_x.shape[0] + item_x.shape[0])
    workspace = _take_workspace(num_rows * user_x.shape[1] * _compute_dtype(user_x).itemsize)
    native().bipartite_propagate(
        _address(user_x), _address(item_x), _address(vertex_indptr), _address(vertex_edges), _address(edge_indptr),
        _address(edge_vertices), *map(_address, scales), _address(user_out), _address(item_out), _address(workspace),
        user_x.shape[0], item_x.shape[0], user_x.shape[1], num_layers, _DTYPE_CODE[user_x.dtype],
        _num_threads(),
    )  # fmt: skip
    _keep_workspace(workspace)
    return user_out, item_out


@checked
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
    rows = None if rows is None else rows.to(torch.int64)
    row_grad = _like(row_grad, anchor)
    num_keys, dim = anchor.shape
    num_rows = num_keys if rows is None else rows.numel()
    dtype = _compute_dtype(anchor)
    if num_rows == 0:
        # Empty tensors have no address, and a missing address means that no gradient is wanted.
        grads = [
            torch.zeros_like(t) if row_grad is not None else t.new_empty(0) for t in (anchor, positive, temperature)
        ]
        return anchor.new_empty(0, dtype=dtype), *grads
    row_loss = anchor.new_empty(num_rows, dtype=dtype)
    # d loss / d (1 / temperature) of each row, already times row_grad.
    row_slope = anchor.new_empty(num_rows if row_grad is not None else 0, dtype=dtype)
    grads = [torch.empty_like(t) if row_grad is not None else t.new_empty(0) for t in (anchor, positive)]
    native().info_nce(
        _address(anchor), _address(positive), _address(rows), _address(row_grad), _address(row_loss),
        *map(_address, grads if row_grad is not None else (None, None)), _address(row_slope),
        num_keys, num_rows, dim, float(temperature), intra_view_negatives, precision == "highest",
        _DTYPE_CODE[anchor.dtype], _num_threads(),
    )  # fmt: skip
    if row_grad is None:
        return row_loss, *grads, temperature.new_empty(0)
    slope = row_slope.sum(dtype=torch.float64) * (-1.0 / float(temperature) ** 2)
    return row_loss, *grads, slope.to(temperature.dtype)


@checked
def item_cross_entropy(
    hidden: Tensor,
    item_embedding: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_grad: Tensor | None,
    hidden_grad: bool,
    items_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row losses, and the wanted gradients of sum(row_grad * row loss) if `row_grad` is given (else empty tensors)."""
    items = item_embedding
    values, row_grad = _like(bias, hidden), _like(row_grad, hidden)
    num_rows, dim = hidden.shape
    hidden_grad, items_grad = hidden_grad and row_grad is not None, items_grad and row_grad is not None
    row_loss = hidden.new_empty(num_rows, dtype=_compute_dtype(hidden))
    # Without a row nothing would write the gradients of the items.
    allocate = torch.empty if num_rows else torch.zeros
    grad_hidden = allocate(hidden.shape if hidden_grad else 0, dtype=hidden.dtype)
    grad_items = allocate(items.shape if items_grad else 0, dtype=items.dtype)
    grad_bias = allocate(items.shape[0] if items_grad and bias is not None else 0, dtype=row_loss.dtype)
    if num_rows:
        native().item_cross_entropy(
            *map(_address, (hidden, items, target, values, row_grad, row_loss, grad_hidden, grad_items, grad_bias)),
            num_rows, items.shape[0], dim, _DTYPE_CODE[hidden.dtype], _num_threads(),
        )  # fmt: skip
    return row_loss, grad_hidden, grad_items, grad_bias if bias is None else grad_bias.to(bias.dtype)


@checked
def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    index = x.new_empty((x.shape[0], k), dtype=torch.int64)
    similarity = x.new_empty((x.shape[0], k), dtype=_compute_dtype(x))
    native().knn(
        _address(x), _address(index), _address(similarity), x.shape[0], x.shape[1], k, _DTYPE_CODE[x.dtype],
        _num_threads(),
    )  # fmt: skip
    return index, similarity
