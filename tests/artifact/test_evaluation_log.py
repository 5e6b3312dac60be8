"""How often a run has met the test split."""

from __future__ import annotations

import json
from datetime import datetime, timezone

import pytest

from hellm.artifact.evaluation_log import TRAINING
from hellm.artifact.files import TEST_EVALUATIONS as FILE
from hellm.evaluate import log_test_evaluation, read_test_evaluations

ENTRY = {"protocols": ["standard"], "metrics": ["recall@10"], "fingerprint": "abc"}
RESULT = {
    "test": {"protocol": "official", "metrics": {"ndcg@10": 0.1}},
    "dataset": {"fingerprint": "abc"},
}


def test_evaluations_are_appended(tmp_path):
    assert read_test_evaluations(tmp_path) == []
    before = datetime.now(timezone.utc).replace(microsecond=0)
    for by in (TRAINING, "hellm evaluate größe"):
        assert log_test_evaluation(tmp_path, by=by, **ENTRY) is None
    lines = (tmp_path / FILE).read_text(encoding="utf-8").splitlines()
    first, second = read_test_evaluations(tmp_path)
    assert [json.loads(line) for line in lines] == [first, second]
    assert (first["by"], second["by"]) == (TRAINING, "hellm evaluate größe")
    assert before <= datetime.fromisoformat(second["time"]) <= datetime.now(timezone.utc)
    assert {name: second[name] for name in ENTRY} == ENTRY


def test_training_of_an_earlier_version_counts_first(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    log_test_evaluation(tmp_path, by="hellm.compare", **ENTRY)
    first, second = read_test_evaluations(tmp_path)
    assert first == {
        "time": None,
        "by": TRAINING,
        "protocols": ["official"],
        "metrics": ["ndcg@10"],
        "fingerprint": "abc",
    }
    assert second["by"] == "hellm.compare"


@pytest.mark.parametrize("text", [json.dumps(RESULT | {"test": None}), "[]", "{", "{}"])
def test_a_result_without_test_counts_nothing(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    assert read_test_evaluations(tmp_path) == []


def test_a_cut_line_counts_and_does_not_swallow_the_next(tmp_path):
    (tmp_path / FILE).write_bytes(b'{"by": "training", "ti')
    log_test_evaluation(tmp_path, by="hellm.compare", **ENTRY)
    lost, kept = read_test_evaluations(tmp_path)
    assert lost == {"time": None, "by": None} and kept["by"] == "hellm.compare"


def test_a_run_that_cannot_be_written_to_is_told(tmp_path):
    # A folder in the place of the file fails for every user, unlike permissions.
    (tmp_path / FILE).mkdir()
    note = log_test_evaluation(tmp_path, by="hellm.compare", **ENTRY)
    assert note is not None and str(tmp_path) in note and "cannot be written to (Is a directory)" in note
    assert read_test_evaluations(tmp_path) == []
