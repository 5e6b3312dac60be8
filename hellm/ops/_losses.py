"""The losses and nearest neighbours as operators of torch: schemas, shapes and derivatives.

The gradients of a loss are an operator of their own. Its derivatives, and the loss's in forward mode row by row, are
those of the definition, which stores the similarities or logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hellm.ops import reference
from hellm.ops._library import Derivatives, accumulation_dtype, define


def _reduce(row_loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return row_loss
    return row_loss.mean() if reduction == "mean" else row_loss.sum()


def _row_grad(row_count: int, like: Tensor, reduction: str) -> Tensor:
    """Gradient of the reduced loss in each row's."""
    scale = 1.0 / row_count if reduction == "mean" and row_count else 1.0
    return torch.full((row_count,), scale, dtype=accumulation_dtype(like), device=like.device)


def _with_loss(x: Tensor, reduction: str) -> bool:
    """Whether the gradients of the loss, a scalar, come from its own sweep, to be scaled in the backward pass.

    Those of a mean are too small for float16: they must be multiplied by the loss scale before they are rounded.
    """
    return reduction != "none" and x.dtype != torch.float16


def _row_grad_of(grad: Tensor, row_count: int, reduction: str) -> Tensor:
    """Gradient in each row's loss from that in the reduced loss."""
    return grad if reduction == "none" else grad.expand(row_count) / (row_count if reduction == "mean" else 1)


def _times(gradient: Tensor, grad: Tensor) -> Tensor:
    """A gradient that came with the loss, times the gradient in the loss, rounded once."""
    return (gradient.to(torch.promote_types(gradient.dtype, grad.dtype)) * grad).to(gradient.dtype)


def _second_order(row_loss: Callable, inputs: list[Tensor], row_grad: Tensor, directions: list[Tensor]) -> tuple:
    """Derivatives of <gradients of sum(row_grad * row loss), directions> in the inputs, and in row_grad.

    The first are second derivatives along the directions, in either mode, as these are symmetric; the last is the
    derivative of the row losses along the directions.
    """
    places = tuple(range(len(inputs)))

    def along(*arguments):
        *at, row_grad = arguments
        found = torch.func.grad(lambda *at: _dot(row_loss(*at), row_grad), places)(*at)
        return sum(map(_dot, found, directions))

    return torch.func.grad(along, (*places, len(inputs)))(*inputs, row_grad)


def _or_zeros(found: tuple, like: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(t) if f is None else f for f, t in zip(found, like, strict=True)]


