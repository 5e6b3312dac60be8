"""Everything a GPU can tell, in one command: python -m benchmarks.gpu [--only NAME ...] [--budget-minutes M].

Builds the extension in place without the network, runs the GPU tests, measures the machine's ceilings, then the
operators beside their peers on the same device, the most important first. results/gpu.json is written after every
step, so what was measured when the time is up is kept. An implementation that disagrees with float64 gets no time.
`--device cpu --smoke` runs toy sizes without a GPU, to see that the script works.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import ROOT, commit, write_json

OUT = ROOT / "benchmarks" / "results" / "gpu.json"
_REPEATS, _SECONDS_AN_ENTRY, _FLUSH_BYTES = 50, 3.0, 256 * 2**20


class Timer:
    """Medians of device time: with the inputs of the last run still in the caches ("warm"), and without ("flushed")."""

    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke, self.cuda = device, smoke, device.type == "cuda"
        self.flush = torch.empty(_FLUSH_BYTES if self.cuda else 2**16, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], Any], flush: bool) -> float:
        if flush:
            self.flush.fill_(1)
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def measure(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Median, 20th and 80th percentile in seconds."""
        for _ in range(1 if self.smoke else 3):
            expected = self.once(run, False)
        count = 2 if self.smoke else max(5, min(_REPEATS, int(_SECONDS_AN_ENTRY / max(expected, 1e-6) / 2)))
        found = {}
        for name in ("warm", "flushed"):
            samples = sorted(self.once(run, name == "flushed") for _ in range(count))
            low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
            found[name] = {"median": statistics.median(samples), "p20": low, "p80": high, "runs": count}
        return found

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any] | None:
        """The same work as a CUDA graph."""
        if not self.cuda:
            return None
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(3):
                run()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def extra_bytes(self, run: Callable[[], Any]) -> int | None:
        """Peak of device memory above what was there before the call, its results included."""
        if not self.cuda:
            return None
        gc.collect()
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


def worst_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Largest difference of any tensor, relative to the largest magnitude in the true one; NaN is infinite."""
    worst = 0.0
    for value, true in zip(found, truth, strict=True):
        scale = float(true.abs().max()) or 1.0
        error = float((value.double() - true.double()).abs().max()) / scale
        worst = max(worst, error if error == error else float("inf"))
    return worst


def measure_entry(
    timer: Timer, run: Callable[[], Sequence[torch.Tensor]], truth, tolerance: float, graph: bool
) -> dict:
    """Record of one implementation: error, repeatability, memory, times; a failure is recorded, not raised."""
    record: dict[str, Any] = {"failure": None}
    try:
        found = [t.detach().clone() for t in run()]
        record["error"] = None if truth is None else worst_error(found, truth)
        again = run()
        record["bitwise_repeat"] = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        del found, again
        if record["error"] is not None and not record["error"] <= tolerance:
            return record | {"failure": f"error {record['error']:.1e} > {tolerance:.0e}"}
        record["extra_bytes"] = timer.extra_bytes(run)
        record["seconds"] = timer.measure(run)
        if graph and (replay := timer.captured(run)) is not None:
            record["graph_seconds"] = timer.measure(replay)
    except Exception as error:  # out of memory, an unusable backend, a kernel that cannot run: a finding
        record["failure"] = f"{type(error).__name__}: {str(error)[:500]}"
        if not isinstance(error, (torch.OutOfMemoryError, ImportError, RuntimeError)):
            traceback.print_exc()
    return record


def build_and_test(device: torch.device, options: argparse.Namespace, record: dict[str, Any]) -> None:
    """Build in place, before anything of hellm is imported; then the GPU tests, in a process of their own."""
    if device.type != "cuda":
        return
    if not options.no_build:
        from benchmarks.gpu_build import build

        start = time.perf_counter()
        try:
            record["build"] = {"file": build(torch.cuda.get_device_capability(device)).name, "failure": None}
        except RuntimeError as error:
            record["build"] = {"failure": str(error)}
        record["build"]["seconds"] = time.perf_counter() - start
    if not options.no_tests:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "tests/cuda", "-p", "no:cacheprovider"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        record["tests"] = {"status": done.returncode, "output": (done.stdout + done.stderr)[-6000:]}
        print(record["tests"]["output"][-2000:], flush=True)


def device_environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    found: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": commit(),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "device": "cpu",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = properties.name
        found["capability"] = f"{properties.major}.{properties.minor}"
        found["processors"] = properties.multi_processor_count
        found["memory_bytes"] = properties.total_memory
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        try:
            found["nvidia_smi"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            found["nvidia_smi"] = None
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="cases whose name contains one of these")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start nothing after this")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--smoke", action="store_true", help="toy sizes, two runs: does it work at all")
    parser.add_argument("--no-build", action="store_true", help="use the extension that is there")
    parser.add_argument("--no-tests", action="store_true", help="do not run the GPU tests first")
    parser.add_argument("--out", type=Path, help="default: results/gpu.json; a smoke run is only printed")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no CUDA device")
    out = options.out or (None if options.smoke else OUT)
    started = time.perf_counter()
    record: dict[str, Any] = {"schema": 1, "kind": "gpu", "environment": device_environment(device), "cases": []}
    record |= {"not_run": [], "seconds": 0.0}

    def keep() -> None:
        record["seconds"] = time.perf_counter() - started
        if out is not None:
            write_json(out, record)

    build_and_test(device, options, record)
    keep()
    from benchmarks.gpu_cases import cases

    timer = Timer(device, options.smoke)
    for name, build in cases(device, options.smoke):
        if options.only and not any(part in name for part in options.only):
            continue
        if time.perf_counter() - started > 60 * options.budget_minutes:
            record["not_run"].append(name)
            continue
        print(f"\n{name}", flush=True)
        one: dict[str, Any] = {"name": name, "entries": [], "failure": None}
        record["cases"].append(one)
        try:
            case = build()
            one |= {"parameters": case.parameters, "work": case.work, "unit": case.unit}
            for entry in case.entries:
                found = measure_entry(timer, entry.run, case.truth, entry.tolerance, case.graph and entry.hellm)
                one["entries"].append({"label": entry.label, "hellm": entry.hellm, **found})
                print(line(one["entries"][-1], case.work, case.unit), flush=True)
                keep()
        except Exception as error:
            traceback.print_exc()
            one["failure"] = f"{type(error).__name__}: {str(error)[:500]}"
        case = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        keep()
    keep()
    print(f"\n{record['seconds'] / 60:.1f} minutes" + (f" -> {out}" if out else ""))
    return 0


def line(entry: dict[str, Any], work: float, unit: str) -> str:
    """One entry as text."""
    if entry["failure"]:
        return f"  {entry['label']:<44} {entry['failure'][:100]}"
    best = entry.get("graph_seconds") or entry["seconds"]
    text = f"  {entry['label']:<44}"
    for name in ("warm", "flushed"):
        text += f" {name} {entry['seconds'][name]['median'] * 1e3:9.4f} ms"
    if "graph_seconds" in entry:
        text += f" graph {best['warm']['median'] * 1e3:9.4f} ms"
    text += f" {work / best['warm']['median'] / 1e9:9.1f} G{unit}/s"
    if entry["error"] is not None:
        text += f" error {entry['error']:.1e}"
    return text + ("" if entry["bitwise_repeat"] else " NOT REPEATABLE")


if __name__ == "__main__":
    sys.exit(main())
