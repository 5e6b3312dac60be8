"""Softmax cross-entropy of rows against all items, without the [R, I] logits: `softmax_passes` with one view.

R = rows, I = items, D = columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .softmax_passes import OPERANDS, SoftmaxPasses, padded_width


@triton.jit(do_not_specialize=["num_rows", "num_items"])
def target_logits_kernel(
    hidden,  # [R, D]
    item_embedding,  # [I, D]
    target,  # [R] int64
    bias,  # [I] float32 or None
    aligned,  # [R] float32
    num_rows,
    num_items,
    dim,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """aligned_r = <hidden_r, item_t> + bias_t, t = target_r, in float32 whatever the precision of the products.

    NaN, and with it the loss, where there is no item t.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    live = row < num_rows
    mask = live[:, None] & (column < dim)[None, :]
    chosen = tl.load(target + row, mask=live, other=0)
    exists = (chosen >= 0) & (chosen < num_items)
    item = tl.where(exists, chosen, 0)
    rows = tl.load(hidden + row[:, None] * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
    items = tl.load(item_embedding + item[:, None] * dim + column[None, :], mask=mask, other=0.0).to(tl.float32)
    logit = tl.sum(rows * items, 1)
    if bias is not None:
        logit += tl.load(bias + item, mask=live, other=0.0)
    tl.store(aligned + row, tl.where(exists, logit, float("nan")), mask=live)


def _operand(x: Tensor, width: int, precision: str) -> tuple[Tensor, Tensor]:
    """x [*, D] in 16 bits as parts [P, *, width], and the power of two that they lack: entries are at most 1."""
    padded = x if x.shape[1] == width else F.pad(x, (0, width - x.shape[1]))
    if x.dtype != torch.float32:
        return padded.unsqueeze(0), torch.ones((), device=x.device)
    dtype, parts = OPERANDS[precision]
    # One factor for all rows: a factor for each would have to be taken out of the weighted sum again.
    size = torch.exp2(torch.frexp(x.abs().amax()).exponent.float())
    scaled = padded / size
    high = scaled.to(dtype)
    return torch.stack([high, (scaled - high).to(dtype)][:parts]), size


def item_cross_entropy(
    hidden: Tensor,
    item_embedding: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_grad: Tensor | None,
    row_loss: Tensor,
    grad_hidden: Tensor | None,
    grad_items: Tensor | None,
    grad_bias: Tensor | None,
    precision: str,
) -> None:
    """loss_r = lse_j(<h_r, e_j> + b_j) - (<h_r, e_t> + b_t) and the gradients of sum_r row_grad_r loss_r.

    hidden [R, D], item_embedding [I, D], target [R] int64; bias, row_grad, row_loss and grad_bias float32; R >= 1.
    A row whose target is not in [0, I) has loss and gradients NaN.
    precision: of float32 rows, "highest", "high" or "medium", see `OPERANDS`; 16-bit rows are multiplied as they are.
    """
    (num_rows, dim), num_items = hidden.shape, item_embedding.shape[0]
    width = padded_width(dim)
    aligned = torch.empty_like(row_loss)
    block = max(1, 2048 // width)
    target_logits_kernel[(triton.cdiv(num_rows, block),)](
        hidden, item_embedding, target, bias, aligned, num_rows, num_items, dim, WIDTH=width, BLOCK=block
    )
    query, query_size = _operand(hidden, width, precision)
    keys, key_size = _operand(item_embedding, width, precision)
    passes = SoftmaxPasses(query, keys.unsqueeze(1), target, bias, query_size * key_size)
    passes.rows(aligned, row_grad, row_loss, None, mean=grad_hidden is not None)
    if grad_hidden is not None:
        # The weight of a row whose target does not exist is NaN, whatever stands beside it.
        own = passes.weight.unsqueeze(1) * item_embedding[target.clamp(0, num_items - 1)]
        grad_hidden.copy_(passes.weighted_mean[:, :dim] * key_size - own)
        passes.weighted_mean = None
    if grad_items is not None:
        gradient, total, factor = passes.columns(own_term=True, total=grad_bias is not None)
        grad_items.copy_(gradient.sum((0, 1))[:, :dim] * (factor * query_size))
        if grad_bias is not None:
            grad_bias.copy_(total.sum((0, 1)) * factor)
