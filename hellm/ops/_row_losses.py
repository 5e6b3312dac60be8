"""What losses with a value for each row have in common: reductions and derivatives.

The gradients of a loss are an operator of their own. Its derivatives, and the loss's in forward mode row by row, are
those of the definition, which stores the similarities or logits. Both operators take their derivatives from here; what
they are of is said by their argument tuples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hellm.ops._dtypes import accumulation_dtype
from hellm.ops._operator import Derivatives


class LossArguments(Protocol):
    """The argument tuple of a loss, which returns the loss and the gradients of `INPUTS`, empty where not computed.

    Attributes:
        INPUTS: Names of the arguments that it can be differentiated in.
        reduction: "mean", "sum" or "none".
        num_rows: Row losses that are reduced.
        precomputed: Whether its gradients come with the loss; see `gradients_with_loss`.
    """

    INPUTS: ClassVar[tuple[str, ...]]
    reduction: str
    num_rows: int
    precomputed: bool

    def without_gradients(self) -> LossArguments:
        """For the loss alone."""
        ...

    def with_row_grad(self, row_grad: Tensor | None, wanted: Mapping[str, bool]) -> GradientArguments:
        """For the gradients of sum(row_grad * row loss) in those of the inputs that are wanted."""
        ...


class GradientArguments(Protocol):
    """The argument tuple of the gradients of a loss.

    Attributes:
        INPUTS: As those of the loss; some may be None.
        row_grad: [R], the gradient in each row's loss.
        wanted: Which gradients are computed; the others are empty.
    """

    INPUTS: ClassVar[tuple[str, ...]]
    row_grad: Tensor
    wanted: Mapping[str, bool]

    def definition(self) -> Callable[..., Tensor]:
        """The row losses as a function of the inputs that are not None."""
        ...

    def gradients(self) -> tuple[Tensor, ...]:
        """What the operator returns: a gradient for each of `INPUTS`."""
        ...


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
    along = [
        torch.zeros_like(x) if (direction := directions.get(name)) is None else direction for name, x in inputs.items()
    ]
    numbers = tuple(range(len(inputs)))

    def slope(*arguments: Tensor) -> Tensor:
        *at, row_grad = arguments
        found = torch.func.grad(lambda *at: dot(row_loss(*at), row_grad), numbers)(*at)
        return functools.reduce(torch.add, map(dot, found, along))

    found = torch.func.grad(slope, (*numbers, len(inputs)))(*inputs.values(), row_grad)
    return dict(zip((*inputs, "row_grad"), found, strict=True))


def change(gradients: Sequence[Tensor], tangents: Sequence[Tensor | None], dtype: torch.dtype) -> Tensor:
    """Of a scalar loss, from its gradients and the changes of what they are in."""
    return functools.reduce(
        torch.add, [dot(g, t).to(dtype) for g, t in zip(gradients, tangents, strict=True) if t is not None]
    )


def dot(left: Tensor, right: Tensor) -> Tensor:
    dtype = accumulation_dtype(left)
    return (left.to(dtype) * right.to(dtype)).sum()


class LossDerivatives(Derivatives):
    """Those of a loss with `LossArguments`."""

    @staticmethod
    def without_precomputed(arguments):
        return arguments.without_gradients()

    @staticmethod
    def setup_context(ctx, arguments, output):
        _, *computed = output
        ctx.mark_non_differentiable(*computed)
        _save(ctx, arguments, *computed)

    @staticmethod
    def backward(ctx, needs, grad, *_):
        if grad is None:
            return {}
        arguments, *computed = _saved(ctx, ctx.saved_tensors)
        if ctx.precomputed and not torch.is_grad_enabled():
            grads = [times(g, grad) for g in computed]
        else:
            row_grad = row_grad_of(grad, arguments.num_rows, arguments.reduction)
            grads = arguments.with_row_grad(row_grad, _by_input(needs, arguments)).gradients()
        return {name: g for name, g in zip(arguments.INPUTS, grads, strict=True) if getattr(needs, name)}

    @staticmethod
    def jvp(ctx, saved, tangents):
        arguments, *_ = _saved(ctx, saved)
        row_grad = row_grad_of_one(arguments.num_rows, arguments[0], arguments.reduction)
        directions = _by_input(tangents, arguments)
        of_rows = arguments.with_row_grad(row_grad, {name: one is not None for name, one in directions.items()})
        if arguments.reduction == "none":
            found = _second_order(of_rows, directions)["row_grad"]
        else:
            found = change(of_rows.gradients(), list(directions.values()), row_grad.dtype)
        return found, *(None for _ in directions)


class GradientDerivatives(Derivatives):
    """Those of the gradients of a loss, with `GradientArguments`."""

    @staticmethod
    def setup_context(ctx, arguments, output):
        wanted = arguments.wanted.values()
        ctx.mark_non_differentiable(*(t for t, want in zip(output, wanted, strict=True) if not want))
        _save(ctx, arguments)

    @staticmethod
    def backward(ctx, needs, *grads):
        if all(grad is None for grad in grads):
            return {}
        arguments, *_ = _saved(ctx, ctx.saved_tensors)
        directions = {name: g for (name, want), g in zip(arguments.wanted.items(), grads, strict=True) if want}
        return _second_order(arguments, directions)

    @staticmethod
    def jvp(ctx, saved, tangents):
        arguments, *_ = _saved(ctx, saved)
        found = _second_order(arguments, _by_input(tangents, arguments))
        if tangents.row_grad is not None:
            linear = arguments._replace(row_grad=tangents.row_grad).gradients()
            for name, more in zip(arguments.INPUTS, linear, strict=True):
                of_input = found.get(name)
                found[name] = of_input + more if of_input is not None and more.shape == of_input.shape else more
        return tuple(found.get(name) if want else None for name, want in arguments.wanted.items())


def _second_order(arguments: GradientArguments, directions: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    return second_order(arguments.definition(), _by_input(arguments, arguments), arguments.row_grad, directions)


def _by_input(values: object, arguments: LossArguments | GradientArguments) -> dict[str, Any]:
    """Those of `values`, a tuple of the same names, that belong to inputs."""
    return {name: getattr(values, name) for name in arguments.INPUTS}


def _save(ctx: Any, arguments: Any, *computed: Tensor) -> None:
    """Keep the arguments of an operator, tensors as autograd asks for it."""
    tensors = {name: value for name, value in arguments._asdict().items() if value is None or isinstance(value, Tensor)}
    ctx.arguments, ctx.names = arguments._replace(**dict.fromkeys(tensors)), tuple(tensors)
    ctx.precomputed = getattr(arguments, "precomputed", False)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors.values(), *computed)
    ctx.save_for_forward(*tensors.values())


def _saved(ctx: Any, saved: Sequence[Tensor | None]) -> list[Any]:
    """The arguments with these tensors, and what was computed with them."""
    count = len(ctx.names)
    return [ctx.arguments._replace(**dict(zip(ctx.names, saved[:count], strict=True))), *saved[count:]]
