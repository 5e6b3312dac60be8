"""Kills and nonsense: short forms of the programs `killed.py` and `bad_requests.py`, which say what is looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def run(program: str, *options: str, out: Path) -> dict[str, Any]:
    """What a program has written. It ends by itself; the limit is for a fault in it."""
    command = [sys.executable, str(Path(__file__).with_name(program)), *options, "--out", str(out)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


def test_kills_lose_nothing_and_double_nothing(tmp_path):
    counts = run("killed.py", "--moments", "3", "--seed", "1", out=tmp_path / "counts.json")
    assert (counts["moments"], counts["failures"]) == (3, 0)
    assert counts["events"] and counts["items"] and counts["sent_again"]


def test_nonsense_is_answered_with_what_is_wrong(tmp_path):
    found = run("bad_requests.py", "--count", "400", "--seed", "1", out=tmp_path / "found.json")
    assert found["faults"] == []
    kinds = {name.partition(":")[0] for name in found["answers"]}
    assert kinds > {"wrong_value", "unknown_id", "too_large", "too_deep", "broken_http", "slow", "leaving", "good"}
