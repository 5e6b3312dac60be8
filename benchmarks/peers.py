"""What `hellm` is compared with: the published forms and the best plain torch, each written from its definition.

N = rows, D = columns, V = vertices, M = hyperedges.
"""

from __future__ import annotations

import random
from functools import partial

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------------ InfoNCE


def info_nce_published(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The published loss in eager torch: exponentials of whole [chunk, N] blocks, their sums minus the diagonal.

    MMHCL: -log(e^(s12_ii / t) / (sum_j e^(s11_ij / t) + sum_j e^(s12_ij / t) - e^(s11_ii / t))), mean over rows.
    Autograd keeps every block.
    """
    first, second = F.normalize(anchor), F.normalize(positive)
    starts = range(0, len(first), chunk)
    return torch.cat([_published_block(first, second, start, chunk, temperature) for start in starts]).mean()


def info_nce_checkpointed(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The same with every block recomputed in backward: the low-memory form without new kernels."""
    first, second = F.normalize(anchor), F.normalize(positive)
    block = partial(checkpoint, _published_block, first, second, use_reentrant=False)
    return torch.cat([block(start, chunk, temperature) for start in range(0, len(first), chunk)]).mean()


def info_nce_unbatched(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """The published loss over all rows at once, for torch.compile."""
    return _published_block(F.normalize(anchor), F.normalize(positive), 0, len(anchor), temperature).mean()


def _published_block(first: Tensor, second: Tensor, start: int, chunk: int, temperature: float) -> Tensor:
    within = torch.exp(first[start : start + chunk] @ first.T / temperature)
    across = torch.exp(first[start : start + chunk] @ second.T / temperature)
    own = across.diagonal(start)
    return -torch.log(own / (within.sum(1) + across.sum(1) - within.diagonal(start)))


class StripInfoNCE(torch.autograd.Function):
    """The loss with both gradients in one sweep over strips of rows, in plain torch and in place.

    With p_ij the share of key j in the denominator of row i, d loss / d s_ij = (p_ij - [j positive]) / (N t).
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, positive: Tensor, temperature: float, strip: int) -> Tensor:
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        first, second = anchor / norms[0], positive / norms[1]
        num_rows = len(first)
        grad_first, grad_second, loss = torch.zeros_like(first), torch.zeros_like(second), 0.0
        for start in range(0, num_rows, strip):
            stop = min(start + strip, num_rows)
            query, mine = first[start:stop], torch.arange(stop - start)
            within = (query @ first.T).div_(temperature).exp_()
            across = (query @ second.T).div_(temperature).exp_()
            within[mine, mine + start] = 0
            own = across[mine, mine + start]
            total = within.sum(1).add_(across.sum(1))
            loss -= (own / total).log().sum().item()
            within.div_(total.unsqueeze(1))
            across.div_(total.unsqueeze(1))
            across[mine, mine + start] -= 1
            grad_first[start:stop].addmm_(within, first).addmm_(across, second)
            grad_first.addmm_(within.T, query)
            grad_second.addmm_(across.T, query)
        grads = []
        for grad, unit, norm in ((grad_first, first, norms[0]), (grad_second, second, norms[1])):
            tangent = grad.sub_((grad * unit).sum(1, keepdim=True) * unit)
            grads.append(tangent.div_(norm * (temperature * num_rows)))
        ctx.save_for_backward(*grads)
        return anchor.new_tensor(loss / num_rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return *(saved * grad for saved in ctx.saved_tensors), None, None


def info_nce_strip(anchor: Tensor, positive: Tensor, temperature: float, strip: int = 512) -> Tensor:
    """`StripInfoNCE` as a function."""
    return StripInfoNCE.apply(anchor, positive, temperature, strip)


# ------------------------------------------------------------------------------------------- item cross-entropy


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


# ----------------------------------------------------------------------------------------- hypergraph convolution


# What `hellm.ops.hypergraph_conv` is told to compute the same.
PUBLISHED_USERS = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
PUBLISHED_ITEMS = {"normalization": "symmetric", "hyperedge_degree": False}


def incidence(index: np.ndarray, shape: tuple[int, int], values: np.ndarray | None = None) -> scipy.sparse.csr_matrix:
    """H [V, M] in float64 from [2, nnz] vertices and hyperedges."""
    ones = np.ones(index.shape[1]) if values is None else values
    return scipy.sparse.csr_matrix((ones, (index[0], index[1])), shape=shape)


def clique_row(h: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """The published user matrix D^-1 (H H^T - diag), D its row sums: [V, V]."""
    square = (h @ h.T).tocsr()
    square.setdiag(0)
    square.eliminate_zeros()
    return scipy.sparse.diags(_inverse(square.sum(1))) @ square


def clique_symmetric(h: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """The published item matrix D^-1/2 H H^T D^-1/2, D the row sums of H H^T: [V, V]."""
    square = (h @ h.T).tocsr()
    scale = scipy.sparse.diags(np.sqrt(_inverse(square.sum(1))))
    return scale @ square @ scale


def bipartite(r: scipy.sparse.csr_matrix) -> scipy.sparse.csr_matrix:
    """D^-1/2 [[0, R], [R^T, 0]] D^-1/2: [U + I, U + I]."""
    adjacency = scipy.sparse.bmat([[None, r], [r.T, None]], format="csr")
    scale = scipy.sparse.diags(np.sqrt(_inverse(adjacency.sum(1))))
    return scale @ adjacency @ scale


def coo_tensor(matrix: scipy.sparse.spmatrix) -> Tensor:
    """Coalesced float32 COO with int64 indices, as torch makes it from a dense matrix."""
    coo = matrix.tocoo()
    index = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    values = torch.from_numpy(coo.data.astype(np.float32))
    return torch.sparse_coo_tensor(index, values, coo.shape, check_invariants=True).coalesce()


def csr_tensor(matrix: scipy.sparse.spmatrix, index_dtype: torch.dtype = torch.int32) -> Tensor:
    """Float32 CSR with sorted columns."""
    csr = matrix.tocsr().sorted_indices()
    index = (torch.from_numpy(part).to(index_dtype) for part in (csr.indptr, csr.indices))
    values = torch.from_numpy(csr.data.astype(np.float32))
    return torch.sparse_csr_tensor(*index, values, size=csr.shape, check_invariants=True)


class TwoProducts:
    """D^-1 (H H^T - diag) x as two cached CSR products, everything that can be folded in beforehand folded in.

    With `symmetric` the published item form, D^-1/2 H H^T D^-1/2 x. The transpose of each factor is cached too, so that
    backward converts nothing: the strongest form stock torch has.
    """

    def __init__(
        self,
        h: scipy.sparse.csr_matrix,
        *,
        symmetric: bool = False,
        index_dtype: torch.dtype = torch.int32,
        product=torch.mm,
        device: torch.device | str = "cpu",
    ) -> None:
        reached, diagonal = h @ np.asarray(h.sum(0)).ravel(), np.asarray(h.multiply(h).sum(1)).ravel()
        if symmetric:
            first = scipy.sparse.diags(np.sqrt(_inverse(reached))) @ h
            last = first
            self.diagonal = None
        else:
            inverse = _inverse(reached - diagonal)
            first, last = h, scipy.sparse.diags(inverse) @ h
            self.diagonal = torch.from_numpy((diagonal * inverse).astype(np.float32)).unsqueeze(1).to(device)
        self.scaled, self.gather, self.spread, self.gather_scaled = (
            csr_tensor(part, index_dtype).to(device) for part in (last, first.T, first, last.T)
        )
        self.product = product

    def forward(self, x: Tensor) -> Tensor:
        return self._apart(self.product(self.scaled, self.product(self.gather, x)), x)

    def backward(self, grad: Tensor) -> Tensor:
        return self._apart(self.product(self.spread, self.product(self.gather_scaled, grad)), grad)

    def _apart(self, out: Tensor, x: Tensor) -> Tensor:
        return out if self.diagonal is None else out.addcmul_(x, self.diagonal, value=-1)

    def __call__(self, x: Tensor) -> Tensor:
        return _Linear.apply(x, self)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, operator: TwoProducts) -> Tensor:
        ctx.operator = operator
        return operator.forward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return ctx.operator.backward(grad), None


def reduce_product(matrix: Tensor, x: Tensor) -> Tensor:
    """torch.sparse.mm with its reduction kernel (CSR, CPU only)."""
    return torch.sparse.mm(matrix, x, "sum")


class ScipyTwoProducts:
    """The same with scipy, which runs on one core; forward only."""

    def __init__(self, h: scipy.sparse.csr_matrix) -> None:
        diagonal = np.asarray(h.multiply(h).sum(1)).ravel()
        inverse = _inverse(h @ np.asarray(h.sum(0)).ravel() - diagonal)
        self.scaled = (scipy.sparse.diags(inverse) @ h).tocsr().astype(np.float32)
        self.gather = h.T.tocsr().astype(np.float32)
        self.diagonal = (diagonal * inverse).astype(np.float32)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        x = x.numpy()
        return torch.from_numpy(self.scaled @ (self.gather @ x) - self.diagonal * x)


def index_add_row(index: Tensor, num_vertices: int, num_hyperedges: int):
    """D^-1 H B^-1 H^T x by gathering and index_add, from [2, nnz] vertices and hyperedges (PyG's formula)."""
    vertex, edge = index
    inverse_vertex, inverse_edge = (
        torch.bincount(ids, minlength=size).clamp(min=1).reciprocal().unsqueeze(1)
        for ids, size in ((vertex, num_vertices), (edge, num_hyperedges))
    )

    def run(x: Tensor) -> Tensor:
        joined = x.new_zeros(num_hyperedges, x.shape[1]).index_add(0, edge, x[vertex]) * inverse_edge
        return x.new_zeros(num_vertices, x.shape[1]).index_add(0, vertex, joined[edge]) * inverse_vertex

    return run


def pyg_conv(index: Tensor, dim: int, num_hyperedges: int):
    """PyTorch Geometric's HypergraphConv with the identity in place of its linear layer.

    Raises:
        ImportError: torch_geometric is not installed.
    """
    from torch_geometric.nn import HypergraphConv

    conv = HypergraphConv(dim, dim, bias=False)
    conv.lin = torch.nn.Identity()
    return lambda x: conv(x, index, num_edges=num_hyperedges)


def light_gcn(matrix: Tensor, user: Tensor, item: Tensor, num_layers: int) -> tuple[Tensor, Tensor]:
    """Mean of layers 0..num_layers of a sparse bipartite matrix product."""
    layers = [torch.cat([user, item])]
    for _ in range(num_layers):
        layers.append(torch.sparse.mm(matrix, layers[-1]))
    user_out, item_out = torch.stack(layers).mean(0).split([len(user), len(item)])
    return user_out, item_out


def _inverse(values) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64).ravel()
    return np.divide(1.0, values, out=np.zeros_like(values), where=values > 0)


# ---------------------------------------------------------------------------------------------- nearest neighbours


def knn_chunked(x: Tensor, k: int, chunk: int = 1024) -> tuple[Tensor, Tensor]:
    """Matrix product and topk by chunks of rows: indices [N, k] and cosines [N, k]."""
    unit = F.normalize(x)
    found = [torch.topk(unit[start : start + chunk] @ unit.T, k) for start in range(0, len(unit), chunk)]
    return torch.cat([part.indices for part in found]), torch.cat([part.values for part in found])


def knn_faiss(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """faiss IndexFlatIP over the normalised rows.

    Raises:
        ImportError: faiss is not installed.
    """
    import faiss

    unit = F.normalize(x).numpy()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    values, indices = index.search(unit, k)
    return torch.from_numpy(indices), torch.from_numpy(values)


# -------------------------------------------------------------------------------------------------------- sampling


class LoopSampler:
    """Training triples drawn in a Python loop: distinct users, a positive of each, a negative by rejection.

    Args:
        draw: [0, high) integers. The published loaders draw each through `numpy.random.randint(0, high, size=1)[0]`,
            the default; `random.randrange` is the fast form.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, num_items: int, batch_size: int, draw=None) -> None:
        self.histories: dict[int, list[int]] = {}
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            self.histories.setdefault(user, []).append(item)
        self.users, self.num_items, self.batch_size = list(self.histories), num_items, batch_size
        self.draw = draw or (lambda high: int(np.random.randint(low=0, high=high, size=1)[0]))

    def sample(self) -> tuple[list[int], list[int], list[int]]:
        users = random.sample(self.users, min(self.batch_size, len(self.users)))
        positives, negatives = [], []
        for user in users:
            history = self.histories[user]
            positives.append(history[self.draw(len(history))])
            while True:
                negative = self.draw(self.num_items)
                if negative not in history:
                    break
            negatives.append(negative)
        return users, positives, negatives
