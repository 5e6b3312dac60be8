"""One implementation on a device: its error, whether it repeats itself, its memory and its times."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.registry import Entry, Outputs, Workload

_REPEATS, _SECONDS_A_TIMING, _FLUSH_BYTES = 50, 0.5, 256 * 2**20
# From here on what the host does between launches is no matter.
_LONGEST_CAPTURED = 0.05


class Timer:
    """Medians of device time.

    "warm" finds the inputs of the last run in the caches, "flushed" does not; both are queued behind a wait, so that
    the launches are ahead of the device. "eager" is warm without the wait: the device idles where the host is slower.
    """

    def __init__(self, device: torch.device, smoke: bool) -> None:
        self.device, self.smoke, self.cuda = device, smoke, device.type == "cuda"
        self.flush = torch.empty(_FLUSH_BYTES if self.cuda else 2**16, dtype=torch.uint8, device=device)

    def once(self, run: Callable[[], Any], flush: bool, wait: int) -> float:
        """Seconds of one run behind a wait of so many device clocks."""
        if flush:
            self.flush.fill_(1)
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if wait:
            torch.cuda._sleep(wait)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3

    def measure(self, run: Callable[[], Any], names: Sequence[str] = ("warm", "flushed", "eager")) -> dict[str, Any]:
        """For each name the median, the 20th and 80th percentile in seconds, and the number of runs."""
        for _ in range(1 if self.smoke else 3):
            expected = self.once(run, False, 0)
        start = time.perf_counter()
        run()
        # Half a millisecond at 2 GHz, or twice as long as the host takes to launch everything, up to 20 ms.
        wait = int(min(max(1e6, 4e9 * (time.perf_counter() - start)), 4e7))
        count = 2 if self.smoke else max(3, min(_REPEATS, int(_SECONDS_A_TIMING / (expected + wait / 2e9))))
        found = {}
        for name in names:
            wait_here = 0 if name == "eager" else wait
            samples = sorted(self.once(run, name == "flushed", wait_here) for _ in range(count))
            low, *_, high = statistics.quantiles(samples, n=5, method="inclusive")
            found[name] = {"median": statistics.median(samples), "p20": low, "p80": high, "runs": count}
        return found

    def captured(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """The same work as a CUDA graph."""
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


def measure_entry(
    timer: Timer,
    entry: Entry,
    workload: Workload,
    truth: Outputs | None,
    alive: Callable[[str], None] = lambda doing: None,
) -> dict[str, Any]:
    """Record of one implementation: error, repeatability, memory, times; a failure is recorded, not raised.

    `alive` is told what comes next.
    """
    run = entry.run
    record: dict[str, Any] = {"failure": None}
    try:
        alive("first run")
        found = [t.detach().clone() for t in run()]
        error = None if truth is None else workload.verify(found, truth)
        if not all(bool(torch.isfinite(t).all()) for t in found):
            return record | {"error": None, "failure": "not finite"}
        record["error"] = error
        again = run()
        record["bitwise_repeat"] = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        del found, again
        if error is not None and not error <= entry.tolerance:
            return record | {"failure": f"error {error:.1e} > {entry.tolerance:.0e}"}
        alive("memory")
        record["extra_bytes"] = timer.extra_bytes(run)
        alive("timing")
        record["seconds"] = timer.measure(run)
    except Exception as error:  # out of memory, an unusable backend, a kernel that cannot run: a finding
        if not isinstance(error, (torch.OutOfMemoryError, ImportError, RuntimeError)):
            traceback.print_exc()
        return record | {"failure": said(error)}
    if workload.graph and timer.cuda:
        record["graph_failure"] = None
        try:
            if record["seconds"]["warm"]["median"] > _LONGEST_CAPTURED:
                raise RuntimeError(f"not tried, it takes more than {_LONGEST_CAPTURED * 1e3:.0f} ms")
            alive("capture")
            replay = timer.captured(run)
            alive("timing of the graph")
            record["graph_seconds"] = timer.measure(replay, ("warm", "flushed"))
        except Exception as error:  # most often something that waits for the device
            record["graph_failure"] = said(error)
    return record


def said(error: BaseException) -> str:
    """Kind and message, the first 500 characters."""
    return f"{type(error).__name__}: {str(error)[:500]}"


def warm_up(device: torch.device) -> None:
    """A second of products: clocks are up and libraries loaded."""
    if device.type != "cuda":
        return
    x, start = torch.ones(4096, 4096, device=device), time.perf_counter()
    while time.perf_counter() - start < 1.0:
        x @ x
        torch.cuda.synchronize(device)


def line(entry: dict[str, Any], work: float, unit: str) -> str:
    """One entry as text."""
    if entry["failure"]:
        return f"  {entry['label']:<44} {entry['failure'][:100]}"
    best = entry.get("graph_seconds") or entry["seconds"]
    text = f"  {entry['label']:<44}"
    for name in ("warm", "flushed", "eager"):
        text += f" {name} {entry['seconds'][name]['median'] * 1e3:9.4f} ms"
    if "graph_seconds" in entry:
        text += f" graph {best['warm']['median'] * 1e3:9.4f} ms"
    text += f" {work / best['warm']['median'] / 1e9:9.1f} G{unit}/s"
    if entry["error"] is not None:
        text += f" error {entry['error']:.1e}"
    return text + ("" if entry["bitwise_repeat"] else " NOT REPEATABLE")
