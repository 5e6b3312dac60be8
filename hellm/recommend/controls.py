"""Controls of a fused model: what else than its towers could explain what it gains.

Each control is fused anew from towers that are trained anew where it changes them, with the settings that they had, and
chosen and weighted by validation as the fused model was. So it says what the same effort brings without what it leaves
out.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from hellm._files import read_json
from hellm._folders import check_target, hold, mark_folder
from hellm.artifact import RUN_LAYOUT, read_embeddings
from hellm.config import FinetuneConfig, FuseConfig, PretrainConfig, load_saved_config
from hellm.data import Dataset
from hellm.recommend.controls_report import controls_report
from hellm.recommend.fuse import fuse
from hellm.training.ablation import reads_content
from hellm.training.trainers import STAGES

__all__ = ["CONTROLS", "PlannedControl", "check_controls", "plan_controls", "run_controls"]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]

CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "two-seeds": "the best sequence tower with two seeds, in place of all towers",
        "permuted-text": "towers that read content trained with that of other items",
        "random-transformer": "random weights in place of the language model's, trained in the same way",
    }
)
"""Controls that are trained, by name. Those without a tower, "without-NAME", are part of what `fuse` leaves."""

_LAYOUT = (
    *("ablation.json", "ablation.md", "ablation.png"),
    *(f"{name}/{file}" for name in CONTROLS for file in RUN_LAYOUT),
    *(f"{name}-towers/*/{file}" for name in CONTROLS for file in RUN_LAYOUT),
)


@dataclass(frozen=True)
class _Training:
    """A run to train in place of another.

    Attributes:
        name: Of its folder.
        stage: Among `hellm.training.trainers.STAGES`.
        config: Its settings.
        runs: Runs of other stages that it reads: "graph" or "sequence" -> a folder, or one that is trained before.
        seconds: What the run that it stands for took.
    """

    name: str
    stage: str
    config: Any
    runs: dict[str, Path | _Training] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class PlannedControl:
    """A control as it will run.

    Attributes:
        name: Among `CONTROLS`.
        towers: Name -> a finished run, or what is trained for it.
        permuted: Whether the data are `Dataset.with_permuted_content`.
    """

    name: str
    towers: dict[str, Path | _Training]
    permuted: bool = False


def check_controls(out: Path_) -> None:
    """Whether controls may be written to `out`, a folder that is not there, is empty, or has some already.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    check_target(out, kind="controls of a fusion", layout=_LAYOUT, resume=True)


class _Fused:
    """A fused run and the runs that it was made of."""

    def __init__(self, run: Path_, device: str, inputs: Mapping[str, Path_ | None]) -> None:
        self.path, self.device = Path(run), device
        if not (self.path / "result.json").is_file():
            raise FileNotFoundError(
                f"fused run {run} holds no result.json: it is no run of `hellm fuse`, or not finished"
            )
        self.result = read_json(self.path / "result.json")
        if self.result.get("stage") != "fuse":
            raise ValueError(f"fused run {run} must be of `hellm fuse`, got one of stage {self.result.get('stage')!r}")
        self.config = replace(load_saved_config(FuseConfig, self.path / "config.yaml"), device=device)
        self.towers = {name: self._tower(name, one["run"]) for name, one in self.result["towers"].items()}
        self.inputs = inputs

    def _tower(self, name: str, given: str) -> Path:
        """Where a tower's own run is: as it was given, or beside the fused run, which `hellm run` makes so."""
        for one in (Path(given), self.path.parent / Path(given).name):
            if (one / "result.json").is_file():
                return one
        raise FileNotFoundError(
            f"tower {name} of {self.path} must be where it was when it was fused, but {given} holds no finished run"
        )

    def stage(self, name: str) -> str:
        return read_json(self.towers[name] / "result.json")["stage"]

    def of_stage(self, stage: str) -> list[str]:
        return [name for name in self.towers if self.stage(name) == stage]

    def settings(self, run: Path, stage: str) -> Any:
        return replace(load_saved_config(STAGES[stage].config, run / "config.yaml"), device=self.device)

    def training(self, run: Path, name: str, stage: str, **changes: Any) -> _Training:
        config = replace(self.settings(run, stage), **changes)
        seconds = read_json(run / "result.json").get("seconds") or 0.0
        runs = self.inputs_of(run, name) if STAGES[stage].inputs else {}
        return _Training(name, stage, config, dict(runs), seconds)

    def inputs_of(self, run: Path, name: str) -> dict[str, Path]:
        """The runs that a language model reads. Raises: ValueError, one that is not given and no tower is."""
        config = self.settings(run, "finetune")
        needed = {"graph": "graph" in config.named_inputs}
        needed["sequence"] = "sequence" in config.named_inputs or config.model.sequence_residual
        return {role: self._input(run, name, role) for role, is_needed in needed.items() if is_needed}

    def _input(self, run: Path, name: str, role: str) -> Path:
        given = self.inputs.get(role)
        if given is not None:
            return Path(given)
        stage = {"graph": "pretrain", "sequence": "sasrec"}[role]
        for other in self.of_stage(stage):
            if role == "sequence" or _same_table(run, self.towers[other]):
                return self.towers[other]
        raise ValueError(f"{role} must be the run that tower {name} was trained with, which is no tower itself")


