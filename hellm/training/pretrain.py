"""Stage 1: hypergraph pre-training of the graph encoder, from data to a finished run directory."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._devices import resolve_device
from hellm.artifact import write_embeddings
from hellm.artifact.run_directory import RunDirectory
from hellm.config import PretrainConfig
from hellm.data import Dataset
from hellm.evaluate import HistoryScorer, evaluate_dataset
from hellm.graphs import item_hypergraph, nearest_items, search_recall, user_hypergraph
from hellm.losses import bpr_loss, l2_loss, softmax_loss, synergistic_contrastive_loss
from hellm.models import FoldIn, GraphEncoder
from hellm.models.graph import Columns, EncoderOutput, ItemBranch, SampledRows
from hellm.neighbours import check_approximate
from hellm.training.candidates import CandidateItems, Candidates
from hellm.training.captured_step import CapturedStep
from hellm.training.checkpoint import read_model
from hellm.training.loop import Progress
from hellm.training.objective import Objective, objective_of
from hellm.training.processes import Processes, launched_processes
from hellm.training.samplers import DeviceTripleSampler, Triples, TripleSampler
from hellm.training.stage import (
    OnEpoch,
    OnPlan,
    OpenedRun,
    common_result,
    fit_stage,
    open_run,
    plan_of_steps,
    readable_memory_errors,
    resolve_common,
    seconds_of_step,
    write_curves,
    write_tables,
)
from hellm.training.step import EagerStep, Step, total_loss
from hellm.training.warm_start import fingerprint_of, started_from, warm_start

__all__ = [
    "build_captured_step",
    "build_encoder",
    "build_optimizer",
    "build_sampler",
    "pretrain",
    "pretrain_losses",
    "resolve_config",
    "step_losses",
]


def pretrain(
    config: PretrainConfig,
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: str | os.PathLike[str] | None = None,
    on_plan: OnPlan | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train the graph encoder, choose by validation, score the test split once, and leave a run directory.

    Started by `accelerate launch` or torchrun, several processes share the columns of all tables, and so of what is
    propagated, and the rows of every loss, which changes nothing; the first does the rest. With a backbone that mixes
    columns every process has all of them. `sampled_neighbours` is for one process.

    Args:
        config: settings; see `hellm.config`.
        data: a data set, or a path for `hellm.data.load_dataset`.
        out: run directory, see `hellm.artifact.run_directory`.
        resume: go on from the last checkpoint in `out`, or start if there is none. A finished run is returned as it is.
        overwrite: replace a run in `out`.
        start: run of earlier data that these continue, whose weights training begins with.
        on_plan: called before the first epoch with what it will cost at most, from one timed step: "steps_per_epoch",
            "max_steps", "seconds_of_step", "expected_seconds_per_epoch" and "expected_seconds".
        on_epoch: called with each record of metrics.jsonl, as by `hellm.training.loop.fit`.
    Returns: what result.json holds.

    Raises:
        FileExistsError, ValueError: as `RunDirectory` and `resolve_config`; `sampled_neighbours` in several processes.
        MemoryError: a step needs more memory than there is; says how much it asked for and what to lower.
        FloatingPointError, Interrupted: as `hellm.training.loop.fit`.
    """
    # Every process makes all embeddings, so dropout must leave out the same in all of them.
    processes = launched_processes(resolve_device(config.device), seed=None)
    if config.sampled_neighbours is not None and processes.count > 1:
        count = config.sampled_neighbours
        raise ValueError(f"sampled_neighbours must be null in several processes, got {count} in {processes.count}")
    with open_run(
        config,
        data,
        out,
        resolve_config,
        fingerprint=fingerprint_of(start),
        read=[start],
        resume=resume,
        overwrite=overwrite,
        processes=processes,
    ) as opened:
        return _train(opened, processes, start, on_plan, on_epoch) if opened.finished is None else opened.finished


