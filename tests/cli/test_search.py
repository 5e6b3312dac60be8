"""`hellm search` through the command line."""

from __future__ import annotations

import json
import re

import pytest

pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("same_threads")
FAST = ["num_threads=1", "tensorboard=false", "max_epochs=2", "validate_every=1", "feedforward_dim=8", "batch_size=64"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    from hellm.data import write_sample_shop

    return write_sample_shop(tmp_path_factory.mktemp("data") / "shop", num_users=60, num_items=40, num_groups=2)


def test_best_settings_are_told_and_train(call, shop, tmp_path):
    data, out = ["--data", shop], tmp_path / "found"
    argv = ["search", "sasrec", *data, "--out", out, *FAST, "embedding-dim=8,16", "learning_rate=1e-3..1e-1:log"]
    code, text, err = call(*argv, "--trials", 2)
    assert code == 0 and re.search(r"\n  trial +valid ndcg@10 +best epoch +time +embedding_dim +learning_rate\n", text)
    assert re.fullmatch(r"(trial \d: finished 0\.\d{4}, [\d.]+ s, embedding_dim=\d+ learning_rate=[\d.]+\n){2}", err)
    assert f"--config {out}/config.yaml --out RUN" in text
    code, text, err = call("search", "sasrec", *data, "--out", out, "--trials", 3, "--resume", "--json")
    found = json.loads(text.splitlines()[-1])
    # The one that was missing.
    assert code == 0 and err.startswith("trial 2: ") and err.count("\n") == 1
    assert found == json.loads((out / "search.json").read_text()) and len(found["trials"]) == 3
    assert found["space"] == {"embedding_dim": "8,16", "learning_rate": "1e-3..1e-1:log"}
    best = found["trials"][found["best"]]
    code, text, _ = call("sasrec", *data, "--out", tmp_path / "run", "--config", out / "config.yaml", "--json")
    result = json.loads(text.splitlines()[-1])
    assert code == 0 and result["valid"]["metrics"]["ndcg@10"] == best["value"] and result["test"] is not None


def test_stage_1_and_defaults(call, shop, tmp_path):
    argv = ["search", "pretrain", "--data", shop, "--out", tmp_path / "out", "--trials", 1, "--json", "max_epochs=1"]
    code, text, _ = call(*argv, "num_threads=1", "tensorboard=false", "batch_size=64")
    found = json.loads(text.splitlines()[-1])
    assert code == 0 and "model.num_layers" in found["space"] and found["monitor"] == "recall@20"


def test_what_would_be_searched(call, shop, tmp_path):
    code, text, _ = call("search", "sasrec", "--data", shop, "--dry-run", "--trials", 30, "dropout=0.1..0.5")
    assert (
        code == 0 and "30 trials of at most 200 epochs, by validation ndcg@10" in text and "  dropout=0.1..0.5" in text
    )
    code, text, _ = call("search")
    assert code == 0 and "finetune" in text


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["sasrek"], "STAGE must be one of pretrain, sasrec, finetune, got 'sasrek'; did you mean 'sasrec'?"),
        (["sasrec", "--data", "SHOP", "dropout=0.1..0.5"], "missing: --out, --trials"),
        (["sasrec", "--data", "SHOP", "--out", "x", "--trials", "2", "drpout=0.1..0.5"], "did you mean --dropout?"),
        (
            ["sasrec", "--data", "SHOP", "--out", "x", "--trials", "2", "dropout=0.9..0.5"],
            "dropout must have LOW < HIGH",
        ),
        (
            ["finetune", "--data", "SHOP", "--out", "x", "--trials", "2", "model.head=tied,best"],
            "model.head must be one",
        ),
        (["pretrain", "--data", "SHOP", "--out", "x", "--trials", "2", "--graph", "y"], "unknown option '--graph'"),
    ],
)
def test_mistakes_are_one_line(fails, shop, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    fails("search", *[shop if word == "SHOP" else word for word in argv], match=re.escape(message))
    assert not (tmp_path / "x").exists()
