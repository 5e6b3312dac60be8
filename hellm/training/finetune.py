"""Stage 2: fine-tuning a language model that ranks the catalogue, from finished stage-1 and SASRec runs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hellm._devices import resolve_device
from hellm._files import atomic_path, read_json
from hellm.artifact import RunDirectory, write_embeddings
from hellm.artifact.files import CONFIG, LANGUAGE_MODEL, SEQUENCE_MODEL
from hellm.artifact.run_directory import peak_memory_bytes
from hellm.config import FinetuneConfig, load_config
from hellm.data import Dataset
from hellm.evaluate import RankingResult, evaluate_histories
from hellm.models.histories import pad_histories
from hellm.models.llm.checkpoint import base_identity, check_base
from hellm.models.llm.language_model import layers_of, load_language_model
from hellm.models.llm.recommender import RecommenderLLM
from hellm.training.candidates import CandidateItems, Candidates, next_item_loss
from hellm.training.checkpoint import read_model
from hellm.training.history_sampler import HistoryBatch, HistorySampler
from hellm.training.item_inputs import ItemInputs, load_item_inputs, resolve_item_inputs
from hellm.training.objective import Objective, ShardedObjective, objective_of
from hellm.training.processes import Processes, launched_processes
from hellm.training.schedule import cosine_schedule
from hellm.training.stage import (
    MAY_CHANGE,
    OnEpoch,
    OnPlan,
    OpenedRun,
    common_result,
    fit_stage,
    open_run,
    readable_memory_errors,
    resolve_common,
    seconds_of_step,
    write_curves,
    write_tables,
)
from hellm.training.step import EagerStep, total_loss

__all__ = [
    "MEMORY_ADVICE",
    "build_history_sampler",
    "build_optimizer",
    "build_recommender_llm",
    "finetune",
    "finetune_loss",
    "plan_finetuning",
    "rate_schedule",
    "resolve_finetune_config",
]

Path_ = str | os.PathLike[str]
MEMORY_ADVICE = "lower batch_tokens, model.max_length or eval_batch_size, or choose a smaller llm"
# In a run: the language model that it is trained on, as `base_identity` tells it.
_LANGUAGE_MODEL = "checkpoint/language_model.json"


def finetune(
    config: FinetuneConfig,
    data: Path_ | Dataset,
    out: Path_,
    *,
    graph: Path_ | None = None,
    sequence: Path_ | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: OnPlan | None = None,
    on_epoch: OnEpoch | None = None,
) -> dict[str, Any]:
    """Fine-tune, choose by validation, score the test split once, and leave a run directory.

    Beside what `train_sasrec` leaves, the run holds the item tables (embeddings.safetensors) and what was trained
    (`model/`); the language model itself is referenced, not copied. Started by `accelerate launch` or torchrun, several
    processes share the histories of every step, which changes nothing but the dropout, and the first does the rest.

    Args:
        config: settings; see `hellm.config`.
        data: a data set, or a path for `hellm.data.load_dataset`.
        out: run directory, see `hellm.artifact.run_directory`.
        graph: finished stage-1 run of the same events; needed for the input "graph".
        sequence: finished SASRec run of the same events; needed for the input "sequence" and the residual.
        resume: go on from the last checkpoint in `out`, or start if there is none. A finished run is returned as it is.
            `config.llm` may be another path, if the same language model is there.
        overwrite: replace a run that is there.
        on_plan: called with `plan_finetuning(...)` before the first epoch.
        on_epoch: called with each record of metrics.jsonl, as by `hellm.training.loop.fit`.

    Returns: what result.json holds, with the metrics directly in "test" as well.

    Raises:
        FileExistsError, ValueError: as `RunDirectory`, `load_item_inputs` and `RecommenderLLM`; and for
            compat="official" in several processes, or `sharded` in one alone or with a prefix.
        MemoryError: a step needs more memory than there is; says what to lower.
        FloatingPointError, Interrupted: as `hellm.training.loop.fit`.
    """
    processes = launched_processes(resolve_device(config.device), seed=config.seed)
    if processes.count > 1 and config.model.compat == "official":
        raise ValueError(
            "model.compat must be null in several processes, got 'official': the published Gram matrix of a history "
            "depends on all histories of its step"
        )

    if config.sharded:
        _check_sharded(config, processes)
    note = Path(out) / _LANGUAGE_MODEL
    trained_with = read_json(note) if resume and note.is_file() else None

    def prepare(config: FinetuneConfig, dataset: Dataset) -> tuple[ItemInputs, RecommenderLLM | None]:
        inputs = load_item_inputs(config, dataset, graph=graph, sequence=sequence)
        if resume and _is_finished(out, config):
            return inputs, None
        # Here, so that what is wrong with the language model shows before a folder is made or changed.
        model = build_recommender_llm(config, dataset, inputs)
        if trained_with is not None:
            check_base(out, trained_with, base_identity(model))
        return inputs, model

    with open_run(
        config,
        data,
        out,
        resolve_finetune_config,
        prepare=prepare,
        fingerprint=lambda prepared: prepared[0].fingerprint,
        # Where a language model is may change, as long as it is the same.
        may_change=(MAY_CHANGE - {"max_epochs"}) | ({"llm", "llm_revision"} if trained_with else set()),
        resume=resume,
        overwrite=overwrite,
        read=[graph, sequence, config.llm],
        processes=processes,
    ) as opened:
        return _train(opened, processes, on_plan, on_epoch) if opened.finished is None else opened.finished


def _train(
    opened: OpenedRun,
    processes: Processes,
    on_plan: OnPlan | None,
    on_epoch: OnEpoch | None,
) -> dict[str, Any]:
    config, dataset, run = opened.config, opened.dataset, opened.run
    inputs, model = opened.inputs
    processes.on_first(lambda: _write_note(run.path / _LANGUAGE_MODEL, base_identity(model)))
    with readable_memory_errors("fine-tuning", MEMORY_ADVICE):
        # Layers that are shared out go to the device one by one.
        model = model if config.sharded else model.to(config.device)
        sampler = build_history_sampler(config, dataset, model)
        step = build_step(model, config, dataset, sampler, processes)
        plan = plan_finetuning(config, model, sampler, processes, step.objective if step.is_shared else None)
        if on_plan is not None and processes.index == 0:
            on_plan(plan)

        def validate(model: RecommenderLLM) -> Mapping[str, float]:
            return _evaluate(model, config, dataset, "valid").metrics

        progress = fit_stage(step, config, dataset, run, validate, on_epoch, validate_steps=config.validate_steps)

    @readable_memory_errors("scoring the test split", MEMORY_ADVICE)
    def score(model: RecommenderLLM) -> tuple[RankingResult | None, float | None]:
        read_model(run.best, model)
        model.eval()
        return _test(model, config, dataset)

    scored = None
    if step.is_shared:
        with step.whole_model():
            scored = score(model)

    def finish() -> dict[str, Any]:
        # Of one that no process has whole, what is written is put together on the CPU.
        tested = build_recommender_llm(config, dataset, inputs) if step.is_shared else model
        if scored is None:
            test, speed = score(tested)
        else:
            read_model(run.best, tested)
            test, speed = scored
        result = common_result("finetune", tested, dataset, run, progress, test=test, device=config.device)
        result |= {"num_trained_parameters": plan["num_trained_parameters"], "plan": plan, "notes": opened.notes}
        result |= {"num_processes": processes.count}
        result |= {"test_users_per_second": speed}
        _write_outputs(tested, inputs, dataset, run)
        write_curves(run, metrics=config.monitor, best_epoch=progress.best_epoch, title=f"{dataset.name}: fine-tuning")
        run.write_result(result)
        return result

    return processes.on_first(finish)


def _check_sharded(config: FinetuneConfig, processes: Processes) -> None:
    if processes.count == 1:
        raise ValueError("sharded must be false in one process: torchrun or accelerate launch starts several")
    if config.model.graph_context == "prefix" or config.model.learned_prefix:
        raise ValueError(
            "sharded must be false with a prefix (model.graph_context=prefix or model.learned_prefix=true), which goes "
            "through weights of all layers before they run"
        )


def _is_finished(out: Path_, config: FinetuneConfig) -> bool:
    """Whether there is a finished run with just these settings, which is returned as it is."""
    return RunDirectory.holds_result(out) and load_config(FinetuneConfig, Path(out) / CONFIG) == config


def _write_note(path: Path, identity: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def resolve_finetune_config(config: FinetuneConfig, dataset: Dataset) -> tuple[FinetuneConfig, list[str]]:
    """Settings as they will run on this machine and data, with a note for each that had to give way.

    Raises: ValueError for titles that the data have not, and as `resolve_common`.
    """
    config, notes = resolve_common(config, dataset)
    config = resolve_item_inputs(config, dataset)
    if config.model.titles and not dataset.item_titles:
        raise ValueError(f"model.titles needs item titles, and data set {dataset.name!r} has none")
    return config, notes


def build_recommender_llm(config: FinetuneConfig, dataset: Dataset, inputs: ItemInputs) -> RecommenderLLM:
    """The untrained model of `config`, on the CPU; drawn from torch's global generator."""
    language_model, tokenizer = load_language_model(
        config.llm,
        dtype=getattr(torch, config.dtype),
        revision=config.llm_revision,
        num_layers=None if config.model.compat == "official" else config.llm_layers,
        random_seed=config.seed if config.llm_init == "random" else None,
    )
    settings = asdict(config.model)
    return RecommenderLLM(
        language_model,
        tokenizer,
        inputs.tables,
        item_titles=dataset.item_titles,
        sequence_model=inputs.sequence_model,
        **settings,
    )


