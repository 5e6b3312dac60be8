"""Ablations of the fine-tuned language model: named changes of its settings, and their runs side by side."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hellm._folders import check_target, hold, mark_folder
from hellm.artifact import RUN_LAYOUT, RunDirectory
from hellm.artifact.files import CONFIG
from hellm.config import FinetuneConfig, PretrainConfig, load_config, override_config

if TYPE_CHECKING:
    from hellm.data import Dataset

__all__ = [
    "ABLATIONS",
    "Ablation",
    "PlannedRow",
    "check_ablations",
    "hold_ablations",
    "plan_ablations",
    "reads_content",
    "run_ablations",
]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]
_LAYOUT = (
    *("ablation.json", "ablation.md", "ablation.png"),
    *(f"{folder}/{file}" for folder in ("*-seed*", "stage1-*") for file in RUN_LAYOUT),
)


@dataclass(frozen=True)
class Ablation:
    """One change of the full model.

    Attributes:
        words: what differs from the full model.
        settings: overrides of `FinetuneConfig`.
        without_input: taken out of `item_inputs`.
        with_input: added to `item_inputs`.
        stage_1: overrides of `PretrainConfig`; with any, stage 1 is trained anew.
        permuted: whether the features and titles that are read are those of other items
            (`Dataset.with_permuted_content`).
    """

    words: str
    settings: tuple[str, ...] = ()
    without_input: str | None = None
    with_input: str | None = None
    stage_1: tuple[str, ...] = ()
    permuted: bool = False

    def overrides(self, config: FinetuneConfig) -> tuple[str, ...]:
        """The changes of `config`, as `override_config` takes them."""
        inputs = [name for name in config.named_inputs if name != self.without_input]
        if self.with_input is not None and self.with_input not in inputs:
            inputs.append(self.with_input)
        changed = (f"item_inputs=[{', '.join(inputs)}]",) if tuple(inputs) != config.named_inputs else ()
        return changed + self.settings


ABLATIONS: Mapping[str, Ablation] = MappingProxyType(
    {
        "full": Ablation("the model as set"),
        "no-graph-context": Ablation(
            "the graph only in the item tokens, not as context of the history", ("model.graph_context=none",)
        ),
        "no-graph": Ablation("no stage-1 embeddings at all", ("model.graph_context=none",), without_input="graph"),
        # The residual is made of the scores of the sequence model, so it goes as well.
        "no-sequence": Ablation("no SASRec embeddings", ("model.sequence_residual=false",), without_input="sequence"),
        "learned-prefix": Ablation("a learned prefix, the same for all histories", ("model.learned_prefix=true",)),
        "no-learned-prefix": Ablation("no learned prefix", ("model.learned_prefix=false",)),
        "no-lora": Ablation("the language model stays as it is", ("model.lora_rank=0",)),
        "head-trained": Ablation("scores against a trained table of items", ("model.head=trained",)),
        "head-frozen": Ablation("scores against a random table of items, as published", ("model.head=frozen",)),
        "prefix": Ablation(
            "graph context and a learned prefix before every layer, one history per pass, as published",
            ("model.graph_context=prefix", "model.learned_prefix=true"),
        ),
        "titles": Ablation("item titles in the prompt", ("model.titles=true",)),
        "text": Ablation("text features in the item tokens", with_input="text"),
        # Controls: what the content and the language model say must be lost here, what their numbers alone do is not.
        "permuted-text": Ablation("features and titles of other items; the graph stays", permuted=True),
        "random-transformer": Ablation("random weights in place of the language model's", ("llm_init=random",)),
        "residual": Ablation("starts from the scores of SASRec and adds to them", ("model.sequence_residual=true",)),
        "no-user-hypergraph": Ablation("stage 1 without the user hypergraph", stage_1=("model.user_hypergraph=false",)),
        "no-item-hypergraph": Ablation("stage 1 without the item hypergraph", stage_1=("model.item_hypergraph=false",)),
    }
)
"""Rows by name, "full" first: what all others are compared with."""


@dataclass(frozen=True)
class PlannedRow:
    """One row as it will run.

    Attributes:
        name: among `ABLATIONS`.
        config: settings of the fine-tuning, but for the seed.
        overrides: how they differ from the full model's.
        stage_1: settings of the stage 1 to train anew; None where the given one serves.
        permuted: whether the content is that of other items.
    """

    name: str
    config: FinetuneConfig
    overrides: tuple[str, ...]
    stage_1: PretrainConfig | None = None
    permuted: bool = False


def plan_ablations(
    config: FinetuneConfig, dataset: Dataset, *, graph: Path_ | None = None, rows: Iterable[str] | None = None
) -> tuple[list[PlannedRow], dict[str, str]]:
    """The rows to run, "full" always among them as the first.

    Args:
        config: settings of the full model.
        dataset: decides which rows are possible.
        graph: finished stage-1 run, whose settings the rows without a hypergraph change.
        rows: names among `ABLATIONS`; None takes all that data and settings allow.
    Returns: rows, and name -> why of those left out: not possible (only where `rows` is None), or the same as "full".
    Raises: ValueError, a row that is unknown (with the nearest name) or, if named, not possible.
    """
    from hellm.training.item_inputs import resolve_item_inputs

    config = resolve_item_inputs(config, dataset)
    planned, skipped = [], {}
    names = list(ABLATIONS) if rows is None else ["full", *rows]
    for name in dict.fromkeys(names):
        if name not in ABLATIONS:
            nearest = difflib.get_close_matches(name, ABLATIONS, n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"rows must be among {', '.join(ABLATIONS)}, got {name!r}{hint}")
        try:
            row = _planned(name, config, dataset, graph)
        except ValueError as error:
            if rows is not None or name == "full":
                raise ValueError(f"row {name!r} is not possible: {error}") from None
            skipped[name] = str(error)
            continue
        if name != "full" and row.stage_1 is None and row.config == config and not row.permuted:
            skipped[name] = "the same as full with these settings"
        else:
            planned.append(row)
    return planned, skipped


def _planned(name: str, config: FinetuneConfig, dataset: Dataset, graph: Path_ | None) -> PlannedRow:
    from hellm.training.finetune import resolve_finetune_config

    ablation = ABLATIONS[name]
    overrides = ablation.overrides(config)
    changed = override_config(config, overrides)
    resolve_finetune_config(changed, dataset)
    absent = [one for one in changed.named_inputs if one not in ("graph", "sequence", *dataset.item_content)]
    if absent:
        raise ValueError(f"data set {dataset.name!r} has no item features {absent[0]!r}")
    if ablation.permuted and not reads_content(changed):
        raise ValueError(
            f"item_inputs must hold features where titles are not read, got {', '.join(config.named_inputs)}"
        )
    if not ablation.stage_1:
        return PlannedRow(name, changed, overrides, permuted=ablation.permuted)
    if "graph" not in config.named_inputs:
        raise ValueError(f"item_inputs must hold 'graph', got {', '.join(config.named_inputs)}")
    before = _stage_1_of(graph)
    stage_1 = override_config(before, ablation.stage_1)
    return PlannedRow(name, changed, overrides, None if stage_1 == before else stage_1)


def reads_content(config: FinetuneConfig) -> bool:
    """Whether a language model with named `item_inputs` reads features or titles itself."""
    return config.model.titles or any(name not in ("graph", "sequence") for name in config.named_inputs)


def _stage_1_of(graph: Path_ | None) -> PretrainConfig:
    """Raises: ValueError, no run; FileNotFoundError, one without settings."""
    if graph is None:
        raise ValueError("graph must be the run directory of a finished `hellm pretrain`, got none")
    file = Path(graph) / CONFIG
    if not file.is_file():
        raise FileNotFoundError(f"graph run {Path(graph)} holds no config.yaml: it is no run of `hellm pretrain`")
    return load_config(PretrainConfig, file)


def check_ablations(out: Path_) -> None:
    """Whether ablations may be written to `out`, a folder that is not there, is empty, or has some already.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    if Path(out).is_dir() and any((one / "checkpoint").is_dir() for one in Path(out).glob("full-seed*")):
        # Earlier versions wrote no marks.
        proof = next(one.name for one in Path(out).glob("full-seed*"))
    else:
        proof = None
    check_target(out, kind="ablation", layout=_LAYOUT, resume=True, proof=proof)


