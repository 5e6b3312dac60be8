"""A server under load: python -m benchmarks.serve [--out FILE] [--seconds S] [--soak S] [--run NAME=DIR ...].

Server and client are two processes that talk over loopback, on a core each where there are two. For every run:

saturation   so many connections ask again as soon as they are answered: requests a second, latency, batches
half load    requests leave by the clock, half as many a second, and latency counts from when each was due, so a slow
             answer also counts against those that had to wait for it
overload     a queue of 32 and 256 connections: answers, refusals (503) and, after it, whether the next is answered
soak         half load for as long as asked; memory of the server at the start and at the end

Without --run, stage 1, a sequence model and their sum are made up, in the size of a shop with 10,000 items.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.environment import environment, write_json

USERS, ITEMS, EVENTS, DIM = 50_000, 10_000, 500_000, 64
CONNECTIONS = 64
OVERLOAD_CONNECTIONS, OVERLOAD_QUEUE = 256, 32
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
TARGET = {"requests_per_second": 1000, "p99_ms_at_half": 50}


def make_runs(folder: Path) -> dict[str, Path]:
    """Untrained models of the size of real ones: what an answer costs does not depend on what was learned."""
    import polars as pl
    import torch

    from hellm.models import SASRec
    from hellm.recommend import Recommender, ServedFused, ServedGraph, ServedSASRec

    rng, draw = np.random.default_rng(0), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    ids = pl.DataFrame(
        {
            "side": ["user"] * USERS + ["item"] * ITEMS,
            "index": [*range(USERS), *range(ITEMS)],
            "id": [f"u{n}" for n in range(USERS)] + [f"i{n}" for n in range(ITEMS)],
            "title": [None] * USERS + [f"Product {n}" for n in range(ITEMS)],
        }
    )
    users = np.sort(rng.integers(USERS, size=EVENTS))
    items = np.minimum(rng.zipf(1.3, size=EVENTS) - 1, ITEMS - 1)
    events = pl.DataFrame({"user": users, "item": items, "split": np.zeros(EVENTS, np.int8)})
    sizes = {"user": USERS, "item": ITEMS, "fold_in_source": ITEMS, "fold_in_view": ITEMS}
    graph = ServedGraph({name: torch.randn(size, DIM, generator=draw) for name, size in sizes.items()}, 0.5)
    sequence = ServedSASRec(SASRec(ITEMS, embedding_dim=DIM).eval())
    fused = ServedFused({"stage1": graph, "sasrec": sequence}, {"stage1": 1.0, "sasrec": 0.5})
    models = {"stage 1": graph, "sequence": sequence, "fused": fused}
    return {
        name: Recommender(model, ids, events).save(folder / name.replace(" ", "")) for name, model in models.items()
    }


@contextmanager
def server(run: Path, *options: str) -> Iterator[tuple[str, int]]:
    """A server of its own process, ready: its address and its process number."""
    command = [sys.executable, "-m", "hellm", "serve", str(run), "--port", "0", "--store", "none", *options]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryFile() as log:
        if len(CORES) >= 2:
            command = ["taskset", "-c", str(CORES[0]), *command]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        line = process.stdout.readline()
        if " on http://" not in line:
            log.seek(0)
            raise RuntimeError(line + log.read().decode())
        try:
            url = line.split(" on ")[1].strip()
            asyncio.run(_ready(url))
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


class Connection:
    """One keep-alive connection."""

    def __init__(self, url: str) -> None:
        self.address = urlsplit(url)

    async def open(self) -> Connection:
        self.reader, self.writer = await asyncio.open_connection(self.address.hostname, self.address.port)
        return self

    def close(self) -> None:
        self.writer.close()

    async def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        head = f"{method} {path} HTTP/1.1\r\nHost: {self.address.netloc}\r\nContent-Type: application/json\r\n"
        self.writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        lines = (await self.reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        length = next(int(line[15:]) for line in lines if line.lower().startswith(b"content-length:"))
        return int(lines[0].split()[1]), await self.reader.readexactly(length)


async def _ready(url: str) -> None:
    while True:
        connection = await Connection(url).open()
        status, _ = await connection.ask("GET", "/health/ready")
        connection.close()
        if status == 200:
            return
        await asyncio.sleep(0.05)


async def closed_loop(url: str, bodies: list[bytes], connections: int, seconds: float) -> dict[str, Any]:
    """Connections that ask as soon as they are answered."""
    statuses, latencies, stop = Counter(), [], time.perf_counter() + seconds

    async def work(number: int) -> None:
        connection, rng = await Connection(url).open(), random.Random(number)
        while (started := time.perf_counter()) < stop:
            status, _ = await connection.ask("POST", "/recommend", rng.choice(bodies))
            statuses[status] += 1
            if status == 200:
                latencies.append(time.perf_counter() - started)
        connection.close()

    started = time.perf_counter()
    await asyncio.gather(*(work(number) for number in range(connections)))
    return _told(statuses, latencies, time.perf_counter() - started) | {"connections": connections}


async def open_loop(url: str, bodies: list[bytes], connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """Requests by the clock; latency counts from when one was due."""
    statuses, latencies, rng = Counter(), [], random.Random(0)
    free: asyncio.Queue[Connection] = asyncio.Queue()
    for _ in range(connections):
        free.put_nowait(await Connection(url).open())
    started, tasks = time.perf_counter(), set()

    async def one(due: float) -> None:
        connection = await free.get()
        status, _ = await connection.ask("POST", "/recommend", rng.choice(bodies))
        statuses[status] += 1
        latencies.append(time.perf_counter() - due)
        free.put_nowait(connection)

    for number in range(int(rate * seconds)):
        due = started + number / rate
        if (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        task = asyncio.create_task(one(due))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    found = _told(statuses, latencies, time.perf_counter() - started) | {"rate": rate}
    while not free.empty():
        free.get_nowait().close()
    return found


def _told(statuses: Counter, latencies: list[float], seconds: float) -> dict[str, Any]:
    found = {"requests_per_second": statuses[200] / seconds, "statuses": dict(statuses), "seconds": seconds}
    if latencies:
        p50, p99, most = np.percentile(np.array(latencies) * 1000, [50, 99, 100])
        found |= {"p50_ms": p50, "p99_ms": p99, "max_ms": most}
    return found


def memory(pid: int) -> int:
    """Resident bytes of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def bodies_of(run: Path) -> list[bytes]:
    """Requests for one user each, as a shop's page makes them."""
    from hellm.artifact import read_ids
    from hellm.artifact.tables import side_of

    users, _ = side_of(read_ids(run), "user")
    rng = random.Random(0)
    return [json.dumps({"users": [user], "k": 10}).encode() for user in rng.choices(users.ids, k=2000)]