def _train(
    opened: OpenedRun, processes: Processes, start, on_plan: OnPlan | None, on_epoch: OnEpoch | None
) -> dict[str, Any]:
    config, dataset, run = opened.config, opened.dataset, opened.run

    def finish() -> dict[str, Any]:
        read_model(run.best, model)
        result = _result(model, config, dataset, run, progress)
        result |= {"notes": opened.notes, "num_processes": processes.count} | started_from(start, fresh)
        result |= _recall(config, dataset)
        _write_outputs(model, config, dataset, run, progress)
        run.write_result(result)
        return result

    with readable_memory_errors("pre-training", "lower contrastive_rows, model.embedding_dim or eval_batch_size"):
        model = build_encoder(config, dataset, config.device)
        fresh = [] if start is None else warm_start(model, start)
        progress = _fit(model, config, dataset, run, processes, on_plan, on_epoch)
        return processes.on_first(finish)


def resolve_config(config: PretrainConfig, dataset: Dataset) -> tuple[PretrainConfig, list[str]]:
    """Settings as they will run on this machine and data, with a note for each that had to give way.

    Raises: ValueError for modalities that the data have not, a capture without a GPU, and as `resolve_common`;
        ImportError, an approximate search without the extra that it needs.
    """
    config, notes = resolve_common(config, dataset)
    model = config.model
    known = list(dataset.item_features)
    absent = [name for name in model.modalities or () if name not in known]
    if absent:
        raise ValueError(f"model.modalities must be among {known} (data set {dataset.name!r}), got {absent[0]!r}")
    model = replace(model, attributes=_attributes(config, dataset))
    if model.item_hypergraph and not known and not model.attributes:
        notes.append(f"data set {dataset.name!r} has no item features: trained without the item hypergraph")
        model = replace(model, item_hypergraph=False)
    if model.item_hypergraph and model.modalities is None and known:
        model = replace(model, modalities=tuple(known))
    if model.item_hypergraph and model.knn_search == "approximate" and known:
        check_approximate()
    if model.item_hypergraph and model.knn_k > dataset.num_items:
        notes.append(f"model.knn_k {model.knn_k} cut to the {dataset.num_items} items there are")
        model = replace(model, knn_k=dataset.num_items)
    for name in ("contrastive_rows", "contrastive_keys") if config.compat == "official" else ():
        if getattr(config, name) is not None:
            notes.append(f"the published loss runs over all nodes: {name} {getattr(config, name)} is not used")
            config = replace(config, **{name: None})
    return replace(config, model=model, capture=_resolve_capture(config)), notes


def _attributes(config: PretrainConfig, dataset: Dataset) -> tuple[str, ...]:
    """Those whose values are hyperedges. Raises: ValueError, one that the data have not."""
    chosen = config.model.attributes
    if chosen is None:
        chosen = () if config.compat == "official" else tuple(dataset.attribute_sets)
    for name in chosen:
        if name not in dataset.attribute_sets:
            known = ", ".join(dataset.attribute_sets) or "none"
            raise ValueError(f"model.attributes must be among {known} (data set {dataset.name!r}), got {name!r}")
    return chosen


def _resolve_capture(config: PretrainConfig) -> bool:
    on_gpu, sampled = torch.device(config.device).type == "cuda", _is_sampled(config)
    if config.capture and not on_gpu:
        raise ValueError(f"capture must be null or false without a GPU, got true with device {config.device!r}")
    if config.capture and sampled:
        names = "sampled_items, contrastive_keys or sampled_neighbours"
        raise ValueError(f"capture must be null or false with {names}, got true")
    return on_gpu and not sampled if config.capture is None else config.capture


def _is_sampled(config: PretrainConfig) -> bool:
    """Whether a step is over items, keys or neighbours drawn for it, whose number may change."""
    return any(one is not None for one in (config.sampled_items, config.contrastive_keys, config.sampled_neighbours))


