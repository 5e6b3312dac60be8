"""The measuring script on toy sizes without a GPU."""

from __future__ import annotations

import json

import torch

from benchmarks import gpu, gpu_cases


def test_smoke_run_measures_and_keeps_what_it_has(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    names = ["ceiling-copy", "conv-sports-1", "propagate", "knn-1"]
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(out), "--only", *names]) == 0
    run = json.loads(out.read_text())
    assert run["kind"] == "gpu" and run["not_run"] == []
    assert [case["failure"] for case in run["cases"]] == [None] * len(run["cases"])
    entries = {case["name"]: {entry["label"]: entry for entry in case["entries"]} for case in run["cases"]}
    assert set(entries) == {"ceiling-copy", "conv-sports-1", "propagate-sports", "knn-18357x4096", "knn-100000x128"}
    for label in ("hellm torch", "two cached CSR products, int32", "published, clique COO"):
        found = entries["conv-sports-1"][label]
        assert found["failure"] is None and found["error"] < 1e-5
        assert 0 < found["seconds"]["warm"]["p20"] <= found["seconds"]["warm"]["p80"]
    assert "conv-sports-1" in capsys.readouterr().out


def test_nothing_starts_after_the_budget(tmp_path):
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--smoke", "--out", str(out), "--budget-minutes", "-1"])
    run = json.loads(out.read_text())
    assert run["cases"] == []
    assert run["not_run"] == [name for name, _ in gpu_cases.cases(torch.device("cpu"), True)]


def test_a_wrong_implementation_gets_no_time():
    timer = gpu.Timer(torch.device("cpu"), True)
    found = gpu.measure_entry(timer, lambda: [torch.ones(3)], [torch.full((3,), 1.1).double()], 1e-3, False)
    assert found["failure"] == "error 9.1e-02 > 1e-03"
    assert "seconds" not in found
    failed = gpu.measure_entry(timer, lambda: torch.ones(2) @ torch.ones(3), None, 1e-3, False)
    assert failed["failure"].startswith("RuntimeError")


def test_info_nce_peers_agree_with_the_definition():
    """The stock forms on the CPU; the two attentions need a GPU."""
    case = gpu_cases._info_nce(torch.device("cpu"), 70, 16, 0.2)
    for entry in case.entries:
        if "compile" not in entry.label and "attention" not in entry.label:
            assert gpu.worst_error([t.detach() for t in entry.run()], case.truth) <= entry.tolerance, entry.label
