"""The sequence model: SASRec from data to a finished run directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._devices import resolve_device
from hellm.artifact.files import CONTENT
from hellm.config import SASRecConfig
from hellm.data import Dataset
from hellm.evaluate import RankingResult, evaluate_histories
from hellm.models import ItemContent, SASRec
from hellm.models.histories import pad_histories
from hellm.models.sequence import WhitenedContent
from hellm.training.candidates import CandidateItems, Candidates, next_item_loss
from hellm.training.checkpoint import read_model
from hellm.training.history_sampler import HistoryBatch, SequenceSampler
from hellm.training.loop import Progress
from hellm.training.objective import Losses, objective_of
from hellm.training.processes import Processes, launched_processes
from hellm.training.schedule import constant_schedule, cosine_schedule
from hellm.training.stage import (
    MAY_CHANGE,
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
from hellm.training.warm_start import fingerprint_of, same_columns, started_from, warm_start

__all__ = [
    "build_sasrec",
    "build_sequence_sampler",
    "continued_sasrec",
    "resolve_sasrec_config",
    "sasrec_losses",
    "train_sasrec",
]


def train_sasrec(
    config: SASRecConfig,
    data: str | os.PathLike[str] | Dataset,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: str | os.PathLike[str] | None = None,
    on_plan: OnPlan | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Train SASRec, choose by validation, score the test split once, and leave a run directory.

    Validation knows the training events of a user, the test the validation event as well. Beside what `pretrain`
    leaves, embeddings.safetensors holds the whole model: `SASRec.load(out)` gives it back. Started by torchrun or
    `accelerate launch`, several processes share the sequences of every step, which changes nothing but the dropout, and
    the first does the rest.

    Args:
        config: settings; see `hellm.config`.
        data: a data set, or a path for `hellm.data.load_dataset`.
        out: run directory, see `hellm.artifact.run_directory`.
        resume: go on from the last checkpoint in `out`, or start if there is none. A finished run is returned as it is.
        overwrite: replace a run in `out`.
        start: run of earlier data that these continue, whose weights training begins with. Content stays whitened as it
            was, where it is of the same encoder or values; what reads other content begins anew.
        on_plan: called before the first epoch with what it will cost at most, from one timed step: "steps_per_epoch",
            "max_steps", "seconds_of_step", "expected_seconds_per_epoch" and "expected_seconds".
        on_epoch: called with each record of metrics.jsonl, as by `hellm.training.loop.fit`.
    Returns: what result.json holds; "test" holds each metric by its name, e.g. result["test"]["recall@10"], and all of
        them under "metrics"; "test_masked" the same lists under the protocol "standard", which masks what a user has.

    Raises:
        FileExistsError, ValueError: as `RunDirectory` and `resolve_sasrec_config`.
        MemoryError: a step needs more memory than there is; says what to lower.
        FloatingPointError, Interrupted: as `hellm.training.loop.fit`.
    """
    processes = launched_processes(resolve_device(config.device), seed=config.seed)
    with open_run(
        config,
        data,
        out,
        resolve_sasrec_config,
        prepare=build_sequence_sampler,
        fingerprint=fingerprint_of(start),
        read=[start],
        may_change=MAY_CHANGE - ({"max_epochs"} if config.schedule == "cosine" else set()),
        resume=resume,
        overwrite=overwrite,
        processes=processes,
    ) as opened:
        return _train(opened, processes, start, on_plan, on_epoch) if opened.finished is None else opened.finished


def _train(
    opened: OpenedRun, processes: Processes, start, on_plan: OnPlan | None, on_epoch: OnEpoch | None
) -> dict[str, Any]:
    config, dataset = opened.config, opened.dataset
    with readable_memory_errors("training SASRec", "lower batch_size, max_length, embedding_dim or eval_batch_size"):
        if start is None:
            model, fresh = build_sasrec(config, dataset).to(config.device), []
        else:
            model, fresh = continued_sasrec(config, dataset, start)
        progress = _fit(model, opened, processes, on_plan, on_epoch)
    return processes.on_first(lambda: _finished(model, opened, progress, processes.count, start, fresh))