def measure(run: Path, args: argparse.Namespace, say: Callable[[str], None]) -> dict[str, Any]:
    bodies, found = bodies_of(run), {}
    options = ["--llm", args.llm] if args.llm else []
    with server(run, *options) as (url, pid):
        asyncio.run(closed_loop(url, bodies, CONNECTIONS, min(2.0, args.seconds)))
        found["saturation"] = asyncio.run(closed_loop(url, bodies, CONNECTIONS, args.seconds))
        rate = found["saturation"]["requests_per_second"] / 2
        found["half"] = asyncio.run(open_loop(url, bodies, CONNECTIONS, rate, args.seconds))
        if args.soak:
            before = memory(pid)
            found["soak"] = asyncio.run(open_loop(url, bodies, CONNECTIONS, rate, args.soak))
            found["soak"] |= {"memory_before": before, "memory_after": memory(pid)}
    with server(run, "--max-queue", str(OVERLOAD_QUEUE), *options) as (url, pid):
        found["overload"] = asyncio.run(closed_loop(url, bodies, OVERLOAD_CONNECTIONS, min(5.0, args.seconds)))
        found["after_overload"] = asyncio.run(closed_loop(url, bodies, 1, 1.0))
    say(
        f"{found['saturation']['requests_per_second']:.0f} requests/s, p99 {found['saturation']['p99_ms']:.1f} ms; at "
        f"half of it p50 {found['half']['p50_ms']:.1f} ms, p99 {found['half']['p99_ms']:.1f} ms; overload "
        f"{found['overload']['statuses']}, then {found['after_overload']['statuses']}"
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--soak", type=float, default=0.0)
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--llm")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: Path(path) for name, _, path in (one.partition("=") for one in args.run)}
        runs = runs or make_runs(Path(folder))
        if len(CORES) >= 2:
            os.sched_setaffinity(0, CORES[1:2])
        results = {
            name: measure(run, args, lambda text, name=name: print(f"{name}: {text}", flush=True))
            for name, run in runs.items()
        }
    record = {"environment": environment(), "target": TARGET, "runs": results}
    if args.out is not None:
        write_json(args.out, record)


if __name__ == "__main__":
    main()
