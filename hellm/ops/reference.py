"""The definition of every operator in plain torch.

Tests compare each backend with these functions in float64, benchmarks use them as a baseline, and they run where
nothing faster can. Differentiable by autograd, any floating dtype, any device. On a GPU nothing waits for the device,
so that all but `knn` can be captured in a CUDA graph. Schedules of matrices, which the GPU kernels take after the
arguments of a sparse product, are ignored.

V = vertices, M = hyperedges, N = rows, I = items, D = columns.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def incidence_product(x: Tensor, indptr: Tensor, indices: Tensor, values: Tensor | None, *_: object) -> Tensor:
    """CSR matrix [rows, columns] times x [columns, D] -> [rows, D]; absent values are ones. Sums as in `_wide`."""
    wide = _wide(x)
    gathered = wide[indices.long()]
    if values is not None:
        gathered = gathered * values.to(wide.dtype).unsqueeze(1)
    row = _row_of_entry(indptr, indices)
    return wide.new_zeros(indptr.numel() - 1, x.shape[1]).index_add(0, row, gathered).to(x.dtype)


def incidence_dot(left: Tensor, right: Tensor, indptr: Tensor, indices: Tensor, block: int = 2**16) -> Tensor:
    """For each entry of a CSR matrix <its row of left, its column's row of right>: [nnz], with which values learn."""
    rows, columns = _row_of_entry(indptr, indices).split(block), indices.long().split(block)
    left, right = _wide(left), _wide(right)
    return torch.cat([(left[row] * right[column]).sum(1) for row, column in zip(rows, columns, strict=True)])


def _wide(x: Tensor) -> Tensor:
    """In the dtype that sums are accumulated in: float64 for float64, else float32."""
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _row_of_entry(indptr: Tensor, indices: Tensor) -> Tensor:
    """[nnz] int64; nothing here has a shape that depends on values."""
    rows = torch.arange(indptr.numel() - 1, device=indptr.device)
    return torch.repeat_interleave(rows, indptr.diff(), output_size=indices.numel())


def hypergraph_conv(
    x: Tensor,
    vertex_indptr: Tensor,
    vertex_edges: Tensor,
    vertex_values: Tensor | None,
    edge_indptr: Tensor,
    edge_vertices: Tensor,
    edge_values: Tensor | None,
    in_scale: Tensor | None,
    edge_scale: Tensor | None,
    out_scale: Tensor | None,
    diagonal: Tensor | None,
    num_layers: int,
    *_: object,
) -> Tensor:
    """num_layers times x <- out_scale * (H (edge_scale * H^T (in_scale * x)) - diagonal * in_scale * x)."""
    if num_layers == 0:
        return x.clone()  # the output of an operator must not share memory with its input
    wide = _wide(x)
    for _ in range(num_layers):
        scaled = _scale(wide, in_scale)
        edge = _scale(incidence_product(scaled, edge_indptr, edge_vertices, edge_values), edge_scale)
        wide = incidence_product(edge, vertex_indptr, vertex_edges, vertex_values)
        if diagonal is not None:
            wide = wide - _scale(scaled, diagonal)
        wide = _scale(wide, out_scale)
    return wide.to(x.dtype)


def bipartite_propagate(
    user_x: Tensor,
    item_x: Tensor,
    vertex_indptr: Tensor,
    vertex_edges: Tensor,
    edge_indptr: Tensor,
    edge_vertices: Tensor,
    user_scale: Tensor,
    item_scale: Tensor,
    num_layers: int,
    *_: object,
) -> tuple[Tensor, Tensor]:
    """Mean of layers 0..num_layers of user <- user_scale * R (item_scale * item), item <- likewise with R^T."""
    user, item = user_sum, item_sum = _wide(user_x), _wide(item_x)
    for _ in range(num_layers):
        user_next = _scale(incidence_product(_scale(item, item_scale), vertex_indptr, vertex_edges, None), user_scale)
        item_next = _scale(incidence_product(_scale(user, user_scale), edge_indptr, edge_vertices, None), item_scale)
        user, item = user_next, item_next
        user_sum, item_sum = user_sum + user, item_sum + item
    return (user_sum / (num_layers + 1)).to(user_x.dtype), (item_sum / (num_layers + 1)).to(item_x.dtype)