def _same_table(llm: Path, graph: Path) -> bool:
    """Whether a language model was told of the items by this stage-1 run."""
    told, own = (read_embeddings(run).tensors[name] for run, name in ((llm, "graph"), (graph, "item")))
    return torch.equal(told, own)


def plan_controls(
    fused: Path_,
    *,
    rows: Iterable[str] | None = None,
    device: str = "auto",
    graph: Path_ | None = None,
    sequence: Path_ | None = None,
) -> tuple[list[PlannedControl], dict[str, str]]:
    """The controls to train for a fused run.

    Args:
        fused: Run of `hellm fuse`, whose towers are where they were.
        rows: Names among `CONTROLS`; None takes all that are possible.
        device: Where they are trained.
        graph, sequence: Runs that the language model was trained with, where they are no towers themselves.
    Returns: Controls, and name -> why of those that are not possible (only where `rows` is None).
    Raises: ValueError, no fused run, a control that is unknown (with the nearest name) or, if named, not possible;
        FileNotFoundError, a tower that is not there.
    """
    return _plan(_Fused(fused, device, {"graph": graph, "sequence": sequence}), rows)


def _plan(fused: _Fused, rows: Iterable[str] | None) -> tuple[list[PlannedControl], dict[str, str]]:
    planned, skipped = [], {}
    for name in dict.fromkeys(CONTROLS if rows is None else rows):
        if name not in CONTROLS:
            nearest = difflib.get_close_matches(name, CONTROLS, n=1, cutoff=0.4)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"rows must be among {', '.join(CONTROLS)}, got {name!r}{hint}")
        try:
            planned.append(_PLANS[name](fused))
        except ValueError as error:
            if rows is not None:
                raise ValueError(f"row {name!r} is not possible: {error}") from None
            skipped[name] = str(error)
    return planned, skipped


def _two_seeds(fused: _Fused) -> PlannedControl:
    sequence, monitor = fused.of_stage("sasrec"), fused.config.monitor[0]
    if not sequence:
        raise ValueError("a tower must be a sequence model, got none")
    best = max(sequence, key=lambda name: fused.result["towers"][name]["valid"][monitor])
    run = fused.towers[best]
    seed = fused.settings(run, "sasrec").seed + 1
    other = fused.training(run, f"{best}-seed{seed}", "sasrec", seed=seed)
    return PlannedControl("two-seeds", {best: run, other.name: other})


def _permuted_text(fused: _Fused) -> PlannedControl:
    made: dict[Path, Path | _Training] = {}

    def permuted(run: Path, name: str) -> Path | _Training:
        """What stands for a run; the run itself where it reads no content."""
        key = run.resolve()
        if key not in made:
            stage = read_json(run / "result.json")["stage"]
            config = fused.settings(run, stage)
            inputs = {}
            if stage == "finetune":
                given = fused.inputs_of(run, name)
                inputs = {
                    role: permuted(one, names.get(one.resolve(), f"{name}-{role}")) for role, one in given.items()
                }
            changed = any(isinstance(one, _Training) for one in inputs.values())
            training = fused.training(run, name, stage)
            made[key] = replace(training, runs=inputs) if changed or _reads_content(config) else run
        return made[key]

    names = {run.resolve(): name for name, run in fused.towers.items()}
    towers = {name: permuted(run, name) for name, run in fused.towers.items()}
    if not any(isinstance(one, _Training) for one in towers.values()):
        raise ValueError("a tower must read the content of the items, got none")
    return PlannedControl("permuted-text", towers, permuted=True)


