"""The model of cost: how time, memory and disk of each stage grow with the data.

With E events, U users, I items, T = E - 2 U training events (leave-two-out holds out two of each user), every quantity
is a sum of few terms, each a count of what the code goes over times a rate that `hellm.plan.sample` measures:

    1          starting Python, imports, files
    events     E: a pass over the events, and over users, of whom a sample has as many for each event
    items      I: a pass over the items
    lists      U I: a score of every item for every user, as validations, tests, fusion and batch scoring make them
    pairs      I^2 (1 - exp(-L T / I^2)): different pairs of items within L = `transitions.max_lag` events of each
               other, if all items were alike
    held       U I, up to the scores that a fusion of three may hold of each (`fuse.max_scores`)
    judged     U I, by which a fusion judges a sum, and twice what its weights are fitted on: the scores of I items for
               a half of the users, or for some 2,048 to 4,096 of it, which a fit goes over a few times
    part       U, up to the 16,384 lists that batch scoring makes at once, for each tower that a sum has kept
    read       E for each tower that a sum has kept, as each reads the histories

A stage that trains costs

    seconds = rest + epochs (steps seconds_of_step + validation) + neighbours

    stage1     steps = T // min(batch_size, U) + 1, or T / batch_size for "interaction-uniform"; a step propagates over
               the whole graph and so grows with events and items
    sequence   steps = (T - U) // batch_size; a step is over all items
    llm        steps = T / batch_tokens, or `steps_per_epoch` at most; a step is over all items
    fusion     with a language model, three validations of it more; batch scoring one
    neighbours I^2 D products where items have features of D columns, in the first stage that trains: later ones find
               them in the cache; I log2(I) D for an approximate search, which a sample of the data does not time

Epochs are `max_epochs`, which patience may cut short: an upper limit. Peak memory is the imports, what grows with
events, items and the scores or lists that are held; disk is what the stage leaves. Each of n processes sends
2 (n - 1) / n times the gradients (4 bytes a parameter) at every update; stage 1 and a sharded language model send what
`sent_by_columns` and `sent_by_shards` say.

How many towers a sum keeps, validation says: batch scoring is planned for all of them, an upper limit too. What the
choice takes, the fits of their weights, follows the samples. A term that no sample shows has the rate 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hellm.config import PretrainConfig, RunConfig
from hellm.training.fusion import FITTED_EVENTS

__all__ = [
    "QUANTITIES",
    "STAGES",
    "Sizes",
    "Stage",
    "cost",
    "fitted",
    "neighbour_products",
    "num_steps",
    "sent_by_columns",
    "sent_by_shards",
    "sent_bytes",
]


class Sizes(NamedTuple):
    """Counts of a data set."""

    events: float
    users: float
    items: float

    @property
    def training(self) -> float:
        """Events that leave-two-out leaves."""
        return max(1.0, self.events - 2 * self.users)

    def terms(self, config: RunConfig, kept: int = 1) -> dict[str, float]:
        """What each term counts, where a sum has so many towers."""
        cells, lists = self.items**2, self.users * self.items
        half = max(1.0, self.users / 2)
        pairs = -cells * math.expm1(-config.transitions.max_lag * self.training / cells)
        return {
            "1": 1.0,
            "events": self.events,
            "items": self.items,
            "lists": lists,
            "pairs": pairs,
            "held": min(lists, config.fuse.max_scores / 3),
            "judged": lists + 2 * self.items * half / max(1, half // FITTED_EVENTS),
            "part": kept * min(self.users, 16384.0),
            "read": kept * self.events,
        }


@dataclass(frozen=True)
class Stage:
    """Terms of what a stage costs, by quantity; see the module.

    Attributes:
        verb: The command.
        config: The part of `RunConfig` with its settings; None has none.
        rest, peak, disk: Terms of its seconds but for training, of its memory in bytes, of the bytes that it leaves.
        step, validation: Terms of a training step and of a validation; empty where it does not train.
        parameters: Terms of the parameters that it trains.
        weights, layers: Terms of all its parameters, and of those in layers; of a model whose parts can be shared out.
    """

    verb: str
    config: str | None
    rest: tuple[str, ...] = ("1", "events", "items", "lists")
    peak: tuple[str, ...] = ("1", "events", "items")
    disk: tuple[str, ...] = ("1", "events", "items")
    step: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()


_VALIDATION = ("1", "events", "lists")
STAGES = {
    "data": Stage("data", None, rest=("1", "events", "items")),
    "stage1": Stage(
        "pretrain",
        "pretrain",
        step=("1", "events", "items"),
        validation=_VALIDATION,
        parameters=("events", "items"),
    ),
    "transitions": Stage(
        "transitions", "transitions", rest=("1", "events", "lists"), disk=("1", "events", "items", "pairs")
    ),
    "sequence": Stage("sasrec", "sasrec", step=("1", "items"), validation=_VALIDATION, parameters=("1", "items")),
    "llm": Stage(
        "finetune",
        "finetune",
        step=("1", "items"),
        validation=_VALIDATION,
        parameters=("1", "items"),
        weights=("1", "items"),
        layers=("1",),
    ),
    "fusion": Stage(
        "fuse",
        "fuse",
        rest=("1", "events", "judged"),
        peak=("1", "events", "items", "held"),
        disk=("1", "events", "items", "pairs"),
    ),
    "batch": Stage(
        "batch",
        None,
        rest=("1", "read", "lists"),
        peak=("1", "events", "items", "part"),
        disk=("1", "events"),
    ),
}
"""Name -> stage, in the order that they run in."""
QUANTITIES = ("rest", "step", "validation", "peak", "disk", "parameters", "weights", "layers")


def num_steps(name: str, config: RunConfig, sizes: Sizes) -> int:
    """Training steps of an epoch, as the samplers have them; 0 where a stage does not train."""
    training = int(sizes.training)
    if name == "stage1":
        stage_1 = config.pretrain
        if stage_1.sampler == "user-uniform":
            return training // max(1, int(min(stage_1.batch_size, sizes.users))) + 1
        return -(-training // stage_1.batch_size)
    if name == "sequence":
        return max(1, int(training - sizes.users) // config.sasrec.batch_size)
    if name == "llm":
        steps = -(-training // config.finetune.batch_tokens)
        return min(steps, config.finetune.steps_per_epoch or steps)
    return 0


def neighbour_products(config: RunConfig, sizes: Sizes, width: float) -> float:
    """Multiplications of finding the nearest items of all by features of so many columns."""
    if config.pretrain.model.knn_search == "approximate":
        return sizes.items * float(np.log2(max(2, sizes.items))) * width
    return sizes.items**2 * width


def sent_bytes(parameters: float, updates: float, processes: int) -> float:
    """Bytes that each of several processes sends while it trains: gradients, reduced and gathered in a ring."""
    return updates * 4 * parameters * 2 * (processes - 1) / processes


def sent_by_shards(weights: float, layers: float, trained: float, processes: int) -> float:
    """Bytes that each of several processes sends in a step of a model of which each has its part.

    Weights are gathered in a ring, those of layers four times: for the instruction and for the items, and for the
    gradients of either, which are reduced in a ring.

    Args:
        weights: numbers in all weights, of four bytes.
        layers: how many of them are in layers that are gathered one at a time.
        trained: how many are trained.
        processes: >= 1.
    """
    return 4 * (weights + 3 * layers + 2 * trained) * (processes - 1) / processes


def sent_by_columns(config: PretrainConfig, users: float, items: float, processes: int) -> float:
    """Bytes that each of several processes sends in a step of stage 1, whose columns they share out.

    Rows that a loss needs are gathered in a ring, and their gradients reduced in one; lengths of rows are summed.
    """
    model, dim = config.model, config.model.embedding_dim
    if model.backbone == "ngcf":
        linears = 2 * model.num_layers * (dim + 1) * dim
        parameters = linears + dim * sum(
            count * (1 + branch) for count, branch in ((users, model.user_hypergraph), (items, model.item_hypergraph))
        )
        return sent_bytes(parameters, 1, processes)
    rows, lengths = config.batch_size * (2.0 if config.loss == "softmax" else 3.0), 0.0
    for count, branch, weight in (
        (users, model.user_hypergraph, config.user_contrastive_weight),
        (items, model.item_hypergraph, config.item_contrastive_weight),
    ):
        if branch:
            lengths += count
            rows += 2 * min(count, config.contrastive_keys or count) if weight > 0 else 0
    if config.loss == "softmax":
        lengths += items
        rows += min(items, config.sampled_items or items)
    ring = 4 * (processes - 1) / processes
    return ring * (3 * dim * rows + 4 * lengths)


def fitted(terms: Sequence[str], counts: Sequence[Mapping[str, float]], values: Sequence[float]) -> dict[str, float]:
    """Rates >= 0 of terms with the least relative error, squared and summed, over what was measured.

    Of all choices of terms the best whose rates come out positive: with few terms, all can be tried.

    Args:
        terms: Names.
        counts: Of each measurement, see `Sizes.terms`.
        values: What was measured there, > 0.
    """
    table = np.array([[one[term] for term in terms] for one in counts])
    rows = table / np.maximum(np.asarray(values, dtype=np.float64), 1e-9)[:, None]
    scale = np.maximum(rows.max(axis=0), 1e-300)
    best, rates = np.inf, np.zeros(len(terms))
    for chosen in itertools.product([False, True], repeat=len(terms)):
        kept = np.flatnonzero(chosen)
        if not 0 < len(kept) <= len(values):
            continue
        found = np.linalg.lstsq(rows[:, kept] / scale[kept], np.ones(len(values)), rcond=None)[0] / scale[kept]
        error = float(np.square(rows[:, kept] @ found - 1).sum())
        if (found >= 0).all() and error < best - 1e-12:
            best, rates = error, np.zeros(len(terms))
            rates[kept] = found
    return dict(zip(terms, rates.tolist(), strict=True))


def cost(rates: Mapping[str, float], counts: Mapping[str, float]) -> float:
    """What terms with these rates come to."""
    return sum(rate * counts[term] for term, rate in rates.items())
