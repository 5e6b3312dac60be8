from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections import deque
from pathlib import Path

import pytest
from served import save_run, serving

from hellm.serve import service as module
from hellm.serve.batcher import Batcher
from hellm.serve.metrics import Metrics
from hellm.serve.schema import EventsRequest
from hellm.serve.service import Service, Source
from hellm.serve.settings import Settings
from hellm.serve.store import Entry, Store

pytestmark = pytest.mark.usefixtures("one_thread")


def test_memory_is_given_back_after_items_that_come_together_and_after_every_reload(tmp_path, monkeypatch):
    released = threading.Semaphore(0)
    monkeypatch.setattr(module, "release_memory", released.release)
    with serving(save_run(tmp_path / "run"), tmp_path / "store.sqlite") as client:
        for number in range(40):
            event = {"id": str(number), "user": "u1", "item": "i1"}
            assert client.post("/events", {"events": [event]}).status_code == 200
        assert not released.acquire(timeout=0.5)
        monkeypatch.setattr(module, "_RELEASE_AFTER", 1.0)
        for number in range(3):
            item = {"id": f"new {number}", "title": "Novelty", "features": {"text": [number + 1.0] * 8}}
            assert client.post("/items", item).status_code == 200
        assert released.acquire(timeout=60)
        assert not released.acquire(timeout=1.5)
        monkeypatch.setattr(module, "_RELEASE_AFTER", 0.05)
        for _ in range(3):
            assert client.post("/admin/reload", {}).status_code == 200
            assert released.acquire(timeout=60)


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


_CYCLES = """
import gc
from hellm.serve.memory import release_memory
release_memory()
gc.collect()
gc.disable()
release_memory()
print(gc.collect())
"""


def test_giving_memory_back_leaves_nothing_to_the_collector_of_cycles():
    # Alone: threads of other tests leave cycles of their own.
    done = subprocess.run([sys.executable, "-c", _CYCLES], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


def test_what_was_served_before_is_gone_when_memory_is_given_back_also_where_a_reader_held_it(tmp_path, monkeypatch):
    before, alive, released, asked, reloaded = [], [], threading.Event(), threading.Event(), threading.Event()

    def release() -> None:
        alive.append(before[-1]())
        released.set()

    def question(snapshot, requests):
        asked.set()
        reloaded.wait()
        return requests

    async def work() -> None:
        service = Service(Source(save_run(tmp_path / "run", "fused")), None, Settings(), Metrics())
        await service.open()
        for _ in range(3):
            reading = asyncio.create_task(service.read(question, None))
            await asyncio.to_thread(asked.wait)
            before.append(weakref.ref(service.snapshot))
            await service.reload()
            reloaded.set()
            await reading
            await asyncio.to_thread(released.wait, 60)
            for one in (asked, reloaded, released):
                one.clear()
        await service.close()

    monkeypatch.setattr(module, "release_memory", release)
    asyncio.run(work())
    assert alive == [None] * 3


def test_ids_of_requests_are_not_kept():
    bodies = [json.dumps({"events": [{"id": f"event {n}", "user": "u1", "item": "i1"}]}) for n in range(2000)]
    EventsRequest.model_validate_json(bodies[0])
    tracemalloc.start()
    try:
        for body in bodies:
            EventsRequest.model_validate_json(body)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 10_000


def test_a_batcher_keeps_neither_jobs_nor_results(one_thread):
    class Large:
        pass

    async def work() -> None:
        batcher = Batcher(lambda jobs: [Large() for _ in jobs], name="test")
        batcher.start()
        job = Large()
        result = await batcher.submit(job)
        kept = weakref.ref(job), weakref.ref(result)
        del job, result
        await asyncio.sleep(0.1)
        alive = [one() for one in kept]
        await batcher.close()
        assert alive == [None, None]

    gc.disable()
    try:
        asyncio.run(work())
    finally:
        gc.enable()


def test_a_store_of_many_entries_is_read_by_few_at_a_time(tmp_path):
    store = Store(tmp_path / "store.sqlite")
    store.append([Entry("event", str(number), {"user": "u1", "item": "i1"}) for number in range(20_000)])
    tracemalloc.start()
    try:
        (last,) = deque(store.entries(5), maxlen=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        store.close()
    assert last.number == 20_000 and peak < 3_000_000


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_a_store_keeps_nothing_of_what_it_has_written(tmp_path):
    program = f"""
from pathlib import Path
import numpy as np
from hellm.serve.memory import release_memory
from hellm.serve.store import Entry, Store

store = Store({str(tmp_path / "store.sqlite")!r})

def append(number):
    items = [Entry("item", f"{{number}} {{place}}", {{}}, {{"text": np.ones(2000, np.float32)}}) for place in range(8)]
    store.append(items)

def resident():
    release_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

for number in range(8):
    append(number)
before = resident()
for number in range(8, 48):
    append(number)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 500_000


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="memory is read from /proc")
def test_an_item_and_an_event_keep_their_rows_and_their_ids(tmp_path):
    """A thousand bytes, of which an item of this run has 500 in tables; with a table of ids in pieces it was 2,500."""
    run = save_run(tmp_path / "run", "fused")
    program = f"""
import gc
from pathlib import Path
import numpy as np, torch
from hellm.recommend import Recommender
from hellm.serve.memory import release_memory

torch.set_num_threads(1)
recommender = Recommender.load({str(run)!r})

def resident():
    gc.collect()
    release_memory()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

def item(number):
    recommender.add_items({{"text": np.full((1, 8), number + 1.0)}}, [f"new {{number}}"], [f"Novelty {{number}}"])

def event(number):
    recommender.add_events([f"new {{number}}"], ["i1"])

for add in (item, event):
    for number in range(50):
        add(number)
    before = resident()
    for number in range(50, 450):
        add(number)
    print((resident() - before) / 400)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    of_item, of_event = map(float, done.stdout.split())
    assert of_item < 1700 and of_event < 1200
