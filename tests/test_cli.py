"""The command line, from a made-up shop to recommendations."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import last_json
from saved_llm import save_tiny_llm

from hellm import _devices
from hellm.cli import VERBS, main
from hellm.cli._output import duration, one_line, table, title

pytestmark = pytest.mark.usefixtures("same_threads")
ROOT = Path(__file__).resolve().parents[1]
FAST = ["--preset", "demo", "--num-threads", "1", "--tensorboard", "false", "--batch-size", "64"]


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> str:
    """A made-up shop of 120 users and 80 items in 4 groups, in hellm's own form."""
    folder = tmp_path_factory.mktemp("shop")
    sizes = ["--num-users", "120", "--num-items", "80", "--num-groups", "4"]
    assert main(["data", "sample", str(folder / "raw"), *sizes]) == 0
    assert main(["data", "build", str(folder / "raw"), str(folder / "built")]) == 0
    return str(folder / "built")


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory) -> str:
    """A run of 10 epochs on `shop`."""
    out = str(tmp_path_factory.mktemp("runs") / "run")
    assert main(["pretrain", "--data", shop, "--out", out, *FAST, "--max-epochs", "10"]) == 0
    return out


class TestFrame:
    def test_help_lists_every_verb(self, call):
        code, out, err = call("--help")
        assert (code, err) == (0, "")
        assert all(re.search(rf"^  {verb} ", out, re.MULTILINE) for verb in VERBS)
        assert call() == (code, out, err)

    @pytest.mark.parametrize("argv", [[verb] for verb in VERBS if verb != "data"] + [["data", "check"]])
    def test_every_verb_has_help(self, call, argv):
        code, out, _ = call(*argv, "--help")
        assert code == 0
        assert out.startswith(f"usage: hellm {' '.join(argv)} ")

    def test_data_help_lists_actions_and_forms(self, call):
        code, out, _ = call("data")
        assert code == 0
        assert all(word in out for word in ("check", "build", "convert", "sample", "mmrec", "recbole"))

    def test_pretrain_help_comes_from_the_config_and_shows_the_preset(self, call):
        _, default, _ = call("pretrain", "--help")
        assert re.search(
            r"--temperature X\s+of both contrastive losses; smaller is sharper\. \(default: 0\.6\)", default
        )
        assert "--model.num_layers X" in default and "--model CONFIG" not in default
        _, toys, _ = call("pretrain", "--preset", "hellm-toys", "--help")
        assert re.search(r"--temperature X\s+of both contrastive losses; smaller is sharper\. \(default: 0\.3\)", toys)

    def test_version(self, call):
        import hellm

        assert call("--version") == (0, f"hellm {hellm.__version__}\n", "")

    def test_module_and_quick_help(self):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "hellm", "--help"], cwd=ROOT, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        assert done.returncode == 0 and "usage: hellm VERB" in done.stdout
        # Well above the 0.1 s it takes on a quiet machine, well below what importing torch would.
        assert seconds < 1.5

    def test_help_does_not_import_torch(self):
        script = "import sys, hellm.cli; hellm.cli.main(['--help']); hellm.cli.main(['pretrain', '--help'])"
        script += "; print([name for name in ('torch', 'polars') if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_error_exit_code_in_a_process(self):
        done = subprocess.run([sys.executable, "-m", "hellm", "pretrian"], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == (
            f"hellm: error: verb must be one of {', '.join(VERBS)}, got 'pretrian'; did you mean 'pretrain'?\n"
        )

    def test_debug_shows_the_traceback(self):
        with pytest.raises(ValueError, match="verb must be one of"):
            main(["nonsense", "--debug"])

    def test_unexpected_errors_are_one_line_too(self, call, monkeypatch):
        def broken(argv):
            raise TypeError("not so")

        monkeypatch.setattr("hellm.cli.info.run", broken)
        assert call("info") == (1, "", "hellm: error: internal: TypeError: not so (--debug shows where)\n")

    def test_missing_extra_is_a_user_error(self, fails, monkeypatch):
        def lacking(argv):
            raise ImportError('ItemKNN needs the implicit library: pip install "hellm[baselines]"')

        monkeypatch.setattr("hellm.cli.info.run", lacking)
        fails("info", match=r'pip install "hellm\[baselines\]"')

    def test_diverged_training_is_one_line(self, call, monkeypatch):
        def diverged(argv):
            raise FloatingPointError("bpr_loss became nan in epoch 3, step 1")

        monkeypatch.setattr("hellm.cli.info.run", diverged)
        assert call("info") == (1, "", "hellm: error: bpr_loss became nan in epoch 3, step 1\n")

    def test_interrupted_training_keeps_its_code_and_message(self, call, monkeypatch):
        from hellm.training.loop import Interrupted

        def stopped(argv):
            raise Interrupted(15, "stopped after epoch 3; saved it")

        monkeypatch.setattr("hellm.cli.info.run", stopped)
        assert call("info") == (143, "", "hellm: stopped after epoch 3; saved it\n")

    def test_sigterm_saves_and_resume_goes_on(self, call, shop, tmp_path):
        settings = ["pretrain", "--data", shop, "--out", str(tmp_path / "run"), *FAST]
        command = [sys.executable, "-m", "hellm", *settings, "--max-epochs", "100000", "--patience", "100000"]
        metrics = tmp_path / "run" / "metrics.jsonl"
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=ROOT, **streams) as process:
            try:
                deadline = time.monotonic() + 120
                while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
                    time.sleep(0.05)
                process.terminate()
                errors = process.communicate(timeout=60)[1]
            finally:
                process.kill()
        assert process.returncode == 143
        assert re.fullmatch(r"hellm: stopped (in|after) epoch \d+.*; saved .*last.safetensors", errors.splitlines()[-1])
        epochs = len(metrics.read_text().splitlines())
        assert call(*settings, "--max-epochs", epochs + 2, "--resume")[0] == 0
        assert [json.loads(line)["epoch"] for line in metrics.read_text().splitlines()] == list(range(epochs + 2))

    def test_keyboard_interrupt(self, call, monkeypatch):
        def stopped(argv):
            raise KeyboardInterrupt

        monkeypatch.setattr("hellm.cli.info.run", stopped)
        assert call("info") == (130, "", "hellm: interrupted\n")


