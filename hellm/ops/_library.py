"""Registration with torch.library: schemas, shapes without data, kernels, autograd and autocast rules.

Arguments are checked in `hellm.ops`; only the values of indices are checked here, where compiled code comes by too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from hellm.hypergraph import RowSchedule
from hellm.ops import _backends, _gpu, _native, _nvrtc, _triton, reference

_library = torch.library.Library("hellm", "DEF")
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


# Backend -> its implementation of every operator, under the same names with the same arguments.
_IMPLEMENTATIONS: dict[str, Any] = {
    "native": _native,
    "cuda": _gpu.Gpu(_gpu.launch_compiled),
    "nvrtc": _gpu.Gpu(_nvrtc.launch),
    "triton": _triton,
    "torch": SimpleNamespace(
        incidence_product=reference.incidence_product,
        hypergraph_conv=reference.hypergraph_conv,
        bipartite_propagate=reference.bipartite_propagate,
        info_nce=reference.info_nce_with_gradients,
        item_cross_entropy=reference.item_cross_entropy_with_gradients,
        knn=reference.knn_by_panels,
    ),
}


def _define(schema: str, kernel_of: Callable[[Any], Callable], fake: Callable, autocast: torch.dtype | None) -> None:
    """Define one operator from what it is in each implementation.

    `autocast` is the dtype it runs in under autocast, None the one autocast is set to.
    """
    name = schema[: schema.index("(")]
    _library.define(schema)
    kernels = {backend: kernel_of(implementation) for backend, implementation in _IMPLEMENTATIONS.items()}

    def kernel(*args):
        device = next(a.device for a in args if isinstance(a, Tensor))
        return kernels[_backends.select(device)](*args)

    for key in ("CPU", "CUDA"):
        _library.impl(name, kernel, key)
    torch.library.register_fake(f"hellm::{name}", fake, lib=_library)
    operator = getattr(torch.ops.hellm, name)

    for device_type, key in _AUTOCAST_KEYS.items():

        def under_autocast(*args, device_type=device_type, key=key):
            dtype = autocast or torch.get_autocast_dtype(device_type)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return operator(*(_cast_rows(a, dtype) for a in args))

        _library.impl(name, under_autocast, key.name)


def _register_autograd(name: str, backward: Callable, setup: Callable) -> None:
    """Gradients come from the backend that was asked for at the forward pass.

    Autograd runs the backward pass of a GPU in a thread of its own, where the caller's choice is not in force.
    """

    def keep(ctx, inputs, output):
        ctx.chosen_backend = _backends.chosen()
        setup(ctx, inputs, output)

    def run(ctx, *grads):
        with contextlib.nullcontext() if ctx.chosen_backend is None else _backends.backend(ctx.chosen_backend):
            return backward(ctx, *grads)

    torch.library.register_autograd(f"hellm::{name}", run, setup_context=keep, lib=_library)


def _cast_rows(argument, dtype: torch.dtype):
    """Matrices of rows follow autocast; scales, values and indices (all 1-d) keep their dtype, and so does float64."""
    matrix = isinstance(argument, Tensor) and argument.ndim == 2 and argument.is_floating_point()
    return argument.to(dtype) if matrix and argument.dtype != torch.float64 else argument


def _check_in_range(name: str, index: Tensor, count: int) -> None:
    """Indices on the CPU; looking at those on a GPU would wait for it at every step, and its kernels take any value.

    Raises:
        ValueError: naming the first index that is not in [0, count).
    """
    if not index.is_cpu:
        return
    outside = (index < 0) | (index >= count)
    if bool(outside.any()):
        place = int(outside.nonzero()[0])
        raise ValueError(f"{name} must be in [0, {count}), got {int(index[place])} first at position {place}")


# ----------------------------------------------------------------------------------------------- sparse products


def _incidence_product_fake(x, indptr, *_):
    return x.new_empty(indptr.shape[0] - 1, x.shape[1])


_define(
    "incidence_product(Tensor x, Tensor indptr, Tensor indices, Tensor? values, Tensor row_order,"
    " Tensor hub_chunk_begin, int num_long, int num_hub_chunks, Tensor t_indptr, Tensor t_indices, Tensor? t_values,"
    " Tensor t_row_order, Tensor t_hub_chunk_begin, int t_num_long, int t_num_hub_chunks) -> Tensor",
    lambda ops: lambda *args: ops.incidence_product(*args[:4], RowSchedule(*args[4:8])),
    _incidence_product_fake,
    autocast=None,
)


def _incidence_product_setup(ctx, inputs, output):
    ctx.matrices = inputs[1:]


def _incidence_product_backward(ctx, grad):
    matrix, transposed = ctx.matrices[:7], ctx.matrices[7:]
    grad_x = torch.ops.hellm.incidence_product(grad, *transposed, *matrix) if ctx.needs_input_grad[0] else None
    return grad_x, *[None] * 14


_register_autograd("incidence_product", _incidence_product_backward, _incidence_product_setup)

_define(
    "hypergraph_conv(Tensor x, Tensor vertex_indptr, Tensor vertex_edges, Tensor? vertex_values, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor? edge_values, Tensor? in_scale, Tensor? edge_scale, Tensor? out_scale,"
    " Tensor? diagonal, int num_layers, Tensor vertex_row_order, Tensor vertex_hub_chunk_begin, int vertex_num_long,"
    " int vertex_num_hub_chunks, Tensor edge_row_order, Tensor edge_hub_chunk_begin, int edge_num_long,"
    " int edge_num_hub_chunks) -> Tensor",
    lambda ops: lambda *args: ops.hypergraph_conv(*args[:12], RowSchedule(*args[12:16]), RowSchedule(*args[16:])),
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    autocast=None,
)


def _conv_setup(ctx, inputs, output):
    x, *csr, in_scale, edge_scale, out_scale, diagonal, ctx.num_layers = inputs[:12]
    scales_need = any(ctx.needs_input_grad[7:11])
    ctx.csr, ctx.schedules = csr, inputs[12:]
    ctx.save_for_backward(in_scale, edge_scale, out_scale, diagonal, x if scales_need else None)


def _conv_backward(ctx, grad):
    in_scale, edge_scale, out_scale, diagonal, x = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        # The core H diag(e) H^T - diag(c) is symmetric: the transpose is the same operator, outer scales swapped.
        grad_x = torch.ops.hellm.hypergraph_conv(
            grad, *ctx.csr, out_scale, edge_scale, in_scale, diagonal, ctx.num_layers, *ctx.schedules
        )
    grad_scales = [None] * 4
    if x is not None:
        grad_scales = _conv_scale_gradients(ctx, grad, x, in_scale, edge_scale, out_scale, diagonal)
    return grad_x, *[None] * 6, *grad_scales, *[None] * 9


def _conv_scale_gradients(ctx, grad, x, in_scale, edge_scale, out_scale, diagonal):
    """Gradients of one layer in its four diagonal factors: row-wise dots of what stands left and right of each."""
    vertex, edge = (*ctx.csr[:3], *ctx.schedules[:4]), (*ctx.csr[3:], *ctx.schedules[4:])

    def scaled(rows, scale):
        return rows if scale is None else rows * scale.to(rows.dtype).unsqueeze(1)

    def core(rows):
        joined = scaled(torch.ops.hellm.incidence_product(rows, *edge, *vertex), edge_scale)
        out = torch.ops.hellm.incidence_product(joined, *vertex, *edge)
        return out if diagonal is None else out - scaled(rows, diagonal)

    def dot(left, right, scale):
        return (left * right).sum(1).to(scale.dtype)

    source, cotangent = scaled(x, in_scale), scaled(grad, out_scale)
    grads = [None] * 4
    if ctx.needs_input_grad[7]:
        grads[0] = dot(core(cotangent), x, in_scale)
    if ctx.needs_input_grad[8]:
        left = torch.ops.hellm.incidence_product(cotangent, *edge, *vertex)
        grads[1] = dot(left, torch.ops.hellm.incidence_product(source, *edge, *vertex), edge_scale)
    if ctx.needs_input_grad[9]:
        grads[2] = dot(grad, core(source), out_scale)
    if ctx.needs_input_grad[10]:
        grads[3] = -dot(cotangent, source, diagonal)
    return grads


_register_autograd("hypergraph_conv", _conv_backward, _conv_setup)

_define(
    "bipartite_propagate(Tensor user_x, Tensor item_x, Tensor vertex_indptr, Tensor vertex_edges, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor user_scale, Tensor item_scale, int num_layers, Tensor vertex_row_order,"
    " Tensor vertex_hub_chunk_begin, int vertex_num_long, int vertex_num_hub_chunks, Tensor edge_row_order,"
    " Tensor edge_hub_chunk_begin, int edge_num_long, int edge_num_hub_chunks) -> (Tensor, Tensor)",
    lambda ops: lambda *args: ops.bipartite_propagate(*args[:9], RowSchedule(*args[9:13]), RowSchedule(*args[13:])),
    lambda user_x, item_x, *_: (user_x.new_empty(user_x.shape), item_x.new_empty(item_x.shape)),
    autocast=None,
)


def _propagate_setup(ctx, inputs, output):
    ctx.rest = inputs[2:]
    ctx.shapes = [(t.shape, t.dtype, t.device) for t in inputs[:2]]


def _propagate_backward(ctx, grad_user, grad_item):
    grads = [
        torch.zeros(shape, dtype=dtype, device=device) if grad is None else grad
        for grad, (shape, dtype, device) in zip((grad_user, grad_item), ctx.shapes, strict=True)
    ]
    return *torch.ops.hellm.bipartite_propagate(*grads, *ctx.rest), *[None] * 15


_register_autograd("bipartite_propagate", _propagate_backward, _propagate_setup)

# ------------------------------------------------------------------------------------------------------ InfoNCE


def _loss_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _reduce(row_loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return row_loss
    return row_loss.mean() if reduction == "mean" else row_loss.sum()


def _row_grad(row_count: int, like: Tensor, reduction: str) -> Tensor:
    scale = 1.0 / row_count if reduction == "mean" and row_count else 1.0
    return torch.full((row_count,), scale, dtype=_loss_dtype(like), device=like.device)


def _with_loss(x: Tensor, reduction: str) -> bool:
    """Whether the gradients of the loss, a scalar, come from its own sweep, to be scaled in the backward pass.

    Those of a mean are too small for float16: they must be multiplied by the loss scale before they are rounded.
    """
    return reduction != "none" and x.dtype != torch.float16


def _row_grad_of(grad: Tensor, row_count: int, reduction: str) -> Tensor:
    """Gradient in each row's loss from that in the reduced loss."""
    return grad if reduction == "none" else grad.expand(row_count) / (row_count if reduction == "mean" else 1)


