"""What `benchmarks.gpu` measures: the operators on every usable backend beside the forms others offer.

N = rows, D = columns, V = vertices, M = hyperedges.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import scipy.sparse
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention_peers, inputs, peers
from benchmarks.gpu_entries import PRECISIONS, Case, Entry, at_precision, compiled, gradients, on, usable_backends
from hellm import ops
from hellm.config import PRESETS, PretrainConfig
from hellm.graphs import item_hypergraph, user_hypergraph
from hellm.hypergraph import Hypergraph
from hellm.ops import reference
from hellm.ops.backends import GPU_BACKENDS
from hellm.ops.backends.gpu import MOST_COLUMNS

DIM = 64
_GATHER, _LARGE_GATHER = ("ceiling-gather", "sports"), ("ceiling-gather", "large")
_PRODUCT = ("ceiling-matmul", "float16")


def cases(device: torch.device, smoke: bool) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names and builders, the most important first. "nvrtc" compiles the text of "cuda": once for each operator."""
    small = partial(min, 70) if smoke else (lambda n: n)
    info_nce = lambda n, dim=DIM, t=0.2, **more: partial(_info_nce, device, small(n), dim, t, **more)  # noqa: E731
    conv = lambda name, *more, **settings: partial(_conv, device, name, smoke, *more, **settings)  # noqa: E731
    knn = lambda n, dim, k=10, **more: partial(_knn, device, small(n), small(dim), k, **more)  # noqa: E731
    yield "ceiling-copy", partial(_copy, device, smoke)
    yield "ceiling-matmul", partial(_matmul, device, smoke)
    yield "ceiling-gather", partial(_gather, device, smoke)
    yield "info_nce-35598", info_nce(35_598, nvrtc=True)
    yield "info_nce-10000", info_nce(10_000)
    yield "conv-sports-1", conv("sports", 1, 1, with_compile=True, nvrtc=True)
    yield "conv-sports-2", conv("sports", 2, 2, with_compile=True)
    yield "propagate-sports", partial(_propagate, device, smoke)
    yield "info_nce-100000", info_nce(100_000)
    yield "step-sports", partial(_step, device, "tiny" if smoke else "sports")
    yield "info_nce-50000", info_nce(50_000)
    yield "conv-large", conv("large", 1, 1)
    for num_rows, num_items in ((12_800, 12_101), (4_096, 100_000)):
        build = partial(_item_cross_entropy, device, small(num_rows), small(num_items), nvrtc=num_rows == 12_800)
        yield f"item_cross_entropy-{num_items}", build
    yield "knn-18357x4096", knn(18_357, 4_096, nvrtc=True)
    yield "knn-100000x128", knn(100_000, 128)
    yield "conv-pyg", partial(_conv_pyg, device, smoke)
    yield "conv-sports-bfloat16", conv("sports", 1, 1, dtype=torch.bfloat16)
    yield "conv-tiktok-3", conv("tiktok", 3, 1)
    for name in ("items-5", "items-10"):
        yield f"conv-{name}", conv(name, 2, 2)
    for dim in (128, 256):
        yield f"info_nce-d{dim}", info_nce(18_357, dim)
    for temperature in (0.05, 1.0):
        yield f"info_nce-t{temperature}", info_nce(18_357, t=temperature)
    for kind in inputs.VIEWS:
        if kind != "related":
            yield f"info_nce-{kind}", info_nce(18_357, kind=kind, every_peer=False)
    yield "info_nce-200000", info_nce(200_000, every_peer=False)
    yield "info_nce-2000", info_nce(2_000)
    yield "info_nce-d32", info_nce(18_357, 32)
    for name in ("middle", "empty", "singletons"):
        yield f"conv-{name}", conv(name, 1, 1)
    for dim in (1, 60, 128, 256):
        yield f"conv-sports-d{dim}", conv("sports", 1, 1, dim=dim)
    for num_rows, dim, k in ((6_710, 128, 5), (18_357, 1_024, 32), (50_000, 768, 10), (100_000, 4_096, 10)):
        yield f"knn-{num_rows}x{dim}", knn(num_rows, dim, k)
    yield "knn-clustered", knn(50_000, 128, clusters=500)
    # Minutes of compiling.
    yield "info_nce-autotuned", info_nce(18_357, every_peer=False, autotuned=True)


