"""Registration with torch.library: schemas, shapes without data, kernels, autograd and autocast rules.

Arguments are checked in `hellm.ops`; nothing is checked twice here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hellm.ops import _backends, _native, reference

_library = torch.library.Library("hellm", "DEF")
_AUTOCAST_KEYS = {"cpu": torch._C.DispatchKey.AutocastCPU, "cuda": torch._C.DispatchKey.AutocastCUDA}


def _define(schema: str, native: Callable, plain: Callable, fake: Callable, autocast: torch.dtype | None) -> None:
    """Define one operator; `autocast` is the dtype it runs in under autocast, None the one autocast is set to."""
    name = schema[: schema.index("(")]
    _library.define(schema)
    implementations = {"native": native, "torch": plain}

    def kernel(*args):
        device_type = next(a.device.type for a in args if isinstance(a, Tensor))
        return implementations[_backends.select(device_type)](*args)

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


def _cast_rows(argument, dtype: torch.dtype):
    """Matrices of rows follow autocast; scales, values and indices (all 1-d) keep their dtype, and so does float64."""
    matrix = isinstance(argument, Tensor) and argument.ndim == 2 and argument.is_floating_point()
    return argument.to(dtype) if matrix and argument.dtype != torch.float64 else argument


# ----------------------------------------------------------------------------------------------- sparse products


def _incidence_product_fake(x, indptr, indices, values, *transposed):
    return x.new_empty(indptr.shape[0] - 1, x.shape[1])


_define(
    "incidence_product(Tensor x, Tensor indptr, Tensor indices, Tensor? values,"
    " Tensor t_indptr, Tensor t_indices, Tensor? t_values) -> Tensor",
    lambda x, indptr, indices, values, *_: _native.incidence_product(x, indptr, indices, values),
    lambda x, indptr, indices, values, *_: reference.incidence_product(x, indptr, indices, values),
    _incidence_product_fake,
    autocast=None,
)


def _incidence_product_setup(ctx, inputs, output):
    ctx.csr = inputs[1:]


def _incidence_product_backward(ctx, grad):
    grad_x = torch.ops.hellm.incidence_product(grad, *ctx.csr[3:], *ctx.csr[:3]) if ctx.needs_input_grad[0] else None
    return grad_x, *[None] * 6


torch.library.register_autograd(
    "hellm::incidence_product", _incidence_product_backward, setup_context=_incidence_product_setup, lib=_library
)

_define(
    "hypergraph_conv(Tensor x, Tensor vertex_indptr, Tensor vertex_edges, Tensor? vertex_values, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor? edge_values, Tensor? in_scale, Tensor? edge_scale, Tensor? out_scale,"
    " Tensor? diagonal, int num_layers) -> Tensor",
    _native.hypergraph_conv,
    reference.hypergraph_conv,
    lambda x, *_: torch.empty_like(x, memory_format=torch.contiguous_format),
    autocast=None,
)


def _conv_setup(ctx, inputs, output):
    x, *csr, in_scale, edge_scale, out_scale, diagonal, ctx.num_layers = inputs
    scales_need = any(ctx.needs_input_grad[7:11])
    ctx.csr = csr
    ctx.save_for_backward(in_scale, edge_scale, out_scale, diagonal, x if scales_need else None)


def _conv_backward(ctx, grad):
    in_scale, edge_scale, out_scale, diagonal, x = ctx.saved_tensors
    grad_x = None
    if ctx.needs_input_grad[0]:
        # The core H diag(e) H^T - diag(c) is symmetric: the transpose is the same operator, outer scales swapped.
        grad_x = torch.ops.hellm.hypergraph_conv(
            grad, *ctx.csr, out_scale, edge_scale, in_scale, diagonal, ctx.num_layers
        )
    grad_scales = [None] * 4
    if x is not None:
        grad_scales = _conv_scale_gradients(ctx, grad, x, in_scale, edge_scale, out_scale, diagonal)
    return grad_x, *[None] * 6, *grad_scales, None


def _conv_scale_gradients(ctx, grad, x, in_scale, edge_scale, out_scale, diagonal):
    """Gradients of one layer in its four diagonal factors: row-wise dots of what stands left and right of each."""
    vertex, edge = tuple(ctx.csr[:3]), tuple(ctx.csr[3:])

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


torch.library.register_autograd("hellm::hypergraph_conv", _conv_backward, setup_context=_conv_setup, lib=_library)

_define(
    "bipartite_propagate(Tensor user_x, Tensor item_x, Tensor vertex_indptr, Tensor vertex_edges, Tensor edge_indptr,"
    " Tensor edge_vertices, Tensor user_scale, Tensor item_scale, int num_layers) -> (Tensor, Tensor)",
    _native.bipartite_propagate,
    reference.bipartite_propagate,
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
    return *torch.ops.hellm.bipartite_propagate(*grads, *ctx.rest), *[None] * 7


torch.library.register_autograd(
    "hellm::bipartite_propagate", _propagate_backward, setup_context=_propagate_setup, lib=_library
)

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


def _info_nce_with(implementation: Callable) -> Callable:
    """Loss and, for a scalar reduction, both gradients in the same sweep."""

    def kernel(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
        count = anchor.shape[0] if rows is None else rows.shape[0]
        row_grad = _row_grad(count, anchor, reduction) if compute_grad and reduction != "none" else None
        row_loss, *grads = implementation(
            anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
        )
        return _reduce(row_loss, reduction), *grads

    return kernel


def _info_nce_fake(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
    count = anchor.shape[0] if rows is None else rows.shape[0]
    loss = anchor.new_empty((count,) if reduction == "none" else (), dtype=_loss_dtype(anchor))
    if not compute_grad or reduction == "none":
        return loss, anchor.new_empty(0), anchor.new_empty(0), temperature.new_empty(0)
    return loss, anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


_define(
    "info_nce(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, bool intra_view_negatives,"
    " str reduction, str precision, bool compute_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    _info_nce_with(_native.info_nce),
    _info_nce_with(reference.info_nce_with_gradients),
    _info_nce_fake,
    autocast=torch.float32,
)


def _info_nce_backward_fake(anchor, positive, temperature, *_):
    return anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


_define(
    "info_nce_backward(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, Tensor row_grad,"
    " bool intra_view_negatives, str precision) -> (Tensor, Tensor, Tensor)",
    lambda *args: _native.info_nce(*args)[1:],
    lambda *args: reference.info_nce_with_gradients(*args)[1:],
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
    elif reduction == "none":
        grads = torch.ops.hellm.info_nce_backward(
            anchor, positive, temperature, rows, grad, intra_view_negatives, precision
        )
    else:
        grads = [g * grad.to(g.dtype) for g in computed]
    return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 5


torch.library.register_autograd("hellm::info_nce", _info_nce_backward, setup_context=_info_nce_setup, lib=_library)

# ---------------------------------------------------------------------------------------------------------- kNN


_define(
    "knn(Tensor x, int k) -> (Tensor, Tensor)",
    _native.knn,
    lambda x, k: reference.knn(x.to(_loss_dtype(x)), k),
    lambda x, k: (
        x.new_empty((x.shape[0], k), dtype=torch.int64),
        x.new_empty((x.shape[0], k), dtype=_loss_dtype(x)),
    ),
    autocast=torch.float32,
)
