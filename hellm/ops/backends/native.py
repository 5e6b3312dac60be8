"""Calls into the compiled extension: allocate the outputs, pass addresses, sizes and a dtype code.

The kernels run on the CPU with `torch.get_num_threads()` threads. Schedules of matrices are for GPUs.
"""

from __future__ import annotations

import os
import threading

import torch
from torch import Tensor

from hellm.ops._arguments import checked
from hellm.ops._dtypes import accumulation_dtype
from hellm.ops.backends import loaders
from hellm.ops.backends._backend import Backend
from hellm.ops.backends._pointers import DTYPE_CODE, addresses, like
from hellm.ops.bipartite_propagate import PropagateArguments
from hellm.ops.hypergraph_conv import ConvArguments
from hellm.ops.incidence_product import ProductArguments
from hellm.ops.info_nce import InfoNCEGradientArguments
from hellm.ops.item_cross_entropy import CrossEntropyGradientArguments
from hellm.ops.knn import KnnArguments

_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def _num_threads() -> int:
    """Threads of a kernel: one in a forked process, where OpenMP would wait for those that the fork left behind."""
    return 1 if _forked else torch.get_num_threads()


_kept = threading.local()
_KEPT_BYTES = 32 * 2**20


def _take_workspace(num_bytes: int) -> Tensor:
    """Uninitialised memory of at least this size, the caller's alone until `_keep_workspace`.

    Faulting in fresh pages takes about as long as a convolution in cache, so a thread keeps up to 32 MiB. It is taken
    away for the call: a signal handler that Python runs meanwhile may call an operator as well.
    """
    kept = _kept.__dict__.pop("workspace", None)
    return torch.empty(num_bytes, dtype=torch.uint8) if kept is None or kept.nbytes < num_bytes else kept


def _keep_workspace(workspace: Tensor) -> None:
    if workspace.nbytes <= _KEPT_BYTES:
        _kept.workspace = workspace


