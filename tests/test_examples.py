"""The examples run and say what they promise."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("same_threads")


@pytest.fixture
def example(monkeypatch, capsys):
    """Run an example as a program; gives what it prints."""

    def example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return example


def numbers(pattern: str, text: str) -> list[float]:
    return [float(number) for number in re.findall(pattern, text)]


def test_train_and_recommend(example, tmp_path):
    out = example("train.py", "--out", tmp_path, "--max-epochs", 8)
    stage1, popularity = numbers(r"recall@10 ([\d.]+)", out)
    assert stage1 > 2 * popularity
    out = example("recommend.py", tmp_path / "stage1")
    assert re.findall(r"\(by (\w+)\)", out) == ["user", "user", "history"]
    assert "shared buyers, likeness {'text':" in out and "like P" in out


def test_ops(example):
    assert len(numbers(r"largest difference ([\d.]+e-?\+?\d+)", example("ops.py"))) == 4


def test_pyg_model(example):
    pytest.importorskip("torch_geometric", reason="torch_geometric is not installed")
    out = example("pyg_model.py")
    assert "the same output from the same weights" in out
    accuracies = numbers(r"accuracy ([\d.]+)", out)
    assert len(accuracies) == 3 and min(accuracies) > 0.8


def test_contrastive(example):
    before, after = numbers(r"(?:before|after): +([\d.]+)", example("contrastive.py"))
    assert after > 0.7 > 0.3 > before


def test_every_example_is_listed_and_tested():
    names = {path.name for path in EXAMPLES.glob("*.py")}
    for page in (EXAMPLES / "README.md", Path(__file__)):
        assert names <= set(re.findall(r"\w+\.py", page.read_text(encoding="utf-8")))
