"""Runs that version 0.1 wrote are read by this one: a small one of each kind, with the answers it gave."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from hellm.artifact import FORMAT, read_embeddings
from hellm.artifact.embeddings import write_embeddings
from hellm.data import DataError
from hellm.recommend import Recommender

RUNS = Path(__file__).parent / "fixtures" / "runs-0.1"
ANSWERS = json.loads((RUNS / "answers.json").read_text())
kinds = pytest.mark.parametrize(
    ("name", "kind"), [("graph", "graph"), ("sequence", "sequence"), ("llm", "llm"), ("fused", "fused")]
)


def load(folder: Path) -> Recommender:
    return Recommender.load(folder, language_model=RUNS / "language-model")


def answers(recommender: Recommender) -> list[list[tuple[str, float]]]:
    lists = recommender.recommend(users=["u0", "u7"], k=4)
    lists += recommender.recommend(histories=[["i1", "i4"], ["i3"]], k=4)
    return [[(item.item, item.score) for item in one] for one in lists]


def check(recommender: Recommender, name: str) -> None:
    for found, expected in zip(answers(recommender), ANSWERS[name], strict=True):
        assert [item for item, _ in found] == [item for item, _ in expected]
        scores, before = (torch.tensor([score for _, score in one]) for one in (found, expected))
        torch.testing.assert_close(scores, before, rtol=1e-4, atol=1e-5)


@kinds
def test_a_run_of_before_answers_as_it_did(name, kind):
    assert read_embeddings(RUNS / name).kind == kind
    check(load(RUNS / name), name)


@kinds
def test_what_is_saved_of_it_has_this_format(name, kind, tmp_path):
    saved = load(RUNS / name).save(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(saved / "embeddings.safetensors", framework="pt") as file:
        assert (file.metadata()["kind"], file.metadata()["format"]) == (kind, str(FORMAT))
    check(load(saved), name)


def test_a_run_of_a_later_version_says_so(tmp_path):
    shutil.copytree(RUNS / "graph", tmp_path / "run")
    kind, tensors, metadata = read_embeddings(tmp_path / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hellm.artifact.embeddings.FORMAT", FORMAT + 1)
        write_embeddings(tmp_path / "run", kind, tensors, metadata)
    with pytest.raises(DataError, match=rf"must be of format {FORMAT} or earlier, got {FORMAT + 1}; a later version"):
        Recommender.load(tmp_path / "run")