class Native(Backend):
    """The C++ kernels, on the CPU."""

    name = "native"

    def unavailable(self, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f'it serves the CPU, not {device.type}; on NVIDIA GPUs the compiled kernels are "cuda" and "nvrtc"'
        if isinstance(loaders.native(), ImportError):
            return f"the compiled extension hellm._C cannot be loaded: {loaders.native()}"
        return None

    @checked(ProductArguments, schedules=False)
    def incidence_product(self, a: ProductArguments) -> Tensor:
        x, num_rows, dim = a.x, a.indptr.numel() - 1, a.x.shape[1]
        out = x.new_empty(num_rows, dim)
        tensors = (x, a.indptr, a.indices, *like(x, a.values), out)
        loaders.extension().incidence_product(*addresses(*tensors), num_rows, dim, DTYPE_CODE[x.dtype], _num_threads())
        return out

    @checked(ConvArguments, schedules=False)
    def hypergraph_conv(self, a: ConvArguments) -> Tensor:
        x = a.x
        if a.num_layers == 0:
            return x.clone()
        factors = like(x, a.vertex_values, a.edge_values, a.in_scale, a.edge_scale, a.out_scale, a.diagonal)
        num_vertices, dim = x.shape
        num_hyperedges = a.edge_indptr.numel() - 1
        out = torch.empty_like(x)
        num_rows = num_hyperedges + (num_vertices if a.num_layers > 1 else 0)
        workspace = _take_workspace(num_rows * dim * accumulation_dtype(x).itemsize)
        tensors = (x, a.vertex_indptr, a.vertex_edges, a.edge_indptr, a.edge_vertices, *factors, out, workspace)
        loaders.extension().hypergraph_conv(
            *addresses(*tensors), num_vertices, num_hyperedges, dim, a.num_layers, DTYPE_CODE[x.dtype], _num_threads()
        )
        _keep_workspace(workspace)
        return out

    @checked(PropagateArguments, schedules=False)
    def bipartite_propagate(self, a: PropagateArguments) -> tuple[Tensor, Tensor]:
        user_x, item_x = a.user_x, a.item_x
        if a.num_layers == 0:
            return user_x.clone(), item_x.clone()
        scales = like(user_x, a.user_scale, a.item_scale)
        user_out, item_out = torch.empty_like(user_x), torch.empty_like(item_x)
        (num_users, dim), num_items = user_x.shape, item_x.shape[0]
        # The layer that is read and the one that is written.
        workspace = _take_workspace(2 * (num_users + num_items) * dim * accumulation_dtype(user_x).itemsize)
        csr = (a.vertex_indptr, a.vertex_edges, a.edge_indptr, a.edge_vertices)
        tensors = (user_x, item_x, *csr, *scales, user_out, item_out, workspace)
        loaders.extension().bipartite_propagate(
            *addresses(*tensors), num_users, num_items, dim, a.num_layers, DTYPE_CODE[user_x.dtype], _num_threads()
        )
        _keep_workspace(workspace)
        return user_out, item_out

    @checked(InfoNCEGradientArguments)
    def info_nce(self, a: InfoNCEGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        anchor, positive, temperature, gradients = a.anchor, a.positive, a.temperature, a.row_grad is not None
        rows = None if a.rows is None else a.rows.to(torch.int64)
        num_keys, dim = anchor.shape
        num_rows = num_keys if rows is None else rows.numel()
        dtype = accumulation_dtype(anchor)
        if num_rows == 0:
            # Empty tensors have no address, and a missing address means that no gradient is wanted.
            allocate = torch.zeros_like if gradients else lambda t: t.new_empty(0)
            return anchor.new_empty(0, dtype=dtype), allocate(anchor), allocate(positive), allocate(temperature)
        row_loss = anchor.new_empty(num_rows, dtype=dtype)
        # d loss / d (1 / temperature) of each row, already times row_grad.
        row_slope = anchor.new_empty(num_rows, dtype=dtype) if gradients else None
        grad_anchor, grad_positive = (torch.empty_like(t) if gradients else t.new_empty(0) for t in (anchor, positive))
        written = (row_loss, *((grad_anchor, grad_positive) if gradients else (None, None)), row_slope)
        loaders.extension().info_nce(
            *addresses(anchor, positive, rows, *like(anchor, a.row_grad), *written),
            num_keys, num_rows, dim, float(temperature), a.intra_view_negatives, a.precision == "highest",
            a.precision == "medium", DTYPE_CODE[anchor.dtype], _num_threads(),
        )  # fmt: skip
        if row_slope is None:
            return row_loss, grad_anchor, grad_positive, temperature.new_empty(0)
        slope = row_slope.sum(dtype=torch.float64) * (-1.0 / float(temperature) ** 2)
        return row_loss, grad_anchor, grad_positive, slope.to(temperature.dtype)

    @checked(CrossEntropyGradientArguments)
    def item_cross_entropy(self, a: CrossEntropyGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        hidden, items, bias = a.hidden, a.item_embedding, a.bias
        values, row_grad = like(hidden, bias, a.row_grad)
        num_rows, dim = hidden.shape
        hidden_grad, items_grad = a.hidden_grad and row_grad is not None, a.items_grad and row_grad is not None
        row_loss = hidden.new_empty(num_rows, dtype=accumulation_dtype(hidden))
        # Without a row nothing would write the gradients of the items.
        allocate = torch.empty if num_rows else torch.zeros
        grad_hidden = allocate(hidden.shape if hidden_grad else 0, dtype=hidden.dtype)
        grad_items = allocate(items.shape if items_grad else 0, dtype=items.dtype)
        grad_bias = allocate(items.shape[0] if items_grad and bias is not None else 0, dtype=row_loss.dtype)
        if num_rows:
            tensors = (hidden, items, a.target, values, row_grad, row_loss, grad_hidden, grad_items, grad_bias)
            loaders.extension().item_cross_entropy(
                *addresses(*tensors), num_rows, items.shape[0], dim, DTYPE_CODE[hidden.dtype], _num_threads()
            )
        return row_loss, grad_hidden, grad_items, grad_bias if bias is None else grad_bias.to(bias.dtype)

    @checked(KnnArguments)
    def knn(self, a: KnnArguments) -> tuple[Tensor, Tensor]:
        x, k = a
        num_rows, dim = x.shape
        index = x.new_empty((num_rows, k), dtype=torch.int64)
        similarity = x.new_empty((num_rows, k), dtype=accumulation_dtype(x))
        loaders.extension().knn(*addresses(x, index, similarity), num_rows, dim, k, DTYPE_CODE[x.dtype], _num_threads())
        return index, similarity