def build_encoder(config: PretrainConfig, dataset: Dataset, device: torch.device | str = "cpu") -> GraphEncoder:
    """The encoder of `config` over the training events, item features and attributes of `dataset`, on `device`.

    Neighbours are searched there too; the tables are drawn on the CPU, the same for every device.
    With compat="official" a contrastive weight of 0 also takes that hypergraph out of the fusion, and kNN neighbours
    with similarity <= 0 stay, both as published.
    """
    settings, official = config.model, config.compat == "official"
    users, items = dataset.pairs("train")
    index = torch.from_numpy(np.stack([users, items]))
    use_user = settings.user_hypergraph and not (official and config.user_contrastive_weight == 0)
    use_item = settings.item_hypergraph and not (official and config.item_contrastive_weight == 0)
    items_by_content = None
    if use_item:
        names = settings.modalities or tuple(dataset.item_features)
        chosen = {name: dataset.item_features[name] for name in names}
        items_by_content = item_hypergraph(
            {name: torch.from_numpy(np.asarray(feature.values)).to(device) for name, feature in chosen.items()},
            settings.knn_k,
            masks={name: torch.from_numpy(np.asarray(feature.mask)).to(device) for name, feature in chosen.items()},
            attributes={
                name: torch.from_numpy(np.stack(dataset.attribute_sets[name].indicators.nonzero())).to(device)
                for name in _attributes(config, dataset)
            },
            num_items=dataset.num_items,
            neighbours={
                name: nearest_items(feature, settings.knn_k, device, search=settings.knn_search)
                for name, feature in chosen.items()
            },
            keep_nonpositive=official,
        )
    return GraphEncoder(
        dataset.num_users,
        dataset.num_items,
        user_hypergraph=user_hypergraph(index, dataset.num_users, dataset.num_items),
        item_hypergraph=items_by_content,
        embedding_dim=settings.embedding_dim,
        backbone=settings.backbone,
        num_layers=settings.num_layers,
        num_user_layers=settings.num_user_layers,
        num_item_layers=settings.num_item_layers,
        use_user_branch=use_user,
        dropout=settings.dropout,
        unit_items=config.loss == "softmax",
        place_untrained=not official,
    ).to(device)


def _recall(config: PretrainConfig, dataset: Dataset) -> dict[str, dict[str, float | None]]:
    """Of an approximate search, "knn_recall": modality -> share of the exact neighbours that it found."""
    settings = config.model
    if not settings.item_hypergraph or settings.knn_search == "exact":
        return {}
    names = settings.modalities or tuple(dataset.item_features)
    options = {"k": settings.knn_k, "device": config.device, "search": settings.knn_search}
    return {"knn_recall": {name: search_recall(dataset.item_features[name], **options) for name in names}}


def build_sampler(config: PretrainConfig, dataset: Dataset) -> TripleSampler:
    """The sampler of `config` over the training events of `dataset`; its `num_steps` are the steps per epoch."""
    return TripleSampler(
        *dataset.pairs("train"),
        dataset.num_users,
        dataset.num_items,
        batch_size=config.batch_size,
        strategy=config.sampler,
        negatives=config.negatives,
        seed=config.seed,
    )


