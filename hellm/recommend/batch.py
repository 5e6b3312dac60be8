"""Lists of many users, worked out beforehand and written as one parquet file in bounded memory.

What is made stands in parts beside the file until it is whole, so that a killed batch goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hellm._files import atomic_path, read_json, reading, update_digest, writing
from hellm._folders import check_target, clear_folder, hold, mark_folder
from hellm.artifact.run_hash import run_hash
from hellm.data import DataError
from hellm.engines import Engine
from hellm.recommend.catalogue import id_list
from hellm.recommend.recommender import Recommender
from hellm.recommend.results import Recommendations
from hellm.recommend.user_files import Asked, asked_in

if TYPE_CHECKING:
    import polars as pl

    from hellm.data import IdMap

__all__ = ["batch", "read_metadata"]

logger = logging.getLogger(__name__)

# Lists in a part and in a row group. A multiple of what a recommender scores at once: lists are then those of one call.
_PART = 16 * 1024
_REQUEST, _LISTS = "request.json", "lists.parquet"
_LAYOUT = (_REQUEST, _LISTS, "part-*.parquet")
_COUNTS = ("unknown_users", "unknown_items")

PathLike_ = str | Path


def batch(
    run: PathLike_,
    out: PathLike_,
    users: PathLike_ | None = None,
    *,
    k: int = 10,
    exclude_seen: bool = True,
    candidates: Iterable[str] | None = None,
    exclude: Iterable[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    device: str = "cpu",
    language_model: PathLike_ | None = None,
    engine: Engine = map,
) -> dict[str, Any]:
    """Recommend to all users of a run, or to those in a file, and write the lists into a parquet file.

    Each list is that of `Recommender.recommend`, bit for bit. There is a row for each user, in order, with the columns

        user    text; null where a history has no label
        basis   text, see `hellm.recommend.Recommendations`
        items   list of item ids, best first
        scores  list of float32

    The metadata of the file (`read_metadata`) name the version of hellm, the run by its hash, and what was asked for.
    Memory is that of the recommender and of one part of 16,384 lists. Until the file is whole, the parts stand in the
    folder OUT.parts.

    Args:
        run: Run directory, or what `Recommender.save` wrote.
        out: Parquet file to write; it appears whole or not at all.
        users: File of users or histories, see `hellm.recommend.user_files.asked_in`; None is every user of the run.
            Users whom the run does not know get the most popular items; items of a history that it does not know are
            left out; both are counted.
        k: List length, 1 <= k <= the number of items.
        exclude_seen: Leave out the items of the history.
        candidates: Item ids to choose from; None is all.
        exclude: Item ids that are in no list.
        resume: Go on with an interrupted batch of the same run and request; a finished one stays as it is.
        overwrite: Replace the file and the parts that are there.
        device, language_model: See `Recommender.load`.
        engine: Who works the lists out, see `hellm.engines`; the file is the same. Other processes need to see `run`
            and `out` at the same paths.
    Returns: "out", "lists" (how many), "basis" (basis -> lists), "unknown_users", "unknown_items" (of histories),
        "unknown_candidates" (of `candidates` and `exclude`), "run" (its hash) and "resumed_at" (lists that were there).

    Raises:
        FileExistsError: Something is there, and neither `resume` nor `overwrite` is given.
        FolderInUseError: Another process writes there.
        ValueError: A resumed batch of another run or request, k out of range, or no known candidate. DataError, a file
            of users that is none.
    """
    out, parts = Path(out), Path(f"{os.fspath(out)}.parts")
    _check_out(out, parts, resume=resume, overwrite=overwrite, inputs=[run, users])
    lists = {"candidates": candidates, "exclude": exclude}
    lists = {name: None if one is None else [str(id_) for id_ in id_list(one, name)] for name, one in lists.items()}
    request = {
        "run": run_hash(run),
        "users": "all" if users is None else _digest_of(users),
        "k": k,
        "exclude_seen": bool(exclude_seen),
        **{name: _digest_of_ids(ids) for name, ids in lists.items()},
    }
    with hold(parts, beside=True):
        _check_out(out, parts, resume=resume, overwrite=overwrite, inputs=[run, users])
        if resume and out.exists():
            metadata = read_metadata(out)
            if not parts.exists():
                _check_request(out, metadata["request"], request)
            if metadata["request"] == request:
                _remove(parts)
                return {"out": str(out), **metadata["counts"], "run": metadata["run"], "resumed_at": metadata["lists"]}
        if overwrite:
            _remove(parts)
        if (parts / _REQUEST).is_file():
            _check_request(parts / _REQUEST, read_json(parts / _REQUEST), request)
        source = {"path": run, "device": device, "language_model": language_model}
        recommender = Recommender.load(**source)
        chosen, unknown = _candidates(recommender.item_ids, **lists)
        with writing(parts):
            parts.mkdir(exist_ok=True)
            mark_folder(parts, "batch", layout=_LAYOUT)
        with atomic_path(parts / _REQUEST) as temporary:
            temporary.write_text(json.dumps(request) + "\n", encoding="utf-8")
        options = {"k": k, "exclude_seen": exclude_seen, "candidates": chosen}
        writer = _Writer(parts, request, options, source, recommender)
        try:
            files, counts, resumed_at = _write_parts(writer, _asked(recommender, users), engine)
        except BaseException:
            # Nothing to go on with.
            if not any(parts.glob("part-*.parquet")):
                _remove(parts)
            raise
        counts["unknown_candidates"] = unknown
        _assemble(out, parts, files, request, counts)
        _remove(parts)
    _warn(counts, recommender)
    return {"out": str(out), **counts, "run": request["run"], "resumed_at": resumed_at}


def read_metadata(lists: PathLike_) -> dict[str, Any]:
    """What a file of `batch` says of itself: "hellm" (version), "run" (its hash), "request", "lists" and "counts".

    Raises: DataError, a parquet file that `batch` did not write, or none at all.
    """
    import polars as pl

    with reading(lists):
        metadata = pl.read_parquet_metadata(lists)
        if "hellm.batch" not in metadata:
            raise DataError(f"{lists}: must be a file that hellm batch wrote, got a parquet file of somebody else")
        return json.loads(metadata["hellm.batch"])


def _check_out(out: Path, parts: Path, *, resume: bool, overwrite: bool, inputs: list[PathLike_ | None]) -> None:
    if resume and overwrite:
        raise ValueError("resume and overwrite must not both be given")
    if out.is_dir():
        raise FileExistsError(f"{out} is a folder; give the name of a parquet file")
    for one in inputs:
        if one is not None and out.exists() and Path(one).exists() and out.samefile(one):
            raise FileExistsError(f"{one} is read, so it is not replaced; give another file")
    if out.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{out} is there; overwrite=True replaces it, resume=True keeps it if it is of the same request"
        )
    if out.exists() and overwrite:
        read_metadata(out)
    if parts.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{parts} holds the parts of an unfinished batch; resume=True goes on with it, overwrite=True starts again"
        )
    check_target(parts, kind="batch", layout=_LAYOUT, resume=resume, overwrite=overwrite, inputs=inputs)


def _check_request(where: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{where}: a resumed batch must keep its run and request; {name} was {before.get(name)!r}, got "
                f"{value!r}; to start again, give overwrite=True or another file"
            )


def _candidates(items: IdMap, candidates: list[str] | None, exclude: list[str] | None) -> tuple[list[str] | None, int]:
    """Item ids to choose from, None for all, and how many of those given the run does not know."""
    unknown = sum(item not in items for item in (candidates or []) + (exclude or []))
    if candidates is None and exclude is None:
        return None, unknown
    left_out = set(exclude or ())
    chosen = [item for item in (items.ids if candidates is None else candidates) if item in items]
    chosen = [item for item in chosen if item not in left_out]
    if not chosen:
        raise ValueError(f"candidates less exclude must leave at least one of the {len(items)} items, got none")
    return chosen, unknown


class _Writer:
    """Writes the lists of a part into its file. In another process it loads a recommender of its own.

    Args:
        parts: Folder of the parts, which holds the request.
        request: What the parts are of.
        options: Of `Recommender.recommend`.
        source: Of `Recommender.load`.
        recommender: What that gave.
    """

    def __init__(
        self,
        parts: Path,
        request: Mapping[str, Any],
        options: Mapping[str, Any],
        source: Mapping[str, Any],
        recommender: Recommender,
    ) -> None:
        self.parts, self.request, self.options, self.source = parts, request, options, source
        self.recommender: Recommender | None = recommender

    def __getstate__(self) -> dict[str, Any]:
        # Elsewhere the working directory is another one.
        source = {**self.source, "path": os.path.abspath(self.source["path"])}
        model = source["language_model"]
        if model is not None and Path(model).exists():
            source["language_model"] = os.path.abspath(model)
        return vars(self) | {"parts": Path(os.path.abspath(self.parts)), "source": source, "recommender": None}

    def __call__(self, part: tuple[str, Asked]) -> int:
        """(name of the file, whom to recommend to) -> how many lists it has.

        Raises: ValueError, the run or the folder is another one here. FileNotFoundError, there is none.
        """
        name, asked = part
        if self.recommender is None:
            self._check_parts()
            path, run = self.source["path"], self.request["run"]
            if (found := run_hash(path)) != run:
                raise ValueError(f"{path} must be run {run}, as where the batch was started, got {found}")
            self.recommender = Recommender.load(**self.source)
        answers, unknown = _answers(self.recommender, asked, self.options)
        # A batch that was killed may have been started again for something else while this one went on elsewhere.
        self._check_parts()
        with atomic_path(self.parts / name) as temporary:
            _table(answers).write_parquet(temporary, metadata={"unknown": json.dumps(unknown)})
        return len(answers)

    def _check_parts(self) -> None:
        if not (self.parts / _REQUEST).is_file():
            raise FileNotFoundError(f"{self.parts} must hold the parts of the batch, and holds no {_REQUEST}")
        _check_request(self.parts / _REQUEST, read_json(self.parts / _REQUEST), self.request)


def _write_parts(writer: _Writer, asked: Iterable[Asked], engine: Engine) -> tuple[list[Path], dict[str, Any], int]:
    """Write those that are missing. Returns: the files, counts over all of them, how many lists were there before."""
    there = {file.name for file in writer.parts.iterdir()}
    files, resumed = [], []

    def missing() -> Iterator[tuple[str, Asked]]:
        for number, one in enumerate(asked):
            files.append(writer.parts / f"part-{number:06d}.parquet")
            if files[-1].name in there:
                resumed.append(len(one.users))
            else:
                yield files[-1].name, one

    written = 0
    for count in engine(writer, missing()):
        written += count
        logger.info("%d lists", sum(resumed) + written)
    return files, _counted(files), sum(resumed)


def _counted(files: Iterable[Path]) -> dict[str, Any]:
    """What there is of each basis and of what the run does not know."""
    import polars as pl

    counts: dict[str, Any] = {"lists": 0, "basis": {}, **dict.fromkeys(_COUNTS, 0)}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} was written by a worker and is not here: all must write to the same storage"
            )
        with reading(file):
            bases = pl.scan_parquet(file, glob=False).group_by("basis").len().collect()
            unknown = json.loads(pl.read_parquet_metadata(file)["unknown"])
        for basis, count in bases.sort("basis").rows():
            counts["basis"][basis] = counts["basis"].get(basis, 0) + count
            counts["lists"] += count
        for name, count in unknown.items():
            counts[name] += count
    return counts


def _asked(recommender: Recommender, users: PathLike_ | None) -> Iterator[Asked]:
    if users is not None:
        yield from asked_in(users, _PART)
        return
    ids = recommender.user_ids.ids
    for start in range(0, len(ids), _PART):
        yield Asked(ids[start : start + _PART], None)


def _answers(
    recommender: Recommender, asked: Asked, options: Mapping[str, Any]
) -> tuple[list[tuple[str | None, Recommendations]], dict[str, int]]:
    """A list for each, with the label it goes by, and how many ids the run does not know."""
    if asked.histories is not None:
        known = [[item for item in one if item in recommender.item_ids] for one in asked.histories]
        lost = sum(map(len, asked.histories)) - sum(map(len, known))
        answers = recommender.recommend(histories=known, **options)
        return list(zip(asked.users, answers, strict=True)), {"unknown_users": 0, "unknown_items": lost}
    known = [user for user in asked.users if user is not None and user in recommender.user_ids]
    lists = iter(recommender.recommend(known, **options))
    unknown = len(asked.users) - len(known)
    popular = recommender.recommend(histories=[[]] if unknown else [], **options)
    answers = [(user, next(lists) if user in recommender.user_ids else popular[0]) for user in asked.users]
    return answers, {"unknown_users": unknown, "unknown_items": 0}


def _table(answers: list[tuple[str | None, Recommendations]]) -> pl.DataFrame:
    import polars as pl

    columns = {
        "user": [user for user, _ in answers],
        "basis": [one.basis for _, one in answers],
        "items": [[item.item for item in one] for _, one in answers],
        "scores": [[item.score for item in one] for _, one in answers],
    }
    schema = {"user": pl.String, "basis": pl.String, "items": pl.List(pl.String), "scores": pl.List(pl.Float32)}
    return pl.DataFrame(columns, schema=schema)


def _assemble(out: Path, parts: Path, files: list[Path], request: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
    """One file of all parts, made among them and then given its name."""
    import polars as pl

    from hellm import __version__

    about = {"hellm": __version__, "run": request["run"], "request": request, "lists": counts["lists"]}
    metadata = {"hellm.batch": json.dumps(about | {"counts": counts})}
    with atomic_path(parts / _LISTS) as temporary:
        if files:
            table = pl.scan_parquet(files, glob=False)
            table.sink_parquet(temporary, row_group_size=_PART, maintain_order=True, metadata=metadata)
        else:
            _table([]).write_parquet(temporary, metadata=metadata)
    with writing(out):
        os.replace(parts / _LISTS, out)


def _remove(parts: Path) -> None:
    """The mark goes last, so that what a kill leaves can still be gone on with."""
    if parts.exists():
        clear_folder(parts, last=[parts / _REQUEST])
        shutil.rmtree(parts)


def _warn(counts: Mapping[str, Any], recommender: Recommender) -> None:
    told = {
        "unknown_users": "users are not known to the run and got the most popular items",
        "unknown_items": "items of histories are not known to the run and were left out",
        "unknown_candidates": "items to choose from or to exclude are not known to the run",
    }
    for name, text in told.items():
        if counts[name]:
            logger.warning("%d %s", counts[name], text)


def _digest_of(file: PathLike_) -> str:
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist: it must be a file of users or histories")
    digest = hashlib.sha256()
    update_digest(digest, file)
    return digest.hexdigest()[:16]


def _digest_of_ids(ids: list[str] | None) -> str | None:
    return None if ids is None else hashlib.sha256(json.dumps(sorted(ids)).encode()).hexdigest()[:16]
