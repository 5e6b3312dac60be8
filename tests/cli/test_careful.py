"""The command line does no harm: what it deletes, resumes, answers, prints, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from saved_llm import save_tiny_llm
from support.command_line import last_json

from hellm.cli import main

pytestmark = pytest.mark.usefixtures("same_threads")
ROOT = Path(__file__).resolve().parents[2]
FAST = ["num_threads=1", "tensorboard=false", "max_epochs=2"]
RUN = (
    *("text=none", "image=none", "language_model=false", "baselines=[popularity]"),
    *("pretrain.max_epochs=2", "pretrain.num_threads=1", "pretrain.tensorboard=false"),
    *("sasrec.max_epochs=2", "sasrec.num_threads=1", "sasrec.tensorboard=false"),
)


def write_shop(folder: Path, *, users=12, items=25, events=6, item="SKU{}", skip=0) -> Path:
    """events.csv, and nothing else."""
    folder.mkdir(parents=True)
    lines = ["user,item,timestamp"]
    for user in range(users):
        for place in range(events - (skip if user == 0 else 0)):
            lines.append(f"c{user},{item.format((user * 3 + place * (1 + user % 3)) % items)},{1000 * user + place}")
    (folder / "events.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A shop, a run of stage 1 on it, one of SASRec, and one of all stages."""
    folder = tmp_path_factory.mktemp("made")
    shop = write_shop(folder / "shop")
    for verb in ("pretrain", "sasrec"):
        assert main([verb, "--data", str(shop), "--out", str(folder / verb), *FAST]) == 0
    assert main(["run", "--data", str(shop), "--out", str(folder / "run"), *RUN]) == 0
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    return {str(one.relative_to(folder)): one.read_bytes() for one in sorted(folder.rglob("*")) if one.is_file()}


class TestOverwrite:
    @pytest.mark.parametrize(
        "argv",
        [
            ["data", "build", "{shop}", "{shop}"],
            ["data", "convert", "{shop}", "{shop}", "--to", "mmrec"],
            ["data", "sample", "{shop}"],
            ["features", "{shop}", "--out", "{shop}"],
            ["pretrain", "--data", "{shop}", "--out", "{shop}", *FAST],
            ["sasrec", "--data", "{shop}", "--out", "{top}", *FAST],
            ["run", "--data", "{shop}", "--out", "{shop}", *RUN],
            ["run", "--data", "{shop}", "--out", ".", *RUN],
            ["demo", "--out", "{shop}"],
            ["finetune", "--data", "{shop}", "--out", "{shop}"],
        ],
        ids=lambda argv: " ".join(argv[:2]),
    )
    def test_never_what_others_made(self, fails, made, tmp_path, monkeypatch, argv):
        shop = shutil.copytree(made / "shop", tmp_path / "top" / "shop")
        # What a run is known by elsewhere.
        (shop / "config.yaml").write_text("seed: 1\n")
        monkeypatch.chdir(shop)
        before = tree(tmp_path)
        argv = [one.format(shop=shop, top=shop.parent) for one in argv]
        fails(*argv, "--overwrite", match=r"so it is not replaced|holds no \.hellm\.json")
        assert tree(tmp_path) == before

    def test_never_the_runs_that_are_read(self, fails, made, tmp_path):
        runs = shutil.copytree(made, tmp_path / "made")
        inputs = ["--graph", runs / "pretrain", "--sequence", runs / "sasrec", "--data", runs / "shop"]
        before = tree(tmp_path)
        fails("finetune", *inputs, "--out", runs / "pretrain", "--overwrite", match="pretrain, which is read")
        fails("pretrain", "--data", runs / "run" / "data", "--out", runs / "run", "--overwrite", match="which is read")
        assert tree(tmp_path) == before

    def test_a_run_of_all_stages_is_made_anew(self, call, made, tmp_path):
        out = shutil.copytree(made / "run", tmp_path / "run")
        assert call("run", "--data", made / "shop", "--out", out, *RUN, "--overwrite")[0] == 0
        assert tree(out).keys() == tree(made / "run").keys()

    def test_another_stage_may_take_the_place_of_a_run(self, call, made, tmp_path):
        out = shutil.copytree(made / "pretrain", tmp_path / "run")
        assert call("sasrec", "--data", made / "shop", "--out", out, *FAST, "--overwrite")[0] == 0
        assert json.loads((out / "result.json").read_text())["stage"] == "sasrec"


