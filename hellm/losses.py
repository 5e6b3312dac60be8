"""Training losses of stage 1: BPR, softmax over all items, L2 of fused rows, and the synergistic contrastive loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from hellm import ops

__all__ = ["bpr_loss", "l2_loss", "softmax_loss", "synergistic_contrastive_loss"]


def bpr_loss(user: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Bayesian personalised ranking: mean_b -log sigmoid(<u_b, p_b> - <u_b, n_b>).

    Computed as softplus of the negated difference, so that it stays finite for any difference
    (Rendle et al. 2009, section 4.2).

    Args:
        user: [B, D] floating point.
        positive: [B, D], rows of items the user has.
        negative: [B, D], rows of items the user has not.
    Returns: scalar, in the inputs' dtype.
    Raises: ValueError if the three shapes differ or are not [B, D] with B >= 1.
    """
    _check_rows(user=user, positive=positive, negative=negative)
    difference = (user * positive).sum(dim=1) - (user * negative).sum(dim=1)
    return F.softplus(-difference).mean()


def softmax_loss(
    user: torch.Tensor,
    item: torch.Tensor,
    positive: torch.Tensor,
    temperature: float = 0.2,
    *,
    candidates: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each positive among all items: mean_b -log softmax_i(cos(u_b, i) / temperature) at p_b.

    Args:
        user: [B, D] floating point.
        item: [I, D] of unit length.
        positive: [B] int64 rows of items the user has.
        temperature: > 0.
        candidates: [I] bool, the items that the softmax is over; None is all. Positives must be among them.
    Returns: scalar.
    Raises: ValueError, a temperature that is not > 0, and as `hellm.ops.item_cross_entropy`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    bias = None if candidates is None else torch.where(candidates, 0.0, -torch.inf)
    return ops.item_cross_entropy(F.normalize(user, dim=1) / temperature, item, positive, bias=bias)


def l2_loss(*rows: torch.Tensor) -> torch.Tensor:
    """Half the squared norm of the rows of a batch, per batch row: sum_r 0.5 * |r|^2 / B.

    In stage 1 the rows are the fused user, positive and negative embeddings, not the tables (MMHCL, loss definition).

    Args:
        rows: tensors [B, D] of one shape.
    Returns: scalar, in the inputs' dtype.
    Raises: ValueError if no tensor is given, or the shapes differ or are not [B, D] with B >= 1.
    """
    if not rows:
        raise ValueError("l2_loss needs at least one tensor [B, D], got none")
    _check_rows(**{f"rows[{index}]": row for index, row in enumerate(rows)})
    return 0.5 * sum((row.square().sum() for row in rows[1:]), rows[0].square().sum()) / rows[0].shape[0]


def synergistic_contrastive_loss(
    fused: torch.Tensor,
    hypergraph_view: torch.Tensor,
    temperature: float = 0.2,
    *,
    precision: str | None = None,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrast of each node's fused embedding (anchor) with its hypergraph embedding (positive), over all nodes.

    Negatives are every other node in both views; one direction, gradients flow into both views (MMHCL, InfoNCE).

    Args:
        fused: [N, D], collaborative plus normalised hypergraph embedding.
        hypergraph_view: [N, D], output of the hypergraph convolution.
        temperature: > 0.
        precision: see `hellm.ops.info_nce`.
        rows: [M] int64 anchors to average over (keys stay all N); None is all of them.
    Returns: scalar.
    Raises: ValueError as `hellm.ops.info_nce` does.
    """
    return ops.info_nce(fused, hypergraph_view, temperature, precision=precision, rows=rows)


def _check_rows(**tensors: torch.Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[0] == 0:
            raise ValueError(f"{name} must be [B, D] with B >= 1, got shape {tuple(tensor.shape)}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have shape {tuple(first.shape)} like {next(iter(tensors))}, got {tuple(tensor.shape)}"
            )
