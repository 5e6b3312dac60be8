"""Load for a server, by connections that cost little to ask with, and what the server's process spends on it.

A connection is an asyncio protocol that sends whole requests and cuts answers off the stream by their length. It takes
a few hundredths of a millisecond of processor time for a request, where a client with pools and redirects takes a
whole one, on the same cores as the server.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from array import array
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

__all__ = ["PATIENCE", "Answer", "Connection", "Latencies", "Usage", "load", "request", "run_loop", "server"]

PATIENCE = 120.0
"""Seconds beyond what a load should take after which a program gives up instead of waiting."""
_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Answer:
    """Status, head and body of one answer."""

    __slots__ = ("body", "head", "status")

    def __init__(self, status: int, head: bytes, body: bytes) -> None:
        self.status, self.head, self.body = status, head, body

    def json(self) -> Any:
        return json.loads(self.body)

    def header(self, name: str) -> str | None:
        """The value of a header, given in lower case; None where there is none."""
        lines = (line.partition(b":") for line in self.head.split(b"\r\n")[1:])
        return next((value.strip().decode() for key, _, value in lines if key.lower().decode() == name), None)


class Connection(asyncio.Protocol):
    """One keep-alive connection, on which one request at a time is open."""

    def __init__(self) -> None:
        self._buffer, self._needed, self._answer = bytearray(), 0, None

    @classmethod
    async def open(cls, url: str) -> Connection:
        address = urlsplit(url)
        _, connection = await asyncio.get_running_loop().create_connection(cls, address.hostname, address.port)
        return connection

    async def ask(self, whole: bytes) -> Answer:
        """The answer to a whole request. Raises: ConnectionError, the server has closed the connection."""
        if self._transport.is_closing():
            raise ConnectionError("the server has closed the connection")
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(whole)
        return await self._answer

    @property
    def is_closed(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer
        buffer += data
        if len(buffer) < self._needed or (end := buffer.find(b"\r\n\r\n")) < 0:
            return
        head = bytes(buffer[:end])
        at = head.lower().find(b"\r\ncontent-length:")
        length = int(head[at + 17 :].partition(b"\r\n")[0]) if at >= 0 else 0
        self._needed = end + 4 + length
        if len(buffer) < self._needed:
            return
        body = bytes(buffer[end + 4 : self._needed])
        del buffer[: self._needed]
        self._needed = 0
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(Answer(int(head[9:12]), head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(ConnectionError(f"the server has closed the connection ({exc or 'no error'})"))


def request(method: str, path: str, body: Any = None) -> bytes:
    """A whole request, to be sent as it is."""
    content = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content


class Latencies:
    """What came of a load.

    Attributes:
        statuses: Status -> answers; 0 stands for a connection that was closed in place of an answer.
        retry_after: Answers 503 that say when to come again.
    """

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.retry_after = 0
        self._seconds = array("d")

    def add(self, answer: Answer | None, seconds: float) -> None:
        self.statuses[0 if answer is None else answer.status] += 1
        if answer is not None and answer.status == 200:
            self._seconds.append(seconds)
        elif answer is not None and answer.status == 503:
            self.retry_after += answer.header("retry-after") is not None

    def told(self, seconds: float) -> dict[str, Any]:
        """As JSON: rates and percentiles of what was answered with 200 in `seconds`."""
        found: dict[str, Any] = {
            "requests_per_second": self.statuses[200] / seconds,
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "seconds": seconds,
        }
        if self.statuses[503]:
            found["retry_after"] = self.retry_after
        if self._seconds:
            values = np.percentile(np.array(self._seconds) * 1000, [50, 95, 99, 100])
            found |= dict(zip(("p50_ms", "p95_ms", "p99_ms", "max_ms"), values.tolist(), strict=True))
        return found


async def load(
    url: str, requests: Sequence[bytes], connections: int, seconds: float, rate: float | None = None
) -> dict[str, Any]:
    """Ask for some seconds.

    Args:
        requests: Whole ones, drawn from at random.
        connections: How many; one that the server closes is opened again.
        rate: Requests a second, each due by the clock: its latency counts from then, so that a slow answer also counts
            against those that had to wait for a connection. None asks again as soon as an answer is there.
    """
    latencies, started = Latencies(), time.perf_counter()
    stop = started + seconds
    times = itertools.repeat(0.0) if rate is None else iter(started + np.arange(max(1, int(rate * seconds))) / rate)

    async def work(number: int) -> None:
        draw, connection = random.Random(number), await Connection.open(url)
        # All take the next one due from the same times.
        for due in times:
            now = time.perf_counter()
            if rate is None:
                if now >= stop:
                    break
                due = now
            elif due > now:
                await asyncio.sleep(due - now)
            try:
                answer = await connection.ask(draw.choice(requests))
            except ConnectionError:
                answer = None
            latencies.add(answer, time.perf_counter() - due)
            if connection.is_closed:
                connection = await Connection.open(url)
        connection.close()

    await asyncio.gather(*(work(number) for number in range(connections)))
    found = latencies.told(time.perf_counter() - started) | {"connections": connections}
    return found if rate is None else found | {"rate": rate}


def run_loop(work: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Run a coroutine on the fastest event loop there is. Raises: TimeoutError, it takes longer than `seconds`."""

    async def bounded() -> Any:
        return await asyncio.wait_for(work, seconds)

    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop
    loop = new_event_loop()
    try:
        return loop.run_until_complete(bounded())
    finally:
        loop.close()


class Usage:
    """What a process has used, from /proc."""

    def __init__(self, pid: int) -> None:
        self._folder = Path(f"/proc/{pid}")

    def cpu_seconds(self) -> float:
        """Processor time of all its threads, in steps of a hundredth of a second."""
        fields = (self._folder / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICK

    def resident(self) -> int:
        """Bytes in memory."""
        return int((self._folder / "statm").read_text().split()[1]) * _PAGE


@contextmanager
def server(run: Path, *options: str, store: Path | None = None, seconds: float = 300.0) -> Iterator[tuple[str, int]]:
    """`hellm serve` in a process of its own, ready: its address and its process number.

    Raises: RuntimeError with what it printed, it does not start within `seconds`.
    """
    command = [sys.executable, "-m", "hellm", "serve", str(run), "--port", "0", "--store", str(store or "none")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder, "out"), Path(folder, "log")
        with out.open("wb") as output, log.open("wb") as errors:
            process = subprocess.Popen([*command, *options], stdout=output, stderr=errors, env=env)
        try:
            stop = time.monotonic() + seconds
            while not (line := out.read_text()).endswith("\n"):
                if process.poll() is not None or time.monotonic() > stop:
                    raise RuntimeError(f"the server does not start: {line}{log.read_text(errors='replace')}")
                time.sleep(0.02)
            url = line.split(" on ")[1].strip()
            run_loop(_until_ready(url), max(1.0, stop - time.monotonic()))
            yield url, process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _until_ready(url: str) -> None:
    status = 0
    while status != 200:
        connection = await Connection.open(url)
        answer = await connection.ask(request("GET", "/health/ready"))
        connection.close()
        status, state = answer.status, answer.json()["status"]
        if state.startswith("not able"):
            raise RuntimeError(f"the server is {state}")
        await asyncio.sleep(0.05)