def _random_transformer(fused: _Fused) -> PlannedControl:
    models = fused.of_stage("finetune")
    if not models:
        raise ValueError("a tower must be a language model, got none")
    changed = {name: fused.training(fused.towers[name], name, "finetune", llm_init="random") for name in models}
    return PlannedControl("random-transformer", fused.towers | changed)


_PLANS: Mapping[str, Callable[[_Fused], PlannedControl]] = {
    "two-seeds": _two_seeds,
    "permuted-text": _permuted_text,
    "random-transformer": _random_transformer,
}


def _reads_content(config: Any) -> bool:
    """Whether a run with these resolved settings was told what the items look and read like."""
    if isinstance(config, PretrainConfig):
        return config.model.item_hypergraph
    return reads_content(config) if isinstance(config, FinetuneConfig) else bool(config.content)


def run_controls(
    fused: Path_,
    dataset: Dataset,
    out: Path_,
    *,
    rows: Iterable[str] | None = None,
    device: str = "auto",
    graph: Path_ | None = None,
    sequence: Path_ | None = None,
    on_training: Callable[[str, float], None] | None = None,
) -> dict[str, Any]:
    """Train and fuse the controls of a fused run, and compare their tests with its test, user by user.

    What is finished is read, not repeated, and what was interrupted goes on; so the same call completes the whole.

    Args:
        fused: As for `plan_controls`, with a test; rows, device, graph and sequence too.
        dataset: Of the fused run.
        out: Folder, made if absent: `out`/ROW is the fused run of a control, `out`/ROW-towers/NAME what was trained.
        on_training: Called with "row, tower (n of all)" and the seconds that the tower took that it stands for, before
            it is trained or found finished.
    Returns: Plain values as `hellm.training.ablation_report.ablation_report` gives them: "rows" are "full" (the fused
        run), the controls, and "without-NAME" for each of its towers; those that were fused have "weights".
    Raises: As `plan_controls`, `fuse` and what trains a stage; ValueError, data of another fingerprint, or no test.
    """
    given = _Fused(fused, device, {"graph": graph, "sequence": sequence})
    if given.result["dataset"]["fingerprint"] != dataset.fingerprint:
        raise ValueError(f"data must be those of fused run {fused}, but {dataset.name!r} has other events or features")
    if given.result["test"] is None:
        raise ValueError(f"fused run {fused} must have a test to compare by, got none")
    planned, skipped = _plan(given, rows)
    check_controls(out)
    out = Path(out)
    with hold(out):
        mark_folder(out, "controls of a fusion", layout=_LAYOUT)
        results, runs = {}, {}
        for control in planned:
            data = dataset.with_permuted_content() if control.permuted else dataset
            folder = out / f"{control.name}-towers"
            runs[control.name] = _train(control, data, folder, on_training)
            results[control.name] = fuse(runs[control.name], data, out / control.name, given.config, resume=True)
        return controls_report(given, dataset, results, runs, CONTROLS, skipped, out)


def _train(
    control: PlannedControl, dataset: Dataset, folder: Path, on_training: Callable[[str, float], None] | None
) -> dict[str, Path]:
    """Name -> finished run of each tower."""
    waiting = list(_trainings(control.towers.values()))
    for place, one in enumerate(waiting, 1):
        if on_training is not None:
            on_training(f"{control.name}, {one.name} ({place} of {len(waiting)})", one.seconds)
        runs = {role: _folder(run, folder) for role, run in one.runs.items()}
        STAGES[one.stage].train(one.config, dataset, folder / one.name, resume=True, **runs)
    return {name: _folder(one, folder) for name, one in control.towers.items()}


def _folder(run: Path | _Training, folder: Path) -> Path:
    return folder / run.name if isinstance(run, _Training) else run


def _trainings(runs: Iterable[Path | _Training]) -> Iterable[_Training]:
    """Each once, what it reads before it."""
    found: dict[str, _Training] = {}
    for run in runs:
        if isinstance(run, _Training):
            for one in [*_trainings(run.runs.values()), run]:
                found.setdefault(one.name, one)
    return found.values()