def pretrain_losses(
    model: GraphEncoder,
    triples: Triples,
    *,
    l2_weight: float,
    user_contrastive_weight: float,
    item_contrastive_weight: float,
    temperature: float,
    softmax_temperature: float | None = None,
    precision: str | None = None,
    candidates: Candidates | None = None,
    user_rows: Tensor | None = None,
    item_rows: Tensor | None = None,
    user_keys: Tensor | None = None,
    item_keys: Tensor | None = None,
    share: Callable[[int], slice] = slice,
    sampled: Callable[[Tensor, Tensor], EncoderOutput] | None = None,
) -> dict[str, Tensor]:
    """Weighted loss terms of one step, whose sum stage 1 minimises: "bpr_loss", "l2_loss", "contrastive_loss".

    With a `softmax_temperature`, "softmax_loss" over the `candidates` (None is all items) stands in place of
    "bpr_loss", and negatives are not used. A contrastive term of weight 0, or of a hypergraph the model does not use,
    is not computed. `user_rows` and `item_rows` [R] int64 are the contrastive anchors; None is all. `user_keys` and
    `item_keys`: see `hellm.losses.synergistic_contrastive_loss`. All terms are means of rows; `share` says of how many
    rows which are taken, and then the terms are these rows' part of the mean. `sampled` gives what the losses need of
    users and items alone, as `hellm.models.graph.SampledRows` does; None takes the model's embeddings of all.
    """
    users, positives, negatives = (torch.as_tensor(ids).to(model.device) for ids in triples)
    ranked = negatives if softmax_temperature is None else None if candidates is None else candidates.rows
    contrasts = [
        (side, num_nodes, weight, anchors, keys)
        for side, num_nodes, table, weight, anchors, keys in (
            ("user", model.num_users, model.user_branch_table, user_contrastive_weight, user_rows, user_keys),
            ("item", model.num_items, model.item_branch_table, item_contrastive_weight, item_rows, item_keys),
        )
        if weight > 0 and table is not None
    ]
    needed = {"user": [users], "item": [positives, ranked]}
    for side, *_, keys in contrasts:
        needed[side].append(keys)
    embeddings = _Embeddings.of(model, needed, sampled)
    own = _Rows.of(len(users), share)
    user, positive = own(embeddings("user", users)), own(embeddings("item", positives))
    if softmax_temperature is None:
        rows = (user, positive, own(embeddings("item", negatives)))
        ranking = {"bpr_loss": bpr_loss(*rows) * own.part}
    else:
        rows, places, log_weight = (user, positive), positives, None
        if candidates is not None:
            places, log_weight = candidates.places(positives), candidates.log_weight
        items = embeddings("item", ranked)
        loss = softmax_loss(user, items, own(places), softmax_temperature, log_weight=log_weight)
        ranking = {"softmax_loss": loss * own.part}
    contrastive = user.new_zeros(())
    for side, num_nodes, weight, anchors, keys in contrasts:
        views = embeddings(side, keys), embeddings(f"{side}_view", keys)
        if keys is not None and anchors is not None:
            anchors = torch.searchsorted(keys, anchors)
        ours = _Rows.of(len(views[0]) if anchors is None else len(anchors), share)
        if anchors is None and ours.part < 1:
            anchors = torch.arange(len(views[0]), device=model.device)
        loss = synergistic_contrastive_loss(
            *views,
            temperature,
            precision=precision,
            rows=None if anchors is None else ours(anchors),
            num_nodes=num_nodes,
        )
        contrastive = contrastive + weight * ours.part * loss
    return {
        **ranking,
        "l2_loss": l2_weight * own.part * l2_loss(*rows),
        "contrastive_loss": contrastive,
    }


class _Embeddings:
    """Rows of embeddings by the ids of their nodes.

    Args:
        model: what they are of.
        output: its embeddings, of all nodes or of some.
        ids: "user" and "item" -> [N] int64, ascending: the nodes of the output, where it has not all.
    """

    def __init__(self, model: GraphEncoder, output: EncoderOutput, ids: Mapping[str, Tensor]) -> None:
        self._model, self._output, self._ids = model, output, ids
        # Rows that two losses need whole are put together once.
        self._all = functools.cache(lambda name: model.whole(getattr(output, name)))

    @classmethod
    def of(
        cls,
        model: GraphEncoder,
        needed: Mapping[str, Sequence[Tensor | None]],
        sampled: Callable[[Tensor, Tensor], EncoderOutput] | None,
    ) -> _Embeddings:
        """The model's, or what `sampled` gives of the nodes that are needed; None among these is all of a side."""
        if sampled is None:
            return cls(model, model(), {})
        ids = {
            side: _union(needed[side], count, model.device)
            for side, count in (("user", model.num_users), ("item", model.num_items))
        }
        return cls(model, sampled(ids["user"], ids["item"]), ids)

    def __call__(self, name: str, ids: Tensor | None) -> Tensor:
        """[N, D] of a field of `EncoderOutput` for nodes [N], which are needed; None is all."""
        if ids is None:
            return self._all(name)
        own = self._ids.get(name.removesuffix("_view"))
        places = ids if own is None else torch.searchsorted(own, ids)
        # F.embedding sums repeated rows of the gradient in a fixed order, plain indexing does not on CUDA.
        return self._model.whole(F.embedding(places, getattr(self._output, name)))