@contextlib.contextmanager
def hold_ablations(out: Path_) -> Iterator[None]:
    """Check, hold and mark the folder of ablations. Raises: as `check_ablations` and `hellm._folders.hold`."""
    check_ablations(out)
    with hold(out):
        mark_folder(out, "ablation", layout=_LAYOUT)
        yield


def run_ablations(
    config: FinetuneConfig,
    dataset: Dataset,
    out: Path_,
    *,
    graph: Path_ | None = None,
    sequence: Path_ | None = None,
    rows: Iterable[str] | None = None,
    seeds: Sequence[int] | None = None,
    on_run: Callable[[str, Mapping[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Fine-tune once per row and seed, each into a run directory `out`/ROW-seedN.

    What is finished is read, not repeated, and what was interrupted goes on; so the same call completes the whole.
    Beside what `finetune` leaves, each run holds test_users.safetensors, the test metrics of every user.

    Args:
        config: settings of the full model; see `hellm.config`.
        dataset: with test events.
        out: folder of the runs; stage 1 is trained anew into `out`/stage1-ROW where a row needs it.
        graph, sequence: finished runs, as for `finetune`.
        rows: as for `plan_ablations`.
        seeds: of the fine-tuning; None takes the one of `config`.
        on_run: called with "row, seed (n of all)" and the plan before a run's first epoch.
    Returns: "seeds", "skipped" (name -> why) and "rows", each with its name, words, overrides, stage_1 (run, overrides
        and seconds; None where the given run served) and "runs": one per seed, with its folder in `out`, best_epoch,
        valid and test metrics, intervals, training seconds, users scored per second and number of trained parameters.
    Raises: as `plan_ablations`, `load_item_inputs` and `finetune`; ValueError without test events.
    """
    from hellm.training.item_inputs import load_item_inputs

    if not (dataset.split == 2).any():
        raise ValueError(f"data set {dataset.name!r} must have test events to compare by, got none")
    seeds = list(dict.fromkeys(seeds if seeds is not None else [config.seed]))
    if not seeds:
        raise ValueError("seeds must hold one or more numbers, got none")
    planned, skipped = plan_ablations(config, dataset, graph=graph, rows=rows)
    # Every input is read once before anything is trained: a missing run shows at once.
    for row in planned:
        load_item_inputs(row.config, _data_of(row, dataset), graph=graph, sequence=sequence)
    for name, why in skipped.items():
        logger.warning("row %s left out: %s", name, why)
    done, place, total = [], 0, len(planned) * len(seeds)
    for row in planned:
        row_graph, stage_1 = graph, None
        if row.stage_1 is not None:
            row_graph, stage_1 = _train_stage_1(row, row.stage_1, config, dataset, Path(out))
        runs = {}
        for seed in seeds:
            place += 1
            folder = Path(out) / f"{row.name}-seed{seed}"
            label = f"{row.name}, seed {seed} ({place} of {total})"
            runs[str(seed)] = _run(
                replace(row.config, seed=seed),
                _data_of(row, dataset),
                folder,
                label,
                row_graph,
                sequence,
                on_run,
            )
        words = ABLATIONS[row.name].words
        done.append(
            {"name": row.name, "words": words, "overrides": list(row.overrides), "stage_1": stage_1, "runs": runs}
        )
    return {"seeds": seeds, "skipped": skipped, "rows": done}


def _data_of(row: PlannedRow, dataset: Dataset) -> Dataset:
    return dataset.with_permuted_content() if row.permuted else dataset


def _train_stage_1(
    row: PlannedRow, stage_1: PretrainConfig, config: FinetuneConfig, dataset: Dataset, out: Path
) -> tuple[Path, dict[str, Any]]:
    """The run of `row.stage_1`, trained on the device of the fine-tuning, and what is told of it."""
    from hellm.training.pretrain import pretrain

    run = out / f"stage1-{row.name}"
    here = {name: getattr(config, name) for name in ("device", "num_threads", "tensorboard")}
    logger.info("%s: training stage 1 into %s", row.name, run)
    pretrain(replace(stage_1, **here), dataset, run, resume=True)
    return run, {"run": run.name, "overrides": list(ABLATIONS[row.name].stage_1), "seconds": _seconds(run)}


def _run(
    config: FinetuneConfig,
    dataset: Dataset,
    folder: Path,
    label: str,
    graph: Path_ | None,
    sequence: Path_ | None,
    on_run: Callable[[str, Mapping[str, Any]], None] | None,
) -> dict[str, Any]:
    from hellm.training.finetune import finetune

    result = finetune(
        config,
        dataset,
        folder,
        graph=graph,
        sequence=sequence,
        resume=True,
        on_plan=None if on_run is None else lambda plan: on_run(label, plan),
    )
    return {
        "run": folder.name,
        "best_epoch": result["best_epoch"],
        "num_epochs": result["num_epochs"],
        "valid": result["valid"],
        "test": {name: result["test"][name] for name in _KEPT},
        "training_seconds": _seconds(folder),
        "users_per_second": result["test_users_per_second"],
        "num_trained_parameters": result["num_trained_parameters"],
    }


_KEPT = ("metrics", "confidence_level", "confidence_intervals", "num_users", "num_items", "protocol")


def _seconds(run: Path) -> float:
    """Training steps and validations of all epochs, whatever interrupted them."""
    return RunDirectory(run, resume=True).training_seconds()
