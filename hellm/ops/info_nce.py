"""The InfoNCE loss between two views of the same rows.

N = rows, R = chosen rows, D = columns.
"""

from __future__ import annotations

import numbers
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._arrays import as_tensor, check_flag
from hellm.ops._cases import LONG_SUMS, Case, Samples
from hellm.ops._checks import check_device, check_in_range, check_reduction, check_same, checked_rows
from hellm.ops._dtypes import accumulation_dtype, wide
from hellm.ops._operator import Operator
from hellm.ops._row_losses import (
    GradientDerivatives,
    LossDerivatives,
    gradients_with_loss,
    reduced,
    reduced_fake,
    row_grad_of_one,
)
from hellm.ops._rows import unit_rows, unit_rows_and_lengths

_PRECISIONS = ("highest", "high", "medium")


def info_nce(
    anchor: Tensor,
    positive: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    intra_view_negatives: bool = True,
    reduction: str = "mean",
    precision: str | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """InfoNCE loss between two views of the same rows, without the [N, N] matrix.

    Rows are L2-normalised. Row i of `positive` is the only positive of row i of `anchor`; every other row of
    `positive` (and of `anchor`, if `intra_view_negatives`) is a negative:

        loss_i = log(exp(s_ii / t) + sum_negatives exp(s_ij / t)) - s_ii / t

    computed as softplus(lse_i - s_ii / t) with the positive outside the sum and the diagonal masked, so that it stays
    accurate when the loss is tiny. A row that is all zero has similarity 0 to everything and gradient 0.

    Args:
        anchor: [N, D] float32, float16, bfloat16 or float64.
        positive: [N, D], same dtype and device as `anchor`.
        temperature: t, > 0; smaller is sharper, accurate down to 0.01. A 0-d tensor may require a gradient; one on a
            GPU is not waited for, and gives NaN if it is not > 0.
        intra_view_negatives: GRACE's denominator (both views); False is SimCLR's one-directional cross-view form.
        reduction: "mean", "sum" or "none".
        precision: "highest" (float32 products), "high" (16-bit products, float32 sums: three digits) or "medium" (the
            same, or bfloat16 where that is faster: two digits); None reads `torch.get_float32_matmul_precision()`.
            Ignored for float64.
        rows: [R] int64, the rows whose loss is wanted, against all N keys; None is all. The mean over rows drawn
            uniformly is an unbiased estimate of the whole mean at R / N of the cost. Each in [0, N): see `target` of
            `item_cross_entropy` for what happens otherwise.

    Returns:
        float32 (float64 for float64) scalar, or [R] for "none". Any derivative in `anchor`, `positive` and
        `temperature`; a second one, and forward mode for "none", fall back to plain torch and store the similarities.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.

    Memory: O(N * D); nothing of size N * N is ever stored. For "mean" and "sum" the gradients come from the same
    sweep as the loss; of float16 rows, as for "none", from another one in the backward pass, where the scale of
    `torch.amp.GradScaler` is known: without it they would round to zero.
    """
    anchor = checked_rows("anchor", anchor)
    positive = checked_rows("positive", positive)
    if positive.shape != anchor.shape:
        raise ValueError(f"positive must have the shape of anchor {tuple(anchor.shape)}, got {tuple(positive.shape)}")
    check_same("positive", positive, "anchor", anchor)
    check_flag("intra_view_negatives", intra_view_negatives)
    check_reduction(reduction)
    precision = _default_precision() if precision is None else precision
    if not isinstance(precision, str) or precision not in _PRECISIONS:
        raise ValueError(f"precision must be None or one of {_PRECISIONS}, got {precision!r}")
    rows = _checked_row_choice(rows, anchor)
    if reduction == "mean" and (anchor if rows is None else rows).shape[0] == 0:
        raise ValueError(f"{'anchor' if rows is None else 'rows'} must have at least one row for the mean, got 0")
    temperature = _checked_temperature(temperature, anchor)
    learned = anchor.requires_grad or positive.requires_grad or temperature.requires_grad
    compute_grad = torch.is_grad_enabled() and learned
    return torch.ops.hellm.info_nce(
        anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad
    )[0]


def _default_precision() -> str:
    return torch.get_float32_matmul_precision()


# What `torch.compiler.assume_constant_result` does, which imports the compiler for it: over a second of every start.
_default_precision._dynamo_marked_constant = True


def _checked_row_choice(rows: Tensor | None, anchor: Tensor) -> Tensor | None:
    if rows is None:
        return None
    rows = as_tensor("rows", rows)
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be [R] int32 or int64, got {tuple(rows.shape)} {rows.dtype}")
    check_device("rows", rows.device, anchor, "anchor")
    return rows


def _checked_temperature(temperature: float | Tensor, anchor: Tensor) -> Tensor:
    """0-d. The value of a tensor on the CPU is checked by the kernel."""
    if isinstance(temperature, (int, float)) and not isinstance(temperature, bool):
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        if isinstance(temperature, int):
            if temperature > sys.float_info.max:
                raise ValueError("temperature must be a number of float64, got a larger integer")
            temperature = float(temperature)
        return torch.full((), temperature, dtype=torch.float64, device=anchor.device)
    if isinstance(temperature, numbers.Real) and not isinstance(temperature, bool):  # a number of NumPy
        return _checked_temperature(float(temperature), anchor)
    if not isinstance(temperature, Tensor) and not hasattr(temperature, "__dlpack__"):
        raise ValueError(f"temperature must be a number or a 0-d tensor, got {temperature!r}")
    temperature = as_tensor("temperature", temperature)
    if temperature.ndim != 0:
        raise ValueError(f"temperature must be a number or a 0-d tensor, got shape {tuple(temperature.shape)}")
    if not temperature.is_floating_point():
        raise ValueError(f"temperature must be floating point, got {temperature.dtype}")
    check_device("temperature", temperature.device, anchor, "anchor")
    return temperature if temperature.is_cpu else torch.where(temperature > 0, temperature, torch.nan)


class InfoNCEArguments(NamedTuple):
    """What the operator of torch takes, in this order."""

    anchor: Tensor
    positive: Tensor
    temperature: Tensor
    rows: Tensor | None
    intra_view_negatives: bool
    reduction: str
    precision: str
    compute_grad: bool

    INPUTS = ("anchor", "positive", "temperature")

    @property
    def num_rows(self) -> int:
        return (self.anchor if self.rows is None else self.rows).shape[0]

    @property
    def precomputed(self) -> bool:
        return self.compute_grad and gradients_with_loss(self.anchor, self.reduction)

    def without_gradients(self) -> InfoNCEArguments:
        return self._replace(compute_grad=False)

    def with_row_grad(self, row_grad: Tensor | None, wanted: Mapping[str, bool]) -> InfoNCEGradientArguments:
        """All gradients, whichever are wanted: they come from the same products."""
        tensors = (self.anchor, self.positive, self.temperature, self.rows, row_grad)
        return InfoNCEGradientArguments(*tensors, self.intra_view_negatives, self.precision)


class InfoNCEGradientArguments(NamedTuple):
    """Of the row losses and the gradients of sum(row_grad * row loss); without `row_grad` of the losses alone."""

    anchor: Annotated[Tensor, "rows N D"]
    positive: Annotated[Tensor, "rows N D"]
    temperature: Annotated[Tensor, "floating"]
    rows: Annotated[Tensor | None, "index R=N"]
    row_grad: Annotated[Tensor | None, "floating R", "Tensor"]
    intra_view_negatives: bool
    precision: str

    INPUTS = InfoNCEArguments.INPUTS

    @property
    def wanted(self) -> dict[str, bool]:
        return dict.fromkeys(self.INPUTS, True)

    def definition(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        return lambda anchor, positive, temperature: definition(
            anchor, positive, temperature, self.rows, self.intra_view_negatives
        )

    def gradients(self) -> tuple[Tensor, ...]:
        return torch.ops.hellm.info_nce_backward(*self)


def definition(
    anchor: Tensor,
    positive: Tensor,
    temperature: Tensor | float,
    rows: Tensor | None = None,
    intra_view_negatives: bool = True,
) -> Tensor:
    """Loss of each row (of `rows`, default all): softplus(lse over its negatives - its positive / temperature) [R].

    The positive stands outside the sum and the diagonal is masked, so nothing cancels. A row with no negatives has
    loss 0. Stores the [R, 2N] similarities. 16-bit inputs are computed in float32.
    """
    u, v = unit_rows(wide(anchor)), unit_rows(wide(positive))
    index = torch.arange(u.shape[0], device=u.device) if rows is None else rows.long()
    query = u[index]
    keys = torch.cat([v, u]) if intra_view_negatives else v
    own = torch.arange(keys.shape[0], device=u.device) % u.shape[0] == index.unsqueeze(1)
    logits = (query @ keys.T / temperature).masked_fill(own, float("-inf"))
    aligned = (query * v[index]).sum(1) / temperature
    if u.shape[0] == 1:
        return aligned * 0.0
    return F.softplus(torch.logsumexp(logits, 1) - aligned)


def by_blocks(arguments: InfoNCEGradientArguments, block: int = 512) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`definition` and the gradients of sum(row_grad * loss), by blocks of rows so that memory stays O(block * N).

    Gradients are empty without `row_grad`. Low-precision inputs are computed in float32.
    """
    anchor, positive, temperature, rows, row_grad, intra_view_negatives, _ = arguments
    compute = accumulation_dtype(anchor)
    z1, z2 = anchor.to(compute), positive.to(compute)
    inverse = 1.0 / temperature.double()
    inverse_t = inverse.to(compute)
    (u, norm_u), (v, norm_v) = (unit_rows_and_lengths(z) for z in (z1, z2))
    index = torch.arange(u.shape[0], device=u.device) if rows is None else rows.long()
    keys = torch.cat([v, u]) if intra_view_negatives else v
    losses, slope = [], z1.new_zeros(())
    grad_u, grad_keys = torch.zeros_like(u), torch.zeros_like(keys)
    for start in range(0, index.numel(), block):
        chosen = index[start : start + block]
        query, aligned = u[chosen], (u[chosen] * v[chosen]).sum(1)
        logits = (query @ keys.T).mul_(inverse_t)
        for view in range(keys.shape[0] // max(u.shape[0], 1)):
            logits.scatter_(1, (chosen + view * u.shape[0]).unsqueeze(1), float("-inf"))
        lse = torch.logsumexp(logits, 1)
        margin = lse - aligned * inverse_t
        losses.append(F.softplus(margin))
        if row_grad is None:
            continue
        weight = row_grad[start : start + block].to(compute) * torch.sigmoid(margin)
        share = torch.exp(logits - lse.clamp_min(torch.finfo(compute).min).unsqueeze(1)).nan_to_num_(0.0)
        mean_key = share @ keys
        slope += (weight * ((query * mean_key).sum(1) - aligned)).sum()
        grad_u.index_add_(0, chosen, weight.unsqueeze(1) * (mean_key - v[chosen]))
        grad_keys.addmm_((share * weight.unsqueeze(1)).T, query)
        grad_keys.index_add_(0, chosen, -weight.unsqueeze(1) * query)
    row_loss = torch.cat(losses) if losses else z1.new_zeros(0)
    if row_grad is None:
        return row_loss, anchor.new_empty(0), positive.new_empty(0), temperature.new_empty(0)
    grad_u, grad_v = grad_u + grad_keys[u.shape[0] :] if intra_view_negatives else grad_u, grad_keys[: u.shape[0]]
    grads = []
    for grad, unit, norm, z in ((grad_u, u, norm_u, anchor), (grad_v, v, norm_v, positive)):
        tangent = (grad - (grad * unit).sum(1, keepdim=True) * unit) * (inverse_t / norm)
        grads.append(tangent.to(z.dtype))
    return row_loss, *grads, (slope * -(inverse**2)).to(temperature.dtype)


def _run(method: Callable, arguments: InfoNCEArguments) -> tuple[Tensor, ...]:
    """Loss and, for a scalar reduction, both gradients in the same sweep, but see `gradients_with_loss`."""
    anchor, temperature, reduction = arguments.anchor, arguments.temperature, arguments.reduction
    if arguments.rows is not None:
        check_in_range("rows", arguments.rows, anchor.shape[0])
    if temperature.is_cpu and not float(temperature) > 0:
        raise ValueError(f"temperature must be > 0, got {float(temperature)}")
    row_grad = row_grad_of_one(arguments.num_rows, anchor, reduction) if arguments.precomputed else None
    row_loss, *grads = method(arguments.with_row_grad(row_grad, {}))
    return reduced(row_loss, reduction), *grads


def _fake(arguments: InfoNCEArguments) -> tuple[Tensor, ...]:
    anchor, positive, temperature = arguments.anchor, arguments.positive, arguments.temperature
    loss = reduced_fake(arguments.num_rows, anchor, arguments.reduction)
    if not arguments.precomputed:
        return loss, anchor.new_empty(0), anchor.new_empty(0), temperature.new_empty(0)
    return loss, anchor.new_empty(anchor.shape), positive.new_empty(positive.shape), temperature.new_empty(())


def cases(samples: Samples) -> Iterator[Case]:
    """Of all rows and of some that repeat."""
    temperature = 0.2
    for table in samples.tables():
        views = [samples.rows(table.num_rows, table.dim) for _ in range(2)]
        chosen = samples.integers(table.num_rows, table.num_rows // 2)
        budget = 2**-9 / temperature if table.precision == "high" else LONG_SUMS
        for name, rows in ((table.name, None), (f"{table.name}, some rows", chosen)):

            def nce(a: Tensor, p: Tensor, rows: Tensor | None = rows, precision: str = table.precision) -> Tensor:
                rows = None if rows is None else rows.to(a.device)
                return info_nce(a, p, temperature, rows=rows, precision=precision)

            def defined(a: Tensor, p: Tensor, rows: Tensor | None = rows) -> Tensor:
                return definition(a, p, temperature, None if rows is None else rows.to(a.device)).mean()

            yield Case("info_nce", name, views, nce, defined, budget=budget, **table.settings)


_LOSS = Operator(
    name="info_nce",
    arguments=InfoNCEArguments,
    returns="(Tensor, Tensor, Tensor, Tensor)",
    method="info_nce",
    plain=by_blocks,
    run=_run,
    fake=_fake,
    derivatives=LossDerivatives,
    autocast=torch.float32,
)


_BACKWARD = Operator(
    name="info_nce_backward",
    arguments=InfoNCEGradientArguments,
    returns="(Tensor, Tensor, Tensor)",
    method="info_nce",
    plain=by_blocks,
    run=lambda method, arguments: method(arguments)[1:],
    fake=lambda a: (a.anchor.new_empty(a.anchor.shape), a.positive.new_empty(a.positive.shape),
                    a.temperature.new_empty(())),
    derivatives=GradientDerivatives,
    autocast=torch.float32,
)  # fmt: skip

OPERATORS = (_LOSS, _BACKWARD)
