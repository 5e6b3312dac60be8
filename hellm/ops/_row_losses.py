"""What losses with a value for each row have in common: reductions and derivatives.

The gradients of a loss are an operator of their own. Its derivatives, and the loss's in forward mode row by row, are
those of the definition, which stores the similarities or logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hellm.ops._dtypes import accumulation_dtype


def reduced(row_loss: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return row_loss
    return row_loss.mean() if reduction == "mean" else row_loss.sum()


def reduced_fake(row_count: int, like: Tensor, reduction: str) -> Tensor:
    """The shape and dtype of a loss."""
    return like.new_empty((row_count,) if reduction == "none" else (), dtype=accumulation_dtype(like))


def row_grad_of_one(row_count: int, like: Tensor, reduction: str) -> Tensor:
    """Gradient of the reduced loss in each row's."""
    scale = 1.0 / row_count if reduction == "mean" and row_count else 1.0
    return torch.full((row_count,), scale, dtype=accumulation_dtype(like), device=like.device)


def row_grad_of(grad: Tensor, row_count: int, reduction: str) -> Tensor:
    """Gradient in each row's loss from that in the reduced loss."""
    return grad if reduction == "none" else grad.expand(row_count) / (row_count if reduction == "mean" else 1)


def gradients_with_loss(x: Tensor, reduction: str) -> bool:
    """Whether the gradients of the loss, a scalar, come from its own sweep, to be scaled in the backward pass.

    Those of a mean are too small for float16: they must be multiplied by the loss scale before they are rounded.
    """
    return reduction != "none" and x.dtype != torch.float16


def times(gradient: Tensor, grad: Tensor) -> Tensor:
    """A gradient that came with the loss, times the gradient in the loss, rounded once."""
    return (gradient.to(torch.promote_types(gradient.dtype, grad.dtype)) * grad).to(gradient.dtype)


def second_order(
    row_loss: Callable[..., Tensor],
    inputs: Mapping[str, Tensor | None],
    row_grad: Tensor,
    directions: Mapping[str, Tensor | None],
) -> dict[str, Tensor]:
    """Derivatives of <gradients of sum(row_grad * row loss), directions> in the inputs, and in row_grad.

    The first are second derivatives along the directions, in either mode, as these are symmetric; that in "row_grad" is
    the derivative of the row losses along the directions. An input that is None is left out, a direction that is
    missing is zero.
    """
    inputs = {name: x for name, x in inputs.items() if x is not None}
    along = [torch.zeros_like(x) if directions.get(name) is None else directions[name] for name, x in inputs.items()]
    numbers = tuple(range(len(inputs)))

    def slope(*arguments: Tensor) -> Tensor:
        *at, row_grad = arguments
        found = torch.func.grad(lambda *at: dot(row_loss(*at), row_grad), numbers)(*at)
        return sum(map(dot, found, along))

    found = torch.func.grad(slope, (*numbers, len(inputs)))(*inputs.values(), row_grad)
    return dict(zip((*inputs, "row_grad"), found, strict=True))


def change(gradients: Sequence[Tensor], tangents: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Of a scalar loss, from its gradients and the changes of what they are in."""
    return sum(dot(g, t).to(dtype) for g, t in zip(gradients, tangents, strict=True) if t is not None)


def dot(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulation_dtype(left)
    return (left.to(dtype) * right.to(dtype)).sum()
