"""Time the registered cases and write one JSON file: python -m benchmarks.measure [--only NAME ...] [--out FILE].

hellm, its peers and the machine's limit run in turns, round by round, in one process; nothing is timed before all of
them have agreed. What is short runs twice a turn: the time of the first depends on what the one before it left in the
caches, so the second is the time that counts and the first stands beside it as "cold".
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import memory
from benchmarks.cases import CASES, TARGETS
from benchmarks.environment import ROOT, environment, write_json
from benchmarks.registry import CPU, LIMIT, MEMORY_CASES, Case, Entry, Setup, Target, Workload, on_device
from hellm.ops.backends import BACKENDS, loaders

SCHEMA = 1
# Rounds by the duration of the warm-up run: (at most this many seconds, rounds).
_ROUNDS = ((0.02, 31), (0.2, 15), (2.0, 7), (float("inf"), 3))
_QUICK_ROUNDS = ((2.0, 3), (float("inf"), 1))
_SHORT_SECONDS = 0.05


class Disagreement(Exception):
    """An implementation computed something else than hellm, so its case has no numbers."""


def check(workload: Workload) -> tuple[dict[str, float], dict[str, float]]:
    """Run every entry once and compare it with the first; this is the warm-up as well.

    A peer whose library is missing is skipped.

    Returns:
        Error of each entry that is no limit, and seconds of every entry.

    Raises:
        Disagreement: an error above the entry's tolerance.
    """
    expected, errors, seconds = None, {}, {}
    for entry in list(workload.entries):
        started = time.perf_counter()
        try:
            found = entry.run()
        except ImportError as error:
            if entry.hellm:
                raise
            workload.skipped[entry.label] = f"not installed: {error}"
            workload.entries.remove(entry)
            continue
        seconds[entry.label] = time.perf_counter() - started
        if entry.role == LIMIT:
            continue
        expected = found if expected is None else expected
        errors[entry.label] = workload.verify(found, expected)
        if not errors[entry.label] <= entry.tolerance:
            raise Disagreement(f"{entry.label}: error {errors[entry.label]:.2e} > {entry.tolerance:.0e}")
    return errors, seconds


def time_in_turns(
    entries: Sequence[Entry], rounds: dict[str, int], short: Collection[str] = ()
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each run, A B C, A B C, ..., and of the run before it where an entry is `short`.

    An entry drops out when it has had its rounds.
    """
    samples: dict[str, list[float]] = {entry.label: [] for entry in entries}
    cold: dict[str, list[float]] = {entry.label: [] for entry in entries}
    for turn in range(max(rounds.values())):
        for entry in entries:
            if turn < rounds[entry.label]:
                for times in (cold, samples) if entry.label in short else (samples,):
                    started = time.perf_counter()
                    entry.run()
                    times[entry.label].append(time.perf_counter() - started)
    return samples, cold


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median, minimum, 20th and 80th percentile in seconds, and the number of rounds."""
    ordered = sorted(samples)
    low, high = ordered[0], ordered[-1]
    if len(ordered) > 1:
        low, *_, high = statistics.quantiles(ordered, n=5, method="inclusive")
    return {"median": statistics.median(ordered), "min": ordered[0], "p20": low, "p80": high, "rounds": len(ordered)}


def judge(target: Target, medians: dict[str, float], rates: dict[str, float], limits: Sequence[str]) -> dict[str, Any]:
    """Value of a target: a speed-up over the fastest peer meant or the share of the limit's rate, None without one."""
    if target.peer == LIMIT:
        versus = limits[0] if limits else None
        value = rates[target.entry] / rates[versus] if versus else None
    else:
        meant = [label for label in medians if target.peer in label]
        versus = min(meant, key=medians.__getitem__, default=None)
        value = medians[versus] / medians[target.entry] if versus else None
    return {
        "entry": target.entry,
        "versus": versus or target.peer,
        "kind": LIMIT if versus in limits else "speed-up",
        "at_least": target.factor,
        "value": value,
        "met": None if value is None else value >= target.factor,
    }


def measure_case(case: Case, *, quick: bool = False, tiny: bool = False, with_compile: bool = False) -> dict[str, Any]:
    """Record of one case, ready for JSON. Without agreement it holds "failure" and no numbers."""
    record: dict[str, Any] = {"name": case.name, "group": case.group, "title": case.title}
    workload = case.workload(Setup(tiny=tiny, with_compile=with_compile))
    record |= {"parameters": workload.parameters, "skipped": workload.skipped}
    try:
        errors, warm_up = check(workload)
    except Disagreement as failure:
        return record | {"failure": str(failure)}
    steps = _QUICK_ROUNDS if quick else _ROUNDS
    rounds = {label: next(count for limit, count in steps if seconds <= limit) for label, seconds in warm_up.items()}
    short = [label for label, seconds in warm_up.items() if seconds < _SHORT_SECONDS]
    samples, cold = time_in_turns(workload.entries, rounds, short)

    seconds = {label: summary(values) for label, values in samples.items()}
    medians = {label: values["median"] for label, values in seconds.items()}
    rates = {entry.label: (entry.work or workload.work) / medians[entry.label] for entry in workload.entries}
    entries = [
        {
            "label": entry.label,
            "role": entry.role,
            "note": entry.note,
            "seconds": seconds[entry.label],
            "cold_seconds": statistics.median(cold[entry.label]) if entry.label in short else None,
            "rate": rates[entry.label],
            "error": errors.get(entry.label),
            "tolerance": None if entry.role == LIMIT else entry.tolerance,
        }
        for entry in workload.entries
    ]
    limits = [entry.label for entry in workload.entries if entry.role == LIMIT]
    targets = [target for target in TARGETS if (target.device, target.case) == (CPU, case.name)]
    return record | {
        "work": workload.work,
        "unit": workload.unit,
        "repeats": workload.repeats,
        "entries": entries,
        "targets": [judge(target, medians, rates, limits) for target in targets],
        "failure": None,
    }