def build_history_sampler(config: FinetuneConfig, dataset: Dataset, model: RecommenderLLM) -> HistorySampler:
    """The sampler of `config` over the training events of `dataset`; its `num_steps` are the steps per epoch."""
    official = config.model.compat == "official"
    per_target = not model.context.every_position
    return HistorySampler(
        *_as_read(config, dataset).pairs("train"),
        dataset.num_users,
        per_target=per_target,
        max_length=config.model.max_length,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        tokens_around=model.context.tokens_around(model.prompted),
        tokens_per_item=model.items.max_tokens_per_item,
        sort=not official,
        max_steps=config.steps_per_epoch,
        seed=config.seed,
    )


def _as_read(config: FinetuneConfig, dataset: Dataset) -> Dataset:
    """What the model may see: with compat="official" the last `max_length` events of each user, held-out ones counted.

    The published code cuts before it splits, so histories hold fewer than `max_length` items at validation and test.
    """
    if config.model.compat != "official":
        return dataset
    count = np.bincount(dataset.users, minlength=dataset.num_users)
    from_last = count.cumsum()[dataset.users] - np.arange(dataset.num_events)
    return dataset.of_events(from_last <= config.model.max_length)


def finetune_loss(model: RecommenderLLM, batch: HistoryBatch, candidates: Candidates | None = None) -> Tensor:
    """Mean cross-entropy of the items that came next, over all `candidates`; None is all items."""
    indptr, items, targets = (torch.from_numpy(np.ascontiguousarray(one)) for one in batch[:3])
    # Padded on the CPU: sizes that follow from values would make a GPU wait.
    padded, mask = pad_histories(indptr, items)
    place = mask.flatten().nonzero().squeeze(1)
    if model.device.type == "cuda":
        pinned = (one.pin_memory() for one in (padded, mask, place, targets))
        padded, mask, place, targets = (one.to(model.device, non_blocking=True) for one in pinned)
    if len(targets) == len(items) and model.context.every_position:
        query = model.all_queries(padded, mask).flatten(0, 1)[place]
    else:
        query = model.queries(padded, mask)
    keys = model.item_keys_trainable(None if candidates is None else candidates.rows)
    return next_item_loss(query, keys, targets, candidates)


