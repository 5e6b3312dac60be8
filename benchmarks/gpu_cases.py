"""What `benchmarks.gpu` measures: the operators on every usable backend beside the forms others offer.

Torch only: a GPU machine may have nothing else. N = rows, D = columns, V = vertices, M = hyperedges.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.checkpoint import checkpoint

from benchmarks import inputs
from hellm import ops
from hellm.config import PRESETS, PretrainConfig
from hellm.hypergraph import Hypergraph, user_hypergraph
from hellm.ops import _backends, _gpu, reference

DIM = 64
_PUBLISHED_USERS = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
# In this order: what the time must suffice for comes first, what needs minutes of compiling last.
_KINDS = ("native", "cuda", "peer", "triton", "torch", "compile", "nvrtc")
# The largest pads that torch's attentions take: width 256.
_WIDEST_ATTENTION = 256
_GATHER, _LARGE_GATHER = ("ceiling-gather", "sports"), ("ceiling-gather", "large")
_PRODUCT = ("ceiling-matmul", "float16")

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One implementation: `kind` is a backend of ours, "peer", or "compile" for a peer that torch.compile makes.

    `tolerance` is its largest error relative to the largest true value.
    """

    label: str
    run: Run
    tolerance: float = 1e-4
    kind: str = "peer"

    @property
    def hellm(self) -> bool:
        """Whether it runs a kernel of ours."""
        return self.kind in _backends.GPU_BACKENDS or self.kind == "native"


@dataclass
class Case:
    """Implementations of the same work, in `unit`s; entries come out in the order of their kinds.

    `truth` is the float64 result, if any; `graph`: capture them as CUDA graphs too; `ceiling`: the case and entry whose
    rate is the limit.
    """

    entries: list[Entry]
    work: float
    unit: str = "FLOP"
    truth: list[Tensor] | None = None
    graph: bool = True
    ceiling: tuple[str, str] | None = None
    parameters: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries.sort(key=lambda entry: _KINDS.index(entry.kind))


