"""The benchmark cases: inputs, `hellm`, its peers, the limit and the targets of each.

N = rows, I = items, D = columns, V = vertices, M = hyperedges.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs, peers
from benchmarks.spec import CASES, LIMIT, Entry, Outputs, Target, Workload, case, copy_limit, matrix_product_limit
from benchmarks.training_step import HellmStep, PublishedStep
from hellm import ops
from hellm.config import PRESETS, PretrainConfig
from hellm.graphs import item_hypergraph, user_hypergraph
from hellm.hypergraph import Hypergraph
from hellm.training.samplers import Triples, TripleSampler

__all__ = ["CASES"]

DIM = 64
# Matches 16-bit products against float32 ones.
_MEDIUM_TOLERANCE = 3e-2


def _gradients(function: Callable[..., Tensor], *leaves: Tensor, cotangent: Tensor | None = None) -> Outputs:
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, cotangent)


# ------------------------------------------------------------------------------------------------------ InfoNCE


@case(
    "info_nce-items",
    "Contrastive loss",
    "info_nce over the TikTok items, forward + backward",
    num_rows=6_710,
    promised=False,
)
@case(
    "info_nce-users",
    "Contrastive loss",
    "info_nce over the TikTok users, forward + backward",
    num_rows=9_308,
    promised=True,
)
def _info_nce(num_rows: int, promised: bool, *, tiny: bool, with_compile: bool) -> Workload:
    num_rows, temperature = (97 if tiny else num_rows), 0.5
    anchor, positive = inputs.views(num_rows, DIM)

    def both(function: Callable[..., Tensor], **settings) -> Callable[[], Outputs]:
        return lambda: _gradients(partial(function, temperature=temperature, **settings), anchor, positive)

    published = "published eager, chunks of 4096"
    targets = [
        Target("hellm", (published,), 6.0),
        Target("hellm", LIMIT, 0.65),
        Target("hellm, medium", (published,), 10.0),
    ]
    workload = Workload(
        entries=[
            Entry("hellm", both(ops.info_nce, precision="highest"), "hellm"),
            Entry("hellm, medium", both(ops.info_nce, precision="medium"), "hellm", tolerance=_MEDIUM_TOLERANCE),
            Entry(published, both(peers.info_nce_published), note="autograd keeps 2 N^2 exponentials"),
            Entry("plain torch, strips of 512", both(peers.info_nce_strip), note="hand-written gradient, in place"),
            matrix_product_limit(tiny),
        ],
        parameters={"N": num_rows, "D": DIM, "temperature": temperature, "dtype": "float32"},
        work=12.0 * num_rows**2 * DIM,
        unit="FLOP",
        targets=targets if promised else [],
    )
    compiled = "torch.compile, unbatched"
    if with_compile:
        workload.entries.insert(4, Entry(compiled, both(torch.compile(peers.info_nce_unbatched))))
    else:
        workload.skipped[compiled] = "compiling takes a minute; --compile runs it"
    return workload


@case("info_nce-forward", "Contrastive loss", "info_nce over the TikTok users, loss only")
def _info_nce_forward(*, tiny: bool, with_compile: bool) -> Workload:
    num_rows, temperature = (97 if tiny else 9_308), 0.5
    anchor, positive = (view.detach() for view in inputs.views(num_rows, DIM))
    return Workload(
        entries=[
            Entry("hellm", lambda: (ops.info_nce(anchor, positive, temperature, precision="highest"),), "hellm"),
            Entry(
                "hellm, medium",
                lambda: (ops.info_nce(anchor, positive, temperature, precision="medium"),),
                "hellm",
                tolerance=_MEDIUM_TOLERANCE,
            ),
            Entry(
                "published eager, chunks of 4096", lambda: (peers.info_nce_published(anchor, positive, temperature),)
            ),
            matrix_product_limit(tiny),
        ],
        parameters={"N": num_rows, "D": DIM, "temperature": temperature, "dtype": "float32"},
        work=4.0 * num_rows**2 * DIM,
        unit="FLOP",
    )


# ------------------------------------------------------------------------------------------- item cross-entropy


@case("item_cross_entropy", "Item softmax", "item_cross_entropy, a SASRec batch over the Beauty items, both passes")
def _item_cross_entropy(*, tiny: bool, with_compile: bool) -> Workload:
    num_rows, num_items, dim = (97, 61, 8) if tiny else (12_800, 12_101, DIM)
    hidden, items = inputs.rows(num_rows, dim).requires_grad_(), inputs.rows(num_items, dim, seed=1).requires_grad_()
    target = inputs.indices(num_rows, num_items)

    def both(function: Callable[..., Tensor]) -> Callable[[], Outputs]:
        return lambda: _gradients(partial(function, target=target), hidden, items)

    eager = "F.cross_entropy of all logits, eager"
    return Workload(
        entries=[
            Entry("hellm", both(ops.item_cross_entropy), "hellm"),
            Entry(eager, both(peers.item_cross_entropy_eager), note="autograd keeps N I log-probabilities"),
            Entry(
                "plain torch, blocks of 1024",
                both(peers.item_cross_entropy_blocked),
                note="hand-written gradient, in place",
            ),
            matrix_product_limit(tiny),
        ],
        parameters={"N": num_rows, "I": num_items, "D": dim, "dtype": "float32"},
        work=6.0 * num_rows * num_items * dim,
        unit="FLOP",
        targets=[Target("hellm", (eager,), 2.0), Target("hellm", LIMIT, 0.65)],
    )


# ----------------------------------------------------------------------------------------- hypergraph convolution


def _user_graph(tiny: bool) -> tuple[np.ndarray, Hypergraph, inputs.Size]:
    size = inputs.SIZES["tiny" if tiny else "sports"]
    pairs = inputs.interactions(size)
    return pairs, user_hypergraph(torch.from_numpy(pairs), size.num_users, size.num_items), size


def _conv_workload(graph: Hypergraph, entries: list[Entry], passes: int, tiny: bool, targets=()) -> Workload:
    """`passes` sparse products in each direction; bytes are those of the gathered rows."""
    sizes = {"V": graph.num_vertices, "M": graph.num_hyperedges, "incidences": graph.num_incidences}
    return Workload(
        entries=[*entries, copy_limit(tiny)],
        parameters={**sizes, "D": DIM, "dtype": "float32"},
        work=2.0 * passes * graph.num_incidences * DIM * 4,
        unit="byte",
        targets=list(targets),
    )


@case("conv-forward", "Hypergraph convolution", "hypergraph_conv, user graph of the Sports size, forward")
def _conv_forward(*, tiny: bool, with_compile: bool) -> Workload:
    pairs, graph, size = _user_graph(tiny)
    h = peers.incidence(pairs, size[:2])
    x = inputs.rows(size.num_users, DIM)
    clique = peers.clique_row(h)
    coo, csr = peers.coo_tensor(clique), peers.csr_tensor(clique)
    two32, two64 = peers.TwoProducts(h), peers.TwoProducts(h, index_dtype=torch.int64)
    reduce, by_scipy = peers.TwoProducts(h, product=peers.reduce_product), peers.ScipyTwoProducts(h)
    entries = [
        Entry("hellm", lambda: (ops.hypergraph_conv(x, graph, **peers.PUBLISHED_USERS),), "hellm"),
        Entry("two torch CSR products, int32", lambda: (two32.forward(x),), note="cached, scales folded in"),
        Entry("two torch CSR products, int64", lambda: (two64.forward(x),), note="cached, scales folded in"),
        Entry("two torch.sparse.mm(reduce)", lambda: (reduce.forward(x),), note="cached, scales folded in"),
        Entry("two scipy products", lambda: (by_scipy(x),), note="one core"),
        Entry("clique expansion, torch CSR", lambda: (torch.mm(csr, x),), note=f"{clique.nnz:,} non-zeros"),
        Entry("published, clique COO", lambda: (torch.sparse.mm(coo, x),), note=f"{clique.nnz:,} non-zeros"),
    ]
    fastest = ("two torch CSR products, int32", "two torch CSR products, int64")
    return _conv_workload(graph, entries, 1, tiny, [Target("hellm", fastest, 2.5)])


@case("conv-backward", "Hypergraph convolution", "hypergraph_conv, user graph of the Sports size, forward + backward")
def _conv_backward(*, tiny: bool, with_compile: bool) -> Workload:
    pairs, graph, size = _user_graph(tiny)
    h = peers.incidence(pairs, size[:2])
    x, cotangent = inputs.rows(size.num_users, DIM).requires_grad_(), inputs.rows(size.num_users, DIM, seed=1)
    coo = peers.coo_tensor(peers.clique_row(h))
    two = peers.TwoProducts(h)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], Outputs]:
        return lambda: _gradients(function, x, cotangent=cotangent)

    published = "published, clique COO"
    entries = [
        Entry("hellm", both(lambda x: ops.hypergraph_conv(x, graph, **peers.PUBLISHED_USERS)), "hellm"),
        Entry("two torch CSR products, int32", both(two), note="cached, transposes too"),
        Entry(published, both(lambda x: torch.sparse.mm(coo, x)), note=f"{coo._nnz():,} non-zeros"),
    ]
    return _conv_workload(graph, entries, 2, tiny, [Target("hellm", (published,), 100.0)])


@case("conv-pyg", "Hypergraph convolution", "PyG's HypergraphConv formula on the same graph, forward + backward")
def _conv_pyg(*, tiny: bool, with_compile: bool) -> Workload:
    pairs, graph, size = _user_graph(tiny)
    index = torch.from_numpy(pairs)
    x, cotangent = inputs.rows(size.num_users, DIM).requires_grad_(), inputs.rows(size.num_users, DIM, seed=1)

    def both(function: Callable[[Tensor], Tensor]) -> Callable[[], Outputs]:
        return lambda: _gradients(function, x, cotangent=cotangent)

    entries = [
        Entry("hellm", both(lambda x: ops.hypergraph_conv(x, graph, normalization="row")), "hellm"),
        Entry("gather and index_add", both(peers.index_add_row(index, size.num_users, size.num_items))),
    ]
    workload = _conv_workload(graph, entries, 2, tiny)
    workload.add_if_present(
        "torch_geometric HypergraphConv",
        lambda: both(peers.pyg_conv(index, DIM, size.num_items)),
        note="identity in place of its linear layer",
    )
    return workload


@case("conv-items", "Hypergraph convolution", "hypergraph_conv, kNN item graph (k = 5, two modalities), both passes")
def _conv_items(*, tiny: bool, with_compile: bool) -> Workload:
    num_items = 50 if tiny else inputs.SIZES["tiktok"].num_items
    graph = item_hypergraph(inputs.item_features(num_items), 5)
    h = peers.incidence(graph.hyperedge_index.numpy(), (graph.num_vertices, graph.num_hyperedges))
    clique = peers.clique_symmetric(h)
    coo, csr = peers.coo_tensor(clique), peers.csr_tensor(clique)
    conv = partial(ops.hypergraph_conv, hypergraph=graph, **peers.PUBLISHED_ITEMS)
    x, cotangent = inputs.rows(num_items, DIM).requires_grad_(), inputs.rows(num_items, DIM, seed=1)
    entries = [
        Entry(
            "hellm",
            lambda: _gradients(conv, x, cotangent=cotangent),
            "hellm",
        ),
        Entry(
            "clique expansion, torch CSR",
            # Symmetric, so the gradient is the same product.
            lambda: (torch.mm(csr, x.detach()), torch.mm(csr, cotangent)),
            note=f"{clique.nnz:,} non-zeros",
        ),
        Entry(
            "published, clique COO",
            lambda: _gradients(lambda x: torch.sparse.mm(coo, x), x, cotangent=cotangent),
            note=f"{clique.nnz:,} non-zeros",
        ),
    ]
    return _conv_workload(graph, entries, 2, tiny)


@case("propagate", "Hypergraph convolution", "bipartite_propagate, 2 layers at the Sports size, forward + backward")
def _propagate(*, tiny: bool, with_compile: bool) -> Workload:
    pairs, graph, size = _user_graph(tiny)
    tables = [inputs.rows(count, DIM, seed).requires_grad_() for seed, count in enumerate(size[:2])]
    cotangents = [inputs.rows(count, DIM, seed + 2) for seed, count in enumerate(size[:2])]
    matrix = peers.bipartite(peers.incidence(pairs, size[:2]))
    coo, csr = peers.coo_tensor(matrix), peers.csr_tensor(matrix)

    def both(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Outputs:
        found = function(*tables)
        return *(t.detach() for t in found), *torch.autograd.grad(found, tables, cotangents)

    def cached() -> Outputs:
        # The matrix is symmetric, so backward is the same mean over layers of the cotangents.
        with torch.no_grad():
            return *peers.light_gcn(csr, *tables, 2), *peers.light_gcn(csr, *cotangents, 2)

    entries = [
        Entry("hellm", lambda: both(lambda u, i: ops.bipartite_propagate(u, i, graph, num_layers=2)), "hellm"),
        Entry("torch CSR products, int32", cached, note="cached; backward by symmetry"),
        Entry("published, COO", lambda: both(lambda u, i: peers.light_gcn(coo, u, i, 2))),
    ]
    return _conv_workload(graph, entries, 4, tiny)


# ---------------------------------------------------------------------------------------------- nearest neighbours


@case("knn-512", "Nearest neighbours", "knn, k = 10, 12,101 items with 512 columns", num_rows=12_101, dim=512)
@case("knn-128", "Nearest neighbours", "knn, k = 10, items and width of TikTok features", num_rows=6_710, dim=128)
def _knn(num_rows: int, dim: int, *, tiny: bool, with_compile: bool) -> Workload:
    num_rows, dim, k = (70, 16, 5) if tiny else (num_rows, dim, 10)
    x = inputs.rows(num_rows, dim)
    unit = F.normalize(x)

    def verify(found: Outputs, expected: Outputs) -> float:
        """Worst error of the cosines, as returned and as recomputed from the indices; ties may fall either way."""
        indices, values = found
        recomputed = torch.stack([(unit * unit[column]).sum(1) for column in indices.T], 1)
        return max(float((cosines - expected[1]).abs().max()) for cosines in (values, recomputed))

    workload = Workload(
        entries=[
            Entry("hellm", lambda: ops.knn(x, k), "hellm"),
            Entry("torch mm + topk, chunks of 1024", lambda: peers.knn_chunked(x, k)),
            matrix_product_limit(tiny),
        ],
        parameters={"N": num_rows, "D": dim, "k": k, "dtype": "float32"},
        work=2.0 * num_rows**2 * dim,
        unit="FLOP",
        verify=verify,
    )

    def faiss() -> Callable[[], Outputs]:
        peers.knn_faiss(x[:k], k)
        return lambda: peers.knn_faiss(x, k)

    workload.add_if_present("faiss IndexFlatIP", faiss)
    return workload


# ------------------------------------------------------------------------------------------------ training, stage 1


@case("sampler-sports", "Stage-1 training", "10 steps of training triples, Sports size", size_name="sports")
@case("sampler-tiktok", "Stage-1 training", "10 steps of training triples, TikTok size", size_name="tiktok")
def _sampler(size_name: str, *, tiny: bool, with_compile: bool) -> Workload:
    size = inputs.SIZES["tiny" if tiny else size_name]
    users, items = inputs.interactions(size)
    steps, batch_size = 10, min(1024, size.num_users // 2)
    ours = TripleSampler(users, items, size.num_users, size.num_items, batch_size=batch_size)
    known = np.unique(users * size.num_items + items)
    epochs = iter(range(10**9))

    def sampled() -> Outputs:
        epoch = next(epochs)
        return [_as_tensor(ours.sample(epoch, step)) for step in range(steps)]

    def looped(draw: Callable[[int], int] | None) -> Callable[[], Outputs]:
        loop = peers.LoopSampler(users, items, size.num_items, batch_size, draw)
        return lambda: [_as_tensor(loop.sample()) for _ in range(steps)]

    def verify(found: Outputs, expected: Outputs) -> float:
        """0 if users are distinct, positives known and negatives not, in batches of one shape; else infinite."""
        for batch, other in zip(found, expected, strict=True):
            user, positive, negative = batch.numpy()
            distinct = len(np.unique(user)) == len(user)
            right = np.isin(user * size.num_items + positive, known).all()
            wrong = np.isin(user * size.num_items + negative, known).any()
            if batch.shape != other.shape or not distinct or not right or wrong:
                return float("inf")
        return 0.0

    loop = "Python loop, published draws"
    return Workload(
        entries=[
            Entry("hellm", sampled, "hellm"),
            Entry(loop, looped(None), note="numpy.random.randint for each number"),
            Entry("Python loop, fastest draws", looped(_fast_draw), note="random.random for each number"),
        ],
        parameters={**size._asdict(), "batch": batch_size, "steps": steps},
        work=float(steps * batch_size),
        unit="triple",
        targets=[Target("hellm", (loop,), 20.0)],
        verify=verify,
    )


def _fast_draw(high: int) -> int:
    return int(random.random() * high)


def _as_tensor(triples) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(ids, dtype=np.int64) for ids in triples]))


@case("step-tiktok", "Stage-1 training", "one training step on TikTok: graphs, losses, backward, Adam")
def _step(*, tiny: bool, with_compile: bool) -> Workload:
    config = replace(PRESETS[PretrainConfig]["mmhcl-tiktok"], device="cpu")
    dataset = inputs.tiktok(tiny)
    users, items = dataset.pairs("train")
    sampler = TripleSampler(users, items, dataset.num_users, dataset.num_items, batch_size=16 if tiny else 1024)
    triples: list[Triples] = [sampler.sample(0, step) for step in range(4)]
    ours = HellmStep(config, dataset, triples)
    published = "published form, plain torch"
    entries = [
        Entry("hellm", ours, "hellm"),
        # Each keeps weights of its own, so the k-th run of every entry does the same work.
        Entry("hellm, medium", HellmStep(config, dataset, triples, "medium"), "hellm", tolerance=_MEDIUM_TOLERANCE),
        Entry(
            published,
            PublishedStep(config, dataset, triples, ours),
            tolerance=1e-3,
            note="COO clique graphs, eager contrastive loss over all nodes",
        ),
        matrix_product_limit(tiny),
    ]
    rows = dataset.num_users**2 + dataset.num_items**2
    return Workload(
        entries=entries,
        parameters={
            "data": dataset.name,
            "users": dataset.num_users,
            "items": dataset.num_items,
            "events": len(users),
            "D": config.model.embedding_dim,
            "batch": sampler.batch_size,
        },
        work=12.0 * rows * config.model.embedding_dim,
        unit="FLOP",
        targets=[Target("hellm", (published,), 5.0)],
        repeats=("epoch", sampler.num_steps),
    )