def _union(ids: Sequence[Tensor | None], count: int, device: torch.device) -> Tensor:
    """[N] int64, ascending and distinct: what any of them has; None has all."""
    given = [one for one in ids if one is not None]
    return torch.unique(torch.cat(given)) if len(given) == len(ids) else torch.arange(count, device=device)


class _Rows(NamedTuple):
    """Which of the rows of a mean this process takes.

    Attributes:
        rows: them; one that counts for nothing where there is none, as a mean needs one.
        part: how many of all they are.
    """

    rows: slice
    part: float

    @classmethod
    def of(cls, count: int, share: Callable[[int], slice]) -> _Rows:
        rows = share(count)
        taken = len(range(count)[rows])
        return cls(rows, taken / count) if taken else cls(slice(0, 1), 0.0)

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.part == 1 else x[self.rows]


def build_optimizer(config: PretrainConfig, model: GraphEncoder) -> torch.optim.Optimizer:
    """Adam over the tables, or over their rows that a step reads; on a GPU in one kernel that a CUDA graph can hold."""
    if config.sampled_neighbours is not None:
        return torch.optim.SparseAdam(model.parameters(), lr=config.learning_rate)
    on_gpu = model.device.type == "cuda"
    return torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, capturable=on_gpu, fused=True if on_gpu else None
    )


def build_captured_step(
    model: GraphEncoder, config: PretrainConfig, sampler: TripleSampler, optimizer: torch.optim.Optimizer
) -> CapturedStep:
    """The step of stage 1 for a GPU. Published triples and the contrastive anchors are drawn there as well."""
    choices, candidates = _contrastive_choices(config, model), _candidates(config, model)

    def losses_of(triples: Triples, rows: Sequence[Tensor]) -> Mapping[str, Tensor]:
        return _losses(model, config, triples, dict(zip(choices, rows, strict=True)), candidates(0, 0, triples))

    if not sampler.is_published:

        def inputs(epoch: int, step: int) -> list[Tensor]:
            rows = _contrastive_rows(config, choices, epoch, step)
            return [*map(torch.from_numpy, sampler.sample(epoch, step)), *rows.values()]

        def losses(*inputs: Tensor) -> Mapping[str, Tensor]:
            users, positives, negatives, *rows = inputs
            return losses_of(Triples(users, positives, negatives), rows)

    else:
        on_device = DeviceTripleSampler(sampler, model.device, tuple(choices.values()))

        def inputs(epoch: int, step: int) -> list[Tensor]:
            return [on_device.keys(epoch, step)]

        def losses(*inputs: Tensor) -> Mapping[str, Tensor]:
            return losses_of(*on_device.draw(*inputs))

    rate, capture = _learning_rate(config), bool(config.capture)
    return CapturedStep(model, optimizer, inputs, losses, sampler.num_steps, learning_rate=rate, capture=capture)


def _fit(
    model: GraphEncoder,
    config: PretrainConfig,
    dataset: Dataset,
    run: RunDirectory,
    processes: Processes,
    on_plan,
    on_epoch,
) -> Progress:
    sampler = build_sampler(config, dataset)
    step = build_step(model, config, sampler, processes)
    if on_plan is not None:
        losses = step_losses(config, model, sampler, processes)
        seconds = seconds_of_step(model, lambda: total_loss(losses(0, 0)))
        if processes.index == 0:
            on_plan(plan_of_steps(seconds, sampler.num_steps, config.max_epochs))

    def validate(scorer: GraphEncoder) -> Mapping[str, float]:
        return _evaluate(scorer, config, dataset, "valid").metrics

    progress = fit_stage(step, config, dataset, run, validate, on_epoch)
    if step.is_shared:
        model.unite_columns()
    return progress


