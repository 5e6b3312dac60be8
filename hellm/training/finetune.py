"""Stage 2: fine-tuning a language model that ranks the catalogue, from finished stage-1 and SASRec runs."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm._files import atomic_path
from hellm.config import FinetuneConfig
from hellm.data import Dataset, load_dataset
from hellm.models import SASRec
from hellm.models.histories import pad_histories
from hellm.models.language_model import load_language_model
from hellm.models.recommender_llm import RecommenderLLM
from hellm.ops import item_cross_entropy
from hellm.training.checkpoint import read_model
from hellm.training.history_sampler import HistoryBatch, HistorySampler
from hellm.training.loop import Progress, fit
from hellm.training.run_directory import RunDirectory, peak_memory_bytes
from hellm.training.stage import (
    MAY_CHANGE,
    Evaluate,
    common_result,
    readable_memory_errors,
    resolve_device,
    tensorboard,
    write_curves,
)

__all__ = [
    "ItemInputs",
    "build_history_sampler",
    "build_optimizer",
    "build_recommender_llm",
    "finetune",
    "finetune_loss",
    "load_item_inputs",
    "plan_finetuning",
    "rate_schedule",
]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]
_SEQUENCE_MODEL = "sequence_model"


class ItemInputs(NamedTuple):
    """What a language model is told of the items.

    Attributes:
        tables: name -> [num_items, d] float32, in the order of `FinetuneConfig.item_inputs`.
        sequence_model: the SASRec whose scores are the start, for `model.sequence_residual`; None otherwise.
    """

    tables: dict[str, Tensor]
    sequence_model: SASRec | None


def finetune(
    config: FinetuneConfig,
    data: Path_ | Dataset,
    out: Path_,
    *,
    evaluate: Evaluate,
    graph: Path_ | None = None,
    sequence: Path_ | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_plan: Callable[[Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune, choose by validation, score the test split once, and leave a run directory.

    Beside what `train_sasrec` leaves, the run holds the item tables (embeddings.safetensors) and what was trained
    (`model/`); the language model itself is referenced, not copied.

    Args:
        config: settings; see `hellm.config`.
        data: a data set, or a path for `hellm.data.load_dataset`.
        out: run directory, see `hellm.training.run_directory`.
        evaluate: `hellm.evaluate.evaluate_histories`.
        graph: finished stage-1 run of the same events; needed for the input "graph".
        sequence: finished SASRec run of the same events; needed for the input "sequence" and the residual.
        resume: go on from the last checkpoint in `out`, or start if there is none. A finished run is returned as it is.
        overwrite: replace a run that is there.
        on_plan: called with `plan_finetuning(...)` before the first epoch.

    Returns: what result.json holds, with the metrics directly in "test" as well.
    Raises:
        FileExistsError, ValueError: as `RunDirectory`, `load_item_inputs` and `RecommenderLLM`.
        MemoryError: a step needs more memory than there is; says what to lower.
        FloatingPointError, Interrupted: as `hellm.training.loop.fit`.
    """
    started = time.perf_counter()
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    config, notes = resolve_finetune_config(config, dataset)
    inputs = load_item_inputs(config, dataset, graph=graph, sequence=sequence)
    run = RunDirectory(out, resume=resume, overwrite=overwrite)
    run.check_data(dataset.fingerprint)
    changed = run.write_config(config, may_change=MAY_CHANGE)
    if run.result.is_file() and not changed:
        return run.read_result()
    run.result.unlink(missing_ok=True)
    for note in notes:
        logger.warning(note)
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)

    torch.manual_seed(config.seed)
    model = build_recommender_llm(config, dataset, inputs).to(config.device)
    sampler = build_history_sampler(config, dataset, model)
    with _readable_memory_errors():
        plan = plan_finetuning(config, model, sampler)
        if on_plan is not None:
            on_plan(plan)
        progress = _fit(model, config, dataset, sampler, run, evaluate)
    read_model(run.best, model)
    model.eval()
    test, speed = _test(model, config, dataset, evaluate)
    result = common_result("finetune", model, dataset, run, progress, test=test, device=config.device)
    result |= {"num_trained_parameters": plan["num_trained_parameters"], "plan": plan, "notes": notes}
    result |= {"test_users_per_second": speed, "seconds": time.perf_counter() - started}
    _write_outputs(model, inputs, dataset, run)
    write_curves(run, metrics=config.monitor, best_epoch=progress.best_epoch, title=f"{dataset.name}: fine-tuning")
    run.write_result(result)
    return result


def resolve_finetune_config(config: FinetuneConfig, dataset: Dataset) -> tuple[FinetuneConfig, list[str]]:
    """Settings as they will run on this machine and data, with a note for each that had to give way.

    Raises: ValueError for a device that is not there, list lengths beyond the catalogue, or no training events.
    """
    if not (dataset.split == 0).any():
        raise ValueError(f"data set {dataset.name!r} must have training events, got none")
    if max(config.ks) > dataset.num_items:
        raise ValueError(
            f"ks must be at most the {dataset.num_items} items of data set {dataset.name!r}, got {max(config.ks)}"
        )
    if config.model.titles and not dataset.item_titles:
        raise ValueError(f"model.titles needs item titles, and data set {dataset.name!r} has none")
    notes = []
    if not (dataset.split == 1).any():
        notes.append("no validation events: trained for max_epochs, the last weights are kept")
    return replace(config, device=resolve_device(config.device)), notes


