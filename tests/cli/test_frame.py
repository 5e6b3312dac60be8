"""What all commands share: help, options, errors, exit codes, tables."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import FAST, last_json

from hellm.cli import VERBS, main
from hellm.cli._output import duration, one_line, table, title

pytestmark = pytest.mark.usefixtures("same_threads")
ROOT = Path(__file__).resolve().parents[2]


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
            (["--out"], "--out needs a value"),
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
