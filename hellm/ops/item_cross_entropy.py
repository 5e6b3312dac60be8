"""Softmax cross-entropy over a whole catalogue.

N = rows, I = items, D = columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._arrays import as_tensor
from hellm.ops._cases import LONG_SUMS, Case, Samples
from hellm.ops._checks import check_device, check_in_range, check_reduction, check_same, checked_rows
from hellm.ops._dtypes import accumulation_dtype, autocast_enabled, wide
from hellm.ops._operator import Operator
from hellm.ops._row_losses import (
    GradientDerivatives,
    LossDerivatives,
    gradients_with_loss,
    reduced,
    reduced_fake,
    row_grad_of_one,
)


def item_cross_entropy(
    hidden: Tensor,
    item_embedding: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Softmax cross-entropy over the whole catalogue, without the [N, I] logits.

        loss_i = lse_j(<hidden_i, item_j> + bias_j) - (<hidden_i, item_t> + bias_t), t = target_i

    which is `F.cross_entropy(F.linear(hidden, item_embedding, bias), target)`. The target stands outside the sum, so
    that a tiny loss keeps its digits. An item with bias -inf has no part in it.

    Args:
        hidden: [N, D] float32, float16, bfloat16 or float64.
        item_embedding: [I, D], I >= 1, same dtype and device as `hidden`. Under autocast both take its dtype, but
            float64 stays float64.
        target: [N] int64, each in [0, I). One that is not raises on the CPU. A GPU is not waited for: there its loss
            and every gradient that it has a part in are NaN, while plain torch ends with a device-side assertion.
        bias: [I] of a floating dtype, or None.
        reduction: "mean", "sum" or "none".

    Returns:
        float32 (float64 for float64) scalar, or [N] for "none"; sums are accumulated in that dtype. Any derivative in
        `hidden`, `item_embedding` and `bias`; a second one, and forward mode for "none", fall back to plain torch and
        store the logits.

    Raises:
        ValueError: naming the argument, what it must be, and what it was; for `target` on the CPU the first one out of
            range.

    Memory: O((N + I) * D) and the logits of one strip of rows (96 at most compiled, 64 MiB in plain torch). For "mean"
    and "sum" the gradients come from the same sweep as the loss; "none", and float16 rows, whose gradients round to
    zero without the scale of `torch.amp.GradScaler`, compute the logits again for them. The compiled kernel serves
    every D: twice as fast as plain torch by blocks at D = 64, even with it at 576 and a tenth slower from 1,024 on,
    where it is kept because its bits repeat.
    """
    hidden = checked_rows("hidden", hidden)
    item_embedding = checked_rows("item_embedding", item_embedding)
    one_dtype = autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, item_embedding.dtype)
    check_same("item_embedding", item_embedding, "hidden", hidden, same_dtype=not one_dtype)
    if item_embedding.shape[0] == 0:
        raise ValueError("item_embedding must have at least one row, got 0")
    check_reduction(reduction)
    if reduction == "mean" and hidden.shape[0] == 0:
        raise ValueError("hidden must have at least one row for the mean, got 0")
    target = _checked_target(target, hidden)
    bias = None if bias is None else _checked_bias(bias, item_embedding)
    grad = torch.is_grad_enabled()
    items_grad = item_embedding.requires_grad or (bias is not None and bias.requires_grad)
    return torch.ops.hellm.item_cross_entropy(
        hidden, item_embedding, target, bias, reduction, grad and hidden.requires_grad, grad and items_grad
    )[0]


def _checked_target(target: Tensor, hidden: Tensor) -> Tensor:
    target = as_tensor("target", target)
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be [{hidden.shape[0]}] int64, got {tuple(target.shape)} {target.dtype}")
    check_device("target", target.device, hidden, "hidden")
    return target


def _checked_bias(bias: Tensor, item_embedding: Tensor) -> Tensor:
    bias = as_tensor("bias", bias)
    if bias.shape != item_embedding.shape[:1] or not bias.is_floating_point():
        raise ValueError(
            f"bias must be [{item_embedding.shape[0]}] of a floating dtype, got {tuple(bias.shape)} {bias.dtype}"
        )
    check_device("bias", bias.device, item_embedding, "item_embedding")
    return bias