def most_rows_with_truth(device: torch.device) -> int:
    """Beyond this, all pairs in float64 take longer than the measuring."""
    return 200_000 if device.type == "cuda" else 40_000


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


def _info_nce(
    device: torch.device,
    num_rows: int,
    dim: int,
    temperature: float,
    *,
    kind: str = "related",
    every_peer: bool = True,
    autotuned: bool = False,
    nvrtc: bool = False,
) -> Case:
    """Loss and both gradients. Without `every_peer` beside two attentions and the checkpointed form alone."""
    views = [t.detach().to(device).requires_grad_() for t in inputs.views(num_rows, dim, kind=kind)]
    truth = None
    if num_rows <= most_rows_with_truth(device):
        row_grad = torch.full((num_rows,), 1.0 / num_rows, dtype=torch.float64, device=device)
        t = torch.tensor(temperature, dtype=torch.float64, device=device)
        loss, *grads, _ = reference.info_nce_with_gradients(
            *(v.detach().double() for v in views), t, None, row_grad, True, "highest"
        )
        truth = [loss.mean(), *grads]
    entries = []
    # Gradients in the differences of nearly equal rows: float32 itself keeps a digit less of them.
    condition = 5 if kind in ("aligned", "collapsed") else 1
    for precision, tolerance in (("high", condition * 2e-3), ("highest", condition * 2e-5)):
        for backend in usable_backends(device, nvrtc):
            # Wider rows go to plain torch, which has one precision.
            if (backend in GPU_BACKENDS and dim > MOST_COLUMNS[precision == "highest"]) or (
                backend == "torch" and precision == "high"
            ):
                continue
            call = on(backend, lambda a, p, q=precision: ops.info_nce(a, p, temperature, precision=q))
            label = "hellm torch" if backend == "torch" else f"hellm {backend}, {precision}"
            entries.append(Entry(label, gradients(call, views, (None,)), tolerance, backend))
    if dim + 8 <= attention_peers.WIDEST:
        for label, attend in (("flash", attention_peers.flash_attention), ("cuDNN", attention_peers.cudnn_attention)):
            run = partial(attention_peers.composite, *views, temperature, attend)
            entries.append(Entry(f"two {label} attentions (float16)", run, 2e-3))
    in_chunks = [("chunks checkpointed", peers.info_nce_checkpointed)]
    if every_peer:
        run = partial(compiled(partial(attention_peers.flex_composite, temperature=temperature)), *views)
        entries.append(Entry("two FlexAttentions (float16)", run, 2e-3, "compile"))
        in_chunks.insert(0, ("published, chunks of 4096", peers.info_nce_published))
    for label, function in in_chunks:
        for name, at in PRECISIONS:
            run = at(gradients(partial(function, temperature=temperature), views, (None,)))
            entries.append(Entry(f"{label}, {name}", run, 2e-3))
    mode = "max-autotune-no-cudagraphs" if autotuned else None
    at_once = every_peer and num_rows <= 40_000 and (dim, temperature) == (DIM, 0.2)
    for name, at in PRECISIONS if at_once or autotuned else ():
        unbatched = compiled(partial(peers.info_nce_unbatched, temperature=temperature), mode)
        label = f"torch.compile, unbatched, {name}" + (", autotuned" if autotuned else "")
        entries.append(Entry(label, at(gradients(unbatched, views, (None,))), 2e-3, "compile"))
    parameters = {"N": num_rows, "D": dim, "temperature": temperature, "rows": kind}
    return Case(entries, 16.0 * num_rows**2 * dim, truth=truth, ceiling=_PRODUCT, parameters=parameters)


