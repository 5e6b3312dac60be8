"""How often a run has met the test split: test_evaluations.jsonl in its folder, one line per evaluation.

Whoever looks at test numbers again and again and keeps what is best has chosen on them; this shows it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hellm.artifact.files import RESULT, TEST_EVALUATIONS

__all__ = ["TRAINING", "log_test_evaluation", "read_test_evaluations"]

# Who evaluated, where that was the training of the run itself.
TRAINING = "training"


def log_test_evaluation(
    run: str | os.PathLike[str], *, by: str, protocols: Sequence[str], metrics: Sequence[str], fingerprint: str
) -> str | None:
    """Append one evaluation on the test split.

    Args:
        run: Folder of the run.
        by: Command or function, in words.
        protocols: Their names.
        metrics: Those that were asked for, such as "recall@10".
        fingerprint: Of the data set.
    Returns: None, or why it could not be noted, in a sentence: a run that may only be read can still be evaluated.
    """
    record = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "by": by,
        "protocols": list(protocols),
        "metrics": list(metrics),
        "fingerprint": fingerprint,
    }
    try:
        with open(Path(run) / TEST_EVALUATIONS, "ab+") as file:
            # A line that was cut short stays alone.
            file.seek(max(file.seek(0, os.SEEK_END) - 1, 0))
            start = b"" if file.read(1) in (b"", b"\n") else b"\n"
            file.write(start + json.dumps(record, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        return f"{run} cannot be written to ({error.strerror}), so its {TEST_EVALUATIONS} does not have this evaluation"
    return None


def read_test_evaluations(run: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """All evaluations of a run on the test split so far, the test of its own training first.

    A training that left no line (of an earlier version) is known by result.json; its record has the time None. A line
    that cannot be read counts as an evaluation of which nothing is known.
    """
    file, records = Path(run) / TEST_EVALUATIONS, []
    if file.is_file():
        records = [_record(line) for line in file.read_text(encoding="utf-8", errors="replace").splitlines() if line]
    if not any(record.get("by") == TRAINING for record in records):
        records = _training_test(Path(run) / RESULT) + records
    return records


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    return record if isinstance(record, dict) else {"time": None, "by": None}


def _training_test(result: Path) -> list[dict[str, Any]]:
    try:
        values = json.loads(result.read_text(encoding="utf-8"))
        test, fingerprint = values["test"], values["dataset"]["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not test:
        return []
    names = {"protocols": [test.get("protocol")], "metrics": list(test.get("metrics", ()))}
    return [{"time": None, "by": TRAINING, **names, "fingerprint": fingerprint}]
