"""Fused operators for hypergraph convolution, contrastive and item losses and exact nearest neighbours.

They need torch and nothing else of this package. Each runs as a compiled kernel where there is one and as plain torch
elsewhere, and works under autograd in both modes, the transforms of `torch.func`, autocast and
`torch.compile(fullgraph=True)`. The compiled kernels give the same bits on every run and for every number of threads.
Where a tensor is wanted, an array of NumPy, CuPy or another library with `__dlpack__` will do: its memory is shared,
nothing is copied, and tensors come back.

V = vertices, M = hyperedges, N = rows, R = chosen rows, I = items, D = columns.
"""

from __future__ import annotations

import numbers
import sys

import torch
from torch import Tensor

from hellm._arrays import as_count, as_tensor, check_flag
from hellm.hypergraph import Hypergraph
from hellm.ops import _losses, _products  # noqa: F401  (register the operators)
from hellm.ops._backends import backend
from hellm.ops._library import accumulation_dtype, autocast_enabled

__all__ = [
    "backend",
    "bipartite_propagate",
    "hypergraph_conv",
    "incidence_product",
    "info_nce",
    "item_cross_entropy",
    "knn",
]

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_PRECISIONS = ("highest", "high", "medium")
_REDUCTIONS = ("mean", "sum", "none")


def hypergraph_conv(
    x: Tensor,
    hypergraph: Hypergraph,
    *,
    normalization: str = "symmetric",
    hyperedge_degree: bool = True,
    self_loops: bool = True,
    num_layers: int = 1,
) -> Tensor:
    """Convolution over a hypergraph, vertex -> hyperedge -> vertex, without the V x V matrix.

        y = out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x), num_layers times

    with the scales of `Hypergraph.scales`. HGNN is the default; PyTorch Geometric's HypergraphConv is
    normalization="row"; the published user branch is "row", hyperedge_degree=False, self_loops=False; the published
    item branch "symmetric", hyperedge_degree=False.

    Args:
        x: [V, D] float32, float16, bfloat16 or float64.
        hypergraph: V vertices, on the device of x. Its weights get a gradient if they require one.
        normalization: "symmetric", "row" or "none".
        hyperedge_degree: divide by the degree of each hyperedge.
        self_loops: keep the diagonal of the operator, a vertex reached from itself.
        num_layers: >= 0.

    Returns:
        [V, D] like x. Sums, those of gradients too, are accumulated in float32 (float64 for float64). Any derivative,
        in reverse and forward mode, under `torch.func` and `torch.vmap`.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    _check_hypergraph(hypergraph)
    x = _checked_rows("x", x, size=hypergraph.num_vertices, size_name="hypergraph.num_vertices")
    _check_device("hypergraph", hypergraph.device, x)
    num_layers = as_count("num_layers", num_layers)
    scales = hypergraph.scales(
        normalization, hyperedge_degree=hyperedge_degree, self_loops=self_loops, dtype=accumulation_dtype(x)
    )
    csr = (*hypergraph.vertex_csr, *hypergraph.edge_csr)
    schedules = (*hypergraph.vertex_schedule, *hypergraph.edge_schedule)
    return torch.ops.hellm.hypergraph_conv(x, *csr, *scales, num_layers, *schedules)


def incidence_product(x: Tensor, hypergraph: Hypergraph, *, transpose: bool = False) -> Tensor:
    """H x, or H^T x with `transpose`: one half of a convolution, unscaled.

    Args:
        x: [M, D], or [V, D] with `transpose`; float32, float16, bfloat16 or float64.
        hypergraph: on the device of x.
        transpose: from vertices to hyperedges instead of from hyperedges to vertices.

    Returns:
        [V, D], or [M, D] with `transpose`, like x. Accumulated in float32 (float64 for float64). Any derivative.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    _check_hypergraph(hypergraph)
    check_flag("transpose", transpose)
    name = "num_vertices" if transpose else "num_hyperedges"
    x = _checked_rows("x", x, size=getattr(hypergraph, name), size_name=f"hypergraph.{name}")
    _check_device("hypergraph", hypergraph.device, x)
    vertex = (*hypergraph.vertex_csr, *hypergraph.vertex_schedule)
    edge = (*hypergraph.edge_csr, *hypergraph.edge_schedule)
    matrices = (*edge, *vertex) if transpose else (*vertex, *edge)
    return torch.ops.hellm.incidence_product(x, *matrices)


