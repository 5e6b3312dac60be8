"""The load programs in a small form: what they measure is there, and what they look at is well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from served import save_run

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from benchmarks.soak import MAX_SLOPE, least, slope  # noqa: E402

PROGRAM = """
import json, sys
from pathlib import Path
from benchmarks.soak import soak
print(json.dumps(soak([Path(one) for one in sys.argv[1:3]], Path(sys.argv[3]), 6.0)))
"""

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")


def ended(*command: object) -> str:
    """What a program prints; the limit is for a fault in it."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_maximum_half_and_overload(tmp_path):
    run, out = save_run(tmp_path / "run", "sequence"), tmp_path / "out.json"
    options = ["--runs", f"small={run}", "--seconds", "1", "--warm-up", "0.2", "--repeats", "2", "--out", out]
    ended("-m", "benchmarks.serve", *options)
    record = json.loads(out.read_text())
    assert record["environment"]["cpu"]
    found = record["runs"]["small"]
    assert found["ok"]
    for name in ("maximum", "half"):
        assert len(found[name]["repeats"]) == 2
        for value in ("requests_per_second", "p50_ms", "p99_ms", "server_cpu_ms", "client_cpu_ms"):
            one = found[name][value]
            assert 0 < one["min"] <= one["median"] <= one["max"]
    rates = [one["rate"] for one in found["half"]["repeats"]]
    assert rates == [found["maximum"]["requests_per_second"]["median"] / 2] * 2
    overload = found["overload"]
    assert set(overload["statuses"]) == {"200", "503"} and overload["retry_after"] == overload["statuses"]["503"]
    assert overload["afterwards"]["answered"] == overload["afterwards"]["asked"]


def test_soak(tmp_path):
    runs = [save_run(tmp_path / f"run{seed}", "fused", seed=seed, pictures=True) for seed in range(2)]
    found = json.loads(ended("-c", PROGRAM, *runs, tmp_path / "soak").splitlines()[-1])
    assert found["faults"] == {} and found["wrong_answers"] == 0
    # More items than have one digit, whose order is that of the store and not of their names.
    assert found["counts"]["reloads"] and found["counts"]["fresh"] == found["counts"]["items"] > 10
    assert found["answers_compared"] and found["events"] and len(found["resident_bytes"]) > 10


@pytest.mark.parametrize("of_request", [0, 100])
def test_slope_is_that_of_what_is_kept_whatever_part_of_the_time_runs_are_loaded(of_request):
    """Every 10 seconds a run is loaded, in 1 second, and in 9 since the machine has more to do."""
    times = np.arange(40, 120, 0.2)
    loaded = times % 10 < np.where(times < 80, 1, 9)
    sizes = 4e8 + 500 * of_request * times + 4e7 * loaded + np.random.default_rng(0).normal(0, 5e5, len(times))
    found = slope(least(list(zip(times, sizes, strict=True)), 10))
    assert found == pytest.approx(500 * of_request, abs=12 * 1024)
    assert (found > MAX_SLOPE) == bool(of_request)