class CrossEntropyArguments(NamedTuple):
    """What the operator of torch takes, in this order."""

    hidden: Tensor
    item_embedding: Tensor
    target: Tensor
    bias: Tensor | None
    reduction: str
    hidden_grad: bool
    items_grad: bool

    INPUTS = ("hidden", "item_embedding", "bias")

    @property
    def num_rows(self) -> int:
        return self.hidden.shape[0]

    @property
    def wanted(self) -> dict[str, bool]:
        return {"hidden": self.hidden_grad, "item_embedding": self.items_grad, "bias": self.items_grad}

    @property
    def precomputed(self) -> bool:
        return (self.hidden_grad or self.items_grad) and gradients_with_loss(self.hidden, self.reduction)

    def without_gradients(self) -> CrossEntropyArguments:
        return self._replace(hidden_grad=False, items_grad=False)

    def with_row_grad(self, row_grad: Tensor | None, wanted: Mapping[str, bool]) -> CrossEntropyGradientArguments:
        tensors = (self.hidden, self.item_embedding, self.target, self.bias, row_grad)
        return CrossEntropyGradientArguments(*tensors, wanted["hidden"], wanted["item_embedding"] or wanted["bias"])


class CrossEntropyGradientArguments(NamedTuple):
    """Of the row losses and the wanted gradients of sum(row_grad * row loss); none is without `row_grad`.

    "items_grad" is about the items and their bias.
    """

    hidden: Annotated[Tensor, "rows N D"]
    item_embedding: Annotated[Tensor, "rows I D"]
    target: Annotated[Tensor, "int64 N"]
    bias: Annotated[Tensor | None, "floating I"]
    row_grad: Annotated[Tensor | None, "floating N", "Tensor"]
    hidden_grad: bool
    items_grad: bool

    INPUTS = CrossEntropyArguments.INPUTS

    @property
    def wanted(self) -> dict[str, bool]:
        with_bias = self.items_grad and self.bias is not None
        return {"hidden": self.hidden_grad, "item_embedding": self.items_grad, "bias": with_bias}

    def definition(self) -> Callable[..., Tensor]:
        return lambda hidden, items, bias=None: definition(hidden, items, self.target, bias)

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.ops.hellm.item_cross_entropy_backward(*self)