class TestResume:
    def test_other_ids_are_others_data(self, fails, made, tmp_path):
        other = write_shop(tmp_path / "other", item="RIGHT{}")
        argv = ["--out", made / "pretrain", "--resume"]
        fails(
            "pretrain", "--data", other, *argv, match=r"must keep its data, .*: item ids; give .*--overwrite or another"
        )

    def test_a_run_of_all_stages_looks_at_the_data(self, call, fails, made, tmp_path):
        argv = ["run", "--out", made / "run", "--resume"]
        fails(*argv, "--data", tmp_path / "none", match="none: no such file or folder", out=None)
        for name, options, what in (("ids", {"item": "X{}"}, "item ids"), ("fewer", {"skip": 1}, "events, times")):
            other = write_shop(tmp_path / name, **options)
            fails(*argv, "--data", other, match=f"must keep its data, and those given are others: {what}.*", out=None)
        code, out, _ = call(*argv, "--data", made / "shop")
        assert code == 0 and "is there from before, and of the same data" in out

    def test_what_the_errors_advise_works(self, call, fails, made, tmp_path):
        out = shutil.copytree(made / "run", tmp_path / "run")
        other = write_shop(tmp_path / "other", skip=1)
        shutil.rmtree(out / "data")
        argv = ["run", "--out", out]
        fails(*argv, "--resume", "--data", other, match="must keep its data.*--overwrite or another folder", out=None)
        assert call(*argv, "--resume", "--data", made / "shop")[0] == 0
        assert call(*argv, "--overwrite", "--data", other, *RUN)[0] == 0

    def test_new_texts_and_pictures_are_others_data(self, fails, call, tmp_path):
        shop = write_shop(tmp_path / "shop")
        items = "\n".join(f"SKU{item},thing {item}" for item in range(25))
        (shop / "items.csv").write_text(f"item,title\n{items}\n")
        argv = ["run", "--data", shop, "--out", tmp_path / "run", *RUN]
        assert call(*argv, "--dry-run")[0] == 0
        (shop / "items.csv").write_text(f"item,title\n{items.replace('thing 3', 'thing three')}\n")
        fails(*argv, "--resume", match="those given are others: .*item titles", out=None)

    def test_damaged_settings_are_told(self, fails, made, tmp_path):
        out = shutil.copytree(made / "pretrain", tmp_path / "run")
        argv = ["pretrain", "--data", made / "shop", "--out", out, "--resume"]
        (out / "config.yaml").write_text("")
        fails(*argv, match=r"config\.yaml: damaged, holds no settings")
        (out / "config.yaml").unlink()
        fails(*argv, match=r"config\.yaml does not exist")

    def test_a_run_without_a_mark_goes_on(self, call, fails, made, tmp_path):
        out = shutil.copytree(made / "pretrain", tmp_path / "run")
        (out / ".hellm.json").unlink()
        argv = ["pretrain", "--data", made / "shop", "--out", out]
        fails(*argv, "--overwrite", match=r"holds no \.hellm\.json")
        assert call(*argv, "--resume", "max_epochs=3")[0] == 0
        assert call(*argv, "--overwrite", *FAST)[0] == 0


