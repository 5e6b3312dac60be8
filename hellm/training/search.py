"""Search for settings of a stage by validation: trials in run directories, and a study that can be resumed.

base.yaml      settings that all trials have but for the space
config.yaml    settings of the best trial
search.json    the space, and what each trial came to
study.db       optuna's study (SQLite)
trial-N/       run directory of each trial
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hellm._files import atomic_path
from hellm._folders import check_target, clear_folder, hold, mark_folder
from hellm.artifact.run_directory import RUN_LAYOUT, START_OVER, RunDirectory
from hellm.config import config_to_dict, save_config
from hellm.data import Dataset, load_dataset
from hellm.training.search_space import SPACES, parse_space, plain_values, point_of, with_settings
from hellm.training.stage import MAY_CHANGE
from hellm.training.trainers import SEARCHED, STAGES

if TYPE_CHECKING:
    import optuna

__all__ = ["BASE", "check_search", "search"]

logger = logging.getLogger(__name__)

Path_ = str | os.PathLike[str]

BASE, _STUDY = "base.yaml", "study.db"
_LAYOUT = (
    *(BASE, "config.yaml", "search.json", _STUDY, f"{_STUDY}-*"),
    *(f"trial-*/{file}" for file in RUN_LAYOUT),
)
_TEST = 2
# Settings that a resumed search need not keep.
_FREE = MAY_CHANGE - {"max_epochs", "patience"}
# A trial is compared with others from its third validation on, and with no fewer than five.
_UNPRUNED_VALIDATIONS, _UNPRUNED_TRIALS = 2, 5


def check_search(
    out: Path_, *, resume: bool = False, overwrite: bool = False, inputs: Iterable[Path_ | None] = ()
) -> None:
    """Whether a search may be made, gone on with or replaced at `out`; changes nothing.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    check_target(out, kind="search", layout=_LAYOUT, resume=resume, overwrite=overwrite, inputs=inputs)


def search(
    stage: str,
    data: Path_ | Dataset,
    out: Path_,
    *,
    num_trials: int,
    space: Iterable[str] | None = None,
    config: Any = None,
    resume: bool = False,
    overwrite: bool = False,
    on_trial: Callable[[dict[str, Any]], None] | None = None,
    **runs: Path_ | None,
) -> dict[str, Any]:
    """Train a stage with many settings, and keep those that validation finds best.

    The first trial has the settings of `config`, where the space holds them; the next ones are drawn at random, then by
    what was good so far (a tree-structured Parzen estimator). A trial whose best validation lies below the median of
    the others at the same point is given up. Trials have no test events, so nothing is chosen by them.

    A search that was broken off comes to the same trials as one that was not.

    Args:
        stage: One of `hellm.training.trainers.SEARCHED`.
        data: A data set, or a path for `hellm.data.load_dataset`.
        out: Folder to make.
        num_trials: Trials in all, those of before counted.
        space: Words as `parse_space` takes them; None is that of before, or `SPACES` of the stage.
        config: Settings that all trials have but for the space; None are the defaults. The first of `config.monitor` is
            what is searched for, and `config.seed` the seed of the search as well.
        resume: Go on with a search in `out`, or start one.
        overwrite: Replace a search in `out`.
        on_trial: Called with each trial when it is over, as it stands in "trials".
        **runs: Of other stages, as the stage takes them ("graph" and "sequence" of "finetune").

    Returns: What search.json holds: "monitor", "space" (name -> word), "best" (number of a trial; None where none was
        finished) and "trials": each with its number, "state" ("finished", "given up" or "failed"), "why" (in words, of
        the last two), "value" (of the monitored metric), "best_epoch", "num_validations", "seconds", "settings" and
        "run".

    Raises:
        ValueError: An unknown stage, a space that does not suit (see `parse_space`), data without validation events, or
            a resumed search of another space, other settings, data or runs.
        ImportError: Without optuna; says what to install.
        FileExistsError, FolderInUseError: As `check_search` and `hellm._folders.hold`.
    """
    try:
        import optuna
    except ImportError as error:
        raise ImportError('hellm search needs optuna: pip install "hellm[search]"') from error
    if stage not in SEARCHED:
        raise ValueError(f"stage must be one of {', '.join(SEARCHED)}, got {stage!r}")
    if num_trials < 1:
        raise ValueError(f"num_trials must be >= 1, got {num_trials}")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = SEARCHED[stage]() if config is None else config
    check_search(out, resume=resume, overwrite=overwrite, inputs=[*runs.values()])
    dataset = data if isinstance(data, Dataset) else load_dataset(data)
    if not (dataset.split == 1).any():
        raise ValueError(f"data set {dataset.name!r} must have validation events to choose by, got none")
    out, space = Path(out), list(space) if space is not None else None
    # That of before was looked at before.
    if space is not None or overwrite or not (out / _STUDY).is_file():
        _check_space(stage, SPACES[type(config)] if space is None else space, config, dataset)
    with hold(out):
        mark_folder(out, "search", layout=_LAYOUT)
        if overwrite:
            clear_folder(out)
        searching = _Search.open(stage, config, dataset, out, space, runs)
        while len(searching.trials) < num_trials:
            searching.run_next()
            if on_trial is not None:
                on_trial(searching.trials[-1])
        return searching.write()


