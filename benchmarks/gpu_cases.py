"""What `benchmarks.gpu` measures: the operators on every usable backend beside the forms others offer.

Torch only: a GPU machine may have nothing else. N = rows, D = columns, V = vertices, M = hyperedges.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks import inputs
from hellm import ops
from hellm.hypergraph import Hypergraph, user_hypergraph
from hellm.ops import _backends, reference

DIM = 64
_PUBLISHED_USERS = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
# float64 truth needs the similarities by blocks in double precision; beyond this it takes longer than the measuring.
_MOST_ROWS_WITH_TRUTH = 40_000

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One implementation; `tolerance` is its largest error relative to the largest true value."""

    label: str
    run: Run
    tolerance: float = 1e-4
    hellm: bool = False


@dataclass
class Case:
    """Implementations of the same work, in `unit`s; `truth` is the float64 result, if any; `graph`: capture ours."""

    entries: list[Entry]
    work: float
    unit: str = "FLOP"
    truth: list[Tensor] | None = None
    graph: bool = False
    parameters: dict[str, object] = field(default_factory=dict)


def cases(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and builders, the most important first."""
    small = partial(min, 70) if smoke else (lambda n: n)
    yield "ceiling-copy", partial(_copy, device, smoke)
    yield "ceiling-matmul", partial(_matmul, device, smoke)
    for num_rows in (35_598, 10_000):
        yield f"info_nce-{num_rows}", partial(_info_nce, device, small(num_rows), DIM, 0.2)
    for layers, passes in ((1, 1), (2, 2)):
        yield f"conv-sports-{layers}", partial(_conv, device, "tiny" if smoke else "sports", layers, passes)
    yield "propagate-sports", partial(_propagate, device, "tiny" if smoke else "sports")
    yield "info_nce-100000", partial(_info_nce, device, small(100_000), DIM, 0.2)
    yield "info_nce-50000", partial(_info_nce, device, small(50_000), DIM, 0.2)
    yield "conv-large", partial(_conv_large, device, smoke)
    for num_rows, num_items in ((12_800, 12_101), (4_096, 100_000)):
        yield f"item_cross_entropy-{num_items}", partial(_item_cross_entropy, device, small(num_rows), small(num_items))
    yield "knn-18357x4096", partial(_knn, device, small(18_357), 16 if smoke else 4096)
    yield "knn-100000x128", partial(_knn, device, small(100_000), 16 if smoke else 128)
    yield "conv-sports-bfloat16", partial(_conv, device, "tiny" if smoke else "sports", 1, 1, torch.bfloat16)
    yield "conv-tiktok-3", partial(_conv, device, "tiny" if smoke else "tiktok", 3, 1)
    for dim in (128, 256):
        yield f"info_nce-d{dim}", partial(_info_nce, device, small(18_357), dim, 0.2)
    for temperature in (0.05, 1.0):
        yield f"info_nce-t{temperature}", partial(_info_nce, device, small(18_357), DIM, temperature)


def usable_backends(device: torch.device) -> list[str]:
    """Backends that can run there, plain torch last; those in question are asked for by name."""
    return [name for name in _backends.BACKENDS if _backends.unusable(name, device) is None]


def on(backend: str, function: Callable, *arguments, **settings) -> Callable:
    """A call under an explicit backend."""

    def run(*more):
        with ops.backend(backend):
            return function(*arguments, *more, **settings)

    return run


def gradients(function: Callable, leaves: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Run:
    """Outputs and the gradients in the leaves."""

    def run() -> Sequence[Tensor]:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        return [*found, *torch.autograd.grad(found, leaves, cotangents)]

    return run


def one_output(function: Callable, place: int | None = None) -> Run:
    """The output, or the one at a place, as a list."""
    return lambda: [function() if place is None else function()[place]]


# ---------------------------------------------------------------------------------------------------- ceilings


def _copy(device: torch.device, smoke: bool) -> Case:
    source = torch.ones((2**16 if smoke else 2**30) // 4, device=device)
    target = torch.empty_like(source)
    return Case([Entry("copy_", lambda: (target.copy_(source)[:1],))], 2.0 * source.nbytes, "byte")


def _matmul(device: torch.device, smoke: bool) -> Case:
    size = 64 if smoke else 8192
    entries = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        entries.append(Entry(f"torch.mm {dtype}", lambda left=left, right=right: (left @ right,)))
    return Case(entries, 2.0 * size**3, parameters={"size": size})


# ------------------------------------------------------------------------------------------------------ InfoNCE


def _unit_views(anchor: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    return F.normalize(anchor), F.normalize(positive)


def published(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The published loss in eager torch; autograd keeps every block of exponentials."""
    first, second = _unit_views(anchor, positive)
    losses = [_published_block(first, second, start, chunk, temperature) for start in range(0, len(first), chunk)]
    return torch.cat(losses).mean()


def checkpointed(anchor: Tensor, positive: Tensor, temperature: float, chunk: int = 4096) -> Tensor:
    """The same with every block recomputed in backward: the low-memory form without new kernels."""
    first, second = _unit_views(anchor, positive)
    losses = [
        checkpoint(_published_block, first, second, start, chunk, temperature, use_reentrant=False)
        for start in range(0, len(first), chunk)
    ]
    return torch.cat(losses).mean()


def _published_block(first: Tensor, second: Tensor, start: int, chunk: int, temperature: float) -> Tensor:
    within = torch.exp(first[start : start + chunk] @ first.T / temperature)
    across = torch.exp(first[start : start + chunk] @ second.T / temperature)
    own = across.diagonal(start)
    return -torch.log(own / (within.sum(1) + across.sum(1) - within.diagonal(start)))


def unbatched(anchor: Tensor, positive: Tensor, temperature: float) -> Tensor:
    """All rows at once, for torch.compile."""
    return _published_block(*_unit_views(anchor, positive), 0, len(anchor), temperature).mean()


def composite(anchor: Tensor, positive: Tensor, temperature: float) -> Sequence[Tensor]:
    """Loss and gradients from two calls of torch's own attention: the strongest stock form.

    Attention of the anchors over [u; v] with log-sum-exp gives the row side; a second one with a bias for each key,
    folded into extra columns, the key side. Its sums hold the diagonal, which is taken out again afterwards.
    """
    with torch.no_grad():
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        u, v = anchor / norms[0], positive / norms[1]
        half, scale = torch.float16, 1.0 / temperature
        count = len(u)

        def attend(query, key, value):
            out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                *(t.to(half)[None, None] for t in (query, key, value)), 0.0, False, False, scale=scale
            )
            return out[0, 0].float(), lse[0, 0]

        keys = torch.cat([u, v])
        mean, lse = attend(u, keys, keys)
        aligned = (u * v).sum(1)
        # Out with the two diagonals: share of the own anchor (similarity 1) and of the positive.
        own, other = torch.exp(scale - lse), torch.exp(aligned * scale - lse)
        rest = (1 - own - other).clamp_min(1e-12)
        mean = (mean - own[:, None] * u - other[:, None] * v) / rest[:, None]
        lse = lse + rest.log()
        margin = lse - aligned * scale
        weight = torch.sigmoid(margin) / count
        # Un-normalised weights exp(s / t) w_j / exp(lse_j): the bias is a column of the keys against ones.
        bias = (weight.log() - lse) * temperature
        pad = u.new_zeros(count, 7)
        keys_and_bias = torch.cat([u, bias[:, None], pad], 1)
        queries = torch.cat([keys, keys.new_ones(2 * count, 1), keys.new_zeros(2 * count, 7)], 1)
        spread, total = attend(queries, keys_and_bias, torch.cat([u, pad, pad[:, :1]], 1))
        spread = spread[:, : u.shape[1]] * torch.exp(total)[:, None]
        spread[:count] -= (torch.exp(scale - lse) * weight)[:, None] * u
        spread[count:] -= (torch.exp(aligned * scale - lse) * weight)[:, None] * u
        grads = []
        for grad, unit, norm in (
            (weight[:, None] * (mean - v) + spread[:count], u, norms[0]),
            (spread[count:] - weight[:, None] * u, v, norms[1]),
        ):
            grads.append((grad - (grad * unit).sum(1, keepdim=True) * unit) * scale / norm)
        return [F.softplus(margin).mean(), *grads]