def build_step(model: GraphEncoder, config: PretrainConfig, sampler: TripleSampler, processes: Processes) -> Step:
    """The step of stage 1; in several processes, each keeps its columns of the model where the backbone allows it."""
    if model.device.type == "cuda" and not _is_sampled(config) and processes.count == 1:
        return build_captured_step(model, config, sampler, build_optimizer(config, model))
    losses = step_losses(config, model, sampler, processes)
    if processes.count > 1 and not model.mixes_columns:
        model.share_columns(Columns(processes.mesh(), model.embedding_dim))
        objective = Objective(losses, is_shared=True)
    else:
        objective = objective_of(model, losses, processes)
    rate, optimizer = _learning_rate(config), build_optimizer(config, model)
    return EagerStep(model, optimizer, objective, sampler.num_steps, learning_rate=rate, processes=processes)


def step_losses(
    config: PretrainConfig, model: GraphEncoder, sampler: TripleSampler, processes: Processes | None = None
) -> Callable[[int, int], dict[str, Tensor]]:
    """(epoch, step) -> the terms of `pretrain_losses`, all that is drawn for them included.

    Of several processes each has its share of the triples and of the anchors, and the sum of what they give is what one
    process would. Where columns are shared out, all of them ask for a step together.
    """
    choices, candidates = _contrastive_choices(config, model), _candidates(config, model)
    sampled = _sampled_rows(config, model)

    def losses(epoch: int, step: int) -> dict[str, Tensor]:
        triples, drawn = sampler.sample(epoch, step), _contrastive_rows(config, choices, epoch, step)
        rows = {name: one.to(model.device) for name, one in drawn.items()}
        chosen = candidates(epoch, step, triples)
        share = slice if processes is None else processes.share
        return _losses(model, config, triples, rows, chosen, share, sampled(epoch, step))

    return losses


def _losses(
    model: GraphEncoder,
    config: PretrainConfig,
    triples: Triples,
    rows: Mapping[str, Tensor],
    candidates: Candidates | None = None,
    share: Callable[[int], slice] = slice,
    sampled: Callable[[Tensor, Tensor], EncoderOutput] | None = None,
) -> dict[str, Tensor]:
    return pretrain_losses(
        model,
        triples,
        l2_weight=config.l2_weight,
        user_contrastive_weight=config.user_contrastive_weight,
        item_contrastive_weight=config.item_contrastive_weight,
        temperature=config.temperature,
        softmax_temperature=config.softmax_temperature if config.loss == "softmax" else None,
        precision=config.precision,
        candidates=candidates,
        share=share,
        sampled=sampled,
        **rows,
    )


def _sampled_rows(
    config: PretrainConfig, model: GraphEncoder
) -> Callable[[int, int], Callable[[Tensor, Tensor], EncoderOutput] | None]:
    """(epoch, step) -> what gives the rows of a step; None is the model itself, of all nodes."""
    if config.sampled_neighbours is None:
        return lambda epoch, step: None
    rows = SampledRows(model, config.sampled_neighbours)

    def of_step(epoch: int, step: int) -> Callable[[Tensor, Tensor], EncoderOutput]:
        # A stream of its own beside those of samplers, contrastive anchors and candidate items.
        seed = int(np.random.default_rng((config.seed, epoch, step, 3)).integers(2**63))
        return functools.partial(rows, generator=torch.Generator().manual_seed(seed))

    return of_step


def _candidates(config: PretrainConfig, model: GraphEncoder) -> Callable[[int, int, Triples], Candidates | None]:
    """(epoch, step, triples) -> what the softmax of a step is over; None is all items."""
    if config.loss != "softmax":
        return lambda epoch, step, triples: None
    events = model.user_hypergraph.edge_indptr.diff().cpu().numpy()
    items = CandidateItems(events, count=config.sampled_items, seed=config.seed, device=model.device)
    return lambda epoch, step, triples: items.of_step(epoch, step, triples.positives)