def _finished(
    model: SASRec, opened: OpenedRun, progress: Progress, num_processes: int, start, fresh: list[str]
) -> dict[str, Any]:
    """Test the best weights and write what a run holds."""
    config, dataset, run = opened.config, opened.dataset, opened.run
    with readable_memory_errors("scoring the test split", "lower eval_batch_size"):
        read_model(run.best, model)
        model.eval()
        test = _evaluate(model, config, dataset, "test")
    result = common_result("sasrec", model, dataset, run, progress, test=test, device=config.device)
    masked = None
    if result["test"] is not None and config.protocol != "standard":
        by_standard = _evaluate(model, replace(config, protocol="standard"), dataset, "test")
        masked = None if by_standard is None else by_standard.to_dict(level=0.95)
    result |= {"test_masked": masked, "notes": opened.notes, "num_processes": num_processes}
    result |= started_from(start, fresh)
    model.save(run.path)
    write_tables(run, dataset, device=str(model.device))
    write_curves(run, metrics=config.monitor, best_epoch=progress.best_epoch, title=f"{dataset.name}: SASRec")
    run.write_result(result)
    return result


def resolve_sasrec_config(config: SASRecConfig, dataset: Dataset) -> tuple[SASRecConfig, list[str]]:
    """Settings as they will run on this machine and data, with a note for each that had to give way.

    Raises: ValueError, a modality that the data have not, no content for a model without item ids, and as
        `resolve_common`.
    """
    config, notes = resolve_common(config, dataset)
    config = replace(config, content=_modalities(config, dataset))
    if not config.content and not config.item_id:
        raise ValueError(
            f"item_id must be true for data set {dataset.name!r}, whose items have no features or attributes, got false"
        )
    if dataset.timestamps is None and dataset.form == "mmrec":
        notes.append("the data have no times: the order of the source is taken as the order in time")
    return config, notes


def continued_sasrec(config: SASRecConfig, dataset: Dataset, run: str | os.PathLike[str]) -> tuple[SASRec, list[str]]:
    """The model with the weights of an earlier run, and which of its own are fresh.

    Content whose columns mean the same is whitened as there, as weights go with the axes; other content begins anew.
    """
    before, file = SASRec.load(run).items, Path(run) / CONTENT
    same = same_columns(ItemContent.load(file), dataset) if file.is_file() else set()
    whitened = {name: before.content(name) for name in before.modalities if name in same}
    model = build_sasrec(config, dataset, whitened).to(config.device)
    now = {name: place for place, name in enumerate(model.items.modalities) if name in whitened}
    places = {
        f"items.projectors.{place}.": f"items.projectors.{now[name]}." if name in now else None
        for place, name in enumerate(before.modalities)
    }
    return model, warm_start(model, run, places)


def build_sasrec(
    config: SASRecConfig, dataset: Dataset, whitened: Mapping[str, WhitenedContent] | None = None
) -> SASRec:
    """The untrained model of `config` for the items of `dataset`, on the CPU.

    Args:
        config, dataset: As they will run.
        whitened: Modality -> content of the same columns, whose map is taken; that of others is fitted.
    """
    there, content, whitened = dataset.item_content, {}, whitened or {}
    for modality in _modalities(config, dataset):
        features = torch.from_numpy(there[modality].values)
        if modality in whitened:
            content[modality] = whitened[modality].of_others(features)
        else:
            content[modality] = WhitenedContent.of(features, config.content_components)
    return SASRec(
        dataset.num_items,
        content=content,
        item_id=config.item_id,
        content_hidden_dim=config.content_hidden_dim,
        content_dropout=config.content_dropout,
        embedding_dim=config.embedding_dim,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        feedforward_dim=config.feedforward_dim,
        max_length=config.max_length,
        dropout=config.dropout,
        norm_first=config.norm_first,
    )


def _modalities(config: SASRecConfig, dataset: Dataset) -> tuple[str, ...]:
    """Those that the items are read by."""
    there = (*sorted(dataset.item_features), *dataset.attribute_sets)
    for modality in config.content or ():
        if modality not in there:
            known = ", ".join(there) or "none"
            raise ValueError(
                f"content must be among the features and attributes of data set {dataset.name!r} ({known}), "
                f"got {modality!r}"
            )
    return there if config.content is None else config.content


def build_sequence_sampler(config: SASRecConfig, dataset: Dataset) -> SequenceSampler:
    """The sampler of `config` over the training events of `dataset`; its `num_steps` are the steps per epoch."""
    try:
        return SequenceSampler(
            *dataset.pairs("train"),
            dataset.num_users,
            dataset.num_items,
            max_length=config.max_length,
            batch_size=config.batch_size,
            negatives=config.loss == "bce",
            seed=config.seed,
        )
    except ValueError as error:
        raise ValueError(f"data set {dataset.name!r}: {error}") from None