def build_optimizer(config: FinetuneConfig, model: RecommenderLLM) -> torch.optim.AdamW:
    """AdamW over what is trained; weight decay on matrices only, and never on prefixes (published: on everything)."""
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim == 2 or config.model.compat == "official"
            (decayed if matrix else plain).append((name, parameter))
    groups = [
        {"params": [parameter for _, parameter in named], "weight_decay": decay}
        for named, decay in ((decayed, config.weight_decay), (plain, 0.0))
        if named
    ]
    fused = True if model.device.type == "cuda" else None
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.betas[0], config.betas[1]), fused=fused)


def rate_schedule(config: FinetuneConfig, num_steps: int) -> Callable[[int, int], float]:
    """(epoch, step) -> step size: linear from 0 over `warmup_epochs`, then a cosine to `min_learning_rate`.

    The first step is one warm-up step above 0; the published one, kept with compat, is 0 itself.
    """
    return cosine_schedule(
        config.learning_rate,
        num_steps=num_steps,
        num_epochs=config.max_epochs,
        warmup_epochs=config.warmup_epochs,
        low=config.min_learning_rate,
        first=0.0 if config.model.compat == "official" else 1.0,
    )


def plan_finetuning(
    config: FinetuneConfig,
    model: RecommenderLLM,
    sampler: HistorySampler,
    processes: Processes | None = None,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """What a run comes to, from one timed step (forward and backward) of the first batch; nothing is changed by it.

    A model that no process has whole takes the step by its `objective`, in all of them.
    """
    batch = sampler.sample(0, 0)
    share = batch if processes is None else batch.share(processes)[0]

    def loss() -> Tensor:
        if objective is not None:
            return total_loss(objective(0, 0))
        with _autocast(config):
            return finetune_loss(model, share)

    seconds = seconds_of_step(model, loss)
    # Tokens of this batch as the model ran them, padding included.
    longest = int(np.diff(batch.indptr).max())
    own = (len(batch.indptr) - 1) * sampler.tokens_of(longest)
    per_epoch = seconds * sampler.num_padded_tokens / own
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "histories": sampler.num_histories,
        "targets_per_epoch": sampler.num_targets,
        "tokens_per_epoch": sampler.num_padded_tokens,
        "padding_share": 1 - sampler.num_tokens / sampler.num_padded_tokens,
        "steps_per_epoch": sampler.num_steps,
        "max_steps": sampler.num_steps * config.max_epochs,
        "num_trained_parameters": trained,
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_layer_parameters": sum(
            one.numel() for layer in layers_of(model.prompted.base) for one in layer.parameters()
        ),
        "seconds_of_step": seconds,
        "expected_seconds_per_epoch": per_epoch,
        "expected_seconds": per_epoch * config.max_epochs,
        # The step above, AdamW's two moments on top.
        "memory_bytes": {name: value + 8 * trained for name, value in peak_memory_bytes(config.device).items()},
    }


