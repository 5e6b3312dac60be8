"""Everything a GPU can tell, in one command: python -m benchmarks.gpu [--budget-minutes M] [--out FILE]

Steps: build the extension in place without the network; the self-test, which decides what is chosen automatically; the
GPU tests; the cases, ceilings first, then the operators beside their peers on the same device; the memory checker.
Everything runs in child processes: one that dies, or shows no sign of life, costs what it was at, and the next goes on
behind it. The results are written after every entry. An implementation that disagrees with float64 gets no time.
`--device cpu --smoke` runs toy sizes without a GPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, commit, cpu_name, gpu_versions, write_json
from benchmarks.gpu_timing import Timer, line, measure_entry, said, warm_up
from benchmarks.registry import GPU, Case, Setup, on_device
from hellm._devices import no_cuda_reason
from hellm.ops.backends import BACKENDS, GPU_BACKENDS, loaders

OUT = ROOT / "benchmarks" / "results" / "gpu.json"
_EXIT_CODES = """exit codes: 0 all went well, or the time was up; 1 the build, the self-test, a test, the memory
checker, a case or one of our own implementations failed (a peer that fails is a finding); 2 wrong options or no CUDA
device"""
# A child that found its GPU unusable: the next one gets a fresh context.
_AGAIN = 75
_CHECKS = (("cuda", "memcheck"), ("cuda", "racecheck"), ("cuda", "synccheck"), ("triton", "memcheck"))
# Exit statuses of pytest: passed, nothing to run, stopped because the time was up.
_NO_FAILURE = (0, 5, None)


# ------------------------------------------------------------------------------------------------------ results


class Results:
    """The results so far, in a file that parent and child hand to each other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    def keep(self) -> None:
        """Write everything."""
        self.record["seconds"] = time.time() - self.record["started"]
        write_json(self.path, self.record)

    def at(self, seconds: float, **what: Any) -> None:
        """Say what comes next, and after how many seconds without another word it hangs."""
        self.record["current"] = {**what, "seconds": seconds}
        self.keep()


def failures(record: dict[str, Any]) -> list[str]:
    """What went wrong, by the rules of the exit code."""
    found = [f"{step}: {text}" for step, text in record["failures"].items()]
    found += [
        f"selftest: {row['backend']} {row['op']} {row['dtype']} {row['case']}: {row['failure'] or row['worst_error']}"
        for row in record.get("selftest", [])
        if not row["ok"]
    ]
    found += [
        f"tests: {name}"
        for name, one in record.get("tests", {}).items()
        if one["failed"] or one["status"] not in _NO_FAILURE
    ]
    found += [f"memory: {name}" for name, one in record.get("memory", {}).items() if one["status"]]
    for case in record["cases"]:
        found += [f"{case['name']}: {case['failure']}"] if case["failure"] else []
        found += [
            f"{case['name']}: {e['label']}: {e['failure']}" for e in case["entries"] if e["failure"] and e["hellm"]
        ]
    return found


# -------------------------------------------------------------------------------------------- steps, in a child


