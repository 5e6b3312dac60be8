"""`hellm ablate` through the command line, and how it compares."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from saved_llm import save_tiny_llm

from hellm.cli import main
from hellm.cli._figure import plot_ablation
from hellm.cli.ablate import print_ablation
from hellm.config import FinetuneConfig
from hellm.training.ablation_report import ablation_report

pytestmark = pytest.mark.usefixtures("same_threads")
FAST = ["--num-threads", "1", "--tensorboard", "false", "--max-epochs", "1"]


@pytest.fixture(scope="module")
def argv(tmp_path_factory) -> list[str]:
    """Data of 60 users, both finished runs and a tiny language model, as arguments."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = ["--num-users", "60", "--num-items", "40", "--num-groups", "2"]
    data = ["--data", str(folder / "built")]
    assert main(["data", "sample", str(folder / "raw"), *sizes]) == 0
    assert main(["data", "build", str(folder / "raw"), data[1], "--features", "none"]) == 0
    small = ["--preset", "demo", *FAST]
    assert main(["pretrain", *data, "--out", str(folder / "graph"), *small, "--batch-size", "64"]) == 0
    assert main(["sasrec", *data, "--out", str(folder / "sequence"), *small, "--embedding-dim", "8"]) == 0
    runs = ["--graph", str(folder / "graph"), "--sequence", str(folder / "sequence")]
    return ["ablate", *data, *runs, "--llm", str(save_tiny_llm(folder / "llm")), *FAST]


def test_one_table_one_figure_and_nothing_twice(call, argv, tmp_path):
    argv = [*argv, "--out", tmp_path / "out", "--rows", "no-lora", "text-not"]
    code, out, err = call(*argv)
    assert (code, out) == (2, "") and "got 'text-not'; did you mean 'text'?" in err
    argv = argv[:-1]
    code, out, err = call(*argv)
    assert code == 0 and re.search(r"no-lora, seed 2024 \(2 of 2\): [\d,]+ trained parameters, at most", err)
    assert re.search(r"row +valid ndcg@10 +test recall@10 +test ndcg@10 +ndcg@10 interval +ndcg@10 - full", out)
    assert re.search(r"\n  full( +0\.\d{4}){3} +0\.\d{4} to 0\.\d{4} +full +\d+ +[\d,]+\n", out)
    assert re.search(r"\n  no-lora( +0\.\d{4}){3} .* [+-]0\.\d{4} \[[+-]0\.\d{4}, [+-]0\.\d{4}\]", out)
    assert "The validation split chose each run's epoch (by ndcg@10); the test split was scored once per run." in out
    assert (tmp_path / "out" / "ablation.png").read_bytes().startswith(b"\x89PNG")
    head, line, full, lora, *_ = (tmp_path / "out" / "ablation.md").read_text().splitlines()
    assert head == "| row | valid ndcg@10 | recall@10 | ndcg@10 | difference to `full`, ndcg@10 |"
    assert len({text.count("|") for text in (head, line, full, lora)}) == 1
    assert re.fullmatch(r"\| `full`: the model as set \| 0\.\d{4} (\| 0\.\d{4} ±0\.\d{4} ){2}\|  \|", full)
    assert re.search(r"`no-lora`: .* \| [+-]0\.\d{4} \[", lora)
    code, out, err = call(*argv, "--json")
    ablation = json.loads(out.splitlines()[-1])
    # No line on stderr: nothing was trained again.
    assert (code, err) == (0, "") and ablation == json.loads((tmp_path / "out" / "ablation.json").read_text())
    full, changed = ablation["rows"]
    result = json.loads((tmp_path / "out" / "full-seed2024" / "result.json").read_text())
    assert full["test"]["ndcg@10"]["mean"] == result["test"]["ndcg@10"]
    difference = changed["difference_to_full"]["ndcg@10"]["difference"]
    assert difference == pytest.approx(changed["test"]["ndcg@10"]["mean"] - full["test"]["ndcg@10"]["mean"])
    assert full["num_trained_parameters"] > changed["num_trained_parameters"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--graph", "absent"], r"graph run absent holds no embeddings.safetensors"),
        (["--rwos", "full"], r"unknown option '--rwos'; did you mean --rows\?"),
        (["model.head=best"], r"--model.head must be one of tied, trained, frozen, got 'best'"),
    ],
)
def test_wrong_arguments_are_one_line(call, argv, tmp_path, extra, message):
    code, out, err = call(*argv, "--out", tmp_path / "out", "--rows", "full", *extra)
    assert (code, out) == (2, "") and re.fullmatch(f"hellm: error: .*{message}.*\n", err)
    assert not (tmp_path / "out").exists()