def load_item_inputs(
    config: FinetuneConfig, dataset: Dataset, *, graph: Path_ | None = None, sequence: Path_ | None = None
) -> ItemInputs:
    """The item tables that `config.item_inputs` names, from the runs and the features of the data set.

    Raises: FileNotFoundError, ValueError: a run that is missing, unfinished, or of other items or training events; a
        feature that the data set has not.
    """
    tables: dict[str, Tensor] = {}
    residual = config.model.sequence_residual
    model = None
    if "sequence" in config.item_inputs or residual:
        model = SASRec.load(_checked_run(sequence, "sequence", "hellm sasrec", dataset))
    for name in config.item_inputs:
        if name == "graph":
            tables[name] = _read_table(_checked_run(graph, "graph", "hellm pretrain", dataset), "item")
        elif name == "sequence":
            tables[name] = model.sequence_embedding
        elif name in dataset.item_features:
            tables[name] = torch.from_numpy(dataset.item_features[name].values)
        else:
            known = ", ".join(["graph", "sequence", *dataset.item_features])
            raise ValueError(f"item_inputs must be among {known} for data set {dataset.name!r}, got {name!r}")
    return ItemInputs(tables, model if residual else None)


def _checked_run(path: Path_ | None, name: str, verb: str, dataset: Dataset) -> Path:
    """A finished run of the items and training events of `dataset`."""
    import polars as pl

    if path is None:
        raise ValueError(f"{name} must be the run directory of a finished `{verb}`, got none")
    run = Path(path)
    for file in ("embeddings.safetensors", "ids.parquet", "histories.parquet"):
        if not (run / file).is_file():
            raise FileNotFoundError(f"{name} run {run} holds no {file}: it is no run of `{verb}`, or not finished")
    ids = pl.read_parquet(run / "ids.parquet").filter(pl.col("side") == "item").sort("index")["id"].to_list()
    if ids != dataset.item_ids.ids:
        raise ValueError(
            f"{name} run {run} must be of the {dataset.num_items} items of data set {dataset.name!r}, "
            f"got {len(ids)} items{' with other ids' if len(ids) == dataset.num_items else ''}"
        )
    events = pl.read_parquet(run / "histories.parquet").filter(pl.col("split") == 0)
    own = (events["user"].to_numpy(), events["item"].to_numpy())
    if not all(np.array_equal(*pair) for pair in zip(own, dataset.pairs("train"), strict=True)):
        raise ValueError(f"{name} run {run} was trained on other training events than those of {dataset.name!r}")
    return run


