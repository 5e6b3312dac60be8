"""The registry through pytest-benchmark: pytest benchmarks --benchmark-only [-k NAME].

One benchmark per implementation, grouped by case. `HELLM_BENCHMARK_TINY=1` takes toy sizes.
"""

from __future__ import annotations

import functools
import os

import pytest

from benchmarks.cases import CASES
from benchmarks.measure import check
from benchmarks.registry import CPU, Setup, Workload, on_device

_TINY = os.environ.get("HELLM_BENCHMARK_TINY") == "1"


# One at a time: pytest runs a case's implementations one after the other, and only theirs need be in memory.
@functools.lru_cache(maxsize=1)
def _checked(name: str) -> tuple[Workload, dict[str, float]]:
    workload = CASES[name].workload(Setup(tiny=_TINY))
    errors, _ = check(workload)
    return workload, errors


@functools.cache
def _labels(name: str) -> list[str]:
    return [entry.label for entry in CASES[name].workload(Setup(tiny=True)).entries]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    pairs = [(name, label) for name in on_device(CASES, CPU) for label in _labels(name)]
    metafunc.parametrize(("name", "label"), pairs, ids=map("-".join, pairs))


def test_case(benchmark, request: pytest.FixtureRequest, name: str, label: str) -> None:
    if not request.config.getoption("benchmark_only"):
        pytest.skip("a measurement: pytest benchmarks --benchmark-only")
    workload, errors = _checked(name)
    if label in workload.skipped:
        pytest.skip(workload.skipped[label])
    (entry,) = (entry for entry in workload.entries if entry.label == label)
    benchmark.group = name
    benchmark.extra_info |= {"role": entry.role, "work": entry.work or workload.work, "unit": workload.unit}
    benchmark.extra_info |= {"error": errors.get(entry.label)}
    benchmark.pedantic(entry.run, rounds=1 if _TINY else 5, warmup_rounds=0 if _TINY else 1)