def info_nce(
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
    u, v = _unit(_wide(anchor)), _unit(_wide(positive))
    index = torch.arange(u.shape[0], device=u.device) if rows is None else rows.long()
    query = u[index]
    keys = torch.cat([v, u]) if intra_view_negatives else v
    own = torch.arange(keys.shape[0], device=u.device) % u.shape[0] == index.unsqueeze(1)
    logits = (query @ keys.T / temperature).masked_fill(own, float("-inf"))
    aligned = (query * v[index]).sum(1) / temperature
    if u.shape[0] == 1:
        return aligned * 0.0
    return F.softplus(torch.logsumexp(logits, 1) - aligned)


def item_cross_entropy(hidden: Tensor, item_embedding: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
    """Loss of each row [N]: lse_j(<h_i, e_j> + b_j) - (<h_i, e_t> + b_t), t = target_i. Stores the [N, I] logits.

    16-bit inputs are computed in float32.
    """
    hidden = _wide(hidden)
    logits = F.linear(hidden, item_embedding.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))
    return F.cross_entropy(logits, target, reduction="none")


def knn(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest rows by cosine, itself included: indices [N, k] int64 and similarities [N, k], descending.

    Lower index first among equals. All-zero rows have no neighbours and are nobody's: index -1, similarity 0, also
    where fewer than k rows remain. Stores the similarities of all pairs.
    """
    present = (x != 0).any(1)
    u = _unit(x)
    similarity = (u @ u.T).masked_fill(~present, float("-inf"))
    similarity[~present] = float("-inf")
    value, index = similarity.sort(dim=1, descending=True, stable=True)
    value, index = value[:, :k], index[:, :k]
    absent = value == float("-inf")
    return index.masked_fill(absent, -1), value.masked_fill(absent, 0.0)


def knn_by_panels(x: Tensor, k: int, panel_bytes: int = 2**28) -> tuple[Tensor, Tensor]:
    """`knn` without the similarities of all pairs at once. Low-precision rows are computed in float32."""
    present = (x != 0).any(1)
    unit = _unit(x.to(torch.float64 if x.dtype == torch.float64 else torch.float32))
    panel = max(1, panel_bytes // (max(x.shape[0], 1) * unit.element_size()))
    found = [_nearest(unit, present, start, min(start + panel, len(unit)), k) for start in range(0, len(unit), panel)]
    index, value = (torch.cat(part) for part in zip(*found, strict=True))
    absent = value == float("-inf")
    return index.masked_fill(absent, -1), value.masked_fill(absent, 0.0)


def _nearest(unit: Tensor, present: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
    """The k best columns of some rows of unit unit^T; of equals the first ones, which topk does not promise."""
    similarity = (unit[start:stop] @ unit.T).masked_fill_(~present, float("-inf"))
    similarity[~present[start:stop]] = float("-inf")
    least = similarity.topk(k, dim=1).values[:, -1:]
    better, equal = similarity > least, similarity == least
    room = k - better.sum(1, keepdim=True)
    column = (better | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    value, order = similarity.gather(1, column).sort(dim=1, descending=True, stable=True)
    return column.gather(1, order), value


def _unit(x: Tensor) -> Tensor:
    """Rows over their lengths; a row that is all zero stays zero and has derivative 0, of any order and mode."""
    largest = _largest(x)
    zero = largest == 0
    scaled = torch.where(zero, 0.0, x / largest.masked_fill(zero, 1.0))
    return scaled * scaled.square().sum(dim=1, keepdim=True).masked_fill(zero, 1.0).rsqrt()


def _largest(x: Tensor) -> Tensor:
    """[N, 1]; no square of entries overflows or is lost where they were divided by it first."""
    return x.detach().abs().amax(dim=1, keepdim=True) if x.shape[1] else x.new_zeros(x.shape[0], 1)


def _unit_and_length(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows over their lengths, and lengths [N, 1], infinite for rows that are all zero; not to be differentiated."""
    largest = _largest(x)
    largest = largest.masked_fill(largest == 0, float("inf"))
    scaled = x / largest
    norm = scaled.norm(dim=1, keepdim=True).masked_fill(largest.isinf(), 1.0)
    length = largest * norm
    # A subnormal length has few digits; any other rounds once less this way.
    return torch.where(length < torch.finfo(x.dtype).smallest_normal, scaled / norm, x / length), length


def _scale(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale.to(x.dtype).unsqueeze(1)


def info_nce_with_gradients(
    anchor: Tensor,
    positive: Tensor,
    temperature: Tensor,
    rows: Tensor | None,
    row_grad: Tensor | None,
    intra_view_negatives: bool,
    precision: str,
    block: int = 512,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`info_nce` and the gradients of sum(row_grad * loss), by blocks of rows so that memory stays O(block * N).

    Gradients are empty without `row_grad`. Low-precision inputs are computed in float32.
    """
    compute = torch.float64 if anchor.dtype == torch.float64 else torch.float32
    z1, z2 = anchor.to(compute), positive.to(compute)
    inverse = 1.0 / temperature.double()
    inverse_t = inverse.to(compute)
    (u, norm_u), (v, norm_v) = (_unit_and_length(z) for z in (z1, z2))
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


def item_cross_entropy_with_gradients(
    hidden: Tensor,
    item_embedding: Tensor,
    target: Tensor,
    bias: Tensor | None,
    row_grad: Tensor | None,
    hidden_grad: bool,
    items_grad: bool,
    block_elements: int = 2**24,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`item_cross_entropy` and the gradients of sum(row_grad * loss), by blocks of rows of `block_elements` logits.

    The target's logit stands outside the sum, loss = softplus(lse over the other items - target logit), so that a tiny
    loss keeps its digits. Gradients that are not wanted are empty; 16-bit inputs are computed in float32.
    """
    compute = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    h, e, b = (None if t is None else t.to(compute) for t in (hidden, item_embedding, bias))
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
        if not (hidden_grad or items_grad):
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