class TestOptions:
    def test_settings_in_any_spelling(self, call, shop):
        base = ["pretrain", "--data", shop, "--preset", "demo", "--dry-run", "--json"]
        configs = [
            last_json(call(*base, *spelling)[1])["config"]
            for spelling in (
                ["--max-epochs", "7", "--model.num-layers", "3", "--ks", "[5,20]", "--monitor", "[recall@5]"],
                ["--max_epochs=7", "--model.num_layers=3", "--ks=[5,20]", "--monitor=[recall@5]"],
                ["max_epochs=7", "model.num_layers=3", "ks=[5,20]", "monitor=[recall@5]"],
            )
        ]
        assert configs[0] == configs[1] == configs[2]
        assert configs[0]["max_epochs"] == 7 and configs[0]["model"]["num_layers"] == 3
        assert configs[0]["ks"] == [5, 20] and configs[0]["batch_size"] == 256

    def test_config_file_of_a_run_is_a_start(self, call, shop, run):
        argv = ["pretrain", "--data", shop, "--config", f"{run}/config.yaml", "seed=5", "--dry-run", "--json"]
        config = last_json(call(*argv)[1])["config"]
        assert (config["seed"], config["max_epochs"], config["batch_size"]) == (5, 10, 64)

    @pytest.mark.parametrize(
        ("argv", "match"),
        [
            (["--max-epoch", "3"], r"unknown option '--max-epoch'; did you mean --max_epochs\?"),
            (["max_epoch=3"], r"unknown option 'max_epoch'; did you mean --max_epochs\?"),
            (["--num_layers", "3"], r"unknown option '--num_layers'; did you mean --\S*num_layers\?"),
            (["stray"], "unexpected argument 'stray'"),
            (["--max-epochs", "many"], "--max_epochs must be an integer, got 'many'"),
            (["temperature=warm"], "--temperature must be a number, got 'warm'"),
            (["--temperature=-1"], "temperature must be > 0, got -1"),
            (["--model.backbone", "gnc"], "--model.backbone must be one of lightgcn, ngcf, mf, got 'gnc'"),
            (["--compat", "paper"], "--compat must be one of official, null, got 'paper'"),
            (["ks=5"], r"--ks must be a list such as \[a,b\], got '5'"),
            (["--preset", "hellm-beuty"], r"unknown preset.* 'hellm-beuty'; did you mean 'hellm-beauty'\?"),
            (["--preset", "demo", "--config", "x.yaml"], "give either --preset or --config, got both"),
            (["--config", "x.yaml"], r"config file x\.yaml does not exist"),
            (["--out"], "argument --out: expected one argument"),
            ([], r"missing: --out \(the run directory to make\)"),
            (["--resume", "--overwrite", "--out", "x"], "resume and overwrite must not both be given"),
            (["--split", "halves", "--out", "x"], "split must be one of given, .*, got 'halves'"),
            (["--dry-run", "--device", "tpu"], 'device must be "auto", "cpu", "cuda" or "cuda:N", got \'tpu\''),
        ],
    )
    def test_wrong_options_of_pretrain(self, fails, shop, argv, match):
        fails("pretrain", "--data", shop, *argv, match=match)

    def test_missing_data(self, fails):
        fails("pretrain", "--out", "x", match="missing: --data")
        fails("pretrain", "--out", "x", "--data", "/no/such", match="/no/such: no such file or folder")

    def test_wrong_key_in_a_config_file_names_the_file(self, fails, shop, tmp_path):
        file = tmp_path / "mine.yaml"
        file.write_text("temprature: 0.2\n", encoding="utf-8")
        fails(
            "pretrain", "--data", shop, "--config", file, match=r"mine\.yaml: .*temprature.*did you mean 'temperature'"
        )