def _info_nce(device: torch.device, num_rows: int, dim: int, temperature: float) -> Case:
    views = [t.detach().to(device).requires_grad_() for t in inputs.views(num_rows, dim)]
    truth = None
    if num_rows <= _MOST_ROWS_WITH_TRUTH:
        row_grad = torch.full((num_rows,), 1.0 / num_rows, dtype=torch.float64, device=device)
        t = torch.tensor(temperature, dtype=torch.float64, device=device)
        loss, *grads, _ = reference.info_nce_with_gradients(
            *(v.detach().double() for v in views), t, None, row_grad, True, "highest"
        )
        truth = [loss.mean(), *grads]
    entries = []
    for precision, tolerance in (("high", 2e-3), ("highest", 2e-5)):
        for backend in usable_backends(device):
            call = on(backend, lambda a, p, q=precision: ops.info_nce(a, p, temperature, precision=q))
            label = f"hellm {backend}, {precision}"
            entries.append(Entry(label, gradients(call, views, (None,)), tolerance, hellm=backend != "torch"))
    entries.append(Entry("two flash attentions (float16)", lambda: composite(*views, temperature), 5e-2))
    if truth is not None and (dim, temperature) == (DIM, 0.2):  # compiling takes a minute
        entries.append(Entry("torch.compile, unbatched", _compiled(unbatched, views, temperature), 1e-3))
    for label, function in (("published, chunks of 4096", published), ("chunks checkpointed", checkpointed)):
        call = partial(function, temperature=temperature)
        entries.append(Entry(label, gradients(call, views, (None,)), 1e-3))
    parameters = {"N": num_rows, "D": dim, "temperature": temperature, "budget_bytes": 6 * num_rows * dim * 4}
    return Case(entries, 16.0 * num_rows**2 * dim, truth=truth, graph=True, parameters=parameters)


