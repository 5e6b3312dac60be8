"""`hellm pretrain` through the command line."""

from __future__ import annotations

import json

import pytest
from support.command_line import FAST, last_json

pytestmark = pytest.mark.usefixtures("same_threads")


class TestPretrain:
    def test_json_is_result_json_on_the_last_line(self, call, shop, tmp_path):
        code, out, err = call(
            "pretrain", "--data", shop, "--out", tmp_path / "run", *FAST, "--max-epochs", "1", "--seed", "3", "--json"
        )
        assert (code, err) == (0, "")
        assert last_json(out) == json.loads((tmp_path / "run" / "result.json").read_text(encoding="utf-8"))
        assert (tmp_path / "run" / "config.yaml").read_text(encoding="utf-8").count("seed: 3") == 1

    def test_official_compat_runs(self, call, shop, tmp_path):
        argv = [*FAST, "--compat", "official", "--protocol", "official", "--max-epochs", "1", "--json"]
        code, out, _ = call("pretrain", "--data", shop, "--out", tmp_path / "run", *argv)
        assert code == 0 and last_json(out)["test"]["protocol"] == "official"

    def test_run_directory_is_refused_resumed_and_overwritten(self, call, fails, shop, tmp_path):
        argv = ["pretrain", "--data", shop, "--out", tmp_path / "run"]
        first = last_json(call(*argv, *FAST, "--max-epochs", "2", "--json")[1])
        fails(*argv, *FAST, match="run is not empty; --resume goes on with it, --overwrite replaces it")
        # Without settings of its own, a resumed run goes on with those that it had.
        assert last_json(call(*argv, "--resume", "--json")[1]) == first
        longer = last_json(call(*argv, "--resume", "--max-epochs", "3", "--json")[1])
        assert (first["num_epochs"], longer["num_epochs"]) == (2, 3)
        fails(*argv, "--resume", "seed=9", match="a resumed run must keep its settings; seed was 2024, got 9")
        fresh = last_json(call(*argv, *FAST, "--max-epochs", "1", "--overwrite", "--json")[1])
        assert fresh["num_epochs"] == 1

    def test_overwrite_leaves_folders_that_are_no_run(self, fails, shop, tmp_path):
        (tmp_path / "letter.txt").write_text("dear", encoding="utf-8")
        argv = ["pretrain", "--data", shop, "--out", tmp_path]
        fails(*argv, "--overwrite", match=r"holds no \.hellm\.json, so hellm did not make it")
        fails(*argv, "--resume", match=r"holds no \.hellm\.json, so hellm did not make it")
        assert (tmp_path / "letter.txt").read_text(encoding="utf-8") == "dear"

    def test_dry_run_counts_and_writes_nothing(self, call, shop, tmp_path):
        argv = ["pretrain", "--data", shop, "--out", tmp_path / "run", *FAST, "--dry-run"]
        code, out, _ = call(*argv)
        assert code == 0 and "120 users, 80 items" in out and not (tmp_path / "run").exists()
        plan = last_json(call(*argv, "--json")[1])
        train = plan["dataset"]["num_events"]["train"]
        assert plan["steps_per_epoch"] == train // 64 + 1
        # Both users and items have two tables of width 64.
        assert plan["num_embedding_parameters"] == 2 * (120 + 80) * 64
        assert f"{plan['steps_per_epoch']} steps per epoch" in out

    def test_dry_run_without_hypergraphs(self, call, shop):
        argv = ["model.user_hypergraph=false", "model.item_hypergraph=false", "--dry-run", "--json"]
        assert last_json(call("pretrain", "--data", shop, *FAST, *argv)[1])["num_embedding_parameters"] == 200 * 64

    def test_matrix_factorisation_run_can_be_served(self, call, shop, tmp_path):
        argv = ["model.backbone=mf", "model.user_hypergraph=false", "model.item_hypergraph=false", "max_epochs=1"]
        assert call("pretrain", "--data", shop, "--out", tmp_path / "mf", *FAST, *argv)[0] == 0
        assert last_json(call("recommend", tmp_path / "mf", "--history", "P1000", "--json")[1])[0]["basis"] == "history"
