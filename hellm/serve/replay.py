"""Answers computed again: the same bits, or the reason why not.

A state is a run and the entries of a store that were taken up in it. Both are named in the receipt of every answer, so
that what was asked and the receipt are enough: the run is loaded, the entries are taken up in their order, and the
question is put once more.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ValidationError

from hellm._files import DataError
from hellm.artifact.run_hash import run_hash
from hellm.serve.answer_log import computed_by
from hellm.serve.answers import QUESTIONS, written
from hellm.serve.errors import RequestError
from hellm.serve.schema import Receipt
from hellm.serve.state import BY_ONNX, Snapshot, load_snapshot
from hellm.serve.store import read_entries
from hellm.serve.writer import replayed

__all__ = ["Outcome", "replay"]

# More than any machine has; a file may claim anything.
_MAX_THREADS = 1024


class Outcome(NamedTuple):
    """What came of a logged answer.

    Attributes:
        place: Line of the file, or place in its list, from 1 on.
        question: What was asked; None where the file does not say it.
        verdict: "same" bits, "different" bits, or "impossible": there is nothing to compare with.
        reason: Why it is not the same; "" where it is.
        answer: As it is computed now; None where it cannot be.
    """

    place: int
    question: str | None
    verdict: str
    reason: str = ""
    answer: dict[str, Any] | None = None


class _ImpossibleError(Exception):
    """An answer cannot be computed again; the message says why."""


class _Logged(NamedTuple):
    """An answer of the file: its digest, or itself where somebody has kept it."""

    place: int
    question: str
    asked: BaseModel
    receipt: Receipt
    sha256: str | None
    answer: dict[str, Any] | None
    computed_by: dict[str, Any]


def replay(
    file: str | os.PathLike[str],
    runs: Sequence[str | os.PathLike[str]],
    store: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    language_model: str | os.PathLike[str] | None = None,
    onnx: Sequence[str | os.PathLike[str]] = (),
) -> list[Outcome]:
    """Compute logged answers again.

    Args:
        file: JSON lines, as an answer log has them; or, with the suffix .json, one such object or a list. A line may
            hold "answer", as a client got it, in place of "receipt" and "sha256".
        runs: Run directories that may have answered.
        store: What the server has kept, which may go on meanwhile; None is nothing.
        device, language_model: As in `hellm.recommend.Recommender.load`.
        onnx: What `hellm export --to onnx` made of the runs whose histories onnxruntime has read.
    Returns: What came of each, in the order of the file.
    Raises: FileNotFoundError, a file or run that is not there. DataError, a file that holds no answers, or a damaged
        run or store.
    """
    by_hash = {run_hash(run): run for run in runs}
    exports = {}
    if onnx:
        from hellm.export import OnnxEncoder

        exports = {OnnxEncoder(folder).run: folder for folder in onnx}
    outcomes, logged = [], []
    for place, value in _values(Path(file)):
        try:
            logged.append(_logged(place, value))
        except _ImpossibleError as error:
            question = value.get("question") if isinstance(value, dict) else None
            outcomes.append(Outcome(place, question if isinstance(question, str) else None, "impossible", str(error)))
    if not logged and not outcomes:
        raise DataError(f"{file} holds no answers")
    logged.sort(key=lambda one: (*_model_of(one), one.receipt.revision))
    threads = torch.get_num_threads()
    try:
        for (wanted, by_onnx, learned, then), group in groupby(logged, _model_of):
            reason = None
            if wanted not in by_hash:
                given = ", ".join(f"{run} is {name}" for name, run in by_hash.items())
                reason = f"it is of run {wanted}, and {given}"
            elif by_onnx and wanted not in exports:
                reason = f"onnxruntime has read the histories, and no export of run {wanted} is given"
            if reason is not None:
                outcomes += [Outcome(one.place, one.question, "impossible", reason) for one in group]
                continue
            torch.set_num_threads(then or threads)
            options = {"device": device, "language_model": language_model}
            snapshot = load_snapshot(by_hash[wanted], onnx=exports[wanted] if by_onnx else None, **options)
            states = _States(snapshot.learned_up_to(learned), store)
            here = computed_by(device, by_onnx=by_onnx)
            outcomes += [_outcome(one, states, here) for one in group]
    finally:
        torch.set_num_threads(threads)
    return sorted(outcomes, key=lambda one: one.place)


class _States:
    """The states of one run, one after another."""

    def __init__(self, snapshot: Snapshot, store: str | os.PathLike[str] | None) -> None:
        self.snapshot, self.store = snapshot, store

    def of(self, receipt: Receipt) -> Snapshot:
        """The state of an answer, whose revision is not below that of the one before. Raises: _ImpossibleError."""
        revision = receipt.revision
        if revision > self.snapshot.revision:
            if self.store is None:
                raise _ImpossibleError(
                    f"events and items up to revision {revision} were taken up, and no store is given"
                )
            try:
                entries = read_entries(self.store, self.snapshot.revision, revision)
            except FileNotFoundError as error:
                raise _ImpossibleError(
                    f"events and items up to revision {revision} were taken up, and {error}"
                ) from None
            snapshot, _ = replayed(self.snapshot, entries)
            if snapshot.revision != revision:
                raise _ImpossibleError(f"there is no entry {revision} in {self.store}")
            self.snapshot = snapshot
        if revision != self.snapshot.revision:
            raise _ImpossibleError(f"revision must be at least {self.snapshot.revision} (learned), got {revision}")
        if receipt.state != self.snapshot.state:
            raise _ImpossibleError(
                f"the state was {receipt.state}, and run and store up to revision {revision} give "
                f"{self.snapshot.state}: the entries are not those that the server had"
            )
        return self.snapshot


def _model_of(logged: _Logged) -> tuple[str, bool, int, int]:
    """The run, whether onnxruntime has read histories, from where on the store counts, and threads (0: unknown)."""
    receipt, threads = logged.receipt, logged.computed_by.get("threads")
    known = threads if isinstance(threads, int) and 1 <= threads <= _MAX_THREADS else 0
    return receipt.run_hash, receipt.model_version.endswith(BY_ONNX), receipt.learned, known


def _outcome(logged: _Logged, states: _States, here: dict[str, Any]) -> Outcome:
    try:
        snapshot = states.of(logged.receipt)
        (answer,) = QUESTIONS[logged.question][1](snapshot, [logged.asked])
        if isinstance(answer, (RequestError, ValueError)):
            raise _ImpossibleError(f"the request is refused: {answer}")
        if isinstance(answer, BaseException):
            raise answer
    except _ImpossibleError as error:
        return Outcome(logged.place, logged.question, "impossible", str(error))
    difference = _difference(logged, answer)
    if difference is None:
        return Outcome(logged.place, logged.question, "same", "", answer)
    others = [
        f"{name} {value} then and {here.get(name)} now"
        for name, value in logged.computed_by.items()
        if value != here.get(name)
    ]
    reason = f"{difference}; " + (", ".join(others) if others else "nothing is known to differ in how it is computed")
    return Outcome(logged.place, logged.question, "different", reason, answer)


def _difference(logged: _Logged, answer: dict[str, Any]) -> str | None:
    """Where an answer is not the logged one; None where all bits are the same."""
    if logged.answer is None:
        same = hashlib.sha256(written(answer)).hexdigest() == logged.sha256
        return None if same else "the answer has another SHA-256"
    # Read as it was sent, so that both are plain values.
    return _first_difference(logged.answer, json.loads(written(answer)))


def _first_difference(before: Any, now: Any, at: str = "") -> str | None:
    if isinstance(before, dict) and isinstance(now, dict) and before.keys() == now.keys():
        parts: Iterable[tuple[str, Any, Any]] = ((f"{at}.{key}", before[key], now[key]) for key in now)
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        parts = ((f"{at}[{place}]", *pair) for place, pair in enumerate(zip(before, now, strict=True)))
    else:
        texts = json.dumps(before), json.dumps(now)
        if texts[0] == texts[1]:
            return None
        return f"{at.lstrip('.') or 'the answer'} was {texts[0][:80]} and is {texts[1][:80]}"
    return next((found for part in parts if (found := _first_difference(part[1], part[2], part[0]))), None)


def _values(file: Path) -> Iterator[tuple[int, Any]]:
    """What stands in the file, with its place."""
    text = file.read_text(encoding="utf-8", errors="replace")
    if file.suffix == ".json":
        try:
            value = json.loads(text)
        except ValueError as error:
            raise DataError(f"{file}: not valid JSON ({error})") from None
        yield from enumerate(value if isinstance(value, list) else [value], start=1)
        return
    for place, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield place, json.loads(line)
            except ValueError:
                yield place, None


def _logged(place: int, value: Any) -> _Logged:
    """Raises: _ImpossibleError, no answer that can be computed again."""
    if not isinstance(value, dict):
        raise _ImpossibleError("it is no JSON object")
    question, answer, sha256 = (value.get(name) for name in ("question", "answer", "sha256"))
    if not isinstance(question, str) or question not in QUESTIONS:
        raise _ImpossibleError(f"question must be one of {', '.join(QUESTIONS)}, got {question!r}")
    if not isinstance(answer, dict) and not isinstance(sha256, str):
        raise _ImpossibleError("it must hold the answer, or sha256 and receipt")
    try:
        asked = QUESTIONS[question][0].model_validate_json(json.dumps(value.get("request")))
    except ValidationError as error:
        raise _ImpossibleError(f"request: {_told(error)}") from None
    try:
        receipt = Receipt.model_validate(answer if isinstance(answer, dict) else value.get("receipt"))
    except ValidationError as error:
        raise _ImpossibleError(f"{'answer' if isinstance(answer, dict) else 'receipt'}: {_told(error)}") from None
    by = value.get("computed_by")
    kept = answer if isinstance(answer, dict) else None
    return _Logged(place, question, asked, receipt, sha256, kept, by if isinstance(by, dict) else {})


def _told(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