# ----------------------------------------------------------------------------------------- hypergraph convolution


class _Graph(NamedTuple):
    """A hypergraph on a device, and the settings of the published convolution over it."""

    hypergraph: Hypergraph
    settings: dict[str, object]

    def incidence(self) -> scipy.sparse.csr_matrix:
        """H [V, M] in float64."""
        graph = self.hypergraph
        return peers.incidence(graph.hyperedge_index.cpu().numpy(), (graph.num_vertices, graph.num_hyperedges))


class _Sizes(NamedTuple):
    """Of a synthetic hypergraph: `empty` is the share of hyperedges without vertices, `hub` how many one more has."""

    num_vertices: int
    num_hyperedges: int
    num_incidences: int
    empty: float = 0.0
    hub: int = 0


_SYNTHETIC = {
    "large": _Sizes(10**6, 5 * 10**5, 2 * 10**7, hub=50_000),
    "middle": _Sizes(10**5, 5 * 10**4, 2 * 10**6),
    "empty": _Sizes(10**5, 5 * 10**4, 10**6, empty=0.3),
    "singletons": _Sizes(10**5, 10**5, 10**5),
}
_SMOKE = _Sizes(300, 50, 900, empty=0.3, hub=200)


@functools.lru_cache(maxsize=1)
def _graph(name: str, device: torch.device, smoke: bool) -> _Graph:
    """User graphs of the sizes of data sets, kNN item graphs "items-K", and the synthetic ones."""
    if name in _SYNTHETIC:
        return _Graph(_synthetic(name, _SMOKE if smoke else _SYNTHETIC[name]).to(device), peers.PUBLISHED_ITEMS)
    if name.startswith("items-"):
        num_items = 50 if smoke else inputs.SIZES["tiktok"].num_items
        graph = item_hypergraph(inputs.item_features(num_items), int(name.removeprefix("items-")))
        return _Graph(graph.to(device), peers.PUBLISHED_ITEMS)
    size = inputs.SIZES["tiny" if smoke else name]
    index = torch.from_numpy(inputs.interactions(size))
    return _Graph(user_hypergraph(index, size.num_users, size.num_items).to(device), peers.PUBLISHED_USERS)


def _synthetic(name: str, sizes: _Sizes) -> Hypergraph:
    """Uniform vertices in hyperedges of a power law; "singletons": vertex v alone in hyperedge v."""
    if name == "singletons":
        alone = torch.arange(min(sizes.num_vertices, sizes.num_hyperedges))
        return Hypergraph(
            torch.stack([alone, alone]), num_vertices=sizes.num_vertices, num_hyperedges=sizes.num_hyperedges
        )
    generator = torch.Generator().manual_seed(0)
    occupied = int(sizes.num_hyperedges * (1 - sizes.empty))
    vertex = torch.randint(sizes.num_vertices, (sizes.num_incidences,), generator=generator)
    edge = (torch.rand(sizes.num_incidences, generator=generator) ** 2 * occupied).long()
    # The hyperedges that are empty lie among the others.
    edge = torch.randperm(sizes.num_hyperedges, generator=generator)[edge]
    hub = torch.arange(sizes.hub)
    index = torch.stack([torch.cat([vertex, hub]), torch.cat([edge, torch.zeros_like(hub)])])
    return Hypergraph(index, num_vertices=sizes.num_vertices, num_hyperedges=sizes.num_hyperedges)