def _compiled(function: Callable, views: Sequence[Tensor], temperature: float) -> Run:
    compiled = torch.compile(function)
    return gradients(lambda *leaves: compiled(*leaves, temperature), views, (None,))


# ----------------------------------------------------------------------------------------- hypergraph convolution


def _csr(matrix: Tensor, index_dtype: torch.dtype = torch.int32) -> Tensor:
    csr = matrix.to_sparse_csr()
    index = (part.to(index_dtype) for part in (csr.crow_indices(), csr.col_indices()))
    return torch.sparse_csr_tensor(*index, csr.values(), size=csr.shape)


class TwoProducts(torch.autograd.Function):
    """D^-1 (H H^T - diag) x by two cached CSR products, their transposes cached too, scales folded in."""

    @staticmethod
    def forward(ctx, x: Tensor, matrices: tuple[Tensor, ...]) -> Tensor:
        ctx.matrices = matrices
        scaled, gather, _, _, diagonal = matrices
        return (scaled @ (gather @ x)).addcmul_(x, diagonal, value=-1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        _, _, spread, gather_scaled, diagonal = ctx.matrices
        return (spread @ (gather_scaled @ grad)).addcmul_(grad, diagonal, value=-1), None


def _published_matrices(index: Tensor, size: inputs.Size, device: torch.device):
    """The clique matrix in COO, and the factors for TwoProducts."""
    users, items = size[:2]
    h = torch.sparse_coo_tensor(index, torch.ones(index.shape[1], dtype=torch.float64), (users, items)).coalesce()
    degree = torch.bincount(index[0], minlength=users).double()
    row_sum = (h @ (h.T @ torch.ones(users, 1, dtype=torch.float64))).squeeze(1) - degree
    inverse = torch.where(row_sum > 0, 1 / row_sum, 0.0)
    scaled = torch.sparse_coo_tensor(h.indices(), h.values() * inverse[h.indices()[0]], h.shape).coalesce()
    square = torch.sparse.mm(h, h.T.coalesce()).coalesce()
    apart = square.indices()[0] != square.indices()[1]
    clique_index = square.indices()[:, apart]
    clique_values = square.values()[apart] * inverse[clique_index[0]]
    clique = torch.sparse_coo_tensor(clique_index, clique_values.float(), square.shape).coalesce().to(device)
    parts = [_csr(part.float().coalesce()).to(device) for part in (scaled, h.T.coalesce(), h, scaled.T.coalesce())]
    return clique, (*parts, (degree * inverse).float().unsqueeze(1).to(device))


def _conv(device: torch.device, size_name: str, layers: int, passes: int, dtype=torch.float32) -> Case:
    """One pass is forward alone, two are forward and backward."""
    size = inputs.SIZES[size_name]
    index = torch.from_numpy(inputs.interactions(size))
    graph = user_hypergraph(index, size.num_users, size.num_items).to(device)
    x = inputs.rows(size.num_users, DIM).to(device=device, dtype=dtype).requires_grad_(passes == 2)
    cotangent = inputs.rows(size.num_users, DIM, seed=1).to(device=device, dtype=dtype)
    clique, factors = _published_matrices(index, size, device)

    def repeated(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            for _ in range(layers):
                x = layer(x)
            return x

        return run

    def entry(label: str, function: Callable[[Tensor], Tensor], **settings) -> Entry:
        run = gradients(function, (x,), (cotangent,)) if passes == 2 else (lambda: (function(x),))
        return Entry(label, run, 1e-4 if dtype == torch.float32 else 3e-2, **settings)

    def conv(x: Tensor, graph: Hypergraph = graph) -> Tensor:
        return ops.hypergraph_conv(x, graph, num_layers=layers, **_PUBLISHED_USERS)

    wide = x.detach().double().requires_grad_(passes == 2)
    with ops.backend("torch"):
        truth = gradients(conv, (wide,), (cotangent.double(),))() if passes == 2 else [conv(wide)]
    entries = [entry(f"hellm {name}", on(name, conv), hellm=name != "torch") for name in usable_backends(device)]
    if dtype == torch.float32:
        entries.append(entry("two cached CSR products, int32", repeated(lambda x: TwoProducts.apply(x, factors))))
        entries.append(entry("published, clique COO", repeated(lambda x: torch.sparse.mm(clique, x))))
    work = 2.0 * passes * layers * graph.num_incidences * DIM * x.element_size()
    parameters = {"V": size.num_users, "M": size.num_items, "nnz": graph.num_incidences, "layers": layers, "D": DIM}
    parameters |= {"passes": passes, "dtype": str(dtype), "clique_nnz": clique._nnz()}
    case = Case(entries, work, "byte", [t.detach() for t in truth], True, parameters)
    if dtype == torch.float32 and layers == 1:
        case.entries += _pyg(index.to(device), x, size)
    return case


def _pyg(index: Tensor, x: Tensor, size: inputs.Size) -> list[Entry]:
    """PyG's layer, if it is installed: another normalisation, so its result is not compared."""
    try:
        from torch_geometric.nn import HypergraphConv
    except ImportError:
        return []
    conv = HypergraphConv(DIM, DIM, bias=False)
    conv.lin = torch.nn.Identity()
    return [Entry("torch_geometric HypergraphConv", lambda: (conv(x, index, num_edges=size.num_items),), float("inf"))]


def _conv_large(device: torch.device, smoke: bool) -> Case:
    """A million vertices, half a million hyperedges, twenty million incidences, one hyperedge of 50,000 vertices."""
    num_vertices, num_hyperedges, nnz, hub = (300, 50, 900, 200) if smoke else (10**6, 5 * 10**5, 2 * 10**7, 50_000)
    generator = torch.Generator().manual_seed(0)
    vertex = torch.randint(num_vertices, (nnz,), generator=generator)
    edge = (torch.rand(nnz, generator=generator) ** 2 * num_hyperedges).long()
    index = torch.stack([torch.cat([vertex, torch.arange(hub)]), torch.cat([edge, torch.zeros(hub).long()])])
    graph = Hypergraph(index, num_vertices=num_vertices, num_hyperedges=num_hyperedges).to(device)
    x = inputs.rows(num_vertices, DIM).to(device)
    with ops.backend("torch"):
        truth = [ops.hypergraph_conv(x, graph)]
    conv = partial(ops.hypergraph_conv, x, graph)
    entries = [
        Entry(f"hellm {name}", one_output(on(name, conv)), 1e-4, hellm=name != "torch")
        for name in usable_backends(device)
    ]
    parameters = {"V": num_vertices, "M": num_hyperedges, "nnz": graph.num_incidences, "hub": hub, "D": DIM}
    return Case(entries, 2.0 * graph.num_incidences * DIM * 4, "byte", [truth[0].double()], True, parameters)


def _propagate(device: torch.device, size_name: str) -> Case:
    size = inputs.SIZES[size_name]
    index = torch.from_numpy(inputs.interactions(size))
    graph = user_hypergraph(index, size.num_users, size.num_items).to(device)
    tables = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate(size[:2])]
    cotangents = [inputs.rows(n, DIM, seed + 2).to(device) for seed, n in enumerate(size[:2])]

    def propagate(user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return ops.bipartite_propagate(user, item, graph, num_layers=2)

    wide = [t.detach().double().requires_grad_() for t in tables]
    with ops.backend("torch"):
        truth = gradients(propagate, wide, [t.double() for t in cotangents])()
    entries = [
        Entry(f"hellm {name}", gradients(on(name, propagate), tables, cotangents), hellm=name != "torch")
        for name in usable_backends(device)
    ]
    work = 8.0 * graph.num_incidences * DIM * 4
    return Case(entries, work, "byte", [t.detach() for t in truth], True, {"nnz": graph.num_incidences, "layers": 2})


# ------------------------------------------------------------------------------- item cross-entropy, neighbours


def at_precision(precision: str, run: Run) -> Run:
    """Under a float32 matmul precision of torch, which its products and the operators without an argument follow."""

    def set_and_run() -> Sequence[Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return set_and_run


def _item_cross_entropy(device: torch.device, num_rows: int, num_items: int) -> Case:
    leaves = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate((num_rows, num_items))]
    target = torch.randint(num_items, (num_rows,), generator=torch.Generator().manual_seed(0)).to(device)

    def eager(hidden: Tensor, items: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ items.T, target)

    def fused(hidden: Tensor, items: Tensor) -> Tensor:
        return ops.item_cross_entropy(hidden, items, target)

    truth = gradients(eager, [t.detach().double().requires_grad_() for t in leaves], (None,))()
    compiled = torch.compile(eager)
    entries = []
    for precision, tolerance in (("high", 2e-2), ("highest", 2e-4)):
        for name in usable_backends(device):
            run = at_precision(precision, gradients(on(name, fused), leaves, (None,)))
            entries.append(Entry(f"hellm {name}, {precision}", run, tolerance, hellm=name != "torch"))
        for label, function in (("F.cross_entropy(h @ e.T)", eager), ("the same, torch.compile", compiled)):
            if function is eager or device.type == "cuda":  # compiling takes a minute
                run = at_precision(precision, gradients(function, leaves, (None,)))
                entries.append(Entry(f"{label}, {precision}", run, tolerance))
    work = 6.0 * num_rows * num_items * DIM
    return Case(entries, work, truth=[t.detach() for t in truth], parameters={"N": num_rows, "I": num_items, "D": DIM})


def _knn(device: torch.device, num_rows: int, dim: int, k: int = 10) -> Case:
    x = inputs.rows(num_rows, dim).to(device)

    def chunked(dtype: torch.dtype) -> Sequence[Tensor]:
        unit = F.normalize(x).to(dtype)
        blocks = range(0, num_rows, 4096)
        return [torch.cat([(unit[i : i + 4096] @ unit.T).topk(k).values for i in blocks]).float()]

    truth = []
    for part in F.normalize(x.double()).split(1024) if num_rows <= _MOST_ROWS_WITH_TRUTH else ():
        truth.append((part @ F.normalize(x.double()).T).topk(k).values)
    entries = [
        Entry(f"hellm {name}", one_output(on(name, ops.knn, x, k), 1), 1e-5, hellm=name != "torch")
        for name in usable_backends(device)
        if name not in ("torch", "triton")  # they store the similarities of all pairs
    ]
    entries.append(Entry("torch mm + topk, chunks of 4096", partial(chunked, torch.float32), 1e-5))
    entries.append(Entry("the same in TF32", at_precision("high", partial(chunked, torch.float32)), 5e-3))
    entries.append(Entry("the same in float16, not exact", partial(chunked, torch.float16), 5e-3))
    parameters = {"N": num_rows, "D": dim, "k": k}
    return Case(entries, 2.0 * num_rows**2 * dim, truth=[torch.cat(truth)] if truth else None, parameters=parameters)