def cases(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and builders, the most important first. "nvrtc" compiles the text of "cuda": once for each operator."""
    small = partial(min, 70) if smoke else (lambda n: n)
    sports, tiktok = ("tiny", "tiny") if smoke else ("sports", "tiktok")
    yield "ceiling-copy", partial(_copy, device, smoke)
    yield "ceiling-matmul", partial(_matmul, device, smoke)
    yield "ceiling-gather", partial(_gather, device, smoke)
    for num_rows in (35_598, 10_000):
        nvrtc = num_rows == 35_598
        yield f"info_nce-{num_rows}", partial(_info_nce, device, small(num_rows), DIM, 0.2, nvrtc=nvrtc)
    for layers, passes in ((1, 1), (2, 2)):
        yield f"conv-sports-{layers}", partial(_conv, device, sports, layers, passes, nvrtc=layers == 1)
    yield "propagate-sports", partial(_propagate, device, sports)
    yield "info_nce-100000", partial(_info_nce, device, small(100_000), DIM, 0.2)
    yield f"step-{sports}", partial(_step, device, sports)
    yield "info_nce-50000", partial(_info_nce, device, small(50_000), DIM, 0.2)
    yield "conv-large", partial(_conv_large, device, smoke)
    for num_rows, num_items in ((12_800, 12_101), (4_096, 100_000)):
        build = partial(_item_cross_entropy, device, small(num_rows), small(num_items), nvrtc=num_rows == 12_800)
        yield f"item_cross_entropy-{num_items}", build
    yield "knn-18357x4096", partial(_knn, device, small(18_357), 16 if smoke else 4096, nvrtc=True)
    yield "knn-100000x128", partial(_knn, device, small(100_000), 16 if smoke else 128)
    yield "conv-pyg", partial(_conv_pyg, device, sports)
    yield "conv-sports-bfloat16", partial(_conv, device, sports, 1, 1, torch.bfloat16)
    yield "conv-tiktok-3", partial(_conv, device, tiktok, 3, 1)
    for dim in (128, 256):
        yield f"info_nce-d{dim}", partial(_info_nce, device, small(18_357), dim, 0.2)
    for temperature in (0.05, 1.0):
        yield f"info_nce-t{temperature}", partial(_info_nce, device, small(18_357), DIM, temperature)


def usable_backends(device: torch.device, nvrtc: bool = False) -> list[str]:
    """Backends that can run there, plain torch last; those in question are asked for by name."""
    names = [name for name in _backends.BACKENDS if _backends.unusable(name, device) is None]
    return [name for name in names if nvrtc or name != "nvrtc"]


def most_rows_with_truth(device: torch.device) -> int:
    """Beyond this, all pairs in float64 take longer than the measuring."""
    return 200_000 if device.type == "cuda" else 40_000


def on(backend: str, function: Callable, *arguments, **settings) -> Callable:
    """A call under an explicit backend."""

    def run(*more):
        with ops.backend(backend):
            return function(*arguments, *more, **settings)

    return run


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


def gradients(function: Callable, leaves: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Run:
    """Outputs and the gradients in the leaves."""

    def run() -> Sequence[Tensor]:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        return [*found, *torch.autograd.grad(found, leaves, cotangents)]

    return run


def compiled(function: Callable) -> Callable:
    """torch.compile at the first call, for the shapes of that call and with nothing left of earlier ones."""
    made: list[Callable] = []

    def call(*arguments):
        if not made:
            torch._dynamo.reset()
            made.append(torch.compile(function, dynamic=False))
        return made[0](*arguments)

    return call


# ---------------------------------------------------------------------------------------------------- ceilings


def _copy(device: torch.device, smoke: bool) -> Case:
    """A gigabyte through memory; 8 MiB over and over, which stay in the second-level cache."""
    num_bytes = 2**16 if smoke else 2**30
    entries = []
    for label, size in (("copy_", num_bytes), ("copy_ in L2", min(num_bytes, 2**23))):
        source = torch.ones(size // 4, device=device)
        target = torch.empty_like(source)
        times = max(1, num_bytes // source.nbytes)

        def run(source: Tensor = source, target: Tensor = target, times: int = times) -> Sequence[Tensor]:
            for _ in range(times):
                target.copy_(source)
            return (target[:1],)

        entries.append(Entry(label, run))
    return Case(entries, 2.0 * num_bytes, "byte", graph=False)


def _matmul(device: torch.device, smoke: bool) -> Case:
    size = 64 if smoke else 8192
    entries = []
    for label, dtype in (("float16", torch.float16), ("bfloat16", torch.bfloat16), ("TF32", torch.float32)):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        run = lambda left=left, right=right: (left @ right,)  # noqa: E731
        entries.append(Entry(label, at_precision("high", run)))
    entries.append(Entry("float32", at_precision("highest", run)))
    return Case(entries, 2.0 * size**3, graph=False, parameters={"size": size})


def _gather(device: torch.device, smoke: bool) -> Case:
    """Rows read in random order and written in a row: what the convolutions cannot do without."""
    entries, count = [], 300 if smoke else 2**22
    for label, num_rows in (("sports", 35_598), ("large", 10**6)):
        x = inputs.rows(min(num_rows, count), DIM).to(device)
        index = inputs.indices(count, len(x)).to(device)
        out = x.new_empty(count, DIM)
        entries.append(Entry(label, lambda x=x, i=index, out=out: (torch.index_select(x, 0, i, out=out)[:1],)))
    return Case(entries, 2.0 * count * DIM * 4, "byte", graph=False, parameters={"rows": count, "D": DIM})


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


def flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """FlashAttention-2 in float16: [Q, D], [K, D], [K, D] -> output [Q, D] float32, log-sum-exp [Q] float32."""
    parts = (t.half()[None, None] for t in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(*parts, 0.0, False, False, scale=scale)
    return out[0, 0].float(), lse[0, 0]


def cudnn_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same by cuDNN, which has a kernel for Hopper."""
    parts = (t.half()[None, None] for t in (query, key, value))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(*parts, None, True, 0.0, False, scale=scale)
    return out[0, 0].float(), lse.reshape(-1)


def composite(anchor: Tensor, positive: Tensor, temperature: float, attend: Callable) -> Sequence[Tensor]:
    """Loss and gradients from two calls of torch's own attention: the strongest stock form.

    Attention of the anchors over [u; v] with log-sum-exp gives the row side; a second one with a bias for each key,
    folded into extra columns, the key side. Its sums hold the diagonal, which is taken out again afterwards.
    """
    with torch.no_grad():
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        u, v = anchor / norms[0], positive / norms[1]
        count, scale = len(u), 1.0 / temperature
        keys = torch.cat([u, v])
        mean, lse = attend(u, keys, keys, scale)
        aligned = (u * v).sum(1)
        # Out with the two diagonals: share of the own anchor (similarity 1) and of the positive.
        own, other = torch.exp(scale - lse), torch.exp(aligned * scale - lse)
        rest = (1 - own - other).clamp_min(1e-12)
        mean = (mean - own[:, None] * u - other[:, None] * v) / rest[:, None]
        lse = lse + rest.log()
        margin = lse - aligned * scale
        weight = torch.sigmoid(margin) / count
        # Un-normalised weights exp(s / t) w_j / exp(lse_j): the bias is two columns of the keys against ones, its
        # float16 value and what that leaves.
        bias = (weight.log() - lse) * temperature
        high = bias.half().float()
        keys_and_bias = torch.cat([u, torch.stack([high, bias - high], 1), u.new_zeros(count, 6)], 1)
        queries = torch.cat([keys, keys.new_ones(2 * count, 2), keys.new_zeros(2 * count, 6)], 1)
        spread, total = attend(queries, keys_and_bias, F.pad(u, (0, 8)), scale)
        spread = spread[:, : u.shape[1]] * torch.exp(total)[:, None]
        spread[:count] -= (torch.exp(scale - lse) * weight)[:, None] * u
        spread[count:] -= (torch.exp(aligned * scale - lse) * weight)[:, None] * u
        return _loss_and_gradients((u, v), norms, scale, margin, weight, mean, spread)


def flex_composite(anchor: Tensor, positive: Tensor, temperature: float) -> Sequence[Tensor]:
    """The same by FlexAttention, which leaves the diagonals out and adds the bias itself; for torch.compile."""
    with torch.no_grad():
        norms = [z.norm(dim=1, keepdim=True) for z in (anchor, positive)]
        u, v = anchor / norms[0], positive / norms[1]
        count, scale = len(u), 1.0 / temperature
        keys = torch.cat([u, v])
        half_u, half_keys = (t.half()[None, None] for t in (u, keys))

        def apart(score, batch, head, query, key):
            return torch.where(key % count == query, float("-inf"), score)

        mean, lse = flex_attention(half_u, half_keys, half_keys, score_mod=apart, scale=scale, return_lse=True)
        mean, lse = mean[0, 0].float(), lse[0, 0]
        margin = lse - (u * v).sum(1) * scale
        weight = torch.sigmoid(margin) / count
        bias = weight.log() - lse

        def apart_with_bias(score, batch, head, query, key):
            return torch.where(query % count == key, float("-inf"), score + bias[key])

        spread, total = flex_attention(
            half_keys, half_u, half_u, score_mod=apart_with_bias, scale=scale, return_lse=True
        )
        spread = spread[0, 0].float() * torch.exp(total[0, 0])[:, None]
        return _loss_and_gradients((u, v), norms, scale, margin, weight, mean, spread)


def _loss_and_gradients(units, norms, scale, margin, weight, mean, spread) -> Sequence[Tensor]:
    """From the mean key of each anchor and what every anchor spreads over each key [2N, D]."""
    (u, v), count = units, len(units[0])
    grads = []
    for grad, unit, norm in (
        (weight[:, None] * (mean - v) + spread[:count], u, norms[0]),
        (spread[count:] - weight[:, None] * u, v, norms[1]),
    ):
        grads.append((grad - (grad * unit).sum(1, keepdim=True) * unit) * scale / norm)
    return [F.softplus(margin).mean(), *grads]


def in_bfloat16(run: Run) -> Run:
    """Under autocast."""

    def cast_and_run() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run()

    return cast_and_run


# What stock products of float32 rows can be told to do.
_PRECISIONS: tuple[tuple[str, Callable[[Run], Run]], ...] = (
    ("float32", partial(at_precision, "highest")),
    ("TF32", partial(at_precision, "high")),
    ("bfloat16", in_bfloat16),
)


def _info_nce(device: torch.device, num_rows: int, dim: int, temperature: float, nvrtc: bool = False) -> Case:
    views = [t.detach().to(device).requires_grad_() for t in inputs.views(num_rows, dim)]
    truth = None
    if num_rows <= most_rows_with_truth(device):
        row_grad = torch.full((num_rows,), 1.0 / num_rows, dtype=torch.float64, device=device)
        t = torch.tensor(temperature, dtype=torch.float64, device=device)
        loss, *grads, _ = reference.info_nce_with_gradients(
            *(v.detach().double() for v in views), t, None, row_grad, True, "highest"
        )
        truth = [loss.mean(), *grads]
    entries = []
    for precision, tolerance in (("high", 2e-3), ("highest", 2e-5)):
        for backend in usable_backends(device, nvrtc):
            # Wider rows go to plain torch, which has one precision.
            if (backend in _backends.GPU_BACKENDS and dim > _gpu._MOST_COLUMNS[precision == "highest"]) or (
                backend == "torch" and precision == "high"
            ):
                continue
            call = on(backend, lambda a, p, q=precision: ops.info_nce(a, p, temperature, precision=q))
            label = "hellm torch" if backend == "torch" else f"hellm {backend}, {precision}"
            entries.append(Entry(label, gradients(call, views, (None,)), tolerance, backend))
    if dim + 8 <= _WIDEST_ATTENTION:
        for label, attend in (("flash", flash_attention), ("cuDNN", cudnn_attention)):
            run = partial(composite, *views, temperature, attend)
            entries.append(Entry(f"two {label} attentions (float16)", run, 2e-3))
    run = partial(compiled(partial(flex_composite, temperature=temperature)), *views)
    entries.append(Entry("two FlexAttentions (float16)", run, 2e-3, "compile"))
    for label, function in (("published, chunks of 4096", published), ("chunks checkpointed", checkpointed)):
        for name, at in _PRECISIONS:
            run = at(gradients(partial(function, temperature=temperature), views, (None,)))
            entries.append(Entry(f"{label}, {name}", run, 2e-3))
    if num_rows <= 40_000 and (dim, temperature) == (DIM, 0.2):  # all pairs at once
        for name, at in _PRECISIONS:
            run = at(gradients(compiled(partial(unbatched, temperature=temperature)), views, (None,)))
            entries.append(Entry(f"torch.compile, unbatched, {name}", run, 2e-3, "compile"))
    parameters = {"N": num_rows, "D": dim, "temperature": temperature, "budget_bytes": 6 * num_rows * dim * 4}
    return Case(entries, 16.0 * num_rows**2 * dim, truth=truth, ceiling=_PRODUCT, parameters=parameters)


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


@functools.lru_cache(maxsize=1)
def _interactions(size_name: str, device: torch.device) -> tuple[Tensor, Hypergraph]:
    size = inputs.SIZES[size_name]
    index = torch.from_numpy(inputs.interactions(size))
    return index, user_hypergraph(index, size.num_users, size.num_items).to(device)


@functools.lru_cache(maxsize=1)
def _published_matrices(size_name: str, device: torch.device):
    """The clique matrix in COO, and the factors for TwoProducts."""
    (users, items), index = inputs.SIZES[size_name][:2], _interactions(size_name, device)[0]
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


def _conv(
    device: torch.device, size_name: str, layers: int, passes: int, dtype=torch.float32, nvrtc: bool = False
) -> Case:
    """One pass is forward alone, two are forward and backward."""
    size, graph = inputs.SIZES[size_name], _interactions(size_name, device)[1]
    x = inputs.rows(size.num_users, DIM).to(device=device, dtype=dtype).requires_grad_(passes == 2)
    cotangent = inputs.rows(size.num_users, DIM, seed=1).to(device=device, dtype=dtype)

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
    entries = [entry(f"hellm {name}", on(name, conv), kind=name) for name in usable_backends(device, nvrtc)]
    if dtype == torch.float32:
        clique, factors = _published_matrices(size_name, device)
        entries.append(entry("two cached CSR products, int32", repeated(lambda x: TwoProducts.apply(x, factors))))
        entries.append(entry("published, clique COO", repeated(lambda x: torch.sparse.mm(clique, x))))
    work = 2.0 * passes * layers * graph.num_incidences * DIM * x.element_size()
    parameters = {"V": size.num_users, "M": size.num_items, "nnz": graph.num_incidences, "layers": layers, "D": DIM}
    parameters |= {"passes": passes, "dtype": str(dtype)}
    return Case(entries, work, "byte", [t.detach() for t in truth], ceiling=_GATHER, parameters=parameters)


def _conv_pyg(device: torch.device, size_name: str) -> Case:
    """Forward and backward of what PyG's layer computes without its weights, beside that layer."""
    size, (index, graph) = inputs.SIZES[size_name], _interactions(size_name, device)
    index = index.to(device)
    x = inputs.rows(size.num_users, DIM).to(device).requires_grad_()
    cotangent = inputs.rows(size.num_users, DIM, seed=1).to(device)
    conv = partial(ops.hypergraph_conv, hypergraph=graph, normalization="row")

    @functools.cache
    def layer() -> torch.nn.Module:
        from torch_geometric.nn import HypergraphConv

        made = HypergraphConv(DIM, DIM, bias=False)
        made.lin = torch.nn.Identity()
        return made.to(device)

    wide = x.detach().double().requires_grad_()
    with ops.backend("torch"):
        truth = gradients(conv, (wide,), (cotangent.double(),))()
    entries = [
        Entry(f"hellm {name}", gradients(on(name, conv), (x,), (cotangent,)), kind=name)
        for name in usable_backends(device)
    ]
    run = gradients(lambda x: layer()(x, index, num_edges=size.num_items), (x,), (cotangent,))
    entries.append(Entry("torch_geometric HypergraphConv", run))
    work, parameters = 4.0 * graph.num_incidences * DIM * 4, {"nnz": graph.num_incidences, "D": DIM}
    return Case(entries, work, "byte", [t.detach() for t in truth], ceiling=_GATHER, parameters=parameters)


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
        truth = [ops.hypergraph_conv(x.double(), graph)]
    conv = partial(ops.hypergraph_conv, x, graph)
    entries = [Entry(f"hellm {name}", on(name, lambda: [conv()]), kind=name) for name in usable_backends(device)]
    parameters = {"V": num_vertices, "M": num_hyperedges, "nnz": graph.num_incidences, "hub": hub, "D": DIM}
    work = 2.0 * graph.num_incidences * DIM * 4
    return Case(entries, work, "byte", truth, ceiling=_LARGE_GATHER, parameters=parameters)


def _propagate(device: torch.device, size_name: str) -> Case:
    size, graph = inputs.SIZES[size_name], _interactions(size_name, device)[1]
    tables = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate(size[:2])]
    cotangents = [inputs.rows(n, DIM, seed + 2).to(device) for seed, n in enumerate(size[:2])]

    def propagate(user: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        return ops.bipartite_propagate(user, item, graph, num_layers=2)

    wide = [t.detach().double().requires_grad_() for t in tables]
    with ops.backend("torch"):
        truth = gradients(propagate, wide, [t.double() for t in cotangents])()
    entries = [
        Entry(f"hellm {name}", gradients(on(name, propagate), tables, cotangents), kind=name)
        for name in usable_backends(device, nvrtc=True)
    ]
    work, parameters = 8.0 * graph.num_incidences * DIM * 4, {"nnz": graph.num_incidences, "layers": 2}
    return Case(entries, work, "byte", [t.detach() for t in truth], ceiling=_GATHER, parameters=parameters)


def _step(device: torch.device, size_name: str) -> Case:
    """Forward, losses, backward and Adam of stage 1 with the published settings, beside the published code's step.

    The step size is too small to move a weight, so that every run does the same work.
    """
    from benchmarks.training_step import HellmStep, PublishedStep
    from hellm.training.samplers import TripleSampler

    config = PRESETS[PretrainConfig]["mmhcl-sports"]
    model = replace(config.model, modalities=None)
    config = replace(config, model=model, learning_rate=1e-30, device=str(device), capture=False)
    size = inputs.SIZES[size_name]
    dataset = inputs.synthetic_dataset(size, dim=8 if size_name == "tiny" else 128)
    batch_size = min(config.batch_size, size.num_interactions)
    triples = [TripleSampler(*dataset.pairs("train"), *size[:2], batch_size=batch_size).sample(0, 0)]
    like = HellmStep(config, dataset, triples)
    published = PublishedStep(config, dataset, triples, like)
    truth = [t.detach().double() for t in published()]
    entries = []
    for precision, tolerance in (("high", 2e-2), ("highest", 1e-3)):
        for name in usable_backends(device):
            step = copy.deepcopy(like)
            step.precision = precision
            entries.append(Entry(f"hellm {name}, {precision}", on(name, step), tolerance, name))
    entries.append(Entry("published: clique COO, losses over all pairs", published, 1e-3))
    rows = size.num_users**2 + size.num_items**2
    parameters = {"users": size.num_users, "items": size.num_items, "events": size.num_interactions}
    parameters |= {"D": config.model.embedding_dim, "batch": batch_size}
    return Case(entries, 12.0 * rows * config.model.embedding_dim, truth=truth, ceiling=_PRODUCT, parameters=parameters)


# ------------------------------------------------------------------------------- item cross-entropy, neighbours


def _item_cross_entropy(device: torch.device, num_rows: int, num_items: int, nvrtc: bool = False) -> Case:
    leaves = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate((num_rows, num_items))]
    target = torch.randint(num_items, (num_rows,), generator=torch.Generator().manual_seed(0)).to(device)

    def eager(hidden: Tensor, items: Tensor) -> Tensor:
        return F.cross_entropy(hidden @ items.T, target)

    def fused(hidden: Tensor, items: Tensor) -> Tensor:
        return ops.item_cross_entropy(hidden, items, target)

    truth = gradients(eager, [t.detach().double().requires_grad_() for t in leaves], (None,))()
    entries = []
    for precision, tolerance in (("high", 2e-2), ("highest", 2e-4)):
        for name in usable_backends(device, nvrtc):
            run = at_precision(precision, gradients(on(name, fused), leaves, (None,)))
            entries.append(Entry(f"hellm {name}, {precision}", run, tolerance, name))
    for name, at in _PRECISIONS:
        tolerance = 2e-4 if name == "float32" else 2e-2
        run = at(gradients(eager, leaves, (None,)))
        entries.append(Entry(f"F.cross_entropy(h @ e.T), {name}", run, tolerance))
        run = at(gradients(compiled(eager), leaves, (None,)))
        entries.append(Entry(f"the same, torch.compile, {name}", run, tolerance, "compile"))
    work, parameters = 6.0 * num_rows * num_items * DIM, {"N": num_rows, "I": num_items, "D": DIM}
    return Case(entries, work, truth=[t.detach() for t in truth], ceiling=_PRODUCT, parameters=parameters)


