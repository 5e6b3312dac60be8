"""From raw data to recommendations: the stages of a run, each with its folder, each skipped where it is done.

Nothing is printed here: every step says what it does and returns what came of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hellm._files import atomic_path, read_json, writing
from hellm._folders import check_target, clear_folder, hold, mark_folder
from hellm.artifact.files import CHECKPOINT, CONFIG, REFIT, RUN_LAYOUT
from hellm.artifact.run_directory import START_OVER
from hellm.config import RunConfig, config_to_dict, load_saved_config, save_config

if TYPE_CHECKING:
    from hellm.data import Dataset

__all__ = ["LAYOUT", "Pipeline", "Step", "check_pipeline", "run"]

# Stages that can begin with the weights of an earlier run.
_WARM = ("stage1", "lightgcn", "sasrec", "content")
_STAGES = ("stage1", "lightgcn", "transitions", "sasrec", "content", "llm", "fused")
LAYOUT = (
    *(CONFIG, REFIT, "source.json", "comparison.json", "recommendations.json"),
    *("data/dataset.json", "data/*.parquet", "data/*/*.npy"),
    *(f"{stage}/{file}" for stage in _STAGES for file in RUN_LAYOUT),
)
"""Files of a run of all stages, as `hellm._folders.mark_folder` takes them."""
# Users shown at the end.
_SHOWN = 3


class Step(NamedTuple):
    """One step of a pipeline.

    Attributes:
        name: Its folder, or "compare" or "recommend".
        text: What it does, in a sentence.
        command: The command that does the same by itself.
        run: Does it, or reads what it has come to before; returns what came of it.
    """

    name: str
    text: str
    command: str
    run: Callable[[], Any]


def run(
    data: str | PathLike[str] | Dataset,
    out: str | PathLike[str],
    config: RunConfig | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    cache: str | PathLike[str] | None = None,
    on_step: Callable[[Step], None] | None = None,
    on_plan: Callable[[str, Mapping[str, Any]], None] | None = None,
    on_value: Callable[[Step, Any], None] | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """From raw data to recommendations: what `hellm run` does.

    Args:
        data: A data set, or a path for `hellm.data.load_dataset`.
        out: Folder of everything.
        config: Settings of all stages; None is `RunConfig()`.
        resume: Go on with what is there.
        overwrite: Replace what is there.
        cache: Folder of encoded texts and pictures, and of neighbours; None is the user's cache.
        on_step: Called before each step.
        on_plan: Called with the name of a step and what it is likely to cost, before it trains.
        on_value: Called with each step and what came of it.
        reading: Options of `hellm.data.load_dataset` for a path, such as `columns={"user": "client"}`.
    Returns: Name of the step -> what came of it: "data" (the data set), each stage ("stage1", "sasrec", ...: what its
        result.json holds), "compare" (see `hellm.compare`), "recommend" (lists of some users, with reasons).
    Raises: As `Pipeline` and the stages; `hellm._folders.FolderInUseError`, another process works there; ValueError,
        options of reading for data that are read already.
    """
    from hellm.data import Dataset, load_dataset

    if reading and isinstance(data, Dataset):
        raise ValueError(f"data must be a path where {', '.join(reading)} are given, got a data set")
    inputs = [] if isinstance(data, Dataset) else [data]
    check_pipeline(out, resume=resume, overwrite=overwrite, inputs=inputs)
    values = {}
    with hold(out):
        options = {"resume": resume, "overwrite": overwrite, "cache": cache, "on_plan": on_plan}
        pipeline = Pipeline(out, config or RunConfig(), **options)
        for step in pipeline.steps(lambda: data if isinstance(data, Dataset) else load_dataset(data, **reading)):
            if on_step is not None:
                on_step(step)
            values[step.name] = step.run()
            if on_value is not None:
                on_value(step, values[step.name])
    return values


def check_pipeline(
    path: str | PathLike[str],
    *,
    resume: bool = False,
    overwrite: bool = False,
    inputs: Sequence[str | PathLike[str] | None] = (),
) -> None:
    """Whether a run of all stages may be made, gone on with or replaced at `path`; changes nothing.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    options = {"resume": resume, "overwrite": overwrite, "inputs": inputs, "proof": "data"}
    check_target(path, kind="run of all stages", layout=LAYOUT, **options)