def _conv(
    device: torch.device,
    name: str,
    smoke: bool,
    layers: int,
    passes: int,
    *,
    dim: int = DIM,
    dtype: torch.dtype = torch.float32,
    with_compile: bool = False,
    nvrtc: bool = False,
) -> Case:
    """One pass is forward alone, two are forward and backward."""
    graph, settings = _graph(name, device, smoke)
    x = inputs.rows(graph.num_vertices, dim).to(device=device, dtype=dtype).requires_grad_(passes == 2)
    cotangent = inputs.rows(graph.num_vertices, dim, seed=1).to(device=device, dtype=dtype)

    def entry(label: str, function: Callable[[Tensor], Tensor], **more) -> Entry:
        run = gradients(function, (x,), (cotangent,)) if passes == 2 else (lambda: (function(x),))
        return Entry(label, run, 1e-4 if dtype == torch.float32 else 3e-2, **more)

    conv = partial(ops.hypergraph_conv, hypergraph=graph, num_layers=layers, **settings)
    wide = x.detach().double().requires_grad_(passes == 2)
    with ops.backend("torch"):
        truth = gradients(conv, (wide,), (cotangent.double(),))() if passes == 2 else [conv(wide)]
    entries = [entry(f"hellm {backend}", on(backend, conv), kind=backend) for backend in usable_backends(device, nvrtc)]
    if dtype == torch.float32:
        entries += [entry(*one) for one in _conv_peers(device, name, smoke, layers)]
    if with_compile:
        index_add = compiled(_index_add(graph, settings, layers))
        entries.append(entry("two index_add, torch.compile", index_add, kind="compile"))
    work = 2.0 * passes * layers * graph.num_incidences * dim * x.element_size()
    parameters = {"V": graph.num_vertices, "M": graph.num_hyperedges, "nnz": graph.num_incidences, "layers": layers}
    parameters |= {"D": dim, "passes": passes, "dtype": str(dtype)}
    ceiling = _LARGE_GATHER if name == "large" else _GATHER
    return Case(entries, work, "byte", [t.detach() for t in truth], ceiling=ceiling, parameters=parameters)


