"""Commands that are killed at random moments; `killed.py` is the program."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SLOW = os.environ.get("HELLM_SLOW") == "1"
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")


def run_killed(folder, *options) -> dict:
    program = Path(__file__).with_name("killed.py")
    command = [sys.executable, str(program), str(folder), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_notes_of_times_ahead_depend_on_the_day_and_others_do_not(tmp_path):
    import killed as program

    def written(name: str, *notes: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        about = json.dumps({"name": "shop", "notes": notes})
        (tmp_path / name / "dataset.json").write_text(about)
        (tmp_path / name / ".hellm.json").write_text(json.dumps({"files": {"dataset.json": len(about), "a": 1}}))
        return program.digests(tmp_path / name)

    plain, ahead = written("plain"), written("ahead", "3 events have times in the future, the last 2026-01-01")
    assert plain == ahead and plain.keys() == {"dataset.json", ".hellm.json"}
    assert written("other", "3 events have no user") != plain


@needs_fork
def test_killed_commands_go_on_and_come_to_the_same(tmp_path):
    counts = run_killed(tmp_path, "--moments", 6, "--only", "build", "pretrain", "search")
    assert counts["moments"] == 6 and counts["failures"] == 0


@needs_fork
@pytest.mark.slow
@pytest.mark.skipif(not SLOW, reason="takes minutes; set HELLM_SLOW=1")
def test_a_hundred_moments_of_all_commands(tmp_path):
    counts = run_killed(tmp_path, "--moments", 110)
    assert counts["killed"] > 50 and counts["failures"] == 0
