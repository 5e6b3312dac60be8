"""`hellm evaluate` through the command line."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.command_line import FAST, last_json

from hellm import _devices

pytestmark = pytest.mark.usefixtures("same_threads")


class TestEvaluate:
    def test_table_and_json(self, call, shop, run):
        code, out, _ = call("evaluate", run, "popularity", "--data", shop, "--json")
        report = last_json(out)
        assert code == 0 and report["best"] == run and report["compared"] == "recall@20"
        mine, popular = report["models"]
        result = json.loads(Path(run, "result.json").read_text(encoding="utf-8"))
        assert mine["metrics"] == pytest.approx(result["test"]["metrics"])
        assert mine["difference_to_best"] is None and mine["users_per_second"] > 0
        low, high = popular["confidence_intervals"]["recall@20"]
        assert low <= popular["metrics"]["recall@20"] <= high
        difference = popular["difference_to_best"]
        assert difference["difference"] == pytest.approx(popular["metrics"]["recall@20"] - mine["metrics"]["recall@20"])
        code, out, _ = call("evaluate", run, "popularity", "--data", shop)
        lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
        assert f"{popular['metrics']['ndcg@10']:.4f} ±" in lines["popularity"] and " best " in lines[run]

    def test_validation_split_protocol_and_lengths(self, call, shop, run):
        argv = ["--on", "valid", "--protocol", "official", "--ks", "5", "--metrics", "mrr", "--json"]
        report = last_json(call("evaluate", run, "--data", shop, *argv)[1])
        assert (report["split"], report["protocol"], report["shown"]) == ("valid", "official", ["mrr@5"])

    def test_protocols_side_by_side_and_slices(self, call, shop, run):
        argv = ["--protocol", "standard,recbole-sequential", "--ks", "10", "--slices", "--on", "valid"]
        argv += ["--metrics", "ndcg", "coverage", "diversity"]
        code, out, _ = call("evaluate", run, "popularity", "--data", shop, *argv)
        report = last_json(call("evaluate", run, "popularity", "--data", shop, *argv, "--json")[1])
        (other,) = report["other_protocols"]
        assert code == 0 and "protocol recbole-sequential: RecBole sequential" in out and "s/1,000 users" in out
        for one, prefix in ((report, "standard"), (other, "recbole-sequential")):
            for place, name in enumerate((run, "popularity")):
                model = one["models"][place]["metrics"]
                values = [model[f"{metric}@10"] for metric in ("ndcg", "coverage", "diversity")]
                row = re.search(rf"^  {re.escape(str(name))} +{prefix} .*", out, re.M).group()
                assert all(f"{value:.4f}" in row for value in values)
            for kind, parts in one["models"][0]["slices"].items():
                block = out.split(f"ndcg@10 by {kind}, protocol {prefix}:\n")[1].split("\n\n")[0]
                counts = re.search(r"^  users +(.*)$", block, re.M).group(1).split()
                assert counts == [f"{part['num_users']:,}" for part in parts.values()]

    def test_older_spellings_of_on_and_split(self, call, fails, shop, run):
        old = last_json(call("evaluate", run, "--data", shop, "--split", "valid", "--json")[1])
        new = last_json(call("evaluate", run, "--data", shop, "--on", "valid", "--json")[1])
        assert old["split"] == "valid" and old["models"][0]["metrics"] == new["models"][0]["metrics"]
        argv = ["--split", "valid", "--data-split", "time"]
        fails("evaluate", run, "--data", shop, *argv, match="was trained on another split")
        report = last_json(call("evaluate", "popularity", "--data", shop, *argv, "--json")[1])
        assert report["split"] == "valid" and report["fingerprint"] != old["fingerprint"]

    def test_python_gives_the_same(self, call, shop, run):
        import hellm

        options = {"protocol": "official", "ks": (5,), "metrics": ("mrr",), "split": "valid"}
        mine = hellm.compare([run, "popularity"], shop, **options)
        argv = ["--protocol", "official", "--ks", "5", "--metrics", "mrr", "--on", "valid", "--json"]
        report = last_json(call("evaluate", run, "popularity", "--data", shop, *argv)[1])
        for one in (mine, report):
            for row in one["models"]:
                assert row.pop("users_per_second") > 0 and row.pop("seconds_per_1000_users") > 0
        assert json.loads(json.dumps(mine)) == report
        assert hellm.compare({"mine": run}, shop, **options)["best"] == "mine"

    def test_test_evaluations_are_counted_and_validations_not(self, call, shop, run):
        log = Path(run, "test_evaluations.jsonl")
        before = log.read_text(encoding="utf-8").splitlines()
        assert json.loads(before[0])["by"] == "training"
        code, out, _ = call("evaluate", run, "popularity", "--data", shop, "--on", "valid")
        assert code == 0 and f"{run} {len(before)}" in out
        assert log.read_text(encoding="utf-8").splitlines() == before
        code, out, _ = call("evaluate", f"twice={run},{run}", "--data", shop, "--ks", "5", "10", "--protocol", "s3rec")
        assert code == 0 and f"so far, in training and since (choose with --on valid): {run} {len(before) + 1}" in out
        *kept, last = log.read_text(encoding="utf-8").splitlines()
        last = json.loads(last)
        assert kept == before and last["by"].startswith("hellm evaluate twice=") and last["protocols"] == ["s3rec"]
        assert last["metrics"] == ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]

    def test_run_that_may_only_be_read_is_evaluated(self, call, shop, run, tmp_path):
        shutil.copytree(run, tmp_path / "run")
        (tmp_path / "run" / "test_evaluations.jsonl").unlink()
        (tmp_path / "run" / "test_evaluations.jsonl").mkdir()
        code, out, _ = call("evaluate", tmp_path / "run", "--data", shop)
        assert code == 0 and "note: " in out and "cannot be written to (Is a directory), so its test_eval" in out
        assert f"{tmp_path / 'run'} 1" in out

    def test_device_is_that_of_the_scorer(self, fails, call, shop, run, monkeypatch):
        from hellm.recommend import Recommender

        report = [
            last_json(call("evaluate", run, "--data", shop, "--device", one, "--json")[1]) for one in ("auto", "cpu")
        ]
        assert report[0]["models"][0]["metrics"] == report[1]["models"][0]["metrics"]
        fails(
            "evaluate",
            run,
            "--data",
            shop,
            "--device",
            "tpu",
            match=r'device must be "auto", "cpu", "cuda" or "cuda:N"',
        )
        fails("evaluate", run, "--data", shop, "--device", "cuda:77", match="device must be usable, got 'cuda:77'")
        asked, original = [], Recommender.scorer
        monkeypatch.setattr(_devices, "resolve_device", lambda name: "cuda:1" if name == "cuda" else name)
        monkeypatch.setattr(Recommender, "scorer", lambda self, *where: asked.append(where) or original(self, where[0]))
        assert call("evaluate", run, "--data", shop, "--device", "cuda")[0] == 0
        assert asked == [("test", "cuda:1")]

    def test_baselines_of_the_extra(self, call, shop):
        pytest.importorskip("implicit", reason='needs pip install "hellm[baselines]"')
        report = last_json(call("evaluate", "popularity", "itemknn", "--data", shop, "--json")[1])
        assert [model["kind"] for model in report["models"]] == ["baseline", "baseline"]
        assert report["best"] == "itemknn"

    def test_runs_of_several_seeds_are_one_row(self, call, fails, shop, run, tmp_path):
        other = tmp_path / "other"
        assert call("pretrain", "--data", shop, "--out", other, *FAST, "max_epochs=1", "seed=5")[0] == 0
        argv = [f"both={run},{other}", f"one={run}", f"{other}", "mean=popularity", "--data", shop, "--ks", "10"]
        _, out, _ = call("evaluate", *argv)
        assert re.search(r"both \(2 runs\) +\S+ ±", out) and "(of several runs: their t-interval)" in out
        both, one, two, baseline = last_json(call("evaluate", *argv, "--json")[1])["models"]
        names = [model["name"] for model in (both, one, two, baseline)]
        assert names == ["both", "one", str(other), "mean"] and baseline["kind"] == "baseline"
        low, high = both["confidence_intervals"]["ndcg@10"]
        a, b = (model["metrics"]["ndcg@10"] for model in (one, two))
        assert a != b and [seed["ndcg@10"] for seed in both["seeds"]] == [a, b]
        assert both["metrics"]["ndcg@10"] == pytest.approx((a + b) / 2)
        # Two runs: t of one degree of freedom, times |a - b| / sqrt(2) / sqrt(2).
        assert (high - low) / 2 == pytest.approx(12.7062 * abs(a - b) / 2, rel=1e-4)
        assert "seeds" not in one
        fails("evaluate", f"x={run},popularity", "--data", shop, match="MODEL must be run directories where it is sev")
        fails("evaluate", f"x={run}", "x=popularity", "--data", shop, match="must have a name of its own, got 'x'")
        fails("evaluate", f"x={run},absent", "--data", shop, match="MODEL must be a run directory .* got 'absent'")

    def test_errors(self, fails, call, shop, run, tmp_path):
        fails("evaluate", "populariti", "--data", shop, match=r"got 'populariti'; did you mean 'popularity'\?")
        fails("evaluate", "popularity", "--data", shop, "--on", "train", match="--on must be test or valid, got")
        fails("evaluate", "popularity", "--data", shop, "--protocol", "x", match="protocol must be one of standard, ")
        fails("evaluate", "popularity", "--data", shop, "--metrics", "auc", match="--metrics must be among recall, ")
        for wrong, got in (("10.5", "10.5"), ("10,x", "x"), ("ten", "ten")):
            match = f"--ks must be an integer, or several of them, got '{got}'"
            fails("evaluate", "popularity", "--data", shop, "--ks", wrong, match=match)
        fails("evaluate", "popularity", "--data", shop, "--ks", match="--ks needs a value")
        fails("evaluate", "popularity", "--data", shop, "--ks", "0", match=r"ks must be integers >= 1, .* got \(0,\)")
        fails("evaluate", "--data", shop, match="missing: ")
        other = tmp_path / "other"
        sizes = ["--num-users", "50", "--num-items", "80", "--num-groups", "4"]
        assert call("data", "sample", other, *sizes)[0] == 0
        fails("evaluate", run, "--data", other, match="its 120 user ids are not the 50 of the data")
        fails("evaluate", run, "--data", shop, "--split", "time", match="another split .* give --split as")
        fails("evaluate", tmp_path, "--data", shop, match="holds no embeddings.safetensors")

    def test_split_of_the_run_is_used(self, call, shop, tmp_path):
        out = tmp_path / "time"
        assert call("pretrain", "--data", shop, "--out", out, *FAST, "max_epochs=1", "--split", "time")[0] == 0
        report = last_json(call("evaluate", out, "--data", shop, "--json")[1])
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        assert result["dataset"]["split"] == "time"
        assert report["fingerprint"] == result["dataset"]["fingerprint"]


@pytest.mark.parametrize(
    "given", [["--ks", "5", "10"], ["--ks", "5,10"], ["--ks=5,10"], ["ks=[5,10]"], ["--ks", "5,", "10"]]
)
def test_list_lengths_are_words_or_have_commas_between_them(call, shop, given):
    code, out, _ = call("evaluate", "popularity", "--data", shop, *given, "--split", "valid", "--json")
    assert code == 0 and {"recall@5", "recall@10"} <= set(re.findall(r"recall@\d+", out))
