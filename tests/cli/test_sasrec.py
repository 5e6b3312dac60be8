"""`hellm sasrec` through the command line."""

from __future__ import annotations

import json
import re

import pytest
from support.command_line import last_json

from hellm.cli import main
from hellm.models import SASRec

pytestmark = pytest.mark.usefixtures("same_threads")
FAST = ["--preset", "demo", "--num-threads", "1", "--tensorboard", "false", "--embedding-dim", "8", "--max-epochs", "2"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    """A made-up shop of 60 users and 40 items, in hellm's own form."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = ["--num-users", "60", "--num-items", "40", "--num-groups", "2"]
    assert main(["data", "sample", str(folder / "raw"), *sizes]) == 0
    assert main(["data", "build", str(folder / "raw"), str(folder / "built"), "--features", "none"]) == 0
    return str(folder / "built")


def test_json_is_result_json_on_the_last_line(call, shop, tmp_path):
    code, out, err = call("sasrec", "--data", shop, "--out", tmp_path / "run", *FAST, "--json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
    assert last_json(out) == result
    assert result["test"]["recall@10"] == result["test"]["metrics"]["recall@10"]
    assert SASRec.load(tmp_path / "run").item_keys().shape == (result["dataset"]["num_items"], 8)


def test_run_is_told_refused_resumed_and_overwritten(call, shop, tmp_path):
    argv = ["sasrec", "--data", shop, "--out", tmp_path / "run"]
    code, out, _ = call(*argv, *FAST)
    assert code == 0 and re.search(r"recall@10 +0\.\d{4} +0\.\d{4} to 0\.\d{4} +0\.\d{4}", out)
    assert "protocol recbole-sequential: RecBole sequential models, full ranking: nothing masked" in out
    code, _, err = call(*argv, *FAST)
    assert code == 2 and "is not empty; --resume goes on with it, --overwrite replaces it" in err
    longer = last_json(call(*argv, "--resume", "--max-epochs", "3", "--json")[1])
    assert longer["num_epochs"] == 3
    code, _, err = call(*argv, "--resume", "seed=9")
    assert code == 2 and "a resumed run must keep its settings; seed was 2024, got 9" in err
    assert last_json(call(*argv, *FAST, "--overwrite", "--json")[1])["num_epochs"] == 2


def test_dry_run_counts_and_writes_nothing(call, shop, tmp_path):
    argv = ["sasrec", "--data", shop, "--out", tmp_path / "run", *FAST, "--batch-size", "64", "--dry-run"]
    code, out, _ = call(*argv)
    assert code == 0 and not (tmp_path / "run").exists()
    plan = last_json(call(*argv, "--json")[1])
    # Every training event but each user's first is a target.
    assert plan["positions_per_epoch"] == plan["dataset"]["num_events"]["train"] - 60
    assert plan["steps_per_epoch"] == plan["positions_per_epoch"] // 64
    assert f"{plan['steps_per_epoch']} steps per epoch" in out and "cross-entropy over all items" in out
    assert "one sampled negative" in call(*argv, "--loss", "bce")[1]


def test_settings_come_from_a_file(call, shop, tmp_path):
    (tmp_path / "mine.yaml").write_text("dropout: 0.2\nembedding_dim: 4\n", encoding="utf-8")
    argv = ["--config", tmp_path / "mine.yaml", "embedding_dim=6", "--dry-run", "--json"]
    config = last_json(call("sasrec", "--data", shop, *argv)[1])["config"]
    assert (config["dropout"], config["embedding_dim"], config["max_length"]) == (0.2, 6, 50)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--dropuot", "0.1"], r"unknown option '--dropuot'; did you mean --dropout\?"),
        (["--loss", "hinge"], r"--loss must be one of cross_entropy, bce, got 'hinge'"),
        (["--num-heads", "3"], r"embedding_dim must be a multiple of num_heads 3, got 64"),
        (["--preset", "defualt"], r"unknown preset or config file 'defualt'; did you mean 'default'\?"),
        (["--preset", "demo", "--config", "x.yaml"], r"give either --preset or --config, got both"),
        (["--config", "absent.yaml"], r"config file absent.yaml does not exist"),
        ([], r"missing: --out \(the run directory to make\)"),
    ],
)
def test_wrong_arguments_are_one_line(call, shop, argv, message):
    code, out, err = call("sasrec", "--data", shop, *argv)
    assert (code, out) == (2, "") and re.fullmatch(f"hellm: error: .*{message}.*\n", err)


def test_data_without_a_next_item_are_refused(call, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tiny.txt").write_text("1 1 2 3\n2 2 3 4\n", encoding="utf-8")
    code, _, err = call("sasrec", "--data", tmp_path / "data", "--out", tmp_path / "run", "ks=[1]", "monitor=[ndcg@1]")
    assert code == 2 and "no user has two training events, so there is no next item to learn" in err
    assert not (tmp_path / "run").exists()
