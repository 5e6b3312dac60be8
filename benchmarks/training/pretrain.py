"""One step of stage-1 training, as `hellm` takes it and as the published code does, from the same weights.

The published form here builds its graphs sparsely (the original builds them dense first, once); each step is its own:
COO products over the clique expansions, the contrastive loss over all users and items in eager torch, BPR, L2, Adam.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import inputs
from benchmarks.ceilings import PRODUCT
from benchmarks.entries import ON_CPU, candidates
from benchmarks.ops.bipartite_propagate import bipartite, light_gcn
from benchmarks.ops.hypergraph_conv import clique_row, clique_symmetric, coo_tensor, incidence
from benchmarks.ops.info_nce import info_nce_published
from benchmarks.registry import CPU, TARGETS, Entry, Run, Setup, Target, Workload, register
from hellm.config import PRESETS, PretrainConfig
from hellm.data import Dataset
from hellm.training.pretrain import build_encoder, build_optimizer, pretrain_losses
from hellm.training.samplers import Triples, TripleSampler


class HellmStep:
    """Forward, losses, backward and Adam with `hellm`; each call takes the next of `triples`, round and round.

    It runs on `config.device`, where a CUDA graph can hold it.
    """

    def __init__(
        self, config: PretrainConfig, dataset: Dataset, triples: Sequence[Triples], precision: str | None = "highest"
    ) -> None:
        torch.manual_seed(config.seed)
        self.model = build_encoder(config, dataset, config.device)
        self.config, self.precision = config, precision
        self.tables = list(self.model.parameters())
        self.optimizer = build_optimizer(config, self.model)
        self.next_triples = _cycle(triples, config.device)

    def __call__(self) -> tuple[Tensor, ...]:
        """The loss terms [3], then the gradient of each table."""
        config = self.config
        terms = pretrain_losses(
            self.model,
            self.next_triples(),
            l2_weight=config.l2_weight,
            user_contrastive_weight=config.user_contrastive_weight,
            item_contrastive_weight=config.item_contrastive_weight,
            temperature=config.temperature,
            precision=self.precision,
        )
        return _finish(list(terms.values()), self.tables, self.optimizer)


class PublishedStep:
    """The same step in the published form, starting from the weights of `like`."""

    def __init__(self, config: PretrainConfig, dataset: Dataset, triples: Sequence[Triples], like: HellmStep) -> None:
        self.config = config
        model = like.model
        users, items = dataset.pairs("train")
        self.counts = (dataset.num_users, dataset.num_items)
        interacted = incidence(np.unique(np.stack([users, items]), axis=1), self.counts)
        graph = model.item_hypergraph.to("cpu")
        values = None if graph.vertex_values is None else graph.vertex_values.double().numpy()
        shape = (graph.num_vertices, graph.num_hyperedges)
        neighbours = incidence(graph.hyperedge_index.numpy(), shape, values)
        self.bipartite = coo_tensor(bipartite(interacted)).to(config.device)
        self.user_clique = coo_tensor(clique_row(interacted)).to(config.device)
        self.item_clique = coo_tensor(clique_symmetric(neighbours)).to(config.device)
        self.tables = [table.detach().clone().requires_grad_() for table in like.tables]
        on_gpu = self.tables[0].is_cuda
        self.optimizer = torch.optim.Adam(self.tables, lr=config.learning_rate, capturable=on_gpu)
        self.next_triples = _cycle(triples, config.device)

    def __call__(self) -> tuple[Tensor, ...]:
        """The loss terms [3], then the gradient of each table."""
        config = self.config
        users, positives, negatives = self.next_triples()
        user_table, item_table, user_view, item_view = self.tables
        for _ in range(config.model.num_item_layers):
            item_view = torch.sparse.mm(self.item_clique, item_view)
        for _ in range(config.model.num_user_layers):
            user_view = torch.sparse.mm(self.user_clique, user_view)
        user, item = light_gcn(self.bipartite, user_table, item_table, config.model.num_layers)
        user, item = user + F.normalize(user_view), item + F.normalize(item_view)
        u, p, n = user[users], item[positives], item[negatives]
        bpr = -F.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        l2 = config.l2_weight * 0.5 * (u.square().sum() + p.square().sum() + n.square().sum()) / len(users)
        contrastive = config.user_contrastive_weight * info_nce_published(user, user_view, config.temperature)
        contrastive = contrastive + config.item_contrastive_weight * info_nce_published(
            item, item_view, config.temperature
        )
        return _finish([bpr, l2, contrastive], self.tables, self.optimizer)


def _finish(terms: list[Tensor], tables: list[Tensor], optimizer: torch.optim.Optimizer) -> tuple[Tensor, ...]:
    optimizer.zero_grad(set_to_none=True)
    sum(terms).backward()
    optimizer.step()
    return torch.stack([term.detach() for term in terms]), *(table.grad for table in tables)


def _cycle(triples: Sequence[Triples], device: str) -> Callable[[], Triples]:
    triples = [Triples(*(torch.as_tensor(ids).to(device) for ids in one)) for one in triples]
    place = -1

    def following() -> Triples:
        nonlocal place
        place = (place + 1) % len(triples)
        return triples[place]

    return following


# -------------------------------------------------------------------------------------------------------- cases


def _step(setup: Setup, *, data: str) -> Workload:
    """Forward, losses, backward and Adam with the published settings, beside the published code's step.

    The step size is too small to move a weight, so that every run does the same work.
    """
    config = replace(
        PRESETS[PretrainConfig][f"mmhcl-{data}"], learning_rate=1e-30, device=str(setup.device), capture=False
    )
    if data == "tiktok":
        dataset = inputs.tiktok(setup.tiny)
    else:
        dataset = inputs.synthetic_dataset(inputs.SIZES["tiny" if setup.tiny else data], dim=setup.small(128, 8))
    users, items = dataset.pairs("train")
    batch_size = setup.small(config.batch_size, 16)
    sampler = TripleSampler(users, items, dataset.num_users, dataset.num_items, batch_size=batch_size)
    triples = [sampler.sample(0, 0)]
    like = HellmStep(config, dataset, triples)

    def ours(precision: str) -> Run:
        step = copy.deepcopy(like)
        step.precision = precision
        return step

    published = PublishedStep(config, dataset, triples, like)
    note = "COO clique graphs, eager contrastive loss over all nodes"
    entries = candidates(setup, ours, {"high": 2e-2, "highest": 1e-3} if setup.gpu else ON_CPU)
    entries.append(Entry("published form, plain torch", published, tolerance=1e-3, note=note))
    parameters = {"data": dataset.name, "users": dataset.num_users, "items": dataset.num_items, "events": len(users)}
    rows, dim = dataset.num_users**2 + dataset.num_items**2, config.model.embedding_dim
    return Workload(
        entries,
        12.0 * rows * dim,
        parameters=parameters | {"D": dim, "batch": batch_size},
        truth=lambda: [t.detach().double() for t in published()],
        limit=PRODUCT,
        repeats=("epoch", sampler.num_steps),
    )


_add = partial(register, "Stage-1 training", _step)
_title = "one training step on TikTok: graphs, losses, backward, Adam"
_add("step-tiktok", _title, devices=(CPU,), data="tiktok")
_add("step-sports", rank=0, data="sports")

TARGETS += [
    Target("step-tiktok", "hellm", "published", 5.0, device=CPU),
    Target("step-sports", milliseconds=5.0),
]
