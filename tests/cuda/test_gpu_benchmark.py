"""The measuring script on toy sizes without a GPU."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, gpu, gpu_build, gpu_report, gpu_timing
from benchmarks.cases import CASES, TARGETS
from benchmarks.registry import GPU, Entry, Outputs, Run, Workload, on_device

CPU = torch.device("cpu")
FAKE_CASES = """
import os, sys, time, torch
from benchmarks.registry import GPU, Case, Entry, Limit, Workload

def dies():
    os._exit(3)

def hangs():
    time.sleep(600)

def poisons():
    main = sys.modules["__main__"]

    def no_gpu_any_more(device, results):
        results.at(60.0, step="cases")
        os._exit(main._AGAIN)

    main._go_on = no_gpu_any_more
    raise RuntimeError("an illegal memory access was encountered")

def good():
    return [torch.ones(3)]

truth = [torch.ones(3).double()]
entries = [
    Entry("good", good), Entry("dies", dies, kind="cuda"), Entry("not a number", lambda: [truth[0] / 0 * 0]),
    Entry("hangs", hangs), Entry("poisons", poisons), Entry("also good", good),
]
builds = {
    "mixed": lambda setup: Workload(list(entries), 6.0, truth=lambda: truth, limit=Limit(None, ("limit", "good"))),
    "never made": lambda setup: dies(),
    "limit": lambda setup: Workload([Entry("good", good)], 6.0),
}
CASES = {name: Case(name, "", "", build, (GPU,)) for name, build in builds.items()}
"""


@pytest.fixture
def fake(monkeypatch, tmp_path) -> list[str]:
    """Arguments for cases that die and hang."""
    (tmp_path / "fake_cases.py").write_text(FAKE_CASES)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(str(tmp_path))
    return ["--device", "cpu", "--smoke", "--cases", "fake_cases", "--out", str(tmp_path / "gpu.json")]


@pytest.fixture
def results(tmp_path) -> gpu.Results:
    """Of a run that has only begun."""
    environment.write_json(tmp_path / "gpu.json", {"cases": [], "not_run": [], "failures": {}, "started": 0.0})
    return gpu.Results(tmp_path / "gpu.json")


OPTIONS = gpu.argparse.Namespace(device="cpu", deadline=math.inf, steps=None)


def measured(timer: gpu_timing.Timer, run: Run, truth: Outputs | None) -> dict[str, Any]:
    entry = Entry("stand-in", run, tolerance=1e-3)
    return gpu_timing.measure_entry(timer, entry, Workload([entry], 1.0), truth)


def entries_of(run: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {case["name"]: {entry["label"]: entry for entry in case["entries"]} for case in run["cases"]}


def test_smoke_run_measures_and_keeps_what_it_has(tmp_path, capfd):
    out = tmp_path / "gpu.json"
    names = ["ceiling-", "conv-sports-1", "propagate", "knn-18357x4096", "knn-100000x128"]
    assert gpu.main(["--device", "cpu", "--smoke", "--out", str(out), "--only", *names]) == 0
    run = json.loads(out.read_text())
    assert run["kind"] == "gpu" and run["not_run"] == [] and run["failures"] == {} and "current" not in run
    assert run["environment"]["versions"]["torch"] and run["environment"]["cpu"]
    entries = entries_of(run)
    assert set(entries) == {
        "ceiling-copy", "ceiling-matmul", "ceiling-gather", "conv-sports-1", "propagate-sports", "knn-18357x4096",
        "knn-100000x128",
    }  # fmt: skip
    for label in ("hellm torch", "two cached CSR products, int32", "published, clique COO"):
        found = entries["conv-sports-1"][label]
        assert found["failure"] is None and found["error"] < 1e-5
        assert 0 < found["seconds"]["warm"]["p20"] <= found["seconds"]["warm"]["p80"]
    assert "conv-sports-1" in capfd.readouterr().out
    page = gpu_report.section(run | {"file": "gpu.json"})
    assert "of ceiling-gather sports" in page and "%" in page


def test_targets_stand_beside_what_was_measured():
    def entry(label, kind, milliseconds, failure=None, extra_bytes=54e6, repeats=True):
        seconds = {"warm": {"median": milliseconds / 1e3}}
        found = {"label": label, "kind": kind, "hellm": kind != "peer", "failure": failure, "seconds": seconds}
        return found | {"extra_bytes": extra_bytes, "bitwise_repeat": repeats}

    entries = [
        entry("hellm cuda, high", "cuda", 2.5),
        entry("hellm triton, high", "triton", 5.0, extra_bytes=30e6),
        entry("published, in chunks", "peer", 100.0),
        entry("two FlexAttentions", "peer", 2.0),
        entry("torch.compile, float32", "peer", 1.0, failure="out of memory"),
    ]
    hungry, other = entry("hellm cuda, high", "cuda", 22, extra_bytes=154e6), [*entries]
    other[0] = entry("hellm cuda, high", "cuda", 2.5, repeats=False)
    page = gpu_report._targets([{"name": "info_nce-35598", "entries": other}])
    assert "MB beside its inputs, and bit by bit again | 54.0 MB, other bits | **missed** |" in page
    page = gpu_report._targets(
        [{"name": "info_nce-35598", "entries": entries}, {"name": "info_nce-100000", "entries": [hungry]}]
    )
    assert "MB beside its inputs, and bit by bit again | 54.0 MB, the same bits | met |" in page
    assert "MB beside its inputs, and bit by bit again | 154.0 MB, the same bits | **missed** |" in page
    assert "| info_nce-35598 | ours within 3 ms | 2.5 ms | met |" in page
    assert "| info_nce-35598 | ours at least 20 times as fast as published | 40 times | met |" in page
    assert "| info_nce-35598 | ours at least 8 times as fast as torch.compile | unmeasured |  |" in page
    assert "| info_nce-35598 | ours at least 1 times as fast as attentions | 0.8 times | **missed** |" in page
    assert "| info_nce-35598 | triton at least 0.667 times as fast as hellm cuda | 0.5 times | **missed** |" in page
    assert "| step-sports | ours within 5 ms | unmeasured |  |" in page
    count = sum(target.device == GPU for target in TARGETS)
    assert gpu_report.unmeasured().count("| unmeasured |") == count


def test_what_dies_or_hangs_costs_one_entry(fake, tmp_path):
    assert gpu.main([*fake, "--stall-seconds", "3"]) == 1
    run = json.loads((tmp_path / "gpu.json").read_text())
    entries = entries_of(run)
    # Ours first, then the peers as they stand.
    assert list(entries["mixed"]) == ["dies", "good", "not a number", "hangs", "poisons", "also good"]
    why = {label: entry["failure"] for label, entry in entries["mixed"].items()}
    assert why == {
        "dies": "its process ended with exit status 3",
        "good": None,
        "not a number": "not finite",
        "hangs": "no progress for 3 s: first run",
        "poisons": "RuntimeError: an illegal memory access was encountered",
        "also good": None,
    }
    assert entries["mixed"]["not a number"]["error"] is None
    assert {case["name"]: case["failure"] for case in run["cases"]} == {
        "mixed": None,
        "never made": "its process ended with exit status 3",
        "limit": None,
    }
    assert gpu.failures(run) == [
        "mixed: dies: its process ended with exit status 3",
        "never made: its process ended with exit status 3",
    ]
    page = gpu_report.section(run | {"file": "gpu.json"})
    assert "**no progress for 3 s: first run**" in page and "| also good | " in page and "of limit good" in page
    assert "**Not finished: its process ended" in page


def test_nothing_starts_after_the_budget(tmp_path):
    out = tmp_path / "gpu.json"
    gpu.main(["--device", "cpu", "--smoke", "--out", str(out), "--budget-minutes", "-1"])
    run = json.loads(out.read_text())
    assert run["cases"] == []
    assert run["not_run"] == [*on_device(CASES, GPU)]


def test_the_budget_is_checked_before_every_entry(fake, tmp_path, monkeypatch):
    out = tmp_path / "gpu.json"
    now = 1000.0
    environment.write_json(out, {"cases": [], "not_run": [], "failures": {}, "started": now})
    options = gpu.argparse.Namespace(
        device="cpu", smoke=True, cases="fake_cases", only=["mixed"], deadline=now + 1, stall_seconds=90.0
    )
    times = iter([now] * 3)  # the start of the case, of its first entry, and the record in between
    monkeypatch.setattr(gpu.time, "time", lambda: next(times, now + 2))
    monkeypatch.setattr(gpu, "measure_entry", lambda *rest: {"failure": "stand-in"})
    results = gpu.Results(out)
    gpu.measure(options, results)
    (case,) = results.record["cases"]
    labels = ["dies", "good", "not a number", "hangs", "poisons", "also good"]
    count = len(case["entries"])
    assert count < len(labels)
    assert results.record["not_run"] == [f"mixed: {label}" for label in labels[count:]]


@pytest.mark.parametrize("only", [["conv-sport5"], ["knn", "nothing"]])
def test_an_unknown_case_is_refused(only, capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main(["--device", "cpu", "--smoke", "--only", *only])
    assert end.value.code == 2
    assert (
        "must be part of one of ceiling-copy, ceiling-matmul, ceiling-gather, info_nce-35598"
        in (said := capsys.readouterr().err)
        and f"got {only[-1]}" in said
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_why(capsys):
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2 and "error: torch " in capsys.readouterr().err


def test_a_wrong_implementation_gets_no_time():
    timer = gpu_timing.Timer(CPU, True)
    found = measured(timer, lambda: [torch.ones(3)], [torch.full((3,), 1.1).double()])
    assert found["failure"] == "error 9.1e-02 > 1e-03"
    assert "seconds" not in found
    failed = measured(timer, lambda: torch.ones(2) @ torch.ones(3), None)
    assert failed["failure"].startswith("RuntimeError")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_a_failure(value):
    for truth in (None, [torch.ones(2).double()]):
        found = measured(gpu_timing.Timer(CPU, True), lambda: [torch.tensor([1.0, value])], truth)
        assert found == {"failure": "not finite", "error": None}


def test_a_failed_capture_keeps_the_eager_times():
    class Pretended(gpu_timing.Timer):
        """Times on the CPU, captures like a GPU."""

        def measure(self, run, names=("warm", "flushed", "eager")):
            return {name: {"median": 1e-3} for name in names}

        def captured(self, run):
            raise RuntimeError("operation not permitted when stream is capturing")

        def extra_bytes(self, run):
            return 0

    timer = Pretended(CPU, True)
    timer.cuda = True
    found = measured(timer, lambda: [torch.ones(2)], [torch.ones(2).double()])
    assert found["failure"] is None and found["seconds"]["warm"]["median"] == 1e-3
    assert found["graph_failure"] == "RuntimeError: operation not permitted when stream is capturing"


def test_numbers_that_are_not_finite_become_null(tmp_path):
    environment.write_json(tmp_path / "a.json", {"a": [1.0, math.nan, (math.inf,)], "b": {"c": -math.inf}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [1.0, None, [None]], "b": {"c": None}}


def test_the_commit_of_a_copy_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HELLM_COMMIT", "abc")
    assert environment.commit() == "abc"
    monkeypatch.delenv("HELLM_COMMIT")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() is None


def test_a_compiler_that_is_missing_is_named():
    with pytest.raises(RuntimeError, match="no-such-compiler cannot be run: "):
        gpu_build._run(["no-such-compiler"])


def test_a_command_is_stopped_and_what_it_printed_is_kept():
    script = "import time; print('so far', flush=True); time.sleep(60)"
    assert gpu.bounded([gpu.sys.executable, "-c", script], 2.0, {}) == (None, "so far\n")
    status, output = gpu.bounded([gpu.sys.executable, "-c", "import os; print(os.environ['A'])"], 60.0, {"A": "b"})
    assert (status, output) == (0, "b\n")


def test_tests_of_every_backend_are_recorded_by_name(results, monkeypatch):
    said = "tests/cuda/a.py::one[cuda-1] PASSED [ 10%]\ntests/cuda/a.py::two FAILED [ 20%]\n"
    said += "=== short test summary info ===\nERROR tests/test_b.py - ModuleNotFoundError: No module named 'polars'\n"
    asked = []

    def bounded(command, seconds, environment):
        asked.append(environment.get("HELLM_TEST_BACKEND"))
        assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        return (None if asked[-1] == "triton" else 1), said

    monkeypatch.setattr(gpu, "bounded", bounded)
    monkeypatch.setattr(gpu, "_usable", lambda options: ["cuda", "triton"])
    gpu.tests(OPTIONS, results)
    assert asked == ["cuda", "triton", None]
    found = results.record["tests"]
    assert found["cuda"]["passed"] == 1 and found["cuda"]["failed"] == ["tests/cuda/a.py::two", "tests/test_b.py"]
    assert results.record["not_run"] == ["tests triton: stopped after 300 s"]
    assert gpu.failures(results.record) == ["tests: cuda", "tests: triton", "tests: others"]


def test_the_selftest_is_recorded_and_kept_for_this_machine(results, monkeypatch):
    from hellm import selftest
    from hellm.ops.backends import verified

    row = {"op": "knn", "dtype": "float32", "case": "N 97", "worst_error": math.inf, "ok": False}
    row["failure"] = "RuntimeError: no such kernel"
    kept = []
    monkeypatch.setattr(selftest, "isolated", lambda name, device, seconds: [row])
    monkeypatch.setattr(verified, "record", lambda rows, backends: kept.extend(rows))
    gpu.selftest(OPTIONS, results)
    assert kept == results.record["selftest"] == [{"backend": "torch", "instruction_set": None, **row}]
    assert gpu.failures(results.record) == ["selftest: torch knn float32 N 97: RuntimeError: no such kernel"]
    results.keep()
    assert "self-test of torch: **failed: knn float32 (N 97)**" in "".join(gpu_report._checks(results.record))


def test_the_memory_checker_runs_the_selftest_without_a_caching_allocator(results, monkeypatch):
    asked = []

    def bounded(command, seconds, environment):
        asked.append((command[2], command[-4:], environment))
        return 9, "Invalid __global__ read"

    monkeypatch.setattr(gpu, "bounded", bounded)
    monkeypatch.setattr(gpu, "_usable", lambda options: ["cuda", "torch"])
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: name)
    gpu.memory(OPTIONS, results)
    selftest, apart = ["hellm.selftest", "cuda", "cpu", "small"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checks = ("memcheck", "racecheck", "synccheck")
    assert asked == [(check, selftest, apart) for check in checks]
    assert gpu.failures(results.record) == [f"memory: cuda, {check}" for check in checks]
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    gpu.memory(OPTIONS, results)
    assert results.record["not_run"] == ["memory: compute-sanitizer is not installed"]


def test_a_failed_build_is_recorded(results, monkeypatch):
    def build(capability):
        raise OSError("no space left")

    monkeypatch.setattr(gpu_build, "build", build)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu.build(OPTIONS, results)
    assert results.record["build"]["file"] is None
    assert gpu.failures(results.record) == ["build: no space left"]


def test_steps_without_a_build_build_where_there_is_nothing_for_the_gpu(results, monkeypatch):
    built = []
    monkeypatch.setattr(gpu_build, "build", lambda capability: built.append(capability) or gpu.Path("_C.so"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    options = gpu.argparse.Namespace(**{**vars(OPTIONS), "steps": ["cases"]})
    cuda = type(gpu.BACKENDS["cuda"])
    monkeypatch.setattr(cuda, "unavailable", lambda self, device: None)
    gpu.build(options, results)
    assert not built and "build" not in results.record
    monkeypatch.setattr(cuda, "unavailable", lambda self, device: "it has no kernels")
    gpu.build(options, results)
    assert built == [(9, 0)] and results.record["build"]["file"] == "_C.so"


def test_without_pytest_the_tests_are_left_out(results, monkeypatch):
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    gpu.tests(OPTIONS, results)
    assert results.record["not_run"] == ["tests: pytest is not installed"] and gpu.failures(results.record) == []


def test_cmake_knows_what_the_compiler_can_compile_for(tmp_path):
    """Architectures by nvcc version, and what the extension says of them."""
    cmake = gpu_build.shutil.which("cmake")
    if cmake is None:
        pytest.skip("needs cmake")
    text = (gpu_build.ROOT / "CMakeLists.txt").read_text()
    dropped = text[text.index("  if(CMAKE_CUDA_COMPILER_VERSION") :].partition("endif()\n")
    named = text[text.index("  string(REGEX") : text.index("  # The target is older")]
    for version, expected in (
        ("12.6.77", "80+PTX, 90"),
        ("12.8.61", "80+PTX, 90, 120"),
        ("13.0.88", "80+PTX, 90, 120"),
    ):
        script: Path = tmp_path / "architectures.cmake"
        script.write_text(
            f'set(HELLM_CUDA_ARCHITECTURES "80;90-real;120-real")\nset(CMAKE_CUDA_COMPILER_VERSION {version})\n'
            f'{dropped[0]}{dropped[1]}{named}message("${{architectures}}")\n'
        )
        done = subprocess.run([cmake, "-P", str(script)], capture_output=True, text=True, check=True)
        assert done.stderr.strip() == expected
