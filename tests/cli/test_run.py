"""`hellm demo` and `hellm run`: everything at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from saved_llm import save_tiny_llm
from support.command_line import last_json

pytestmark = pytest.mark.usefixtures("same_threads")


class TestDemo:
    def test_demo_makes_everything_and_finds_the_structure(self, call, fails, tmp_path):
        out = tmp_path / "demo"
        sizes = ["--num-users", "120", "--num-items", "160", "--max-epochs", "6"]
        code, text, err = call("demo", "--out", out, *sizes, "--llm", save_tiny_llm(tmp_path / "llm"), "--json")
        assert code == 0, err
        assert all(f"[{step}]" in text for step in range(1, 11))
        assert (out / "planted_structure.png").read_bytes().startswith(b"\x89PNG")
        result = last_json(text)
        assert result["planted"]["model"] > 0.6 > 2 * result["planted"]["chance"]
        compared = [Path(model["name"]).name for model in result["models"]]
        assert compared[:6] == ["fused", "llm", "content", "sasrec", "transitions", "stage1"]
        assert compared[6:] == ["lightgcn", "popularity", "itemknn", "bpr"]
        assert len(result["verdicts"]) == 1 and str(out / "run" / "llm") in result["verdicts"][0]
        assert "is recommended" in text and "recall@10" in text and "because of" in text
        assert "bought both, alike in " in text
        fails("demo", "--out", out, match="is not empty; --overwrite replaces it, or give another")
        (tmp_path / "file").touch()
        fails("demo", "--out", tmp_path / "file", match="is a file; give another folder")
        (out / "letter.txt").touch()
        fails("demo", "--out", out, "--overwrite", match=r"holds letter\.txt, which hellm did not write")


class TestRun:
    FAST = (
        *("--preset", "demo", "text=none", "image=none", "language_model=false", "baselines=[popularity]"),
        *("pretrain.max_epochs=2", "pretrain.num_threads=1", "sasrec.max_epochs=2", "sasrec.num_threads=1"),
        *("content.max_epochs=2", "content.num_threads=1"),
    )

    def test_run_goes_on_where_it_stopped(self, call, shop, tmp_path, monkeypatch):
        from hellm.training import sasrec

        argv = ["run", "--data", shop, "--out", tmp_path / "run", *self.FAST]
        with monkeypatch.context() as broken:
            broken.setattr(sasrec, "train_sasrec", lambda *args, **options: 1 / 0)
            assert call(*argv)[0] == 1
        done = (tmp_path / "run" / "stage1" / "result.json").stat().st_mtime_ns
        code, text, _ = call(*argv, "--resume", "--json")
        towers = ["stage1", "transitions", "sasrec", "content"]
        assert code == 0 and (tmp_path / "run" / "stage1" / "result.json").stat().st_mtime_ns == done
        assert {Path(model["name"]).name for model in last_json(text)["models"]} == {"fused", *towers, "popularity"}
        answers = json.loads((tmp_path / "run" / "recommendations.json").read_text(encoding="utf-8"))
        assert len(answers) == 3 and all(len(one["items"]) == 5 for one in answers)

    def test_run_is_careful_with_what_is_there(self, fails, shop, tmp_path):
        out = tmp_path / "out"
        out.mkdir()
        (out / "letter.txt").touch()
        fails("run", "--data", shop, "--out", out, match="is not empty; --resume goes on with it, --overwrite")
        fails("run", "--data", shop, "--out", out, "--overwrite", match=r"holds no \.hellm\.json, so hellm did not")
        fails("run", "--data", shop, "--out", out / "letter.txt", match="is a file; give another folder")
        fails("run", "--data", shop, match="missing: --out")
        fails("run", "--data", shop, "--out", out, "--resume", "--overwrite", match="must not both be given")
        fails("run", "--data", shop, "--out", out, "baselines=[magic]", match="baselines must be among .*, got 'magic'")
        assert [path.name for path in out.iterdir()] == ["letter.txt"]

    def test_resumed_run_keeps_its_encoders(self, call, fails, shop, tmp_path):
        argv = ["run", "--data", shop, "--out", tmp_path / "run", *self.FAST]
        assert call(*argv, "--dry-run")[0] == 0
        fails(*argv, "--resume", "text=minilm", match="must keep its encoders; text was 'none', got 'minilm'")