class TestData:
    def test_check_for_people_and_as_json(self, call, shop):
        code, out, err = call("data", "check", shop)
        assert (code, err) == (0, "")
        assert re.search(r"^  users +120$", out, re.MULTILINE) and "items have no title" in out
        report = last_json(call("data", "check", shop, "--json")[1])
        assert (report["users"], report["items"], report["events"]["test"]) == (120, 80, 120)

    def test_convert_keeps_events_and_warns_of_a_lost_split(self, call, shop, tmp_path):
        code, out, err = call("data", "convert", shop, tmp_path / "mmrec", "--to", "mmrec", "--json")
        assert (code, err) == (0, "")
        again = last_json(call("data", "check", tmp_path / "mmrec", "--json")[1])
        assert again["form"] == "mmrec" and again["events"]["train"] == last_json(out)["num_events"]["train"]
        code, _, err = call("data", "convert", shop, tmp_path / "txt", "--to", "sasrec", "--split", "time")
        assert code == 0 and err.startswith("hellm: warning: form 'sasrec' stores no split")

    def test_errors(self, fails, shop, tmp_path):
        fails("data", "chek", shop, match=r"data action must be one of check, .* got 'chek'; did you mean 'check'\?")
        fails("data", "check", tmp_path, match="unknown form; found an empty folder. Known forms: hellm: ")
        fails("data", "check", match="missing: DATA")
        fails("data", "build", shop, shop, match="is not empty; --overwrite replaces it, or give another")
        fails("data", "convert", shop, tmp_path / "x", match="missing: --to")
        fails("data", "convert", shop, tmp_path / "x", "--to", "mmrek", match="form must be one of .*, got 'mmrek'")
        fails("data", "sample", tmp_path / "x", "--num-users", "0", match="num_users must be > 0, got 0")


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
        argv = ["--split", "valid", "--protocol", "official", "--ks", "5", "--metrics", "mrr", "--json"]
        report = last_json(call("evaluate", run, "--data", shop, *argv)[1])
        assert (report["split"], report["protocol"], report["shown"]) == ("valid", "official", ["mrr@5"])

    def test_protocols_side_by_side_and_slices(self, call, shop, run):
        argv = ["--protocol", "standard,recbole-sequential", "--ks", "10", "--slices", "--split", "valid"]
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

    def test_python_gives_the_same(self, call, shop, run):
        import hellm

        options = {"protocol": "official", "ks": (5,), "metrics": ("mrr",), "split": "valid"}
        mine = hellm.compare([run, "popularity"], shop, **options)
        argv = ["--protocol", "official", "--ks", "5", "--metrics", "mrr", "--split", "valid", "--json"]
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
        code, out, _ = call("evaluate", run, "popularity", "--data", shop, "--split", "valid")
        assert code == 0 and f"{run} {len(before)}" in out
        assert log.read_text(encoding="utf-8").splitlines() == before
        code, out, _ = call("evaluate", f"twice={run},{run}", "--data", shop, "--ks", "5", "10", "--protocol", "s3rec")
        assert (
            code == 0 and f"so far, in training and since (choose with --split valid): {run} {len(before) + 1}" in out
        )
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
        fails("evaluate", "popularity", "--data", shop, "--split", "train", match="--split must be test or valid")
        fails("evaluate", "popularity", "--data", shop, "--protocol", "x", match="protocol must be one of standard, ")
        fails("evaluate", "popularity", "--data", shop, "--metrics", "auc", match="--metrics must be among recall, ")
        fails("evaluate", "popularity", "--data", shop, "--ks", "0", match=r"ks must be integers >= 1, .* got \(0,\)")
        fails("evaluate", "--data", shop, match="missing: ")
        other = tmp_path / "other"
        sizes = ["--num-users", "50", "--num-items", "80", "--num-groups", "4"]
        assert call("data", "sample", other, *sizes)[0] == 0
        fails("evaluate", run, "--data", other, match="its 120 user ids are not the 50 of the data")
        fails("evaluate", run, "--data", shop, "--data-split", "time", match="was trained on another split")
        fails("evaluate", tmp_path, "--data", shop, match="holds no embeddings.safetensors")

    def test_split_of_the_run_is_used(self, call, shop, tmp_path):
        out = tmp_path / "time"
        assert call("pretrain", "--data", shop, "--out", out, *FAST, "max_epochs=1", "--split", "time")[0] == 0
        report = last_json(call("evaluate", out, "--data", shop, "--json")[1])
        result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        assert result["dataset"]["split"] == "time"
        assert report["fingerprint"] == result["dataset"]["fingerprint"]