class TestLocks:
    def test_one_process_trains_in_a_folder(self, fails, made, tmp_path):
        out = tmp_path / "run"
        command = [sys.executable, "-m", "hellm", "sasrec", "--data", str(made / "shop"), "--out", str(out)]
        endless = ["num_threads=1", "max_epochs=100000", "patience=100000", "tensorboard=false"]
        with subprocess.Popen([*command, *endless], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
            try:
                wait_for(out / "checkpoint" / "last.safetensors")
                who = f"run is being written by process {process.pid} on .* since .*"
                for how in ("--resume", "--overwrite"):
                    fails("sasrec", "--data", made / "shop", "--out", out, how, "max_epochs=1", match=who)
                process.kill()
            finally:
                process.kill()
        assert (out / ".hellm.lock").is_file()
        epochs = len((out / "metrics.jsonl").read_text().splitlines())
        code = main(["sasrec", "--data", str(made / "shop"), "--out", str(out), "--resume", f"max_epochs={epochs + 1}"])
        assert code == 0 and not (out / ".hellm.lock").exists()


def wait_for(file: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not file.is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert file.is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda one: one.name)
def test_signals_while_nothing_is_trained_leave_nothing(made, tmp_path, number):
    program = """
import sys
from hellm.cli import main
from hellm.data.forms import built
def write(dataset, folder):
    (folder / "half").touch()
    print("writing", flush=True)
    while True: pass
import dataclasses, hellm.data.forms as forms, hellm.data.load as load
kind = forms.get_form("hellm")
load.get_form = lambda name: dataclasses.replace(kind, write=write)
sys.exit(main(sys.argv[1:]))
"""
    command = [sys.executable, "-c", program, "data", "build", str(made / "shop"), str(tmp_path / "out")]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **streams) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    said = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (process.returncode, errors) == (128 + number, f"hellm: {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_hangup_saves_a_training(made, tmp_path):
    out = tmp_path / "run"
    settings = ["num_threads=1", "max_epochs=100000", "patience=100000", "tensorboard=false"]
    command = [sys.executable, "-m", "hellm", "sasrec", "--data", str(made / "shop"), "--out", str(out), *settings]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        wait_for(out / "metrics.jsonl")
        process.send_signal(signal.SIGHUP)
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGHUP and re.search(
        r"hellm: stopped .* saved .*last\.safetensors", errors
    )


class TestBatches:
    def test_an_unknown_candidate_is_left_out(self, call, made, tmp_path):
        stock = tmp_path / "stock.txt"
        stock.write_bytes("\ufeffSKU1\r\n\r\nNEW1\r\n SKU2 \r\n".encode())
        code, out, err = call("recommend", made / "pretrain", "--users", "c1", "--candidates-file", stock, "--json")
        (answer,) = last_json(out)
        assert code == 0 and answer["unknown_candidates"] == 1
        assert "1 of 3 candidates are not known to the run and left out: 'NEW1'" in err
        assert {item["item"] for item in answer["items"]} <= {"SKU1", "SKU2"}

    def test_unknown_users_get_what_is_popular(self, call, made):
        users = ["c1", "new", "c2", "newer"]
        code, out, err = call("recommend", made / "pretrain", "--users", *users, "-k", "3", "--json", "--explain")
        answers = last_json(out)
        assert code == 0 and [one["user"] for one in answers] == users
        assert [one["basis"] for one in answers] == ["user", "popularity", "user", "popularity"]
        assert answers[1]["items"] == answers[3]["items"] and len(answers[1]["items"]) == 3
        assert "2 of 4 users are not known to the run and get the most popular items: 'new', 'newer'" in err
        known = last_json(call("recommend", made / "pretrain", "--users", "c1", "c2", "-k", "3", "--json")[1])
        assert [[item["item"] for item in one["items"]] for one in known] == [
            [item["item"] for item in answers[place]["items"]] for place in (0, 2)
        ]

    def test_unknown_items_of_a_history_are_left_out(self, call, made):
        argv = ["recommend", made / "sasrec", "--json", "--history"]
        with_unknown = last_json(call(*argv, "SKU1", "NEW", "SKU2")[1])
        without = last_json(call(*argv, "SKU1", "SKU2")[1])
        assert with_unknown[0].pop("unknown_history") == 1 and with_unknown == without
        assert last_json(call(*argv, "NEW")[1])[0]["basis"] == "popularity"

    def test_what_cannot_be_answered_is_told(self, fails, made, tmp_path):
        (tmp_path / "latin").write_bytes(b"caf\xe9\n")
        argv = ["recommend", made / "pretrain", "--users", "c1"]
        fails(*argv, "--candidates-file", tmp_path / "latin", match="latin: must be text in UTF-8")

    def test_none_of_the_candidates(self, call, made):
        code, out, err = call("recommend", made / "pretrain", "--users", "c1", "--candidates", "NEW")
        assert (code, out) == (2, "") and "none of the candidates is among the 25 items" in err


class TestSmallData:
    @pytest.mark.parametrize("settings", [[], ["ks=[5]"], ["ks=[5]", "pretrain.ks=[5]"]], ids=" ".join)
    def test_fewer_items_than_lists_are_long(self, call, tmp_path, settings):
        shop = write_shop(tmp_path / "shop", items=12, users=15)
        code, out, err = call("run", "--data", shop, "--out", tmp_path / "run", *RUN, *settings, "--json")
        assert code == 0, err
        longest = 5 if settings else 12
        assert f"recall@{longest}" in last_json(out)["shown"]
        assert "list lengths (ks and monitor) cut to the 12 items there are" in err

    @pytest.mark.parametrize(
        "sizes", [{"users": 1}, {"users": 3, "events": 1}, {"users": 3, "events": 2}, {"users": 4, "items": 3}], ids=str
    )
    @pytest.mark.parametrize("verb", ["pretrain", "sasrec", "run"])
    def test_tiny_data_are_trained_on_or_refused_in_words(self, call, tmp_path, verb, sizes):
        shop = write_shop(tmp_path / "shop", **sizes)
        code, _, err = call(verb, "--data", shop, "--out", tmp_path / "run", *(RUN if verb == "run" else FAST))
        assert code in (0, 2) and "internal" not in err, err
        assert code == 0 or re.search("data set|events|users", err.splitlines()[-1]), err

    def test_lists_are_as_long_as_the_catalogue(self, call, tmp_path):
        shop = write_shop(tmp_path / "shop", items=8)
        assert call("pretrain", "--data", shop, "--out", tmp_path / "run", *FAST)[0] == 0
        assert len(last_json(call("recommend", tmp_path / "run", "--similar-to", "SKU1", "--json")[1])) == 7
        code, out, err = call("evaluate", tmp_path / "run", "--data", shop, "--json")
        assert code == 0 and last_json(out)["shown"] == ["recall@8", "ndcg@8"]
        assert "list lengths (--ks) cut to the 8 items there are" in err


class TestCache:
    def test_a_home_that_cannot_be_written_costs_the_cache_only(self, monkeypatch, tmp_path, caplog):
        from hellm.features.cache import default_cache

        (tmp_path / "home").write_text("no folder")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert default_cache() is None
        assert "cannot be written" in caplog.text and "--cache names another folder" in caplog.text
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        assert default_cache() == tmp_path / "cache" / "hellm"

    def test_without_any_home(self, monkeypatch, caplog):
        from hellm.features.cache import default_cache

        def none():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", none)
        assert default_cache() is None and "Could not determine home" in caplog.text

    @pytest.mark.parametrize("verb", ["run", "demo", "features"])
    def test_every_verb_that_encodes_has_the_option(self, call, verb):
        assert "--cache DIR" in call(verb, "--help")[1]

    def test_a_cache_that_cannot_be_written_is_named(self, tmp_path):
        from hellm._files import WriteError
        from hellm.features.cache import FeatureCache

        (tmp_path / "file").touch()
        with pytest.raises(WriteError, match="file/cache cannot be written: not a directory"):
            FeatureCache(tmp_path / "file" / "cache", "encoder")


def strictly(text: str):
    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_every_json_is_strict_and_the_last_line(call, made, tmp_path):
    shop = made / "shop"
    llm = save_tiny_llm(tmp_path / "llm")
    inputs = ["--graph", made / "pretrain", "--sequence", made / "sasrec"]
    commands = [
        ["info"],
        ["data", "check", shop],
        ["data", "build", shop, tmp_path / "built"],
        ["data", "convert", shop, tmp_path / "mmrec", "--to", "mmrec"],
        *([verb, "--data", shop, "--dry-run", *FAST] for verb in ("pretrain", "sasrec")),
        *([verb, "--data", shop, "--out", tmp_path / verb, *FAST] for verb in ("pretrain", "sasrec")),
        ["finetune", "--data", shop, *inputs, "--out", tmp_path / "llm-run", f"llm={llm}", *FAST],
        ["ablate", "--data", shop, *inputs, "--out", tmp_path / "ablation", f"llm={llm}", "--rows", "no-lora", *FAST],
        ["evaluate", made / "pretrain", made / "sasrec", "popularity", "--data", shop],
        ["recommend", made / "pretrain", "--users", "c1", "new"],
        ["recommend", made / "sasrec", "--history"],
        ["recommend", made / "pretrain", "--similar-to", "SKU1"],
        ["run", "--data", shop, "--out", tmp_path / "run", *RUN],
    ]
    for argv in commands:
        code, out, err = call(*argv, "--json")
        assert code == 0, (argv, err)
        assert strictly(out.splitlines()[-1]), argv


def test_numbers_that_json_has_not_are_not_printed(capsys):
    from hellm.cli._output import print_json

    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"recall": float("nan")})
    assert capsys.readouterr().out == ""