@functools.lru_cache(maxsize=1)
def _conv_peers(device: torch.device, name: str, smoke: bool, layers: int) -> list[tuple[str, Callable]]:
    """Two cached CSR products, and of real sizes the published clique."""
    graph = _graph(name, device, smoke)
    h, symmetric = graph.incidence(), graph.settings is peers.PUBLISHED_ITEMS

    def repeated(layer: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: functools.reduce(lambda x, _: layer(x), range(layers), x)

    found = []
    for index_dtype in (torch.int32,) if name in _SYNTHETIC else (torch.int32, torch.int64):
        products = peers.TwoProducts(h, symmetric=symmetric, index_dtype=index_dtype, device=device)
        found.append((f"two cached CSR products, {str(index_dtype).removeprefix('torch.')}", repeated(products)))
    if name not in _SYNTHETIC:
        clique = peers.coo_tensor((peers.clique_symmetric if symmetric else peers.clique_row)(h)).to(device)
        found.append(("published, clique COO", repeated(partial(torch.sparse.mm, clique))))
    return found


def _index_add(graph: Hypergraph, settings: dict[str, object], layers: int) -> Callable[[Tensor], Tensor]:
    """Gathering and index_add, twice a layer; for torch.compile."""
    vertex, edge = graph.hyperedge_index
    in_scale, _, out_scale, diagonal = (
        None if scale is None else scale.unsqueeze(1) for scale in graph.scales(**settings)
    )

    def run(x: Tensor) -> Tensor:
        for _ in range(layers):
            x = x if in_scale is None else in_scale * x
            joined = x.new_zeros(graph.num_hyperedges, x.shape[1]).index_add(0, edge, x[vertex])
            out = x.new_zeros(x.shape).index_add(0, vertex, joined[edge])
            x = out_scale * (out if diagonal is None else out - diagonal * x)
        return x

    return run


def _conv_pyg(device: torch.device, smoke: bool) -> Case:
    """Forward and backward of what PyG's layer computes without its weights, beside that layer."""
    graph, _ = _graph("sports", device, smoke)
    x = inputs.rows(graph.num_vertices, DIM).to(device).requires_grad_()
    cotangent = inputs.rows(graph.num_vertices, DIM, seed=1).to(device)
    conv = partial(ops.hypergraph_conv, hypergraph=graph, normalization="row")
    layer = functools.cache(lambda: peers.pyg_conv(graph.hyperedge_index, DIM, graph.num_hyperedges))
    wide = x.detach().double().requires_grad_()
    with ops.backend("torch"):
        truth = gradients(conv, (wide,), (cotangent.double(),))()
    entries = [
        Entry(f"hellm {name}", gradients(on(name, conv), (x,), (cotangent,)), kind=name)
        for name in usable_backends(device)
    ]
    entries.append(Entry("torch_geometric HypergraphConv", gradients(lambda x: layer()(x), (x,), (cotangent,))))
    work, parameters = 4.0 * graph.num_incidences * DIM * 4, {"nnz": graph.num_incidences, "D": DIM}
    return Case(entries, work, "byte", [t.detach() for t in truth], ceiling=_GATHER, parameters=parameters)


def _propagate(device: torch.device, smoke: bool) -> Case:
    graph, _ = _graph("sports", device, smoke)
    counts = (graph.num_vertices, graph.num_hyperedges)
    tables = [inputs.rows(n, DIM, seed).to(device).requires_grad_() for seed, n in enumerate(counts)]
    cotangents = [inputs.rows(n, DIM, seed + 2).to(device) for seed, n in enumerate(counts)]

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

    eager = partial(peers.item_cross_entropy_eager, target=target)

    def fused(hidden: Tensor, items: Tensor) -> Tensor:
        return ops.item_cross_entropy(hidden, items, target)

    truth = gradients(eager, [t.detach().double().requires_grad_() for t in leaves], (None,))()
    entries = []
    for precision, tolerance in (("high", 2e-2), ("highest", 2e-4)):
        for name in usable_backends(device, nvrtc):
            run = at_precision(precision, gradients(on(name, fused), leaves, (None,)))
            entries.append(Entry(f"hellm {name}, {precision}", run, tolerance, name))
    for name, at in PRECISIONS:
        tolerance = 2e-4 if name == "float32" else 2e-2
        run = at(gradients(eager, leaves, (None,)))
        entries.append(Entry(f"F.cross_entropy(h @ e.T), {name}", run, tolerance))
        run = at(gradients(compiled(eager), leaves, (None,)))
        entries.append(Entry(f"the same, torch.compile, {name}", run, tolerance, "compile"))
    for label, function in (
        ("Cut Cross-Entropy, bfloat16, unfiltered", peers.item_cross_entropy_cut),
        ("Liger, chunks of logits", peers.item_cross_entropy_liger),
    ):
        entries.append(Entry(label, gradients(partial(function, target=target), leaves, (None,)), 2e-2))
    work, parameters = 6.0 * num_rows * num_items * DIM, {"N": num_rows, "I": num_items, "D": DIM}
    return Case(entries, work, truth=[t.detach() for t in truth], ceiling=_PRODUCT, parameters=parameters)


def _knn(device: torch.device, num_rows: int, dim: int, k: int = 10, *, clusters: int = 0, nvrtc: bool = False) -> Case:
    """With `clusters`, rows lie so near to one of these that float16 cannot tell which of its rows are nearest."""
    x = inputs.rows(num_rows, dim)
    if clusters:
        x = inputs.rows(clusters, dim, 1)[inputs.indices(num_rows, clusters)] + 0.02 * x
    x = x.to(device)

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
        if name != "triton"  # the same as "torch"
    ]
    exact = at_precision("highest", partial(chunked, torch.float32))
    entries.append(Entry("torch mm + topk, chunks of 4096", exact, 1e-5))
    entries.append(Entry("the same in TF32", at_precision("high", partial(chunked, torch.float32)), 5e-3))
    entries.append(Entry("the same in float16, not exact", partial(chunked, torch.float16), 5e-3))
    parameters = {"N": num_rows, "D": dim, "k": k, "clusters": clusters}
    truth = [torch.cat(truth)] if truth else None
    return Case(entries, 2.0 * num_rows**2 * dim, truth=truth, ceiling=_PRODUCT, parameters=parameters)