class TestRecommend:
    @pytest.fixture
    def bought(self, run) -> set[str]:
        """All items of user u00001."""
        from hellm.recommend import Recommender

        return {one.item for one in Recommender.load(run).history("u00001")}

    def test_known_user_gets_no_seen_item(self, call, run, bought):
        (answer,) = last_json(call("recommend", run, "--users", "u00001", "-k", "70", "--json")[1])
        items = [one["item"] for one in answer["items"]]
        assert answer["basis"] == "user" and len(bought) >= 5
        assert len(set(items)) == min(70, 80 - len(bought)) and not bought & set(items)

    def test_seen_items_on_request(self, call, run, bought):
        argv = ["--users", "u00001", "-k", "80", "--include-seen", "--json"]
        (answer,) = last_json(call("recommend", run, *argv)[1])
        assert bought <= {one["item"] for one in answer["items"]}

    def test_bare_history_gets_unseen_items_of_its_group(self, call, run):
        # Item P(1000 + i) is in group i % 4.
        history = ["P1001", "P1005", "P1009", "P1013"]
        (answer,) = last_json(call("recommend", run, "--history", *history, "-k", "5", "--json")[1])
        items = [one["item"] for one in answer["items"]]
        assert answer["basis"] == "history" and not set(history) & set(items)
        assert sum(int(item[1:]) % 4 == 1 for item in items) >= 4

    def test_empty_history_says_popular(self, call, run):
        code, out, _ = call("recommend", run, "--history", "-k", "3")
        assert code == 0 and out.startswith("this history: the most popular items, as there is no history to go by\n")
        assert len(out.splitlines()) == 4

    def test_candidates_from_a_file(self, call, run, tmp_path):
        file = tmp_path / "stock.txt"
        file.write_text("P1040\n\nP1041\n", encoding="utf-8")
        (answer,) = last_json(call("recommend", run, "--history", "P1000", "--candidates-file", file, "--json")[1])
        assert {one["item"] for one in answer["items"]} == {"P1040", "P1041"}

    def test_similar_items(self, call, run):
        items = [one["item"] for one in last_json(call("recommend", run, "--similar-to", "P1002", "--json")[1])]
        assert len(items) == 10 and "P1002" not in items
        code, out, _ = call("recommend", run, "--similar-to", "P1002", "-k", "2")
        assert code == 0 and items[0] in out and len(out.splitlines()) == 4

    def test_explained(self, call, run):
        argv = ["--history", "P1001", "P1005", "-k", "2", "--explain"]
        code, out, _ = call("recommend", run, *argv)
        assert code == 0 and re.search(r"near .*\(P100[15]\): \d+ users have both", out)
        (answer,) = last_json(call("recommend", run, *argv, "--json")[1])
        assert {one["item"] for one in answer["items"][0]["because"]} <= {"P1001", "P1005"}

    def test_errors(self, fails, run):
        fails("recommend", run, "--users", "u00001", "-k", "0", match=r"-k must be >= 1, got 0")
        fails("recommend", run, "--similar-to", "P9", match="unknown item 'P9' among the 80 items of the run")
        fails("recommend", run, match="give one of --users, --history and --similar-to, got 0 of them")
        fails("recommend", run, "--users", "a", "--history", "b", match="got 2 of them")
        fails("recommend", run, "--users", "u00001", "-k", "x", match="--k must be an integer, got 'x'")
        fails("recommend", "nowhere", "--users", "a", match="run directory nowhere does not exist")
        fails("recommend", run, "--users", "u00001", "--candidates-file", "no.txt", match=r"no\.txt: no such file")
        argv = ["--candidates", "P1000", "--candidates-file", "no.txt"]
        fails("recommend", run, "--users", "u00001", *argv, match="give either --candidates or --candidates-file")


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


def test_table_aligns_first_column_left():
    assert table(("a", "b"), [["long", "1"], ["x", "22"]], indent=0).splitlines() == [
        "a      b",
        "--------",
        "long   1",
        "x     22",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (42.4, "42 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")]
)
def test_duration_in_words(seconds, text):
    assert duration(seconds) == text


def test_what_users_write_does_not_steer_the_terminal():
    assert title("i1\x07", "\x1b[2J red\x9b31m\r\n") == "\\x1b[2J red\\x9b31m\\r\\n (i1\\x07)"
    assert one_line("\u202egnirts \u2066x\u2028y\ufeff") == "\\u202egnirts \\u2066x\\u2028y\\ufeff"
    for harmless in (
        "Jeans \U0001f469\u200d\U0001f52c",
        "\u05e9\u05dc\u05d5\u05dd",
        "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        "100 % “wool”",
    ):
        assert one_line(harmless) == harmless
    assert len(one_line("x" * 1_000_000)) == 200 and one_line("x" * 200) == "x" * 200
    assert "\x1b" not in table(("name",), [["\x1b[31m"]])