def definition(hidden: Tensor, item_embedding: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Loss of each row [N]: lse_j(<h_i, e_j> + b_j) - (<h_i, e_t> + b_t), t = target_i. Stores the [N, I] logits.

    16-bit inputs are computed in float32.
    """
    hidden = wide(hidden)
    logits = F.linear(hidden, item_embedding.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return F.cross_entropy(logits, target, reduction="none")


def by_blocks(
    arguments: CrossEntropyGradientArguments, block_elements: int = 2**24
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`definition` and the gradients of sum(row_grad * loss), by blocks of rows of `block_elements` logits.

    The target's logit stands outside the sum, loss = softplus(lse over the other items - target logit), so that a tiny
    loss keeps its digits. Gradients that are not wanted are empty; 16-bit inputs are computed in float32.
    """
    hidden, item_embedding, target, bias, row_grad, hidden_grad, items_grad = arguments
    compute = accumulation_dtype(hidden)
    h, e, b = hidden.to(compute), item_embedding.to(compute), None if bias is None else bias.to(compute)
    hidden_grad, items_grad = hidden_grad and row_grad is not None, items_grad and row_grad is not None
    row_loss = h.new_empty(h.shape[0])
    grad_h, grad_e = (t.new_zeros(t.shape if need else 0) for t, need in ((h, hidden_grad), (e, items_grad)))
    grad_b = e.new_zeros(e.shape[0] if items_grad and b is not None else 0)
    block = max(1, block_elements // e.shape[0])
    for start in range(0, h.shape[0], block):
        chosen = slice(start, start + block)
        logits = F.linear(h[chosen], e, b)
        own = target[chosen].unsqueeze(1)
        aligned = logits.gather(1, own).squeeze(1)
        logits.scatter_(1, own, float("-inf"))
        top = logits.amax(1).clamp_min(torch.finfo(compute).min)
        total = logits.sub_(top.unsqueeze(1)).exp_().sum(1)
        margin = total.log() + top - aligned
        row_loss[chosen] = torch.logaddexp(margin, torch.zeros_like(margin))
        if row_grad is None or not (hidden_grad or items_grad):
            continue
        weight = row_grad[chosen].to(compute) * torch.sigmoid(margin)
        share = logits.mul_((weight / total.clamp_min(torch.finfo(compute).tiny)).unsqueeze(1))
        share.scatter_(1, own, -weight.unsqueeze(1))
        if hidden_grad:
            torch.mm(share, e, out=grad_h[chosen])
        if items_grad:
            grad_e.addmm_(share.T, h[chosen])
            if b is not None:
                grad_b += share.sum(0)
    grad_b = grad_b.to(bias.dtype) if bias is not None else grad_b
    return row_loss, grad_h.to(hidden.dtype), grad_e.to(item_embedding.dtype), grad_b


def _run(method: Callable, arguments: CrossEntropyArguments) -> tuple[Tensor, ...]:
    """Loss and, for a scalar reduction, the wanted gradients in the same sweep, but see `gradients_with_loss`."""
    hidden, reduction = arguments.hidden, arguments.reduction
    check_in_range("target", arguments.target, arguments.item_embedding.shape[0])
    row_grad = row_grad_of_one(hidden.shape[0], hidden, reduction) if arguments.precomputed else None
    row_loss, *grads = method(arguments.with_row_grad(row_grad, arguments.wanted))
    return reduced(row_loss, reduction), *grads


def _fake(arguments: CrossEntropyArguments) -> tuple[Tensor, ...]:
    hidden, reduction = arguments.hidden, arguments.reduction
    arguments = arguments if arguments.precomputed else arguments.without_gradients()
    gradients = _fake_gradients(arguments.with_row_grad(None, arguments.wanted))
    return reduced_fake(hidden.shape[0], hidden, reduction), *gradients


def _fake_gradients(arguments: CrossEntropyGradientArguments) -> tuple[Tensor, Tensor, Tensor]:
    hidden, items, bias, items_grad = arguments.hidden, arguments.item_embedding, arguments.bias, arguments.items_grad
    grad_items = items.new_empty(items.shape if items_grad else 0)
    if bias is None:
        grad_bias = hidden.new_empty(0, dtype=accumulation_dtype(hidden))
    else:
        grad_bias = bias.new_empty(bias.shape if items_grad else 0)
    return hidden.new_empty(hidden.shape if arguments.hidden_grad else 0), grad_items, grad_bias


def cases(samples: Samples) -> Iterator[Case]:
    """Over a third as many items as rows."""
    for table in samples.tables():
        num_items = table.num_rows // 3
        inputs = [samples.rows(count, table.dim) for count in (table.num_rows, num_items)]
        inputs.append(samples.rows(num_items, 1)[:, 0])
        target = samples.integers(num_items, table.num_rows)

        def loss(hidden: Tensor, items: Tensor, bias: Tensor, target: Tensor = target) -> Tensor:
            return item_cross_entropy(hidden, items, target.to(hidden.device), bias=bias)

        def defined(hidden: Tensor, items: Tensor, bias: Tensor, target: Tensor = target) -> Tensor:
            return definition(hidden, items, target.to(hidden.device), bias).mean()

        budget = 2e-2 if table.precision == "high" else LONG_SUMS
        yield Case("item_cross_entropy", table.name, inputs, loss, defined, budget=budget, **table.settings)


_LOSS = Operator(
    name="item_cross_entropy",
    arguments=CrossEntropyArguments,
    returns="(Tensor, Tensor, Tensor, Tensor)",
    method="item_cross_entropy",
    plain=by_blocks,
    run=_run,
    fake=_fake,
    derivatives=LossDerivatives,
)


_BACKWARD = Operator(
    name="item_cross_entropy_backward",
    arguments=CrossEntropyGradientArguments,
    returns="(Tensor, Tensor, Tensor)",
    method="item_cross_entropy",
    plain=by_blocks,
    run=lambda method, arguments: method(arguments)[1:],
    fake=_fake_gradients,
    derivatives=GradientDerivatives,
)

OPERATORS = (_LOSS, _BACKWARD)
