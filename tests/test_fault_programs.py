"""Programs on which hellm once failed; `fault_programs.py` runs them and knows what is right.

`faults.json` names for each the tests that fail where its fault is put back.
"""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest
from fault_programs import RIGHT, Programs, missing, wrong_families

SLOW = os.environ.get("HELLM_SLOW") == "1"
TESTS = Path(__file__).resolve().parent
FOLDER = TESTS.parents[1] / "shared" / "faults"
LONGER = {
    "ops/01_conv_reads_past_buffer",
    "ops/07_compile_temperature",
    "ops/09_bad_alloc_aborts",
    "ops/10_plain_torch_strides_under_compile",
    "ops/15_compile_checkpoint",
    "ops/22_interrupt",
}
QUICK = {name for name in RIGHT if name.startswith("ops/")} - LONGER
QUICK |= {"data/01_overwrite_deletes_source", "data/29_image_paths_leave_the_folder"}


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> Programs:
    if not FOLDER.is_dir():
        pytest.skip("needs the programs in ../shared/faults, which is not there")
    return Programs(FOLDER, tmp_path_factory.mktemp("fault_programs"))


@pytest.mark.parametrize("name", sorted(QUICK))
def test_quick_programs_are_right(programs, name):
    assert programs.wrong(name) == ""


@pytest.mark.slow
@pytest.mark.skipif(not SLOW, reason="takes many minutes; set HELLM_SLOW=1")
@pytest.mark.parametrize("name", sorted(RIGHT.keys() - QUICK))
def test_all_programs_are_right(programs, name):
    assert programs.wrong(name) == ""


def defined(file: str) -> set[str]:
    """Tests of a file, as NAME or CLASS::NAME."""
    found = set()
    for node in ast.parse((TESTS / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            found |= {f"{node.name}::{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
        elif isinstance(node, ast.FunctionDef):
            found.add(node.name)
    return {name for name in found if name.rpartition("::")[2].startswith("test_")}


def test_every_fault_has_tests_outside_this_file():
    named = json.loads((TESTS / "faults.json").read_text(encoding="utf-8"))
    assert named.keys() == RIGHT.keys() and all(named.values())
    for file, name in {tuple(one.split("::", 1)) for tests in named.values() for one in tests}:
        assert file != Path(__file__).name and name in defined(file), f"{file}::{name}"


def test_patterns_follow_one_another():
    assert missing(("a", "b$"), "a\nb", "stdout") == []
    assert missing(("b", "a"), "a\nb", "stdout") == ["stdout lacks 'a'"]
    assert missing(("a.b",), "a\nb", "stdout") == ["stdout lacks 'a.b'"]


def test_a_program_is_wrong_by_output_exit_code_or_absence(tmp_path):
    folder = tmp_path / "folder"
    (folder / "ops").mkdir(parents=True)
    (folder / "ops" / "22_interrupt.py").write_text("print('finished'); raise SystemExit(3)")
    (folder / "ops" / "unknown.py").write_text("")
    programs = Programs(folder, tmp_path / "work")
    assert "ops/unknown" in programs.names() and "ops/22_interrupt" in programs.names()
    found = programs.wrong("ops/22_interrupt")
    assert "stdout lacks" in found and "'finished' in the output" in found and "exit code 3, right is 0" in found
    assert programs.wrong("ops/unknown") == "nothing is known of what is right"
    assert programs.wrong("ops/05_stale_scales").endswith("05_stale_scales.py is absent")


@pytest.mark.parametrize(
    ("row", "wrong"),
    [
        ('"oracle": 1e-6, "leak": 0.0, "batch_alone": 1e-7', ""),
        ('"oracle": 0.2, "leak": 0.0, "batch_alone": 1e-7', "x (oracle 0.2"),
        ('"oracle": 1e-6, "leak": 0.5, "batch_alone": 1e-7', "x (oracle 1e-06; leak 0.5"),
        ('"leak": 0.0, "batch_alone": 1e-7', "x (leak"),
        ('"run": "KeyError"', "x (run KeyError)"),
        ('"construct": "KeyError"', "x (construct KeyError)"),
        ('"construct": "ValueError: x is not served"', "none of 1 families is served"),
    ],
)
def test_families_agree_with_the_plain_decoder_or_are_refused(tmp_path, row, wrong):
    (tmp_path / "scan.jsonl").write_text(f'{{"kind": "x", {row}}}\n')
    found = wrong_families(tmp_path / "scan.jsonl")
    assert found.startswith(wrong) and bool(found) == bool(wrong)