def _read_table(run: Path, name: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(run / "embeddings.safetensors", framework="pt") as file:
        if name not in file.keys():  # noqa: SIM118 (not a mapping)
            raise ValueError(
                f"{run / 'embeddings.safetensors'} must hold a table {name!r}, got {', '.join(file.keys())}"
            )
        return file.get_tensor(name)


def build_recommender_llm(config: FinetuneConfig, dataset: Dataset, inputs: ItemInputs) -> RecommenderLLM:
    """The untrained model of `config`, on the CPU; drawn from torch's global generator."""
    language_model, tokenizer = load_language_model(
        config.llm, dtype=getattr(torch, config.dtype), revision=config.llm_revision
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
    per_target = config.model.graph_context == "prefix"
    users, items = dataset.pairs("train")
    if official:
        users, items = _last_before_split(dataset, config.model.max_length)
    return HistorySampler(
        users,
        items,
        dataset.num_users,
        per_target=per_target,
        max_length=config.model.max_length,
        batch_tokens=config.batch_tokens,
        batch_size=config.batch_size,
        tokens_around=len(model.instruction) + len(model.response) if per_target else 0,
        tokens_per_item=1 + (config.model.max_title_tokens if config.model.titles else 0),
        sort=not official,
        seed=config.seed,
    )


def _last_before_split(dataset: Dataset, max_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Training events among the last `max_length` events of each user, held-out ones counted (published order)."""
    count = np.bincount(dataset.users, minlength=dataset.num_users)
    from_last = count.cumsum()[dataset.users] - np.arange(dataset.num_events)
    kept = (dataset.split == 0) & (from_last <= max_length)
    return dataset.users[kept], dataset.items[kept]


def finetune_loss(model: RecommenderLLM, batch: HistoryBatch) -> Tensor:
    """Mean cross-entropy over the whole catalogue of the items that came next."""
    indptr, items, targets = (torch.from_numpy(np.ascontiguousarray(one)) for one in batch)
    # Padded on the CPU: sizes that follow from values would make a GPU wait.
    padded, mask = pad_histories(indptr, items)
    place = mask.flatten().nonzero().squeeze(1)
    if model.device.type == "cuda":
        pinned = (one.pin_memory() for one in (padded, mask, place, targets))
        padded, mask, place, targets = (one.to(model.device, non_blocking=True) for one in pinned)
    if len(targets) == len(items) and model.graph_context != "prefix":
        query = model.all_queries(padded, mask).flatten(0, 1)[place]
    else:
        query = model.queries(padded, mask)
    return item_cross_entropy(query, model.item_keys_trainable(), targets)


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
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=tuple(config.betas), fused=fused)


def rate_schedule(config: FinetuneConfig, num_steps: int) -> Callable[[int, int], float]:
    """(epoch, step) -> step size: linear from 0 over `warmup_epochs`, then a cosine to `min_learning_rate`.

    The first step is one warm-up step above 0; the published one, kept with compat, is 0 itself.
    """
    first = 0.0 if config.model.compat == "official" else 1.0
    warmup, total = config.warmup_epochs * num_steps, config.max_epochs * num_steps

    def rate(epoch: int, step: int) -> float:
        done = epoch * num_steps + step
        if done < warmup:
            return config.learning_rate * min(1.0, (done + first) / warmup)
        share = (done - warmup) / max(1.0, total - warmup)
        low, high = min(config.min_learning_rate, config.learning_rate), config.learning_rate
        return low + (high - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return rate


def plan_finetuning(config: FinetuneConfig, model: RecommenderLLM, sampler: HistorySampler) -> dict[str, Any]:
    """What a run comes to, from one timed step (forward and backward) of the first batch; nothing is changed by it."""
    generator = torch.get_rng_state()
    model.train()
    batch = sampler.sample(0, 0)
    # The first of the two touches fresh memory, which no later step does.
    for _ in range(2):
        started = time.perf_counter()
        finetune_loss(model, batch).backward()
        model.zero_grad(set_to_none=True)
        if config.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    torch.set_rng_state(generator)
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
        "seconds_of_step": seconds,
        "expected_seconds_per_epoch": per_epoch,
        "expected_seconds": per_epoch * config.max_epochs,
        # The step above, AdamW's two moments on top.
        "memory_bytes": {name: value + 8 * trained for name, value in peak_memory_bytes(config.device).items()},
    }


def _fit(model, config: FinetuneConfig, dataset: Dataset, sampler: HistorySampler, run, evaluate) -> Progress:
    def step_losses(epoch: int, step: int) -> Mapping[str, Tensor]:
        return {"cross_entropy": finetune_loss(model, sampler.sample(epoch, step))}

    def validate(model: RecommenderLLM) -> Mapping[str, float]:
        return _evaluate(evaluate, model, config, dataset, "valid").metrics

    with tensorboard(config.tensorboard, run) as on_epoch:
        return fit(
            model,
            build_optimizer(config, model),
            step_losses,
            sampler.num_steps,
            run,
            learning_rate=rate_schedule(config, sampler.num_steps),
            max_epochs=config.max_epochs,
            accumulate=config.accumulate,
            max_grad_norm=config.max_grad_norm,
            validate=validate if (dataset.split == 1).any() else None,
            validate_every=config.validate_every,
            patience=config.patience,
            monitor=config.monitor,
            checkpoint_every=config.checkpoint_every,
            on_epoch=on_epoch,
        )


def _evaluate(evaluate: Evaluate, model, config: FinetuneConfig, dataset: Dataset, split: str):
    return evaluate(
        model, dataset, split=split, protocol=config.protocol, ks=config.ks, batch_size=config.eval_batch_size
    )


def _test(model, config: FinetuneConfig, dataset: Dataset, evaluate) -> tuple[dict[str, Any] | None, float | None]:
    """Test metrics, and users scored per second."""
    if not (dataset.split == 2).any():
        return None, None
    started = time.perf_counter()
    result = _evaluate(evaluate, model, config, dataset, "test")
    speed = result.num_users / (time.perf_counter() - started)
    test = result.to_dict(level=0.95)
    return {**test["metrics"], **test}, speed


def _write_outputs(model: RecommenderLLM, inputs: ItemInputs, dataset: Dataset, run: RunDirectory) -> None:
    from safetensors.torch import save_file

    with atomic_path(run.embeddings) as temporary:
        tables = {name: table.detach().cpu().contiguous().clone() for name, table in inputs.tables.items()}
        save_file(tables, temporary, metadata={"order": ",".join(tables)})
    if inputs.sequence_model is not None:
        (run.path / _SEQUENCE_MODEL).mkdir(exist_ok=True)
        inputs.sequence_model.save(run.path / _SEQUENCE_MODEL)
    model.save_pretrained(run.path / "model")
    run.write_ids(dataset)
    run.write_histories(dataset)
    run.write_content(dataset)


def _readable_memory_errors() -> contextlib.AbstractContextManager[None]:
    return readable_memory_errors(
        "fine-tuning", "lower batch_tokens, model.max_length or eval_batch_size, or choose a smaller llm"
    )