def made_up(folder, name: str, values: dict[int, list[float]], *, users: bool = True) -> dict:
    """A row whose runs hit by `values`: seed -> one value per user."""
    from safetensors.numpy import save_file

    runs = {}
    for seed, one in values.items():
        run = folder / f"{name}-seed{seed}"
        run.mkdir()
        per_user = {metric: np.array(one) for metric in ("recall@10", "ndcg@10")}
        if users:
            save_file({"users": np.arange(len(one)), **per_user}, run / "test_users.safetensors")
        metrics = {metric: float(np.mean(one)) for metric in per_user}
        test = {"metrics": metrics, "confidence_intervals": {metric: [0.1, 0.9] for metric in metrics}}
        test |= {"num_users": len(one), "num_items": 9}
        runs[str(seed)] = {"run": run.name, "valid": {"metrics": {"ndcg@10": 0.5}}, "test": test}
        runs[str(seed)] |= {"training_seconds": 10.0 * seed, "users_per_second": 4.0, "num_trained_parameters": 7}
    return {"name": name, "words": f"{name} in words", "overrides": [], "stage_1": None, "runs": runs}


DATA = SimpleNamespace(name="made up", fingerprint="f")


def test_differences_are_paired_user_by_user(tmp_path):
    full = made_up(tmp_path, "full", {1: [0.2, 0.4, 0.6, 0.8]})
    worse = made_up(tmp_path, "no-lora", {1: [0.1, 0.3, 0.5, 0.7]})
    old = made_up(tmp_path, "no-graph", {1: [0.3, 0.5, 0.7, 0.9]}, users=False)
    ran = {"seeds": [1], "skipped": {"titles": "no titles"}, "rows": [full, worse, old]}
    ablation = ablation_report(ran, FinetuneConfig(), DATA, tmp_path)
    rows = ablation["rows"]
    assert rows[0]["test"]["ndcg@10"] == {"mean": pytest.approx(0.5), "low": 0.1, "high": 0.9}
    assert ablation["interval"] == "95% bootstrap interval over users" and rows[0]["difference_to_full"] is None
    # Each user loses 0.1, so the paired interval has no width though users differ.
    found = rows[1]["difference_to_full"]["ndcg@10"]
    assert [found[name] for name in ("difference", "low", "high")] == pytest.approx([-0.1] * 3)
    assert rows[2]["difference_to_full"]["ndcg@10"] == {"difference": pytest.approx(0.1), "low": None, "high": None}


def test_several_seeds_have_a_t_interval(tmp_path, capsys):
    full = made_up(tmp_path, "full", {1: [0.2, 0.4], 2: [0.4, 0.6]})
    other = made_up(tmp_path, "titles", {1: [0.2, 0.4], 2: [0.6, 0.8]})
    ran = {"seeds": [1, 2], "skipped": {"text": "no text"}, "rows": [full, other]}
    ablation = ablation_report(ran, FinetuneConfig(), DATA, tmp_path)
    test = ablation["rows"][0]["test"]["recall@10"]
    # Means 0.3 and 0.5; half width 12.7062 * 0.1414 / sqrt(2).
    assert (test["mean"], test["high"] - test["mean"]) == pytest.approx((0.4, 1.27062), abs=1e-5)
    assert ablation["rows"][1]["difference_to_full"]["recall@10"]["difference"] == pytest.approx(0.1)
    assert ablation["rows"][1]["training_seconds"] == 15
    print_ablation(ablation)
    out = capsys.readouterr().out
    assert "Interval: 95% t-interval over 2 seeds" in out and "user by user, of the means over seeds" in out
    assert "  left out: text (no text)" in out and "  titles  titles in words" in out


def test_figure_takes_intervals_that_leave_out_their_value(tmp_path):
    options = {"metric": "ndcg@10", "interval": "95% interval", "title": "made up"}
    plot_ablation(tmp_path / "a.png", ["full", "none"], [0.4, 0.0], [(0.41, 0.5), (0.0, 0.0)], **options)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and not list(tmp_path.glob(".*"))