def _info_nce_with(implementation: Callable) -> Callable:
    """Loss and, for a scalar reduction, both gradients in the same sweep, but see `_with_loss`."""

    def kernel(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
        count = anchor.shape[0] if rows is None else rows.shape[0]
        if rows is not None:
            _check_in_range("rows", rows, anchor.shape[0])
        row_grad = _row_grad(count, anchor, reduction) if compute_grad and _with_loss(anchor, reduction) else None
        row_loss, *grads = implementation(
            anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
        )
        return _reduce(row_loss, reduction), *grads

    return kernel


def _info_nce_fake(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
    count = anchor.shape[0] if rows is None else rows.shape[0]
    loss = anchor.new_empty((count,) if reduction == "none" else (), dtype=_loss_dtype(anchor))
    if not compute_grad or not _with_loss(anchor, reduction):
        return loss, anchor.new_empty(0), anchor.new_empty(0), temperature.new_empty(0)
    return loss, anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


_define(
    "info_nce(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, bool intra_view_negatives,"
    " str reduction, str precision, bool compute_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda ops: _info_nce_with(ops.info_nce),
    _info_nce_fake,
    autocast=torch.float32,
)


def _info_nce_backward_fake(anchor, positive, temperature, *_):
    return anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


_define(
    "info_nce_backward(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, Tensor row_grad,"
    " bool intra_view_negatives, str precision) -> (Tensor, Tensor, Tensor)",
    lambda ops: lambda *args: ops.info_nce(*args)[1:],
    _info_nce_backward_fake,
    autocast=torch.float32,
)


def _info_nce_setup(ctx, inputs, output):
    anchor, positive, temperature, rows, *ctx.settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(anchor, positive, temperature, rows, *output[1:])


def _info_nce_backward(ctx, grad, *_):
    anchor, positive, temperature, rows, *computed = ctx.saved_tensors
    intra_view_negatives, reduction, precision = ctx.settings[:3]
    if grad is None:
        return (None,) * 8
    if torch.is_grad_enabled():
        # A second derivative is asked for; the fused sweep has none, the definition has.
        row_loss = reference.info_nce(anchor, positive, temperature, rows, intra_view_negatives)
        needed = [t for t, need in zip((anchor, positive, temperature), ctx.needs_input_grad, strict=False) if need]
        found = iter(torch.autograd.grad(_reduce(row_loss, reduction), needed, grad, create_graph=True))
        grads = [next(found) if need else None for need in ctx.needs_input_grad[:3]]
    elif not _with_loss(anchor, reduction):
        row_grad = _row_grad_of(grad, (anchor if rows is None else rows).shape[0], reduction)
        grads = torch.ops.hellm.info_nce_backward(
            anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
        )
    else:
        grads = [g * grad.to(g.dtype) for g in computed]
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 5


_register_autograd("info_nce", _info_nce_backward, _info_nce_setup)

# ------------------------------------------------------------------------------------------- item cross-entropy


def _item_cross_entropy_with(implementation: Callable) -> Callable:
    """Loss and, for a scalar reduction, the wanted gradients in the same sweep, but see `_with_loss`."""

    def kernel(hidden, item_embedding, target, bias, reduction, hidden_grad, items_grad):
        _check_in_range("target", target, item_embedding.shape[0])
        wanted = (hidden_grad or items_grad) and _with_loss(hidden, reduction)
        row_grad = _row_grad(hidden.shape[0], hidden, reduction) if wanted else None
        row_loss, *grads = implementation(hidden, item_embedding, target, bias, row_grad, hidden_grad, items_grad)
        return _reduce(row_loss, reduction), *grads

    return kernel


def _item_cross_entropy_gradient_shapes(hidden, item_embedding, bias, hidden_grad, items_grad):
    grad_items = item_embedding.new_empty(item_embedding.shape if items_grad else 0)
    if bias is None:
        grad_bias = hidden.new_empty(0, dtype=_loss_dtype(hidden))
    else:
        grad_bias = bias.new_empty(bias.shape if items_grad else 0)
    return hidden.new_empty(hidden.shape if hidden_grad else 0), grad_items, grad_bias


def _item_cross_entropy_fake(hidden, item_embedding, target, bias, reduction, hidden_grad, items_grad):
    loss = hidden.new_empty((hidden.shape[0],) if reduction == "none" else (), dtype=_loss_dtype(hidden))
    now = _with_loss(hidden, reduction)
    return loss, *_item_cross_entropy_gradient_shapes(
        hidden, item_embedding, bias, hidden_grad and now, items_grad and now
    )


_define(
    "item_cross_entropy(Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias, str reduction,"
    " bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda ops: _item_cross_entropy_with(ops.item_cross_entropy),
    _item_cross_entropy_fake,
    autocast=None,
)

_define(
    "item_cross_entropy_backward(Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias, Tensor row_grad,"
    " bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor)",
    lambda ops: lambda *args: ops.item_cross_entropy(*args)[1:],
    lambda hidden, items, target, bias, row_grad, *need: _item_cross_entropy_gradient_shapes(
        hidden, items, bias, *need
    ),
    autocast=None,
)


def _item_cross_entropy_setup(ctx, inputs, output):
    hidden, item_embedding, target, bias, ctx.reduction, *ctx.wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(hidden, item_embedding, target, bias, *output[1:])


def _item_cross_entropy_backward(ctx, grad, *_):
    hidden, item_embedding, target, bias, *computed = ctx.saved_tensors
    need = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
    if grad is None:
        return (None,) * 7
    if torch.is_grad_enabled():
        # A second derivative is asked for; the fused sweep has none, the definition has.
        wide = [None if t is None else t.to(_loss_dtype(hidden)) for t in (hidden, item_embedding, bias)]
        row_loss = reference.item_cross_entropy(*wide[:2], target, wide[2])
        needed = [t for t, wanted in zip((hidden, item_embedding, bias), need, strict=True) if wanted]
        found = iter(torch.autograd.grad(_reduce(row_loss, ctx.reduction), needed, grad, create_graph=True))
        grads = [next(found) if wanted else None for wanted in need]
    elif not _with_loss(hidden, ctx.reduction):
        row_grad = _row_grad_of(grad, hidden.shape[0], ctx.reduction)
        grads = torch.ops.hellm.item_cross_entropy_backward(
            hidden, item_embedding, target, bias, row_grad, need[0], need[1] or need[2]
        )
    else:
        grads = [g * grad.to(g.dtype) for g in computed]
    grads = [g if wanted else None for g, wanted in zip(grads, need, strict=True)]
    return *grads[:2], None, grads[2], *[None] * 3


_register_autograd("item_cross_entropy", _item_cross_entropy_backward, _item_cross_entropy_setup)

# ---------------------------------------------------------------------------------------------------------- kNN


_define(
    "knn(Tensor x, int k) -> (Tensor, Tensor)",
    lambda ops: ops.knn,
    lambda x, k: (
        x.new_empty((x.shape[0], k), dtype=torch.int64),
        x.new_empty((x.shape[0], k), dtype=_loss_dtype(x)),
    ),
    autocast=torch.float32,
)
