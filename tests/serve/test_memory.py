from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from served import save_run, serving

from hellm.serve import service as module

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memory_is_given_back_now_and_then_while_the_catalogue_changes(tmp_path, monkeypatch):
    released = []
    monkeypatch.setattr(module, "release_memory", lambda: released.append(1))
    with serving(save_run(tmp_path / "run"), tmp_path / "store.sqlite") as client:
        for number in range(40):
            event = {"id": str(number), "user": "u1", "item": "i1"}
            assert client.post("/events", {"events": [event]}).status_code == 200
        assert not released
        for number in range(40):
            item = {"id": f"new {number}", "title": "Novelty", "features": {"text": [number + 1.0] * 8}}
            assert client.post("/items", item).status_code == 200
        assert len(released) == 2
        for _ in range(8):
            assert client.post("/admin/reload", {}).status_code == 200
        assert len(released) == 3


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_freed_memory_is_given_back():
    program = """
from pathlib import Path
from hellm.serve.memory import release_memory
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * 4096
# Small enough for the heap, and a block after them that keeps its end.
blocks = [bytes(100_000) for _ in range(1000)]
last = bytes(100_000)
blocks.clear()
before = resident()
release_memory()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 50_000_000