def sasrec_losses(
    model: SASRec, batch: HistoryBatch, loss: str, candidates: Candidates | None = None
) -> dict[str, Tensor]:
    """The loss of one step, by its name.

    It is the mean over all positions of

    "cross_entropy"   -log softmax(scores of all `candidates`)[target]; None is all items
    "bce"             -log sigmoid(score of the target) - log(1 - sigmoid(score of the negative))
    """
    indptr, items, targets = (torch.from_numpy(one).to(model.device) for one in batch[:3])
    if candidates is not None and candidates.log_weight is not None:
        # Of a large catalogue, only what the step reads is made.
        rows, place = torch.unique(torch.cat([items, candidates.rows]), return_inverse=True)
        table, items, keys = model.items(rows), place[: len(items)], place[len(items) :]
    else:
        table, keys = model.items(), None if candidates is None else candidates.rows
    padded, mask = pad_histories(indptr, items)
    # The mask reads rows in order, as CSR has them.
    hidden = model(padded, mask, table)[mask]
    if loss == "cross_entropy":
        # F.embedding sums gradients in a fixed order, plain indexing does not on CUDA.
        table = table if keys is None else F.embedding(keys, table)
        return {"cross_entropy": next_item_loss(hidden, table, targets, candidates)}
    negatives = torch.from_numpy(batch.negatives).to(model.device)
    positive, negative = ((hidden * F.embedding(rows, table)).sum(1) for rows in (targets, negatives))
    return {"bce": (F.softplus(-positive) + F.softplus(negative)).mean()}


def _fit(model: SASRec, opened: OpenedRun, processes: Processes, on_plan, on_epoch) -> Progress:
    config, dataset, sampler = opened.config, opened.dataset, opened.inputs
    if on_plan is not None and processes.index == 0:
        losses = _step_losses(model, config, dataset, sampler, processes)
        seconds = seconds_of_step(model, lambda: total_loss(losses(0, 0)))
        on_plan(plan_of_steps(seconds, sampler.num_steps, config.max_epochs))

    def validate(model: SASRec) -> Mapping[str, float]:
        found = _evaluate(model, config, dataset, "valid")
        assert found is not None  # only where there are events to validate on
        return found.metrics

    step = build_step(model, config, dataset, sampler, processes)
    return fit_stage(step, config, dataset, opened.run, validate, on_epoch)


def build_step(
    model: SASRec, config: SASRecConfig, dataset: Dataset, sampler: SequenceSampler, processes: Processes
) -> Step:
    """The step of a sequence model."""
    objective = objective_of(model, _step_losses(model, config, dataset, sampler, processes), processes)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
    rate = _schedule(config, sampler.num_steps)
    return EagerStep(model, optimizer, objective, sampler.num_steps, learning_rate=rate, processes=processes)


def _step_losses(
    model: SASRec, config: SASRecConfig, dataset: Dataset, sampler: SequenceSampler, processes: Processes
) -> Losses:
    candidates = CandidateItems.of(dataset, model.device, count=config.sampled_items, seed=config.seed)

    def losses(epoch: int, step: int) -> Mapping[str, Tensor]:
        batch = sampler.sample(epoch, step)
        share, part = batch.share(processes)
        terms = sasrec_losses(model, share, config.loss, candidates.of_step(epoch, step, batch.targets))
        # Shares have different numbers of targets; the mean of the step is over all of them.
        return {name: term * part for name, term in terms.items()}

    return losses


def _schedule(config: SASRecConfig, num_steps: int) -> Callable[[int, int], float]:
    if config.schedule == "constant":
        return constant_schedule(config.learning_rate)
    return cosine_schedule(
        config.learning_rate,
        num_steps=num_steps,
        num_epochs=config.max_epochs,
        warmup_epochs=config.warmup_epochs,
    )


def _evaluate(model: SASRec, config: SASRecConfig, dataset: Dataset, split: str) -> RankingResult | None:
    if not len(dataset.pairs(split)[0]):
        return None
    options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
    return evaluate_histories(model, dataset, split=split, by_target=split == "test", **options)