def _learning_rate(config: PretrainConfig) -> Callable[[int, int], float]:
    rate, decay, epochs = config.learning_rate, config.learning_rate_decay, config.learning_rate_decay_epochs
    return lambda epoch, step: rate * decay ** (epoch / epochs)


def _contrastive_choices(config: PretrainConfig, model: GraphEncoder) -> dict[str, tuple[int, int]]:
    """(of how many nodes, how many) are drawn as anchors, or as keys with the anchors among them; empty for all."""
    choices = {}
    for kind, count in (("user", model.num_users), ("item", model.num_items)):
        for name, size in (("keys", config.contrastive_keys), ("rows", config.contrastive_rows)):
            if size is not None and size < count:
                choices[f"{kind}_{name}"] = (count, size)
                break
    return choices


def _contrastive_rows(
    config: PretrainConfig, choices: Mapping[str, tuple[int, int]], epoch: int, step: int
) -> dict[str, Tensor]:
    # A stream of its own beside the sampler's (seed, epoch, step).
    rng, chosen = np.random.default_rng((config.seed, epoch, step, 1)), {}
    for name, (count, size) in choices.items():
        drawn = rng.choice(count, size, replace=False)
        if name.endswith("keys"):
            chosen[name.replace("keys", "rows")], drawn = drawn[: config.contrastive_rows], np.sort(drawn)
        chosen[name] = drawn
    return {name: torch.from_numpy(drawn) for name, drawn in chosen.items()}


class _FoldedIn(NamedTuple):
    """The encoder as a model of histories."""

    fold_in: FoldIn
    item: Tensor

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        return self.fold_in.embed(indptr, items)

    def item_keys(self) -> Tensor:
        return self.item


def _evaluate(model: GraphEncoder, config: PretrainConfig, dataset: Dataset, split: str):
    scorer = model
    if dataset.has_cold_users:
        # Those that are asked for have no trained embedding.
        scorer = HistoryScorer.of(_FoldedIn(model.fold_in_tables(), model.embeddings().item), dataset, split)
    options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
    return evaluate_dataset(scorer, dataset, split=split, by_target=split == "test", **options)


def _result(model, config: PretrainConfig, dataset: Dataset, run: RunDirectory, progress: Progress):
    model.eval()
    test = None
    if (dataset.split == 2).any():
        test = _evaluate(model, config, dataset, "test")
    return common_result("pretrain", model, dataset, run, progress, test=test, device=config.device)


def _write_outputs(
    model: GraphEncoder, config: PretrainConfig, dataset: Dataset, run: RunDirectory, progress: Progress
) -> None:
    names = ("user", "item", "user_hypergraph", "item_hypergraph")
    fold_in = model.fold_in_tables()
    output = dict(zip(names, model.embeddings(), strict=True))
    output |= {"fold_in_source": fold_in.source, "fold_in_view": fold_in.view}
    metadata = {"fold_in_exponent": str(fold_in.exponent), "unit_items": json.dumps(model.unit_items)}
    if model.item_branch_table is not None:
        output["item_hypergraph_source"] = model.item_view_source()
        output["item_hypergraph_input"] = model.item_branch_table.weight
        output["item_backbone"] = model.backbone_items(place=False)
        branch = ItemBranch(model.num_item_layers, config.model.knn_k, model.unit_items, model.place_untrained)
        metadata["item_branch"] = json.dumps(branch._asdict())
    tensors = {name: value.float() for name, value in output.items() if value is not None}
    modalities = None
    if config.model.item_hypergraph:
        modalities = [*(config.model.modalities or ()), *(config.model.attributes or ())]
    write_embeddings(run.path, "graph", tensors, metadata | {"modalities": json.dumps(modalities)})
    options = {"k": config.model.knn_k, "device": str(model.device), "search": config.model.knn_search}
    write_tables(run, dataset, modalities=modalities, **options)
    write_curves(run, metrics=config.monitor, best_epoch=progress.best_epoch, title=f"{dataset.name}: pre-training")