def _check_space(stage: str, words: Iterable[str], config: Any, dataset: Dataset) -> None:
    """Raises: ValueError, a value that the settings or the data do not allow."""
    from optuna.distributions import CategoricalDistribution

    resolve = STAGES[stage].resolve
    resolve(config, dataset)
    for name, one in parse_space(words, config).items():
        for text in one.choices if isinstance(one, CategoricalDistribution) else ():
            try:
                changed = with_settings(config, {name: text})
            except ValueError:
                # It needs other values of other settings, which only a trial has.
                continue
            resolve(changed, dataset)


class _Search:
    """A study in its folder, which is held."""

    def __init__(self, stage, config, dataset: Dataset, out: Path, words: list[str], runs, study: optuna.Study) -> None:
        self.stage, self.config, self.out, self.words, self.runs = stage, config, out, words, runs
        self.space, self.study, self.dataset = parse_space(words, config), study, dataset
        self.training_data = dataset.of_events(dataset.split != _TEST)
        # As it is called where lists are cut to the catalogue.
        self.monitor = STAGES[stage].resolve(config, dataset)[0].monitor[0]

    @classmethod
    def open(cls, stage, config, dataset: Dataset, out: Path, words: list[str] | None, runs) -> _Search:
        """Find the study or make one. Raises: ValueError, it is of another space, or other settings, data or runs."""
        import optuna
        from sqlalchemy.engine import URL

        storage = URL.create("sqlite", database=str((out / _STUDY).resolve()))
        study = optuna.create_study(
            storage=storage.render_as_string(),
            study_name="search",
            load_if_exists=True,
            direction="maximize",
            pruner=optuna.pruners.MedianPruner(_UNPRUNED_TRIALS, _UNPRUNED_VALIDATIONS),
        )
        note = study.user_attrs.get("note")
        if words is None:
            words = list[str](SPACES[type(config)] if note is None else note["space"])
        now = {
            "stage": stage,
            "space": words,
            "settings": {name: value for name, value in config_to_dict(config).items() if name not in _FREE},
            "data": dataset.fingerprint,
            "runs": {name: os.fspath(run) for name, run in runs.items() if run is not None},
        }
        if note is None:
            study.set_user_attr("note", now)
        for name in now:
            if note is not None and note[name] != now[name]:
                was, given = _first_difference(note[name], now[name])
                raise ValueError(f"{out}: a resumed search must keep its {name}, was {was}, got {given}; {START_OVER}")
        save_config(config, out / BASE)
        return cls(stage, config, dataset, out, words, runs, study)

    @property
    def trials(self) -> list[dict[str, Any]]:
        """Those that are over, in their order."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return [self._row(trial) for trial in self.study.get_trials(deepcopy=False, states=states)]

    def _row(self, trial: optuna.trial.FrozenTrial) -> dict[str, Any]:
        told = trial.user_attrs
        why = told.get("why")
        finished = trial.state.name == "COMPLETE"
        values = list(trial.intermediate_values.values())
        return {
            "trial": told["place"],
            "state": "finished" if finished else "failed" if why else "given up",
            "why": None if finished else why or "below the median of the other trials",
            "value": trial.value if finished else max(values, default=None),
            "best_epoch": told.get("best_epoch"),
            "num_validations": len(values),
            "seconds": told.get("seconds", 0.0),
            "settings": plain_values(trial.params),
            "run": f"trial-{told['place']}",
        }

    def run_next(self) -> None:
        """One trial: that which was broken off, or a new one."""
        import optuna

        done = len(self.trials)
        # The place of a trial decides what is drawn, so it does not matter how often the search was broken off.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.config.seed + done, multivariate=True, constant_liar=False
        )
        broken_off = self.study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
        for one in broken_off:
            self.study.tell(one.number, state=optuna.trial.TrialState.FAIL)
        known = broken_off[-1].params if broken_off else None
        if known is None or set(known) != set(self.space):
            known = point_of(self.config, self.space) if done == 0 else None
        waiting = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.WAITING,))
        if known is not None and not waiting:
            self.study.enqueue_trial(known)
        trial = self.study.ask({**self.space})
        trial.set_user_attr("place", done)
        outcome = self._outcome(trial, self.out / f"trial-{done}")
        self.study.tell(trial, outcome, state=optuna.trial.TrialState.PRUNED if outcome is None else None)
        self.write()

    def _outcome(self, trial: optuna.Trial, folder: Path) -> float | None:
        """The value that a trial comes to; None for one that is given up or fails."""
        import optuna

        try:
            config = with_settings(self.config, trial.params)
        except ValueError as error:
            trial.set_user_attr("why", str(error))
            return None
        report = _Report(trial, folder, self.monitor)
        try:
            result = STAGES[self.stage].train(
                config, self.training_data, folder, resume=True, on_epoch=report, **self.runs
            )
        except optuna.TrialPruned:
            return None
        except (FloatingPointError, MemoryError) as error:
            trial.set_user_attr("why", str(error))
            logger.warning("trial %d failed: %s", trial.user_attrs["place"], error)
            return None
        finally:
            if (folder / "metrics.jsonl").is_file():
                trial.set_user_attr("seconds", RunDirectory(folder, resume=True).training_seconds())
        # A run that was finished before it was told of.
        report.catch_up()
        trial.set_user_attr("best_epoch", result["best_epoch"])
        return result["valid"]["metrics"][self.monitor]

    def write(self) -> dict[str, Any]:
        """Write search.json and, once there is a best trial, config.yaml. Returns: what search.json holds."""
        trials = self.trials
        finished = [one for one in trials if one["state"] == "finished"]
        best = max(finished, key=lambda one: one["value"]) if finished else None
        found = {
            "stage": self.stage,
            "data": self.dataset.name,
            "fingerprint": self.dataset.fingerprint,
            "monitor": self.monitor,
            "space": dict(word.split("=", 1) for word in self.words),
            "best": None if best is None else best["trial"],
            "trials": trials,
        }
        with atomic_path(self.out / "search.json") as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if best is not None:
            save_config(with_settings(self.config, best["settings"]), self.out / "config.yaml")
        return found


class _Report:
    """Tells a trial of every validation of its run, those of before it was broken off as well."""

    def __init__(self, trial: optuna.Trial, folder: Path, monitor: str) -> None:
        self.trial, self.folder, self.monitor, self.told = trial, folder, monitor, 0

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Raises: optuna.TrialPruned, it is not worth going on."""
        import optuna

        for _ in self._reported():
            if self.trial.should_prune():
                raise optuna.TrialPruned

    def catch_up(self) -> None:
        for _ in self._reported():
            pass

    def _reported(self):
        records = RunDirectory(self.folder, resume=True).read_metrics()
        values = [one for record in records for name, one in record.items() if name == f"valid_{self.monitor}"]
        for value in values[self.told :]:
            self.trial.report(value, self.told)
            self.told += 1
            yield value


def _first_difference(before: Any, now: Any) -> tuple[str, str]:
    """The first parts that differ, in words."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in dict.fromkeys([*before, *now]):
            if before.get(name) != now.get(name):
                was, given = _first_difference(before.get(name), now.get(name))
                return f"{name} {was}", f"{name} {given}"
    return repr(before), repr(now)
