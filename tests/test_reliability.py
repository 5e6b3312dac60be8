"""The programs behind the reliability figures, in short, and the command that runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import reliability, reliability_report
from benchmarks.reliability import CHECKS, Check

TESTS = Path(__file__).parent
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def figures_of(program: str, *options) -> dict:
    """What a program of tests/ prints last; it must end well."""
    command = [sys.executable, str(TESTS / program), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    figures = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in figures:
        pytest.skip(figures["unavailable"])
    return figures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_torn_files_are_named_or_not_needed(tmp_path):
    counts = figures_of("torn.py", tmp_path / "x", "--cuts", 1, "--only", "unfinished sasrec", "transitions", "data")
    assert counts["failures"] == 0 and counts["named"] > 10


@needs_linux
def test_a_full_disk_is_told_of_and_costs_nothing(tmp_path):
    counts = figures_of("full_disk.py", tmp_path / "x", "--moments", 4, "--only", "build", "transitions")
    assert counts["full"] > 0 and counts["failures"] == 0


@needs_linux
def test_a_clock_that_jumps_changes_nothing(tmp_path):
    counts = figures_of("clocks.py", tmp_path / "x", "--moments", 2, "--only", "build", "transitions")
    assert (counts["moments"], counts["failures"]) == (2, 0)


@needs_linux
@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("HELLM_SLOW") != "1", reason="takes half a minute; set HELLM_SLOW=1")
def test_a_server_whose_clock_jumps_loses_nothing(tmp_path):
    assert figures_of("clocks.py", tmp_path / "x", "--moments", 1, "--only", "server")["failures"] == 0


def test_fuzzed_operators_say_how_near_to_the_tolerance_they_came():
    found = figures_of("ops/fuzzed_operators.py", "--count", 2, "--kernel", "torch")
    assert found["failures"] == 0 and {"hypergraph_conv", "info_nce", "knn"} <= found["operators"].keys()
    assert all(one["compared"] and 0 <= one["worst"] <= 1 for one in found["operators"].values())


def test_a_kernel_of_another_processor_is_not_run():
    command = [sys.executable, str(TESTS / "ops/fuzzed_operators.py"), "--count", "5", "--kernel", "native-other"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "this processor has no other" in done.stdout


def test_guided_readers_go_on_from_sound_files(tmp_path):
    pytest.importorskip("atheris", reason="needs atheris")
    found = figures_of("guided_readers.py", tmp_path / "x", "--count", 20, "--readers", "file result.json")
    assert found["file result.json"]["inputs"] >= 20 and found["file result.json"]["edges"] > 0


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Checks that do well, fail, break and hang."""
    (tmp_path / "tests").mkdir()
    for name, text in {
        "well": "print('noise'); print('{\"failures\": 0, \"moments\": 7}')",
        "wrong": "print('moment 3: lost'); print('{\"failures\": 2}'); sys.exit(1)",
        "broken": "raise RuntimeError('no such luck')",
        "silent": "",
        "hanging": "time.sleep(600)",
    }.items():
        (tmp_path / "tests" / f"{name}.py").write_text(f"import sys, time\n{text}\n")
    monkeypatch.setattr(reliability, "ROOT", tmp_path)
    monkeypatch.setattr(reliability, "environment", lambda: dict.fromkeys(("date", "commit", "cpu", "python"), "x"))
    names = dict(
        zip(
            ("kills", "server kills", "torn files", "full disk", "races"),
            sorted(one.name for one in (tmp_path / "tests").iterdir()),
            strict=True,
        )
    )
    checks = {name: Check(file, "--count", 9, 1) for name, file in names.items()}
    monkeypatch.setattr(reliability, "CHECKS", checks)
    return {Path(file).stem: name for name, file in names.items()}


def test_a_check_that_fails_takes_no_other_with_it(programs, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert reliability.main(["--quick", "--hours", "0.002", "--out", str(out)]) == 1
    found = json.loads(out.read_text())["checks"]
    assert list(found) == list(programs.values())
    told = {stem: found[name] for stem, name in programs.items()}
    assert told["well"]["failure"] is None and told["well"]["figures"] == {"failures": 0, "moments": 7}
    assert told["wrong"]["failure"] == "moment 3: lost" and told["wrong"]["figures"] == {"failures": 2}
    assert "RuntimeError: no such luck" in told["broken"]["failure"]
    assert told["silent"]["failure"] == "printed no figures"
    assert told["hanging"]["failure"] == "not finished after 0.002 hours"
    assert {one["count"] for one in told.values()} == {1}
    page = reliability_report.page(json.loads(out.read_text()))
    assert "| 7 moments | 0 |" in page and "| **2** |" in page and "no such luck" in page


def test_a_part_renews_itself_alone(programs, tmp_path, capsys):
    out = tmp_path / "found.json"
    well = programs["well"]
    out.write_text(json.dumps({"kind": "reliability", "checks": {programs["silent"]: {"kept": True}, well: {}}}))
    assert reliability.main(["--only", well, "--count", "4", "--out", str(out)]) == 0
    found = json.loads(out.read_text())["checks"]
    assert found[programs["silent"]] == {"kept": True} and found[well]["count"] == 4


def test_every_check_has_its_program_and_its_words():
    for name, check in CHECKS.items():
        assert (TESTS / check.program).is_file() and check.quick < check.full
        record = {"figures": None, "failure": "x", "date": "", "commit": "", "cpu": "", "python": ""}
        assert "**x**" in reliability_report.page({"checks": {name: record}})