def _dot(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulation_dtype(left)
    return (left.to(dtype) * right.to(dtype)).sum()


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


# ------------------------------------------------------------------------------------------------------ InfoNCE


def _info_nce_with(implementation: Callable) -> Callable:
    """Loss and, for a scalar reduction, both gradients in the same sweep, but see `_with_loss`."""

    def kernel(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
        count = anchor.shape[0] if rows is None else rows.shape[0]
        if rows is not None:
            _check_in_range("rows", rows, anchor.shape[0])
        if temperature.is_cpu and not float(temperature) > 0:
            raise ValueError(f"temperature must be > 0, got {float(temperature)}")
        row_grad = _row_grad(count, anchor, reduction) if compute_grad and _with_loss(anchor, reduction) else None
        row_loss, *grads = implementation(
            anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
        )
        return _reduce(row_loss, reduction), *grads

    return kernel


def _info_nce_fake(anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad):
    count = anchor.shape[0] if rows is None else rows.shape[0]
    loss = anchor.new_empty((count,) if reduction == "none" else (), dtype=accumulation_dtype(anchor))
    if not compute_grad or not _with_loss(anchor, reduction):
        return loss, anchor.new_empty(0), anchor.new_empty(0), temperature.new_empty(0)
    return loss, anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


def _info_nce_rows(rows: Tensor | None, intra_view_negatives: bool) -> Callable:
    """The definition as a function of what it can be differentiated in."""
    return lambda anchor, positive, temperature: reference.info_nce(
        anchor, positive, temperature, rows, intra_view_negatives
    )


class _InfoNCE(Derivatives):
    @staticmethod
    def without_precomputed(*args):
        return *args[:7], False

    @staticmethod
    def setup_context(ctx, inputs, output):
        anchor, positive, temperature, rows, *ctx.settings, compute_grad = inputs
        ctx.computed = compute_grad and _with_loss(anchor, ctx.settings[1])
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(anchor, positive, temperature, rows, *output[1:])
        ctx.save_for_forward(anchor, positive, temperature, rows)

    @staticmethod
    def backward(ctx, grad, *_):
        anchor, positive, temperature, rows, *computed = ctx.saved_tensors
        intra_view_negatives, reduction, precision = ctx.settings
        if grad is None:
            return (None,) * 8
        if ctx.computed and not torch.is_grad_enabled():
            grads = [_times(g, grad) for g in computed]
        else:
            row_grad = _row_grad_of(grad, (anchor if rows is None else rows).shape[0], reduction)
            grads = torch.ops.hellm.info_nce_backward(
                anchor, positive, temperature, rows, row_grad, intra_view_negatives, precision
            )
        return *(g if need else None for g, need in zip(grads, ctx.needs_input_grad, strict=False)), *[None] * 5

    @staticmethod
    def jvp(ctx, saved, *tangents):
        anchor, positive, temperature, rows = saved
        intra_view_negatives, reduction, precision = ctx.settings
        inputs = [anchor, positive, temperature]
        row_grad = _row_grad((anchor if rows is None else rows).shape[0], anchor, reduction)
        if reduction == "none":
            definition = _info_nce_rows(rows, intra_view_negatives)
            found = _second_order(definition, inputs, row_grad, _or_zeros(tangents[:3], inputs))[-1]
        else:
            grads = torch.ops.hellm.info_nce_backward(*inputs, rows, row_grad, intra_view_negatives, precision)
            found = sum(_dot(g, t).to(row_grad.dtype) for g, t in zip(grads, tangents, strict=False) if t is not None)
        return found, None, None, None


define(
    "info_nce(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, bool intra_view_negatives,"
    " str reduction, str precision, bool compute_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda ops: _info_nce_with(ops.info_nce),
    _info_nce_fake,
    _InfoNCE,
    autocast=torch.float32,
)


class _InfoNCEBackward(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.intra_view_negatives, ctx.precision = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _along(ctx, saved: Sequence[Tensor | None], directions: tuple) -> tuple:
        *inputs, rows, row_grad = saved
        definition = _info_nce_rows(rows, ctx.intra_view_negatives)
        return _second_order(definition, inputs, row_grad, _or_zeros(directions, inputs))

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * 7
        *found, row_grad = _InfoNCEBackward._along(ctx, ctx.saved_tensors, grads)
        return *found, None, row_grad, None, None

    @staticmethod
    def jvp(ctx, saved, *tangents):
        *inputs, rows, _ = saved
        found = _InfoNCEBackward._along(ctx, saved, tangents[:3])[:3]
        if tangents[4] is not None:
            linear = torch.ops.hellm.info_nce_backward(
                *inputs, rows, tangents[4], ctx.intra_view_negatives, ctx.precision
            )
            found = tuple(f + g for f, g in zip(found, linear, strict=True))
        return found


define(
    "info_nce_backward(Tensor anchor, Tensor positive, Tensor temperature, Tensor? rows, Tensor row_grad,"
    " bool intra_view_negatives, str precision) -> (Tensor, Tensor, Tensor)",
    lambda ops: lambda *args: ops.info_nce(*args)[1:],
    lambda anchor, positive, temperature, *_: (
        anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(()),
    ),
    _InfoNCEBackward,
    autocast=torch.float32,
)  # fmt: skip

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
        grad_bias = hidden.new_empty(0, dtype=accumulation_dtype(hidden))
    else:
        grad_bias = bias.new_empty(bias.shape if items_grad else 0)
    return hidden.new_empty(hidden.shape if hidden_grad else 0), grad_items, grad_bias


def _item_cross_entropy_fake(hidden, item_embedding, target, bias, reduction, hidden_grad, items_grad):
    loss = hidden.new_empty((hidden.shape[0],) if reduction == "none" else (), dtype=accumulation_dtype(hidden))
    now = _with_loss(hidden, reduction)
    return loss, *_item_cross_entropy_gradient_shapes(
        hidden, item_embedding, bias, hidden_grad and now, items_grad and now
    )


def _item_cross_entropy_rows(target: Tensor) -> Callable:
    """The definition as a function of what it can be differentiated in."""
    return lambda hidden, item_embedding, bias=None: reference.item_cross_entropy(hidden, item_embedding, target, bias)


class _ItemCrossEntropy(Derivatives):
    @staticmethod
    def without_precomputed(*args):
        return *args[:5], False, False

    @staticmethod
    def setup_context(ctx, inputs, output):
        hidden, item_embedding, target, bias, ctx.reduction, *wanted = inputs
        ctx.computed = any(wanted) and _with_loss(hidden, ctx.reduction)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(hidden, item_embedding, target, bias, *output[1:])
        ctx.save_for_forward(hidden, item_embedding, target, bias)

    @staticmethod
    def backward(ctx, grad, *_):
        hidden, item_embedding, target, bias, *computed = ctx.saved_tensors
        need = [ctx.needs_input_grad[place] for place in (0, 1, 3)]
        if grad is None:
            return (None,) * 7
        if ctx.computed and not torch.is_grad_enabled():
            grads = [_times(g, grad) for g in computed]
        else:
            row_grad = _row_grad_of(grad, hidden.shape[0], ctx.reduction)
            grads = torch.ops.hellm.item_cross_entropy_backward(
                hidden, item_embedding, target, bias, row_grad, need[0], need[1] or need[2]
            )
        grads = [g if wanted else None for g, wanted in zip(grads, need, strict=True)]
        return *grads[:2], None, grads[2], *[None] * 3

    @staticmethod
    def jvp(ctx, saved, *tangents):
        hidden, item_embedding, target, bias = saved
        row_grad = _row_grad(hidden.shape[0], hidden, ctx.reduction)
        inputs = [t for t in (hidden, item_embedding, bias) if t is not None]
        tangents = [tangents[place] for place in (0, 1, 3)]
        if ctx.reduction == "none":
            directions = _or_zeros(tuple(tangents[: len(inputs)]), inputs)
            found = _second_order(_item_cross_entropy_rows(target), inputs, row_grad, directions)[-1]
        else:
            grads = torch.ops.hellm.item_cross_entropy_backward(
                hidden, item_embedding, target, bias, row_grad, tangents[0] is not None,
                tangents[1] is not None or tangents[2] is not None,
            )  # fmt: skip
            found = sum(_dot(g, t).to(row_grad.dtype) for g, t in zip(grads, tangents, strict=True) if t is not None)
        return found, None, None, None


define(
    "item_cross_entropy(Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias, str reduction,"
    " bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda ops: _item_cross_entropy_with(ops.item_cross_entropy),
    _item_cross_entropy_fake,
    _ItemCrossEntropy,
)


class _ItemCrossEntropyBackward(Derivatives):
    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, hidden_grad, items_grad = inputs
        bias = tensors[3]
        ctx.wanted = hidden_grad, items_grad, items_grad and bias is not None
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t, wanted in zip(output, ctx.wanted, strict=True) if not wanted))
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def _along(ctx, directions: tuple) -> tuple:
        """Of `_second_order` what belongs to hidden, items, bias (None without one) and row_grad."""
        hidden, item_embedding, target, bias, row_grad = ctx.saved_tensors
        inputs = [t for t in (hidden, item_embedding, bias) if t is not None]
        directions = [d if wanted else None for d, wanted in zip(directions, ctx.wanted, strict=True)]
        found = _second_order(
            _item_cross_entropy_rows(target), inputs, row_grad, _or_zeros(tuple(directions[: len(inputs)]), inputs)
        )
        return *found[:2], None if bias is None else found[2], found[-1]

    @staticmethod
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return (None,) * 7
        hidden, items, bias, row_grad = _ItemCrossEntropyBackward._along(ctx, grads)
        return hidden, items, None, bias, row_grad, None, None

    @staticmethod
    def jvp(ctx, saved, *tangents):
        hidden, item_embedding, target, bias, row_grad = saved
        inputs = [t for t in (hidden, item_embedding, bias) if t is not None]
        directions = [tangents[place] for place in (0, 1, 3)]
        found = _second_order(
            _item_cross_entropy_rows(target), inputs, row_grad, _or_zeros(tuple(directions[: len(inputs)]), inputs)
        )[: len(inputs)]
        found = [*found, None][:3]
        if tangents[4] is not None:
            linear = torch.ops.hellm.item_cross_entropy_backward(
                hidden, item_embedding, target, bias, tangents[4], *ctx.wanted[:2]
            )
            found = [g if f is None else f + g if g.shape == f.shape else g for f, g in zip(found, linear, strict=True)]
        return tuple(f if wanted else None for f, wanted in zip(found, ctx.wanted, strict=True))


define(
    "item_cross_entropy_backward(Tensor hidden, Tensor item_embedding, Tensor target, Tensor? bias, Tensor row_grad,"
    " bool hidden_grad, bool items_grad) -> (Tensor, Tensor, Tensor)",
    lambda ops: lambda *args: ops.item_cross_entropy(*args)[1:],
    lambda hidden, items, target, bias, row_grad, *need: _item_cross_entropy_gradient_shapes(
        hidden, items, bias, *need
    ),
    _ItemCrossEntropyBackward,
)

# ---------------------------------------------------------------------------------------------------------- kNN


def _knn_with(implementation: Callable) -> Callable:
    def kernel(x, k):
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if not (capturing or x.is_meta):
            finite = torch.isfinite(x).all(1)
            if not bool(finite.all()):
                raise ValueError(f"x must be finite, got NaN or infinity first in row {int((~finite).nonzero()[0])}")
        index, similarity = implementation(x, k)
        # A cosine is at most 1, its rounded products may not be.
        return index, similarity.clamp_(-1.0, 1.0)

    return kernel


class _Neighbours(Derivatives):
    """None: neighbours are found, not differentiated."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def backward(ctx, *_):
        return None, None

    @staticmethod
    def jvp(ctx, *_):
        return None, None


define(
    "knn(Tensor x, int k) -> (Tensor, Tensor)",
    lambda ops: _knn_with(ops.knn),
    lambda x, k: (
        x.new_empty((x.shape[0], k), dtype=torch.int64),
        x.new_empty((x.shape[0], k), dtype=accumulation_dtype(x)),
    ),
    _Neighbours,
    autocast=torch.float32,
)