def measure_all(
    names: Sequence[str],
    *,
    budget_seconds: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
    **settings: bool,
) -> dict[str, Any]:
    """Records of the named cases and memory cases; what the budget leaves no time for is listed in "not_run"."""
    started = time.perf_counter()
    run: dict[str, Any] = {
        "schema": SCHEMA,
        "kind": "cases",
        "environment": environment(),
        "settings": settings,
        "cases": [],
        "memory": [],
        "not_run": {},
    }
    for name in names:
        if time.perf_counter() - started > budget_seconds:
            run["not_run"][name] = f"the budget of {budget_seconds / 60:g} minutes was spent"
        elif name in CASES:
            record = _guarded(CASES[name], settings)
            run["cases"].append(record)
            say(table(record))
        else:
            record = memory.measure(name, tiny=settings.get("tiny", False))
            run["memory"].append(record)
            say(memory.line(record))
        gc.collect()
    run["seconds"] = time.perf_counter() - started
    return run


def _guarded(case: Case, settings: dict[str, bool]) -> dict[str, Any]:
    """A case that cannot run is a failure of its own and does not take the others with it."""
    try:
        return measure_case(case, **settings)
    except Exception as error:
        traceback.print_exc()
        description = {"name": case.name, "group": case.group, "title": case.title, "parameters": {}, "skipped": {}}
        return description | {"failure": f"{type(error).__name__}: {error}"}


def table(record: dict[str, Any]) -> str:
    """One case as text."""
    lines = [f"\n{record['name']}: {record['title']}"]
    if record["failure"]:
        return "\n".join([*lines, f"  FAILED, no numbers: {record['failure']}"])
    ours = record["entries"][0]["seconds"]["median"]
    for entry in record["entries"]:
        median = entry["seconds"]["median"]
        lines.append(
            f"  {entry['label']:<36} {median * 1e3:11.3f} ms   {entry['rate'] / 1e9:9.3f} G{record['unit']}/s"
            + ("" if entry["role"] == LIMIT else f"   {median / ours:7.2f}x hellm's time")
        )
    for target in record["targets"]:
        verdict = {True: "met", False: "MISSED", None: ""}[target["met"]]
        value = "not there to compare with" if target["value"] is None else f"{target['value']:.2f}"
        lines.append(
            f"  target: {target['entry']} >= {target['at_least']:g} of {target['versus']}: {value} {verdict}".rstrip()
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    known = [*on_device(CASES, CPU), *MEMORY_CASES]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.measure", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=known, help="cases: " + ", ".join(known))
    parser.add_argument("--quick", action="store_true", help="a few rounds only")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: does it run at all")
    parser.add_argument("--compile", action="store_true", help="torch.compile peers as well")
    parser.add_argument("--budget-minutes", type=float, default=float("inf"), help="start no case after this")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's choice")
    parser.add_argument(
        "--instruction-set", metavar="NAME", help="of hellm's kernels; that of torch is ATEN_CPU_CAPABILITY"
    )
    parser.add_argument("--out", type=Path, help="default: results/cpu.json; a partial or quick run is only printed")
    options = parser.parse_args(arguments)
    if not options.tiny and (reason := BACKENDS["native"].unavailable(torch.device("cpu"))):
        parser.error(f"numbers must be those of the compiled kernels, but {reason}")
    if options.instruction_set is not None:
        sets = loaders.extension().instruction_sets()
        if options.instruction_set not in sets:
            parser.error(f"--instruction-set must be one of {', '.join(sets)}, got {options.instruction_set}")
        loaders.extension().use_instruction_set(options.instruction_set)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", message="Sparse")
    run = measure_all(
        options.only or known,
        budget_seconds=60 * options.budget_minutes,
        say=lambda text: print(text, flush=True),
        quick=options.quick,
        tiny=options.tiny,
        with_compile=options.compile,
    )
    out = options.out
    if out is None and not (options.only or options.quick or options.tiny):
        out = ROOT / "benchmarks" / "results" / "cpu.json"
    if out is not None:
        write_json(out, run)
    failed = [record["name"] for record in run["cases"] + run["memory"] if record["failure"]]
    print(f"\n{run['seconds'] / 60:.1f} minutes" + (f" -> {out}" if out else ""))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