def describe(options: argparse.Namespace, results: Results) -> None:
    """What the numbers depend on."""
    device = torch.device(options.device)
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "device": "cpu",
        "cpu": cpu_name(),
        "python": sys.version.split()[0],
        "torch_cuda": torch.version.cuda,
        "versions": gpu_versions(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["processors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        found["nvidia_smi"] = nvidia_smi("driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    results.record["environment"] = found


def nvidia_smi(query: str) -> str | None:
    """Fields of the first GPU; None without the tool."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def build(options: argparse.Namespace, results: Results) -> None:
    """Compile the extension for the GPU at hand; later children load it.

    Where it was not asked for, only if there is no extension for that GPU yet: later steps would leave its kernels out.
    """
    if options.steps and "build" not in options.steps and BACKENDS["cuda"].available(torch.device(options.device)):
        return
    from benchmarks import gpu_build

    seconds = max(1.0, min(900.0, options.deadline - time.time()))
    results.at(seconds, step="build")
    start = time.perf_counter()
    try:
        made = {"file": gpu_build.build(torch.cuda.get_device_capability(options.device)).name}
    except (RuntimeError, OSError) as error:
        made, results.record["failures"]["build"] = {"file": None}, str(error)
        print(error, flush=True)
    results.record["build"] = made | {"seconds": time.perf_counter() - start}


def selftest(options: argparse.Namespace, results: Results) -> None:
    """Every GPU backend against the definitions; what is found is kept for this machine too."""
    from hellm.ops.backends import verified
    from hellm.selftest import isolated

    rows = results.record["selftest"] = []
    for name in _usable(options):
        seconds = _share(options, 300.0)
        results.at(seconds + 60.0, step="selftest")
        architecture = loaders.architecture(torch.device(options.device))
        one = isolated(name, options.device, seconds)
        rows += ({"backend": name, "instruction_set": architecture, **row} for row in one)
        with contextlib.suppress(OSError):  # a home that cannot be written
            verified.record(rows, GPU_BACKENDS)
        bad = [row for row in one if not row["ok"]]
        print(f"selftest {name}: {len(one) - len(bad)} of {len(one)} passed", *bad, sep="\n  ", flush=True)


def tests(options: argparse.Namespace, results: Results) -> None:
    """The GPU tests, one process for each backend and one for what is not about backends."""
    found = results.record["tests"] = {}
    if importlib.util.find_spec("pytest") is None:
        results.record["not_run"].append("tests: pytest is not installed")
        return
    others = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text("utf-8")]
    others = [str(path.relative_to(ROOT)) for path in others if path.parent.name != "cuda"]
    for name in (*_usable(options), "others"):
        seconds = _share(options, 300.0)
        results.at(seconds + 60.0, step="tests")
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "--maxfail=10", "-m", "gpu"]
        command += ["-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command += ["tests/cuda"] if name != "others" else others
        start = time.perf_counter()
        # Deterministic matrix products need it before the first one.
        environment = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        environment |= {} if name == "others" else {"HELLM_TEST_BACKEND": name}
        status, output = bounded(command, seconds, environment)
        outcomes = re.findall(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED)\b", output, re.MULTILINE)
        failed = {test for test, outcome in outcomes if outcome in ("FAILED", "ERROR")}
        # A file that cannot be imported is told of at the end, and the others run.
        failed = sorted(failed | set(re.findall(r"^ERROR (\S+\.py)(?= - |$)", output, re.MULTILINE)))
        passed = sum(outcome == "PASSED" for _, outcome in outcomes)
        found[name] = {"status": status, "passed": passed, "failed": failed, "output": output[-6000:]}
        found[name]["seconds"] = time.perf_counter() - start
        if status is None:
            results.record["not_run"].append(f"tests {name}: stopped after {seconds:.0f} s")
        print(
            f"tests {name}: {passed} passed, {len(failed)} failed, exit status {status}",
            *failed,
            sep="\n  ",
            flush=True,
        )


def memory(options: argparse.Namespace, results: Results) -> None:
    """The small inputs of the self-test under compute-sanitizer, every tensor an allocation of its own.

    Triton makes its own barriers: only ours are looked at for races.
    """
    found = results.record["memory"] = {}
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        results.record["not_run"].append("memory: compute-sanitizer is not installed")
        return
    usable = _usable(options)
    for name, check in _CHECKS:
        if name not in usable:
            continue
        seconds = _share(options, 240.0)
        results.at(seconds + 60.0, step="memory")
        command = [tool, "--tool", check, "--error-exitcode", "9"]
        command += ["--report-api-errors", "no"] if check == "memcheck" else []
        command += [sys.executable, "-m", "hellm.selftest", name, options.device, "small"]
        status, output = bounded(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        found[f"{name}, {check}"] = {"status": status, "output": output[-6000:]}
        if status is None:
            results.record["not_run"].append(f"{check} {name}: stopped after {seconds:.0f} s")
        print(f"{check} of {name}: exit status {status}", flush=True)


def _usable(options: argparse.Namespace) -> list[str]:
    """Backends to check, plain torch last; "triton" takes minutes to compile and comes behind the others of ours."""
    device = torch.device(options.device)
    return [name for name in ("cuda", "nvrtc", "triton", "torch") if BACKENDS[name].available(device)]


def _share(options: argparse.Namespace, most: float) -> float:
    """Seconds that one check among others may take: a quarter of what is left."""
    return max(1.0, min(most, (options.deadline - time.time()) / 4))


def bounded(command: Sequence[str], seconds: float, environment: dict[str, str]) -> tuple[int | None, str]:
    """Exit status, None when the time was up, and what it printed until then."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        environment = os.environ | environment
        process = subprocess.Popen(command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        said.seek(0)
        return status, said.read()


def measure(options: argparse.Namespace, results: Results) -> None:
    """The cases, from where the last child stopped."""
    device, record = torch.device(options.device), results.record
    timer = Timer(device, options.smoke)
    warm_up(device)
    known = {case["name"]: case for case in record["cases"]}
    setup = Setup(device, gpu=True, tiny=options.smoke)
    for name, case in _cases(options).items():
        one = known.get(name)
        if one is not None and (one["finished"] or one["failure"]):
            continue
        if time.time() > options.deadline:
            record["not_run"].append(name)
            continue
        if one is None:
            print(f"\n{name}", flush=True)
            one = {"name": name, "entries": [], "failure": None, "finished": False}
            record["cases"].append(one)
        results.at(options.stall_seconds, step="cases", case=name)
        try:
            workload = case.workload(setup)
            truth = workload.truth and workload.truth()
        except Exception as error:
            traceback.print_exc()
            one["failure"] = said(error)
            _go_on(device, results)
            continue
        one |= {"parameters": workload.parameters, "work": workload.work, "unit": workload.unit}
        one["ceiling"] = workload.limit and workload.limit.ceiling
        done = {entry["label"] for entry in one["entries"]}
        for entry in (entry for entry in workload.entries if entry.label not in done):
            if time.time() > options.deadline:
                record["not_run"].append(f"{name}: {entry.label}")
                continue
            what = {"label": entry.label, "kind": entry.kind, "hellm": entry.hellm}

            def alive(doing: str, name: str = name, what: dict = what) -> None:
                results.at(options.stall_seconds, step="cases", case=name, entry=what, doing=doing)

            found = measure_entry(timer, entry, workload, truth, alive)
            one["entries"].append(what | found)
            print(line(one["entries"][-1], workload.work, workload.unit), flush=True)
            _go_on(device, results)
        one["clocks"] = nvidia_smi("clocks.sm,clocks.mem,temperature.gpu,power.draw") if timer.cuda else None
        one["finished"] = True
        workload = truth = entry = None
        _go_on(device, results)


def _cases(options: argparse.Namespace) -> dict[str, Case]:
    """Those asked for, in the order in which they run."""
    every = on_device(importlib.import_module(options.cases).CASES, GPU)
    return {name: case for name, case in every.items() if any(part in name for part in options.only or [""])}


def _go_on(device: torch.device, results: Results) -> None:
    """Keep the results and free the device; a child whose GPU no longer answers leaves the rest to another."""
    results.at(60.0, step="cases")
    if device.type != "cuda":
        return
    try:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).add_(1).item()
    except Exception as error:
        print(f"  a new process: {said(error)[:200]}", flush=True)
        sys.stdout.flush()
        os._exit(_AGAIN)  # an orderly end would ask the GPU once more


# ------------------------------------------------------------------------------------------------------- parent

STEPS = {"build": build, "selftest": selftest, "tests": tests, "cases": measure, "memory": memory}
_ALL_STEPS = {"describe": describe} | STEPS


def supervise(step: str, arguments: Sequence[str], options: argparse.Namespace, path: Path) -> None:
    """Run a step in children until it is through; this process never touches the GPU."""
    while True:
        results = Results(path)
        before = _entries(results.record)
        # The first word comes after the imports.
        results.at(max(60.0, options.stall_seconds), step=step)
        command = [sys.executable, "-m", "benchmarks.gpu", *arguments, "--step", step, "--out", str(path)]
        child = subprocess.Popen([*command, "--deadline", str(options.deadline)], cwd=ROOT, start_new_session=True)
        try:
            hung = _watch(child, path)
        finally:
            # With everything it started: compilers, tests.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(30)
        results = Results(path)
        current = results.record.pop("current", None)
        if not hung and child.returncode == 0:
            results.keep()
            return
        if not hung and child.returncode == _AGAIN and _entries(results.record) != before:
            continue
        why = hung or f"its process ended with exit status {child.returncode}"
        if current is not None and "case" in current:
            _blame(results.record, current, why)
        elif _entries(results.record) == before:
            results.record["failures"][step] = why
        print(f"  {why}", flush=True)
        results.keep()
        if _entries(results.record) == before:
            return


def _watch(child: subprocess.Popen, path: Path) -> str | None:
    """Wait for the end of a child; why it is not waited for any longer, if it hangs."""
    seen, since, current = 0, time.monotonic(), {"seconds": math.inf}
    while child.poll() is None:
        if (changed := path.stat().st_mtime_ns) != seen:
            seen, since = changed, time.monotonic()
            current = json.loads(path.read_text(encoding="utf-8")).get("current") or current
        if time.monotonic() - since > current["seconds"]:
            return f"no progress for {current['seconds']:.0f} s: {current.get('doing') or 'preparing'}"
        time.sleep(0.1)
    return None


def _entries(record: dict[str, Any]) -> int:
    """Entries and cases that are settled."""
    return sum(len(case["entries"]) + (case["failure"] is not None) for case in record["cases"])


def _blame(record: dict[str, Any], current: dict[str, Any], why: str) -> None:
    """Record a failure of the entry that was running, or of the case that was being made."""
    case = next(case for case in record["cases"] if case["name"] == current["case"])
    if "entry" in current:
        case["entries"].append(current["entry"] | {"failure": why})
    else:
        case["failure"] = why


def _run_steps(
    steps: Sequence[str], arguments: Sequence[str], options: argparse.Namespace, path: Path
) -> dict[str, Any]:
    """The steps, as long as there is time; everything that is known then."""
    now = time.time()
    options.deadline = now + 60 * options.budget_minutes
    record = {"schema": 2, "kind": "gpu", "environment": {}, "failures": {}, "cases": [], "not_run": []}
    write_json(path, record | {"started": now})
    supervise("describe", arguments, options, path)
    if torch.device(options.device).type == "cuda":
        steps = ["build", *steps]
    for step in (step for step in STEPS if step in steps):
        if time.time() < options.deadline:
            supervise(step, arguments, options, path)
            continue
        results = Results(path)
        results.record["not_run"] += [*_cases(options)] if step == "cases" else [step]
        results.keep()
    return Results(path).record


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0], epilog=_EXIT_CODES
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--steps", nargs="+", choices=STEPS, metavar="STEP", help=f"some of {', '.join(STEPS)}")
    parser.add_argument("--budget-minutes", type=float, default=math.inf, help="start nothing after this")
    parser.add_argument(
        "--stall-seconds", type=float, default=90.0, help="an entry that says nothing for so long hangs"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, two runs: does it work at all")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; a smoke run is only printed")
    parser.add_argument("--cases", default="benchmarks.cases", metavar="MODULE", help="default: %(default)s")
    parser.add_argument("--step", choices=_ALL_STEPS, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step:
        results = Results(options.out)
        _ALL_STEPS[options.step](options, results)
        results.record.pop("current", None)
        results.keep()
        return 0
    if torch.device(options.device).type == "cuda" and (reason := no_cuda_reason()):
        parser.error(reason)
    every = _cases(argparse.Namespace(cases=options.cases, only=None))
    if unknown := [part for part in options.only or () if not any(part in name for name in every)]:
        parser.error(f"--only must be part of one of {', '.join(every)}; got {', '.join(unknown)}")
    given = list(sys.argv[1:] if arguments is None else arguments)
    steps = options.steps or (list(STEPS) if torch.device(options.device).type == "cuda" else ["cases"])
    # A signal to end takes the children along.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = (options.out or (Path(folder) / "gpu.json" if options.smoke else OUT)).resolve()
            record = _run_steps(steps, given, options, path)
    finally:
        signal.signal(signal.SIGTERM, before)
    found = failures(record)
    print(f"\n{record['seconds'] / 60:.1f} minutes -> {path if path.exists() else 'not kept'}")
    print(*(f"FAILED {text[:300]}" for text in found), sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
