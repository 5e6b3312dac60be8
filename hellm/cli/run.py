"""`hellm run`: from raw data to recommendations in one command."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hellm._files import atomic_path, read_json, writing
from hellm._folders import check_target, clear_folder, hold, mark_folder
from hellm.cli._output import duration, print_json, title
from hellm.cli._training import parse_settings, settings_parser
from hellm.cli.data import reading_options, summary
from hellm.cli.features import CACHE_HELP
from hellm.config import RunConfig, config_to_dict, load_saved_config, save_config
from hellm.training.run_directory import RUN_LAYOUT, START_OVER

__all__ = ["LAYOUT", "Stages", "check_stages", "run", "source_fingerprints"]

_STAGES = ("stage1", "lightgcn", "sasrec", "content", "llm", "fused")
LAYOUT = (
    *("config.yaml", "source.json", "comparison.json", "recommendations.json"),
    *("data/dataset.json", "data/*.parquet", "data/features/*.npy"),
    *(f"{stage}/{file}" for stage in _STAGES for file in RUN_LAYOUT),
)
# Users shown at the end.
_SHOWN = 3


def run(argv: Sequence[str]) -> int:
    parser = settings_parser(
        "run",
        "From raw data to recommendations: item features, stage 1, sequence models, the language model, their sum as "
        "far as each is shown to help, a comparison with simpler recommenders, and sample recommendations with "
        "reasons. Every stage leaves a folder in --out, and --resume goes on where it stopped.",
        RunConfig,
        dry_run="stop when the data are read and encoded",
        json="print the comparison as one line of JSON, the last of the output",
    )
    parser.add_argument("--cache", metavar="DIR", help=CACHE_HELP)
    args, config = parse_settings(parser, argv, RunConfig)
    if args.out is None:
        raise ValueError("missing: --out (the folder to make)")
    check_stages(args.out, resume=args.resume, overwrite=args.overwrite, inputs=[args.data])
    with hold(args.out):
        return _run(args, config)


def _run(args, config: RunConfig) -> int:
    from hellm.data import load_dataset

    started = time.perf_counter()
    stages = Stages(Path(args.out), config, resume=args.resume, overwrite=args.overwrite, cache=args.cache)
    stages.prepare(lambda: load_dataset(args.data, **reading_options(args)))
    if args.dry_run:
        print(f"Nothing was trained (--dry-run); the data with their features are in {stages.path('data')}.")
        print("Go on with --resume; what a stage would take: its command above with --dry-run.")
        return 0
    stages.train()
    comparison = stages.compare()
    stages.recommend()
    print(f"\nDone in {duration(time.perf_counter() - started)}.")
    if args.json:
        print_json(comparison)
    return 0


def check_stages(
    path: str | Path, *, resume: bool = False, overwrite: bool = False, inputs: Sequence[str | Path | None] = ()
) -> None:
    """Whether a run of all stages may be made, gone on with or replaced at `path`; changes nothing.

    Raises: FileExistsError, ValueError: see `hellm._folders.check_target`.
    """
    options = {"resume": resume, "overwrite": overwrite, "inputs": inputs, "proof": "data"}
    check_target(path, kind="run of all stages", layout=LAYOUT, **options)


class Stages:
    """The stages of a run, each with its folder in `out`, each skipped where it is done.

    Args:
        out: folder of everything.
        config: settings of all stages.
        resume: go on with what is there.
        overwrite: delete what is there.
        cache: folder for encoded texts and pictures; None is `hellm.features.cache.default_cache()`.
    Raises: FileExistsError, something is there and neither is given, or it is no such run; ValueError, both are given,
        or a resumed run has other settings (those of a stage are checked by the stage).
    """

    def __init__(
        self,
        out: Path,
        config: RunConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        cache: str | Path | None = None,
    ) -> None:
        check_stages(out, resume=resume, overwrite=overwrite)
        self.out, self.config, self.cache, self.dataset, self.number = out, config, cache, None, 0
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
            mark_folder(out, "run of all stages", layout=LAYOUT)
            if overwrite:
                # What a stage left can be gone on with only where the data are.
                clear_folder(out, last=[self.path("data"), self.path("config.yaml")])
        saved = self.path("config.yaml")
        self._before = saved.read_text(encoding="utf-8") if saved.is_file() else None
        if saved.is_file():
            before, now = (config_to_dict(one) for one in (load_saved_config(RunConfig, saved), config))
            for name in ("text", "image"):
                if before[name] != now[name]:
                    raise ValueError(
                        f"{saved}: a resumed run must keep its encoders; {name} was {before[name]!r}, got "
                        f"{now[name]!r}; {START_OVER}"
                    )

    @property
    def final(self) -> str:
        """Folder of the model that recommends: the fused one, or without validation events the last."""
        if (self.dataset.split == 1).any():
            return "fused"
        return "llm" if self.config.language_model else "sasrec"

    @property
    def towers(self) -> list[str]:
        """Folders of what is added up."""
        content = ["content"] if self.dataset.item_features or self.dataset.attribute_sets else []
        return ["stage1", "sasrec", *content, *(["llm"] if self.config.language_model else [])]

    def path(self, name: str) -> Path:
        return self.out / name

    def prepare(self, load: Callable[[], Any]) -> None:
        """The data set with its features, in `data/`."""
        from hellm.data import load_dataset, save_dataset

        folder = self.path("data")
        self._step(
            "Read the data, encode texts and pictures, and hold out events.", f"hellm features DATA --out {folder}"
        )
        source, note = load(), self.path("source.json")
        parts = source_fingerprints(source, pictures=self.config.image != "none")
        before = read_json(note) if note.is_file() else load_dataset(folder).fingerprints if folder.is_dir() else {}
        changed = [name for name in _comparable(parts, before) if parts[name] != before[name]]
        if changed:
            raise ValueError(
                f"{self.out}: a resumed run must keep its data, and those given are others: {', '.join(changed)}; "
                f"give the data it was started with, read with the same options, or, {START_OVER}"
            )
        save_config(self.config, self.path("config.yaml"))
        if folder.is_dir():
            print(f"{folder} is there from before, and of the same data.")
        else:
            encoded = _with_features(source, self.config, self.cache)
            with atomic_path(note) as temporary:
                temporary.write_text(json.dumps(parts) + "\n", encoding="utf-8")
            save_dataset(encoded, folder)
        self.dataset = load_dataset(folder)
        print(f"{self.dataset.name}: {summary(self.dataset)}")
        for note in self.dataset.notes:
            print(f"  note: {note}")

    def train(self) -> None:
        """Stage 1, the LightGCN baseline, the sequence models, the language model if asked for, and their sum."""
        from hellm.evaluate import evaluate_dataset, evaluate_histories
        from hellm.training.pretrain import pretrain
        from hellm.training.sasrec import train_sasrec

        config, common = self.config, {"protocol": self.config.protocol, "ks": self._ks()}
        if max(config.ks) > self.dataset.num_items:
            print(f"  note: list lengths cut to the {self.dataset.num_items} items there are")
        stage_1 = replace(config.pretrain, **common)
        self._train(
            "stage1", "Train the hypergraph recommender (stage 1).", "pretrain", pretrain, stage_1, evaluate_dataset
        )
        if "lightgcn" in config.baselines:
            model = replace(stage_1.model, backbone="lightgcn", user_hypergraph=False, item_hypergraph=False)
            baseline = replace(stage_1, model=model)
            self._train("lightgcn", "Train LightGCN to compare with.", "pretrain", pretrain, baseline, evaluate_dataset)
        sequence = replace(config.sasrec, **common)
        self._train("sasrec", "Train the sequence model SASRec.", "sasrec", train_sasrec, sequence, evaluate_histories)
        if "content" in self.towers:
            content = replace(config.content, **common)
            text = "Train a sequence model that reads the content of items alone."
            self._train("content", text, "sasrec", train_sasrec, content, evaluate_histories)
        if config.language_model:
            self._finetune(common)
        if self.final == "fused":
            self._fuse(common)

    def _finetune(self, common: dict[str, Any]) -> None:
        from hellm.evaluate import evaluate_histories
        from hellm.training.finetune import finetune

        runs = {"graph": self.path("stage1"), "sequence": self.path("sasrec")}
        self._train(
            "llm",
            f"Fine-tune the language model {self.config.finetune.llm} (stage 2).",
            "finetune",
            finetune,
            replace(self.config.finetune, **common),
            evaluate_histories,
            **runs,
        )

    def _fuse(self, common: dict[str, Any]) -> None:
        from hellm.cli.fuse import print_fusion
        from hellm.recommend.fuse import fuse

        folder, towers = self.path("fused"), {name: self.path(name) for name in self.towers}
        self._step(
            "Add up what each of them says, as far as validation shows that it helps.",
            f"hellm fuse {' '.join(map(str, towers.values()))} --data {self.path('data')} --out {folder}",
        )
        config = replace(self.config.fuse, **common)
        print_fusion(fuse(towers, self.dataset, folder, config, resume=True), folder)

    def compare(self) -> dict[str, Any]:
        """All models on the test split, in one table, and in comparison.json."""
        from hellm.cli.evaluate import print_comparison
        from hellm.recommend.compare import compare

        names = [self.final, *reversed(self.towers), *(["lightgcn"] if "lightgcn" in self.config.baselines else [])]
        models = [str(self.path(name)) for name in dict.fromkeys(names)]
        models += [name for name in self._available_baselines() if name != "lightgcn"]
        ks = " ".join(map(str, self._ks()))
        command = (
            f"hellm evaluate {' '.join(models)} --data {self.path('data')} --protocol {self.config.protocol} --ks {ks}"
        )
        self._step("Compare all models on events that none of them has seen.", command)
        comparison = compare(models, self.dataset, protocol=self.config.protocol, ks=self._ks(), by="hellm run")
        print_comparison(comparison)
        self._write("comparison.json", comparison)
        return comparison

    def recommend(self, users: Sequence[str] | None = None, k: int = 5) -> list[dict[str, Any]]:
        """Lists of a few users with reasons, printed and in recommendations.json."""
        from hellm.recommend import Recommender

        recommender = Recommender.load(self.path(self.final))
        reasons = Recommender.load(self.path("stage1"))
        users = list(users or recommender.user_ids.ids[:_SHOWN])
        command = f"hellm recommend {self.path(self.final)} --users {' '.join(users)} -k {k} --explain"
        self._step("Recommend.", command)
        answers = []
        for one in recommender.recommend(users, k=min(k, recommender.num_items)):
            print(f"user {one.user} had")
            history = reasons.history(one.user)
            for item in history[-5:]:
                print(f"    {title(item.item, item.title)}")
            print("  and is recommended")
            explained = []
            for item in one:
                had = [event.item for event in history]
                why = [reason.to_dict() for reason in reasons.explain(item.item, history=had, k=1)]
                print(f"    {title(item.item, item.title)}{_because(why)}")
                explained.append({"item": item.item, "title": item.title, "score": item.score, "reasons": why})
            answers.append({"user": one.user, "basis": one.basis, "items": explained})
        self._write("recommendations.json", answers)
        return answers

    def _train(self, name: str, text: str, verb: str, train: Callable, config: Any, evaluate: Callable, **runs) -> None:
        from hellm.cli._training import print_result

        inputs = "".join(f" --{key} {value}" for key, value in runs.items())
        folder = self.path(name)
        self._step(
            text, f"hellm {verb} --data {self.path('data')}{inputs} --config {folder / 'config.yaml'} --out {folder}"
        )
        try:
            result = train(config, self.dataset, folder, evaluate=evaluate, resume=True, **runs)
        except ValueError:
            # A setting that a stage refuses must not become what the next --resume starts from.
            if self._before is not None:
                with atomic_path(self.path("config.yaml")) as temporary:
                    temporary.write_text(self._before, encoding="utf-8")
            raise
        k = self._ks()[len(self._ks()) // 2]
        print_result(result, folder, metrics=(f"recall@{k}", f"ndcg@{k}"))

    def _available_baselines(self) -> list[str]:
        import importlib.util

        if importlib.util.find_spec("implicit") is not None:
            return list(self.config.baselines)
        left_out = [name for name in self.config.baselines if name in ("itemknn", "bpr", "als")]
        if left_out:
            print(f'{", ".join(left_out)} left out, they need: pip install "hellm[baselines]"')
        return [name for name in self.config.baselines if name not in left_out]

    def _ks(self) -> tuple[int, ...]:
        return tuple(sorted({min(k, self.dataset.num_items) for k in self.config.ks}))

    def _step(self, text: str, command: str) -> None:
        self.number += 1
        print(f"\n[{self.number}] {text}\n    $ {command}", flush=True)

    def _write(self, name: str, value: Any) -> None:
        with atomic_path(self.path(name)) as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def source_fingerprints(dataset: Any, *, pictures: bool) -> dict[str, str]:
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


def _with_features(dataset: Any, config: RunConfig, cache: str | Path | None) -> Any:
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


def _because(reasons: list[dict[str, Any]]) -> str:
    if not reasons:
        return ""
    reason = reasons[0]
    parts = [f"{reason['shared_users']} bought both"] if reason["shared_users"] else []
    parts += [f"alike in {name}" for name, link in (reason["content"] or {}).items() if link["shared_hyperedges"]]
    return f"  (because of {title(reason['item'], reason['title'])}{': ' + ', '.join(parts) if parts else ''})"