def in_process(*argv, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, **options)


def test_plain_ascii_output(made, tmp_path):
    shop = write_shop(tmp_path / "shop", item="Größe{}")
    assert main(["pretrain", "--data", str(shop), "--out", str(tmp_path / "run"), *FAST]) == 0
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "LANG": "C"}
    argv = ["-m", "hellm", "recommend", tmp_path / "run", "--users", "c1", "-k", "1"]
    done = in_process(*argv, env=environment)
    assert done.returncode == 0 and rb"Gr\xf6\xdfe" in done.stdout
    done = in_process(*argv, "--json", env=environment)
    assert strictly(done.stdout.decode("ascii"))[0]["items"][0]["item"].startswith("Größe")
    done = in_process("-m", "hellm", "evaluate", "popularity", "--data", shop, env=environment)
    assert done.returncode == 0 and b" +-" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full_is_told(made):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "hellm", "recommend", str(made / "pretrain"), "--users", "c1"]
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "no space left on device" in done.stderr and "Traceback" not in done.stderr


def test_the_usual_verbs_warn_of_nothing(made, tmp_path):
    program = f"""
from hellm.cli import main
shop, made, out = {str(made / "shop")!r}, {str(made)!r}, {str(tmp_path)!r}
for argv in (
    ["data", "check", shop],
    ["data", "build", shop, out + "/built"],
    *([verb, "--data", shop, "--out", out + "/" + verb, *{FAST!r}] for verb in ("pretrain", "sasrec")),
    ["evaluate", made + "/pretrain", "popularity", "--data", shop],
    ["recommend", made + "/sasrec", "--users", "c1", "--explain"],
):
    assert main([*argv, "--debug"]) == 0, argv
"""
    done = in_process("-W", "error", "-c", program, text=True)
    assert done.returncode == 0, done.stderr
    # Notes on the data are ours; a warning of Python's would have been an error.
    notes = [line for line in done.stderr.splitlines() if "trained without the item hypergraph" not in line]
    assert notes == []