def bipartite_propagate(
    user_x: Tensor, item_x: Tensor, hypergraph: Hypergraph, *, num_layers: int = 2
) -> tuple[Tensor, Tensor]:
    """LightGCN over the user-item graph: the mean of layers 0..num_layers of D^-1/2 A D^-1/2, A = [[0, R], [R^T, 0]].

    Args:
        user_x: [V, D] float32, float16, bfloat16 or float64.
        item_x: [M, D], same dtype and device.
        hypergraph: incidence R as `user_hypergraph` gives it: users are vertices, items hyperedges; without weights.
        num_layers: >= 0.

    Returns:
        ([V, D], [M, D]) like the inputs. Sums are accumulated in float32 (float64 for float64). Any derivative.

    Raises:
        ValueError: naming the argument, what it must be, and what it was.
    """
    _check_hypergraph(hypergraph)
    user_x = _checked_rows("user_x", user_x, size=hypergraph.num_vertices, size_name="hypergraph.num_vertices")
    item_x = _checked_rows("item_x", item_x, size=hypergraph.num_hyperedges, size_name="hypergraph.num_hyperedges")
    _check_same("item_x", item_x, "user_x", user_x)
    _check_device("hypergraph", hypergraph.device, user_x)
    num_layers = as_count("num_layers", num_layers)
    for name in ("incidence_weight", "hyperedge_weight"):
        if (hypergraph.vertex_values if name == "incidence_weight" else hypergraph.hyperedge_weight) is not None:
            raise ValueError(f"hypergraph must have no {name} here, got one")
    scales = hypergraph.bipartite_scales(accumulation_dtype(user_x))
    csr = (*hypergraph.vertex_csr[:2], *hypergraph.edge_csr[:2])
    schedules = (*hypergraph.vertex_schedule, *hypergraph.edge_schedule)
    return torch.ops.hellm.bipartite_propagate(user_x, item_x, *csr, *scales, num_layers, *schedules)


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
        precision: "highest" (float32 products), "high" or "medium" (16-bit products, float32 sums); None reads
            `torch.get_float32_matmul_precision()`. Ignored for float64.
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
    anchor = _checked_rows("anchor", anchor)
    positive = _checked_rows("positive", positive)
    if positive.shape != anchor.shape:
        raise ValueError(f"positive must have the shape of anchor {tuple(anchor.shape)}, got {tuple(positive.shape)}")
    _check_same("positive", positive, "anchor", anchor)
    check_flag("intra_view_negatives", intra_view_negatives)
    _check_reduction(reduction)
    precision = _default_precision() if precision is None else precision
    if not isinstance(precision, str) or precision not in _PRECISIONS:
        raise ValueError(f"precision must be None or one of {_PRECISIONS}, got {precision!r}")
    rows = _checked_row_choice(rows, anchor)
    if reduction == "mean" and (anchor if rows is None else rows).shape[0] == 0:
        raise ValueError(f"{'anchor' if rows is None else 'rows'} must have at least one row for the mean, got 0")
    temperature = _checked_temperature(temperature, anchor)
    compute_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (anchor, positive, temperature))
    return torch.ops.hellm.info_nce(
        anchor, positive, temperature, rows, intra_view_negatives, reduction, precision, compute_grad
    )[0]


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
    hidden = _checked_rows("hidden", hidden)
    item_embedding = _checked_rows("item_embedding", item_embedding)
    one_dtype = autocast_enabled(hidden.device.type) and torch.float64 not in (hidden.dtype, item_embedding.dtype)
    _check_same("item_embedding", item_embedding, "hidden", hidden, same_dtype=not one_dtype)
    if item_embedding.shape[0] == 0:
        raise ValueError("item_embedding must have at least one row, got 0")
    _check_reduction(reduction)
    if reduction == "mean" and hidden.shape[0] == 0:
        raise ValueError("hidden must have at least one row for the mean, got 0")
    target = _checked_target(target, hidden)
    bias = None if bias is None else _checked_bias(bias, item_embedding)
    grad = torch.is_grad_enabled()
    items_grad = item_embedding.requires_grad or (bias is not None and bias.requires_grad)
    return torch.ops.hellm.item_cross_entropy(
        hidden, item_embedding, target, bias, reduction, grad and hidden.requires_grad, grad and items_grad
    )[0]