def _knn(device: torch.device, num_rows: int, dim: int, k: int = 10, nvrtc: bool = False) -> Case:
    x = inputs.rows(num_rows, dim).to(device)

    def chunked(dtype: torch.dtype) -> Sequence[Tensor]:
        unit = F.normalize(x).to(dtype)
        blocks = range(0, num_rows, 4096)
        return [torch.cat([(unit[i : i + 4096] @ unit.T).topk(k).values for i in blocks]).float()]

    wide, truth = F.normalize(x.double()), []
    for part in wide.split(1024) if num_rows <= most_rows_with_truth(device) else ():
        truth.append((part @ wide.T).topk(k).values)
    del wide
    entries = [
        Entry(f"hellm {name}", on(name, lambda: [ops.knn(x, k)[1]]), 1e-5, name)
        for name in usable_backends(device, nvrtc)
        if name not in ("torch", "triton")  # they store the similarities of all pairs
    ]
    exact = at_precision("highest", partial(chunked, torch.float32))
    entries.append(Entry("torch mm + topk, chunks of 4096", exact, 1e-5))
    entries.append(Entry("the same in TF32", at_precision("high", partial(chunked, torch.float32)), 5e-3))
    entries.append(Entry("the same in float16, not exact", partial(chunked, torch.float16), 5e-3))
    parameters = {"N": num_rows, "D": dim, "k": k}
    truth = [torch.cat(truth)] if truth else None
    return Case(entries, 2.0 * num_rows**2 * dim, truth=truth, ceiling=_PRODUCT, parameters=parameters)
