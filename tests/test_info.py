"""`hellm info`: what is reported of this installation, and how failures show."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import hellm.info
from hellm.cli import main
from hellm.ops.backends import loaders

ROOT = Path(__file__).resolve().parents[1]


def test_report_is_json_with_versions_and_backends(capsys):
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads() and report["cpu"]["cores"] >= 1
    usable = {(row["name"], row["device"]): row["usable"] for row in report["backends"]}
    assert usable["torch", "cpu"] is True
    assert usable["native", "cpu"] is not isinstance(loaders.native(), ImportError)
    assert usable["torch", "cuda"] is torch.cuda.is_available()


def test_text_names_instruction_sets_and_reasons(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for name in hellm.info.collect()["cpu"]["instruction_sets"]:
        assert re.search(rf"kernels .*\b{name}\b", out)
    for row in hellm.info.collect()["backends"]:
        state = "usable" if row["usable"] else f"not usable: {row['reason']}"
        state += f" ({row['note']})" if row["note"] else ""
        assert re.search(rf"^  {row['name']} +{row['device']} +{re.escape(state)}$", out, re.MULTILINE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU of this machine may have passed the self-test")
def test_gpu_backends_are_called_untested(capsys):
    assert main(["info"]) == 0
    assert re.search(r"^  triton +cuda +not usable: .* \(untested on a GPU\)$", capsys.readouterr().out, re.MULTILINE)


def test_missing_extension_is_reported_with_its_reason(capsys, monkeypatch):
    monkeypatch.setattr(loaders, "native", lambda: ImportError("no such symbol"))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"native +cpu +not usable: .*no such symbol", out) and re.search(r"kernels +none", out)


def test_missing_extra_gives_the_install_line(capsys, monkeypatch):
    needed = {"": ("torch",), "dreams": ("no-such-package", "numpy")}
    monkeypatch.setattr(hellm.info, "requirements", lambda: needed)
    assert main(["info"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  dreams"))
    assert re.search(r'numpy \d.*; missing no-such-package: pip install "hellm\[dreams\]"', line)


def test_extras_are_those_that_were_installed():
    found = hellm.info.requirements()
    assert "torch" in found[""] and found["baselines"] == ("implicit", "scipy")
    assert {"encoders", "llm", "smollm2", "search"} <= found.keys() and not {"dev", "docs"} & found.keys()


def row(ok: bool) -> dict:
    return {
        "backend": "native",
        "instruction_set": "avx2",
        "op": "info_nce",
        "dtype": "float32",
        "case": "N 97, D 67, high",
        "worst_error": 3.2e-7 if ok else 0.5,
        "budget": 1e-5,
        "ok": ok,
        "failure": None if ok else "RuntimeError: no such kernel",
        "seconds": 0.1,
    }


@pytest.mark.parametrize(
    ("rows", "code", "text"), [([row(True)], 0, "1 of 1 passed"), ([row(True), row(False)], 1, "1 FAILED")]
)
def test_selftest_table_and_exit_code(capsys, monkeypatch, rows, code, text):
    monkeypatch.setattr("hellm.info.run_selftest", lambda: rows)
    assert main(["info", "--selftest"]) == code
    out = capsys.readouterr().out
    assert text in out and ("3.2e-07" in out and "N 97, D 67, high" in out)
    assert ("N 97, D 67, high: RuntimeError: no such kernel" in out) == (code == 1)
    assert main(["info", "--selftest", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["selftest"] == rows


def test_selftest_of_this_installation_passes():
    rows = hellm.info.run_selftest()
    assert rows and all(one["ok"] for one in rows), [one for one in rows if not one["ok"]]