class Pipeline:
    """The stages of a run, each with its folder in `out`, each skipped where it is done.

    Args:
        out: Folder of everything.
        config: Settings of all stages.
        resume: Go on with what is there.
        overwrite: Delete what is there.
        cache: Folder of encoded texts and pictures, and of neighbours; None is the user's cache.
        on_plan: Called with the name of a stage and what it is likely to cost, before it trains.
        start: Run of all stages, of data that these continue, whose weights training begins with.

    Attributes:
        dataset: The data set with its features, once the step "data" has run.
        notes: What had to give way, in words.
        ks: List lengths, none beyond the catalogue.

    Raises:
        FileExistsError: Something is there and neither is given, or it is no such run.
        ValueError: Both are given, or a resumed run has other settings (those of a stage are checked by the stage).
        ImportError, FileNotFoundError: The language model, or what it needs, is not on this machine.
    """

    def __init__(
        self,
        out: str | PathLike[str],
        config: RunConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        cache: str | PathLike[str] | None = None,
        on_plan: Callable[[str, Mapping[str, Any]], None] | None = None,
        start: str | PathLike[str] | None = None,
    ) -> None:
        check_pipeline(out, resume=resume, overwrite=overwrite)
        if config.language_model:
            from hellm.models.llm.language_model import check_installed

            # Not after an hour of the stages before it.
            check_installed(config.finetune.llm)
        self.out, self.config, self.cache = Path(out), config, cache
        self.start = None if start is None else Path(start)
        self.on_plan = on_plan
        self.dataset: Any = None
        self.notes: list[str] = []
        with writing(self.out):
            self.out.mkdir(parents=True, exist_ok=True)
            mark_folder(self.out, "run of all stages", layout=LAYOUT)
            if overwrite:
                # What a stage left can be gone on with only where the data are.
                clear_folder(self.out, last=[self.path("data"), self.path(CONFIG)])
        saved = self.path(CONFIG)
        self._before = saved.read_text(encoding="utf-8") if saved.is_file() else None
        if saved.is_file():
            before, now = (config_to_dict(one) for one in (load_saved_config(RunConfig, saved), config))
            for name in ("text", "image"):
                if before[name] != now[name]:
                    raise ValueError(
                        f"{saved}: a resumed run must keep its encoders; {name} was {before[name]!r}, got "
                        f"{now[name]!r}; {START_OVER}"
                    )

    # ---- what there is

    def path(self, name: str) -> Path:
        """Of a step or a file in `out`."""
        return self.out / name

    @property
    def final(self) -> str:
        """The stage that recommends: the fused one, or without validation events the last."""
        if (self.dataset.split == 1).any():
            return "fused"
        return "llm" if self.config.language_model else "sasrec"

    @property
    def towers(self) -> list[str]:
        """The stages that are added up."""
        content = ["content"] if self.dataset.item_features or self.dataset.attribute_sets else []
        return ["stage1", "transitions", "sasrec", *content, *(["llm"] if self.config.language_model else [])]

    @property
    def ks(self) -> tuple[int, ...]:
        return tuple(sorted({min(k, self.dataset.num_items) for k in self.config.ks}))

    # ---- steps

    def steps(self, load: Callable[[], Dataset]) -> Iterator[Step]:
        """All steps in order; each must have run before the next is asked for."""
        yield self.data(load)
        yield from self.training()
        yield self.comparison()
        yield self.recommendations()

    def data(self, load: Callable[[], Dataset]) -> Step:
        """The data set with its features, in `data/`."""
        return Step(
            "data",
            "Read the data, encode texts and pictures, and hold out events.",
            f"hellm features DATA --out {self.path('data')}",
            lambda: self._prepare(load),
        )

    def training(self) -> Iterator[Step]:
        """Stage 1, the LightGCN baseline, the sequence models, the language model if asked for, and their sum."""
        from hellm.training.pretrain import pretrain
        from hellm.training.sasrec import train_sasrec
        from hellm.training.transitions import fit_transitions

        config, common = self.config, self._common()
        stage_1 = replace(config.pretrain, **common)
        yield self._stage("stage1", "Train the hypergraph recommender (stage 1).", "pretrain", pretrain, stage_1)
        if "lightgcn" in config.baselines:
            model = replace(stage_1.model, backbone="lightgcn", user_hypergraph=False, item_hypergraph=False)
            baseline = replace(stage_1, model=model)
            yield self._stage("lightgcn", "Train LightGCN to compare with.", "pretrain", pretrain, baseline)
        counted = replace(config.transitions, **common)
        text = "Count what follows what."
        yield self._stage("transitions", text, "transitions", fit_transitions, counted, told=False)
        sequence = replace(config.sasrec, **common)
        yield self._stage("sasrec", "Train the sequence model SASRec.", "sasrec", train_sasrec, sequence)
        if "content" in self.towers:
            text = "Train a sequence model that reads the content of items alone."
            content = replace(config.content, **common)
            yield self._stage("content", text, "sasrec", train_sasrec, content)
        if config.language_model:
            yield self._language_model()
        if self.final == "fused":
            yield self._fusion()

    def comparison(self) -> Step:
        """All models on the test split, in one table, and in comparison.json."""
        names = [self.final, *reversed(self.towers), *(["lightgcn"] if "lightgcn" in self.config.baselines else [])]
        models = [str(self.path(name)) for name in dict.fromkeys(names)]
        models += [name for name in self._available_baselines() if name != "lightgcn"]
        ks = " ".join(map(str, self.ks))
        return Step(
            "compare",
            "Compare all models on events that none of them has seen.",
            f"hellm evaluate {' '.join(models)} --data {self.path('data')} --protocol {self.config.protocol} "
            f"--ks {ks} --slices",
            lambda: self._compare(models),
        )

    def recommendations(self, users: Sequence[str] | None = None, k: int = 5) -> Step:
        """Lists of a few users with reasons, and in recommendations.json."""
        from hellm.recommend import Recommender

        recommender = Recommender.load(self.path(self.final))
        users = list(users or recommender.user_ids.ids[:_SHOWN])
        return Step(
            "recommend",
            "Recommend.",
            f"hellm recommend {self.path(self.final)} --users {' '.join(users)} -k {k} --explain",
            lambda: self._recommend(recommender, users, k),
        )

    # ---- what they do

    def _prepare(self, load: Callable[[], Dataset]) -> Dataset:
        from hellm.data import load_dataset, save_dataset

        folder, note = self.path("data"), self.path("source.json")
        source = load()
        parts = _source_fingerprints(source, pictures=self.config.image != "none")
        before = read_json(note) if note.is_file() else load_dataset(folder).fingerprints if folder.is_dir() else {}
        changed = [name for name in _comparable(parts, before) if parts[name] != before[name]]
        if changed:
            raise ValueError(
                f"{self.out}: a resumed run must keep its data, and those given are others: {', '.join(changed)}; "
                f"give the data it was started with, read with the same options, or, {START_OVER}"
            )
        save_config(self.config, self.path(CONFIG))
        if folder.is_dir():
            self.notes.append(f"{folder} is there from before, and of the same data")
        else:
            encoded = _with_features(source, self.config, self.cache)
            with atomic_path(note) as temporary:
                temporary.write_text(json.dumps(parts) + "\n", encoding="utf-8")
            save_dataset(encoded, folder)
        self.dataset = load_dataset(folder)
        if max(self.config.ks) > self.dataset.num_items:
            self.notes.append(f"list lengths cut to the {self.dataset.num_items} items there are")
        return self.dataset

    def _common(self) -> dict[str, Any]:
        return {"protocol": self.config.protocol, "ks": self.ks}

    def _stage(
        self,
        name: str,
        text: str,
        verb: str,
        train: Callable,
        config: Any,
        *,
        told: bool = True,
        **runs: Path,
    ) -> Step:
        """A step that trains; what it will cost is told before, unless that is seconds."""
        folder = self.path(name)
        inputs = "".join(f" --{key} {value}" for key, value in runs.items())
        command = f"hellm {verb} --data {self.path('data')}{inputs} --config {folder / CONFIG} --out {folder}"
        options = {"on_plan": self._teller(name)} if told else {}
        return Step(name, text, command, lambda: self._train(name, train, config, **options, **runs))

    def _train(self, name: str, train: Callable, config: Any, **options: Any) -> dict[str, Any]:
        if self.start is not None and name in _WARM and (self.start / name / CHECKPOINT).is_dir():
            options["start"] = self.start / name
        try:
            with self._searching():
                return train(config, self.dataset, self.path(name), resume=True, **options)
        except ValueError:
            # A setting that a stage refuses must not become what the next --resume starts from.
            if self._before is not None:
                with atomic_path(self.path(CONFIG)) as temporary:
                    temporary.write_text(self._before, encoding="utf-8")
            raise

    def _teller(self, name: str) -> Callable[[Mapping[str, Any]], None] | None:
        return None if self.on_plan is None else partial(self.on_plan, name)

    def _language_model(self) -> Step:
        from hellm.training.finetune import finetune

        return self._stage(
            "llm",
            f"Fine-tune the language model {self.config.finetune.llm} (stage 2).",
            "finetune",
            finetune,
            replace(self.config.finetune, **self._common()),
            graph=self.path("stage1"),
            sequence=self.path("sasrec"),
        )

    def _fusion(self) -> Step:
        folder, towers = self.path("fused"), {name: self.path(name) for name in self.towers}
        config = replace(self.config.fuse, **self._common())
        return Step(
            "fused",
            "Add up what each of them says, as far as validation shows that it helps.",
            f"hellm fuse {' '.join(map(str, towers.values()))} --data {self.path('data')} --out {folder}",
            lambda: self._fuse(towers, folder, config),
        )

    def _fuse(self, towers: Mapping[str, Path], folder: Path, config: Any) -> dict[str, Any]:
        from hellm.recommend.fuse import fuse

        with self._searching():
            return fuse(towers, self.dataset, folder, config, resume=True, on_plan=self._teller("fused"))

    def _searching(self) -> contextlib.AbstractContextManager[None]:
        """All stages have the neighbours that stage 1 has."""
        from hellm.graphs import searching

        return searching(self.config.pretrain.model.knn_search, self.cache)

    def _available_baselines(self) -> list[str]:
        if importlib.util.find_spec("implicit") is not None:
            return list(self.config.baselines)
        left_out = [name for name in self.config.baselines if name in ("itemknn", "bpr", "als")]
        if left_out:
            self.notes.append(f'{", ".join(left_out)} left out, they need: pip install "hellm[baselines]"')
        return [name for name in self.config.baselines if name not in left_out]

    def _compare(self, models: Sequence[str]) -> dict[str, Any]:
        from hellm.recommend.compare import compare

        comparison = compare(
            models, self.dataset, protocol=self.config.protocol, ks=self.ks, slices=True, by="hellm run"
        )
        self._write("comparison.json", comparison)
        return comparison

    def _recommend(self, recommender: Any, users: Sequence[str], k: int) -> list[dict[str, Any]]:
        from hellm.recommend import Recommender

        reasons = Recommender.load(self.path("stage1"))
        answers = []
        for one in recommender.recommend(users, k=min(k, recommender.num_items)):
            history = reasons.history(one.user)
            known = [event.item for event in history]
            items = [
                {
                    "item": item.item,
                    "title": item.title,
                    "score": item.score,
                    "reasons": [reason.to_dict() for reason in reasons.explain(item.item, history=known, k=1)],
                }
                for item in one
            ]
            had = [{"item": event.item, "title": event.title} for event in history]
            answers.append({"user": one.user, "basis": one.basis, "history": had, "items": items})
        self._write("recommendations.json", answers)
        return answers

    def _write(self, name: str, value: Any) -> None:
        with atomic_path(self.path(name)) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _source_fingerprints(dataset: Dataset, *, pictures: bool) -> dict[str, str]:
    """`Dataset.fingerprints` of raw data, with one of the item texts and one of the picture files."""
    fields = {name: values for name, values in dataset.item_fields.items() if name != "image" and any(values)}
    found = dataset.fingerprints | {"item texts": _digest([json.dumps(sorted(fields.items())).encode()])}
    if pictures and dataset.item_fields.get("image"):
        files = (Path(one) if one else None for one in dataset.item_fields["image"])
        found["pictures"] = _digest(one.read_bytes() if one is not None and one.is_file() else b"" for one in files)
    return found


def _digest(contents: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for one in contents:
        digest.update(len(one).to_bytes(8, "little") + one)
    return digest.hexdigest()[:16]


def _comparable(now: dict[str, str], before: dict[str, str]) -> list[str]:
    """Names in both; a run of an earlier version noted nothing, and features of its data are made by its encoders."""
    return [name for name in now if name in before and ("item texts" in before or name != "item features")]


def _with_features(dataset: Dataset, config: RunConfig, cache: str | PathLike[str] | None) -> Dataset:
    """The data set with the features that are asked for and not there yet."""
    from hellm.features import add_features, choose_encoders
    from hellm.features.cache import default_cache

    encoders = {}
    for name, encoder in (("text", config.text), ("image", config.image)):
        kept = encoder == "none" or (encoder == "auto" and name in dataset.item_features and dataset.form != "shop")
        encoders[name] = None if kept else encoder
    asked = [name for name in encoders if encoders[name] is not None]
    if not asked:
        return dataset
    try:
        choose_encoders(dataset, **encoders)
    except ValueError:
        if any(encoders[name] != "auto" for name in asked):
            raise
        return dataset
    return add_features(dataset, **encoders, cache=default_cache() if cache is None else cache)
