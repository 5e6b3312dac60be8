"""Calls of the Triton kernels: allocate outputs and workspace, pass tensors in the order of the C++ launchers.

Nothing waits for the device. Losses of float64 rows and of rows wider than 256 columns, 128 at "highest" precision, are
computed in plain torch by blocks.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hellm.ops._arguments import checked
from hellm.ops._dtypes import accumulation_dtype
from hellm.ops.backends import loaders
from hellm.ops.backends._backend import GpuBackend, too_old
from hellm.ops.backends._pointers import like
from hellm.ops.bipartite_propagate import PropagateArguments
from hellm.ops.hypergraph_conv import ConvArguments
from hellm.ops.incidence_product import ProductArguments
from hellm.ops.info_nce import InfoNCEGradientArguments
from hellm.ops.info_nce import by_blocks as info_nce_by_blocks
from hellm.ops.item_cross_entropy import CrossEntropyGradientArguments
from hellm.ops.item_cross_entropy import by_blocks as item_cross_entropy_by_blocks


def _on_device_of_first(method: Callable) -> Callable:
    """Triton launches on torch's current device, whatever the device of the tensors."""

    @functools.wraps(method)
    def guarded(backend: Any, a: Any):
        first = next(iter(a))
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return method(backend, a)

    return guarded


class Triton(GpuBackend):
    """The Triton kernels."""

    name = "triton"
    compiler = "triton"
    extension = False

    def unavailable(self, device: torch.device) -> str | None:
        if isinstance(loaders.triton(), ImportError):
            return f"Triton cannot be loaded: {loaders.triton()}"
        if device.type == "cpu" and not loaders.triton_kernels().INTERPRETED:
            return (
                "Triton needs a GPU; its interpreter runs on the CPU where TRITON_INTERPRET=1 was set before the start"
            )
        return too_old(device)

    def kernels(self) -> Iterable[Path]:
        return Path(str(loaders.triton_kernels().__file__)).parent.glob("*.py")

    @checked(ProductArguments)
    @_on_device_of_first
    def incidence_product(self, a: ProductArguments) -> Tensor:
        x = a.x
        out = x.new_empty(a.indptr.numel() - 1, x.shape[1])
        loaders.triton_kernels().hypergraph_conv.incidence_product(
            x, a.indptr, a.indices, *like(x, a.values), out, a.matrix.schedule
        )
        return out

    @checked(ConvArguments)
    @_on_device_of_first
    def hypergraph_conv(self, a: ConvArguments) -> Tensor:
        x = a.x
        if a.num_layers == 0:
            return x.clone()
        out = torch.empty_like(x)
        num_rows = a.edge_indptr.numel() - 1 + (x.shape[0] if a.num_layers > 1 else 0)
        workspace = x.new_empty(num_rows, x.shape[1], dtype=accumulation_dtype(x))
        vertex = (a.vertex_indptr, a.vertex_edges, *like(x, a.vertex_values))
        edge = (a.edge_indptr, a.edge_vertices, *like(x, a.edge_values))
        scales = like(x, a.in_scale, a.edge_scale, a.out_scale, a.diagonal)
        loaders.triton_kernels().hypergraph_conv.hypergraph_conv(
            x, *vertex, *edge, *scales, out, workspace, a.num_layers, a.vertex_schedule, a.edge_schedule
        )
        return out

    @checked(PropagateArguments)
    @_on_device_of_first
    def bipartite_propagate(self, a: PropagateArguments) -> tuple[Tensor, Tensor]:
        user_x, item_x = a.user_x, a.item_x
        if a.num_layers == 0:
            return user_x.clone(), item_x.clone()
        user_out, item_out = torch.empty_like(user_x), torch.empty_like(item_x)
        num_rows = user_x.shape[0] + item_x.shape[0]
        workspace = user_x.new_empty(2 * num_rows, user_x.shape[1], dtype=accumulation_dtype(user_x))
        loaders.triton_kernels().hypergraph_conv.bipartite_propagate(
            user_x, item_x, a.vertex_indptr, a.vertex_edges, None, a.edge_indptr, a.edge_vertices, None,
            *like(user_x, a.user_scale, a.item_scale), user_out, item_out, workspace, a.num_layers,
            a.vertex_schedule, a.edge_schedule,
        )  # fmt: skip
        return user_out, item_out

    @checked(InfoNCEGradientArguments)
    @_on_device_of_first
    def info_nce(self, a: InfoNCEGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        anchor, positive, temperature = a.anchor, a.positive, a.temperature
        num_rows = anchor.shape[0] if a.rows is None else a.rows.numel()
        if num_rows == 0 or not _fits(anchor, a.precision):
            return info_nce_by_blocks(a)
        rows = None if a.rows is None else a.rows.to(torch.int64)
        row_loss = anchor.new_empty(num_rows, dtype=torch.float32)
        grad_anchor = grad_positive = row_slope = None
        if a.row_grad is not None:
            grad_anchor, grad_positive, row_slope = map(torch.empty_like, (anchor, positive, row_loss))
        loaders.triton_kernels().info_nce.info_nce(
            anchor, positive, rows, *like(anchor, a.row_grad), row_loss, grad_anchor, grad_positive, row_slope,
            temperature, a.intra_view_negatives, a.precision,
        )  # fmt: skip
        if grad_anchor is None or grad_positive is None or row_slope is None:
            return row_loss, anchor.new_empty(0), positive.new_empty(0), temperature.new_empty(0)
        slope = -row_slope.sum(dtype=torch.float64) / temperature.double() ** 2
        return row_loss, grad_anchor, grad_positive, slope.to(temperature.dtype)

    @checked(CrossEntropyGradientArguments)
    @_on_device_of_first
    def item_cross_entropy(self, a: CrossEntropyGradientArguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Products of float32 rows follow `torch.get_float32_matmul_precision()`; 16-bit rows are taken as they are."""
        hidden, items, bias = a.hidden, a.item_embedding, a.bias
        precision = torch.get_float32_matmul_precision() if hidden.dtype == torch.float32 else "high"
        if hidden.shape[0] == 0 or not _fits(hidden, precision):
            return item_cross_entropy_by_blocks(a)
        hidden_grad, items_grad = a.hidden_grad and a.row_grad is not None, a.items_grad and a.row_grad is not None
        row_loss = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if hidden_grad else None
        grad_items = torch.empty_like(items) if items_grad else None
        grad_bias = row_loss.new_empty(items.shape[0]) if items_grad and bias is not None else None
        loaders.triton_kernels().item_cross_entropy.item_cross_entropy(
            hidden, items, a.target, *like(hidden, bias, a.row_grad), row_loss,
            grad_hidden, grad_items, grad_bias, precision,
        )  # fmt: skip
        alike = (hidden, items, hidden if bias is None else bias)
        found = zip((grad_hidden, grad_items, grad_bias), alike, strict=True)
        of_hidden, of_items, of_bias = (t.new_empty(0) if grad is None else grad.to(t.dtype) for grad, t in found)
        return row_loss, of_hidden, of_items, of_bias


def _fits(x: Tensor, precision: str) -> bool:
    return x.dtype != torch.float64 and 0 < x.shape[1] <= loaders.triton_kernels().WIDEST[precision]
