"""The softmax over all items beside torch's loss and the fused ones of others.

N = rows, I = items, D = columns.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs
from benchmarks.ceilings import PRODUCT
from benchmarks.entries import at_precision, candidates, compiled, gradients, stock, wide
from benchmarks.registry import CPU, DIM, LIMIT, TARGETS, Entry, Setup, Target, Workload, register
from hellm import ops


def item_cross_entropy_eager(hidden: Tensor, item_embedding: Tensor, target: Tensor) -> Tensor:
    """torch's loss over all logits at once; autograd keeps their [N, I] log-softmax."""
    return F.cross_entropy(hidden @ item_embedding.T, target)


class BlockedItemCrossEntropy(torch.autograd.Function):
    """The mean loss with both gradients in one sweep over blocks of rows, in plain torch and in place."""

    @staticmethod
    def forward(ctx, hidden: Tensor, item_embedding: Tensor, target: Tensor, block: int) -> Tensor:
        grad_hidden, grad_items = torch.empty_like(hidden), torch.zeros_like(item_embedding)
        loss = 0.0
        for start in range(0, len(hidden), block):
            query, own = hidden[start : start + block], target[start : start + block].unsqueeze(1)
            share = query @ item_embedding.T
            aligned = share.gather(1, own)
            top = share.amax(1, keepdim=True)
            total = share.sub_(top).exp_().sum(1, keepdim=True)
            loss += (total.log() + top - aligned).sum().item()
            share.div_(total * len(hidden)).scatter_add_(1, own, share.new_full(own.shape, -1 / len(hidden)))
            torch.mm(share, item_embedding, out=grad_hidden[start : start + block])
            grad_items.addmm_(share.T, query)
        ctx.save_for_backward(grad_hidden, grad_items)
        return hidden.new_tensor(loss / len(hidden))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(saved * grad for saved in ctx.saved_tensors), None, None


def item_cross_entropy_blocked(hidden: Tensor, item_embedding: Tensor, target: Tensor, block: int = 1024) -> Tensor:
    """`BlockedItemCrossEntropy` as a function."""
    return BlockedItemCrossEntropy.apply(hidden, item_embedding, target, block)


def item_cross_entropy_cut(hidden: Tensor, item_embedding: Tensor, target: Tensor) -> Tensor:
    """Cut Cross-Entropy (Triton) on bfloat16 rows, without its filter: the shares of items are below its threshold.

    Raises:
        ImportError: cut_cross_entropy is not installed.
    """
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(hidden.bfloat16(), item_embedding.bfloat16(), target, filter_eps=None).float()


def item_cross_entropy_liger(hidden: Tensor, item_embedding: Tensor, target: Tensor) -> Tensor:
    """Liger's fused linear cross-entropy (chunks of logits, Triton).

    Raises:
        ImportError: liger_kernel is not installed.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(item_embedding, hidden, target)


# -------------------------------------------------------------------------------------------------------- cases


def _item_cross_entropy(setup: Setup, *, num_rows: int, num_items: int, nvrtc: bool = False) -> Workload:
    num_rows, num_items = setup.small(num_rows), setup.small(num_items, 61)
    tables = [inputs.rows(count, DIM, seed) for seed, count in enumerate((num_rows, num_items))]
    leaves = [table.to(setup.device).requires_grad_() for table in tables]
    target = inputs.indices(num_rows, num_items).to(setup.device)
    ours, eager = (partial(f, target=target) for f in (ops.item_cross_entropy, item_cross_entropy_eager))
    tolerances = {"high": 2e-2, "highest": 2e-4} if setup.gpu else {"highest": 1e-4}
    entries = candidates(setup, lambda at: at_precision(at, gradients(ours, leaves)), tolerances, nvrtc=nvrtc)
    label, note = "F.cross_entropy of all logits", "autograd keeps N I log-probabilities"
    entries += stock(setup, f"{label}, eager", lambda: gradients(eager, leaves), (2e-4, 2e-2), note=note)
    if setup.gpu:
        make = lambda: gradients(compiled(eager), leaves)  # noqa: E731
        entries += stock(setup, f"{label}, torch.compile", make, (2e-4, 2e-2), "compile")
        for label, function in (
            ("Cut Cross-Entropy, bfloat16, unfiltered", item_cross_entropy_cut),
            ("Liger, chunks of logits", item_cross_entropy_liger),
        ):
            entries.append(Entry(label, gradients(partial(function, target=target), leaves), tolerance=2e-2))
    else:
        blocked = gradients(partial(item_cross_entropy_blocked, target=target), leaves)
        entries.append(Entry("plain torch, blocks of 1024", blocked, note="hand-written gradient, in place"))
    return Workload(
        entries,
        6.0 * num_rows * num_items * DIM,
        parameters={"N": num_rows, "I": num_items, "D": DIM, "dtype": "float32"},
        truth=gradients(eager, wide(leaves)),
        limit=PRODUCT,
    )


_add = partial(register, "Item softmax", _item_cross_entropy)
_title = "item_cross_entropy, a SASRec batch over the Beauty items, both passes"
_add("item_cross_entropy", _title, devices=(CPU,), num_rows=12_800, num_items=12_101)
_add("item_cross_entropy-12101", rank=0, num_rows=12_800, num_items=12_101, nvrtc=True)
_add("item_cross_entropy-100000", rank=0, num_rows=4_096, num_items=100_000)

TARGETS += [
    Target("item_cross_entropy", "hellm", "eager", 2.0, device=CPU),
    Target("item_cross_entropy", "hellm", LIMIT, 0.8, device=CPU),
]
