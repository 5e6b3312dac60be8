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
    log_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross-entropy of each positive among all items: mean_b -log softmax_i(cos(u_b, i) / temperature) at p_b.

    Args:
        user: [B, D] floating point.
        item: [I, D] of unit length.
        positive: [B] int64 rows of items the user has.
        temperature: > 0.
        log_weight: [I] floating point, the logarithm of the number of items that each stands for, -inf to leave it out;
            None is one each.
    Returns: scalar.
    Raises: ValueError, a temperature that is not > 0, and as `hellm.ops.item_cross_entropy`.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    return ops.item_cross_entropy(F.normalize(user, dim=1) / temperature, item, positive, bias=log_weight)


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
    keys: torch.Tensor | None = None,
    num_nodes: int | None = None,
) -> torch.Tensor:
    """Contrast of each node's fused embedding (anchor) with its hypergraph embedding (positive), over all nodes.

    Negatives are every other node in both views; one direction, gradients flow into both views (MMHCL, InfoNCE).

    Args:
        fused: [N, D], collaborative plus normalised hypergraph embedding.
        hypergraph_view: [N, D], output of the hypergraph convolution.
        temperature: > 0.
        precision: see `hellm.ops.info_nce`.
        rows: [R] int64 anchors to average over; None is all keys.
        keys: [K] int64 nodes, ascending, K >= 2, drawn evenly; the anchors must be among them. The negatives among them
            stand for those of all N, and the sum over these is estimated without bias. None is all N.
        num_nodes: how many nodes there are where N are drawn of them, as `keys` are; None is N.
    Returns: scalar.
    Raises: ValueError as `hellm.ops.info_nce` does, and for fewer than two keys.
    """
    if keys is not None and len(keys) < len(fused):
        num_nodes = num_nodes or len(fused)
        rows = None if rows is None else torch.searchsorted(keys, rows)
        # F.embedding sums repeated rows of the gradient in a fixed order, plain indexing does not on CUDA.
        fused, hypergraph_view = F.embedding(keys, fused), F.embedding(keys, hypergraph_view)
    if num_nodes is None or num_nodes == len(fused):
        return ops.info_nce(fused, hypergraph_view, temperature, precision=precision, rows=rows)
    if len(fused) < 2:
        raise ValueError(f"keys must be at least 2 nodes, got {len(fused)}")
    loss = ops.info_nce(fused, hypergraph_view, temperature, precision=precision, rows=rows, reduction="none")
    # A loss is log(1 + x), x the negatives' share of the positive: of r times x, which keeps the digits of a tiny loss.
    more = (num_nodes - 1) / (len(fused) - 1) - 1
    return (loss + torch.log1p(more * -torch.expm1(-loss))).mean()


def _check_rows(**tensors: torch.Tensor) -> None:
    first = next(iter(tensors.values()))
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or tensor.shape[0] == 0:
            raise ValueError(f"{name} must be [B, D] with B >= 1, got shape {tuple(tensor.shape)}")
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have shape {tuple(first.shape)} like {next(iter(tensors))}, got {tuple(tensor.shape)}"
            )