def _autocast(config: FinetuneConfig) -> torch.autocast:
    return torch.autocast(config.device.partition(":")[0], torch.bfloat16, enabled=config.mixed_precision == "bf16")


def build_step(
    model: RecommenderLLM,
    config: FinetuneConfig,
    dataset: Dataset,
    sampler: HistorySampler,
    processes: Processes,
) -> EagerStep:
    """The step of stage 2; with `config.sharded` each of several processes keeps its part of every weight."""
    candidates = CandidateItems.of(dataset, config.device, count=config.sampled_items, seed=config.seed)
    official = config.model.compat == "official"

    def losses(epoch: int, step: int) -> Mapping[str, Tensor]:
        batch = sampler.sample(epoch, step)
        share, part = batch.share(processes)
        with _autocast(config):
            # The published loss is over the whole catalogue.
            loss = finetune_loss(model, share, None if official else candidates.of_step(epoch, step, batch.targets))
        # Shares have different numbers of targets; the mean of the step is over all of them.
        return {"cross_entropy": loss * part}

    if config.sharded:
        objective = ShardedObjective(model, losses, processes, layers_of(model.prompted.base))
    else:
        objective = objective_of(model, losses, processes)
    return EagerStep(
        model,
        build_optimizer(config, model),
        objective,
        sampler.num_steps,
        learning_rate=rate_schedule(config, sampler.num_steps),
        accumulate=config.accumulate,
        max_grad_norm=config.max_grad_norm,
        processes=processes,
    )


def _evaluate(model, config: FinetuneConfig, dataset: Dataset, split: str):
    options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
    # What is cut off with compat is not what slices by popularity go by.
    by_target = split == "test" and config.model.compat != "official"
    return evaluate_histories(model, _as_read(config, dataset), split=split, by_target=by_target, **options)


def _test(model, config: FinetuneConfig, dataset: Dataset) -> tuple[RankingResult | None, float | None]:
    """Test metrics, and users scored per second."""
    if not (dataset.split == 2).any():
        return None, None
    started = time.perf_counter()
    result = _evaluate(model, config, dataset, "test")
    return result, result.num_users / (time.perf_counter() - started)


def _write_outputs(model: RecommenderLLM, inputs: ItemInputs, dataset: Dataset, run: RunDirectory) -> None:
    tensors = dict(inputs.tables)
    for name, content in inputs.content.items():
        tensors |= {f"{name}.mean": content.mean, f"{name}.matrix": content.matrix}
    write_embeddings(run.path, "llm", tensors, {"order": ",".join(inputs.tables)})
    if inputs.sequence_model is not None:
        (run.path / SEQUENCE_MODEL).mkdir(exist_ok=True)
        inputs.sequence_model.save(run.path / SEQUENCE_MODEL)
    model.save_pretrained(run.path / LANGUAGE_MODEL)
    write_tables(run, dataset, device=str(model.device))