def knn(x: Tensor, k: int, *, metric: str = "cosine") -> tuple[Tensor, Tensor]:
    """The k most similar rows of every row, exact, by blocks: nothing of size N * N is stored.

    The row itself is included. Lower index first among equal similarities. A row that is all zero has no neighbours
    and is nobody's neighbour. No gradient flows into x.

    Args:
        x: [N, D] float32, float16, bfloat16 or float64, finite.
        k: 1 <= k <= N.
        metric: "cosine".

    Returns:
        indices [N, k] int64, -1 where there is no neighbour, and similarities [N, k] float32 (float64 for float64),
        descending, 0 where there is no neighbour.

    Raises:
        ValueError: naming the argument, what it must be, and what it was; for x the first row that is not finite.
    """
    x = _checked_rows("x", x)
    if not isinstance(metric, str) or metric != "cosine":
        raise ValueError(f"metric must be 'cosine', got {metric!r}")
    k = as_count("k", k, low=None)
    if not 1 <= k <= x.shape[0]:
        raise ValueError(f"k must be between 1 and the number of rows {x.shape[0]}, got {k}")
    return torch.ops.hellm.knn(x.detach(), k)


@torch.compiler.assume_constant_result
def _default_precision() -> str:
    return torch.get_float32_matmul_precision()


def _check_hypergraph(hypergraph: Hypergraph) -> None:
    if not isinstance(hypergraph, Hypergraph):
        raise ValueError(f"hypergraph must be a Hypergraph, got {type(hypergraph).__name__}")


def _check_reduction(reduction: str) -> None:
    if not isinstance(reduction, str) or reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def _checked_rows(name: str, x: Tensor, *, size: int | None = None, size_name: str = "") -> Tensor:
    x = as_tensor(name, x)
    if x.ndim != 2:
        raise ValueError(f"{name} must be [rows, columns], got shape {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"{name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
    if size is not None and x.shape[0] != size:
        raise ValueError(f"{name} must have {size_name} = {size} rows, got {x.shape[0]}")
    return x


def _check_same(name: str, x: Tensor, like_name: str, like: Tensor, *, same_dtype: bool = True) -> None:
    if x.shape[1] != like.shape[1]:
        raise ValueError(f"{name} must have {like.shape[1]} columns like {like_name}, got {x.shape[1]}")
    if same_dtype and x.dtype != like.dtype:
        raise ValueError(f"{name} must be {like.dtype} like {like_name}, got {x.dtype}")
    _check_device(name, x.device, like, like_name)


def _check_device(name: str, device: torch.device, like: Tensor, like_name: str = "x") -> None:
    if device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {device}")


def _checked_row_choice(rows: Tensor | None, anchor: Tensor) -> Tensor | None:
    if rows is None:
        return None
    rows = as_tensor("rows", rows)
    if rows.ndim != 1 or rows.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"rows must be [R] int32 or int64, got {tuple(rows.shape)} {rows.dtype}")
    _check_device("rows", rows.device, anchor, "anchor")
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
    _check_device("temperature", temperature.device, anchor, "anchor")
    return temperature if temperature.is_cpu else torch.where(temperature > 0, temperature, torch.nan)


def _checked_target(target: Tensor, hidden: Tensor) -> Tensor:
    target = as_tensor("target", target)
    if target.shape != hidden.shape[:1] or target.dtype != torch.int64:
        raise ValueError(f"target must be [{hidden.shape[0]}] int64, got {tuple(target.shape)} {target.dtype}")
    _check_device("target", target.device, hidden, "hidden")
    return target


def _checked_bias(bias: Tensor, item_embedding: Tensor) -> Tensor:
    bias = as_tensor("bias", bias)
    if bias.shape != item_embedding.shape[:1] or not bias.is_floating_point():
        raise ValueError(
            f"bias must be [{item_embedding.shape[0]}] of a floating dtype, got {tuple(bias.shape)} {bias.dtype}"
        )
    _check_device("bias", bias.device, item_embedding, "item_embedding")
    return bias
