"""A server under a steady load while everything else that can happen happens: `python -m benchmarks.serve --soak S`.

Two runs of the same shop take turns. Requests leave by the clock, half as many a second as the server could answer;
beside them come events (some of them twice), new items with title, picture and features, and reloads. Afterwards it is
looked at that

- every request was answered with 200
- every answer is, bit for bit, that of the run and the revision which it names: of users to whom no event comes, and
  with exactly the new items that the store has up to that revision
- every new item was in the answer of the next request after its own, and every event that was acknowledged is once in
  its user's history, in order
- memory of the server does not grow: by no more than `MAX_SLOPE`, over the last two thirds of the time. A server takes
  minutes until it has done everything once, and a page of stored entries is full: ten say more than two
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import os
import random
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.load import PATIENCE, Connection, Latencies, Usage, load, request, run_loop, server

__all__ = ["MAX_SLOPE", "soak"]

MAX_SLOPE = 32 * 1024
"""Bytes a second by which the server may grow. An event that it keeps takes tens of bytes, and an item some kilobytes,
as every tower has its features; a leak of a hundred bytes a request would be more."""
CONNECTIONS, QUIET_USERS, EVENT_WRITERS = 32, 64, 2
# Seconds between two requests of each writer of events, of the writer of items, and between reloads.
EVENTS_EVERY, ITEMS_EVERY, RELOADS_EVERY = 0.2, 2.0, 10.0
LENGTH = 10


class _Soak:
    """What was sent and what came back."""

    def __init__(self, url: str, runs: Sequence[Path], link: Path, seconds: float) -> None:
        from hellm.recommend import Recommender

        self.url, self.runs, self.link, self.seconds = url, runs, link, seconds
        recommender = Recommender.load(runs[0])
        users, self.items = recommender.user_ids.ids, list(recommender.item_ids.ids)
        few = min(QUIET_USERS, len(users) // 2)
        self.quiet, self.writers_users = users[:few], users[few : few + 100]
        content = recommender.content
        self.width = content.features["text"].shape[1]
        self.attribute, self.values = next((name, list(values)) for name, values in content.attributes.items())
        self.latencies, self.faults, self.counts = Latencies(), Counter(), Counter()
        # (run hash, revision, user) -> digest of the list
        self.lists: dict[tuple[str, int, str], bytes] = {}
        self.acknowledged: dict[str, list[str]] = {}
        self.resident: list[tuple[float, int]] = []

    async def run(self, pid: int, rate: float) -> None:
        self.started = time.perf_counter()
        self.stop = self.started + self.seconds
        self.due = int(rate * self.seconds)
        self.times = iter(self.started + np.arange(self.due) / rate)
        await asyncio.gather(
            *(self._read(number) for number in range(CONNECTIONS)),
            *(self._write_events(number) for number in range(EVENT_WRITERS)),
            self._write_items(),
            self._reload(),
            self._watch(pid),
        )
        self.took = time.perf_counter() - self.started
        await self._check_histories()

    async def _answer(self, connection: Connection, what: str, whole: bytes) -> Any:
        """The answer as JSON; None, counted as a fault, where it is not good."""
        try:
            answer = await connection.ask(whole)
        except ConnectionError:
            self.faults[f"{what}: connection closed"] += 1
            return None
        if answer.status != 200:
            self.faults[f"{what}: {answer.status}"] += 1
            return None
        self.counts[what] += 1
        return answer.json()

    async def _read(self, number: int) -> None:
        draw, connection = random.Random(number), await Connection.open(self.url)
        requests = [request("POST", "/recommend", {"users": [user], "k": LENGTH}) for user in self.quiet]
        for due in self.times:
            # A machine that has come to do other things too answers fewer, and is not waited for.
            if time.perf_counter() >= self.stop:
                break
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            place = draw.randrange(len(self.quiet))
            answer = await connection.ask(requests[place])
            self.latencies.add(answer, time.perf_counter() - due)
            if answer.status != 200:
                self.faults[f"recommend: {answer.status}"] += 1
                continue
            found = answer.json()
            key = (found["run_hash"], found["revision"], self.quiet[place])
            if self.lists.setdefault(key, digest(found["lists"])) != digest(found["lists"]):
                self.faults["two answers of one revision"] += 1
        connection.close()

    async def _write_events(self, number: int) -> None:
        draw, connection = random.Random(1000 + number), await Connection.open(self.url)
        users = [*self.writers_users[number::EVENT_WRITERS], *(f"new-{number}-{count}" for count in range(100))]
        count = 0
        while time.perf_counter() < self.stop:
            events = []
            for _ in range(draw.randint(1, 5)):
                events.append({"id": f"{number}-{count}", "user": draw.choice(users), "item": draw.choice(self.items)})
                count += 1
            whole = request("POST", "/events", {"events": events})
            for _ in range(1 + (draw.random() < 0.1)):
                await self._answer(connection, "events", whole)
            for event in events:
                self.acknowledged.setdefault(event["user"], []).append(event["item"])
            await asyncio.sleep(EVENTS_EVERY)
        connection.close()

    async def _write_items(self) -> None:
        draw, connection, count = random.Random(0), await Connection.open(self.url), 0
        while time.perf_counter() < self.stop:
            name = f"new {count}"
            item = {"id": name, "title": f"Novelty {count}", "picture": picture(draw)}
            item["features"] = {"text": [draw.gauss(0, 1) for _ in range(self.width)]}
            item["attributes"] = {self.attribute: [draw.choice(self.values)]}
            if await self._answer(connection, "items", request("POST", "/items", item)) is not None:
                body = {"histories": [[name]], "candidates": [name], "exclude_seen": False}
                found = await self._answer(connection, "fresh", request("POST", "/recommend", body))
                if found is None or [one["item"] for one in found["lists"][0]["items"]] != [name]:
                    self.faults["a new item is not in the next answer"] += 1
                self.items.append(name)
            count += 1
            await asyncio.sleep(min(ITEMS_EVERY, self.seconds / 30))
        connection.close()

    async def _reload(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(min(RELOADS_EVERY, self.seconds / 3))
            if time.perf_counter() >= self.stop:
                break
            # A server closes connections on which nothing comes.
            connection, count = await Connection.open(self.url), count + 1
            new = self.link.with_name("new")
            new.symlink_to(self.runs[count % len(self.runs)])
            os.replace(new, self.link)
            found = await self._answer(connection, "reloads", request("POST", "/admin/reload", {}))
            if found is None or found["skipped"]:
                self.faults["a reload has left something out"] += 1
            connection.close()

    async def _watch(self, pid: int) -> None:
        usage, every = Usage(pid), max(0.1, self.seconds / 600)
        while (now := time.perf_counter()) < self.stop:
            self.resident.append((round(now - self.started, 2), usage.resident()))
            await asyncio.sleep(every)

    async def _check_histories(self) -> None:
        connection = await Connection.open(self.url)
        for user, items in self.acknowledged.items():
            found = await self._answer(connection, "histories", request("GET", f"/users/{user}/history"))
            if found is None or [one["item"] for one in found["items"]][-len(items) :] != items:
                self.faults["a history lacks events"] += 1
            elif user.startswith("new-") and len(found["items"]) != len(items):
                self.faults["a history has events twice"] += 1
        connection.close()


def digest(lists: Any) -> bytes:
    return hashlib.blake2b(json.dumps(lists).encode(), digest_size=16).digest()


def picture(draw: random.Random) -> str:
    """A small picture of one colour, in base64."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (32, 32), tuple(draw.randrange(256) for _ in range(3))).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def least(samples: Sequence[tuple[float, int]], every: float) -> list[tuple[float, int]]:
    """The smallest of the samples of each `every` seconds.

    A run that is loaded stands beside the one that is served, and what was served before is given back a little later:
    neither is growth, and how much of the time it is there depends on what else the machine does.
    """
    found: dict[int, tuple[float, int]] = {}
    for sample in samples:
        place = int(sample[0] / every)
        found[place] = min(found.get(place, sample), sample, key=lambda one: one[1])
    return list(found.values())


def slope(samples: Sequence[tuple[float, int]]) -> float:
    """Bytes a second: the median over pairs of samples."""
    times, sizes = np.array(samples, float).T
    first, second = np.triu_indices(len(times), 1)
    return float(np.median((sizes[second] - sizes[first]) / (times[second] - times[first])))


def wrong_answers(found: _Soak, store: Path) -> int:
    """Answers that are not those of a recommender that has taken up what the store holds up to their revision."""
    from hellm.artifact.run_hash import run_hash
    from hellm.recommend import Recommender
    from hellm.serve.readiness import is_row_exact
    from hellm.serve.store import Store

    log = Store(store)
    items = [entry for entry in log.entries() if entry.kind == "item"]
    log.close()
    numbers = [entry.number for entry in items]
    # Of every state of the items: (run, items taken up) -> user -> digests
    states: dict[tuple[str, int], dict[str, set[bytes]]] = {}
    for (run, revision, user), value in found.lists.items():
        taken = int(np.searchsorted(numbers, revision, side="right"))
        states.setdefault((run, taken), {}).setdefault(user, set()).add(value)
    wrong = 0
    for run in found.runs:
        recommender, taken = Recommender.load(run), 0
        exact = is_row_exact(recommender)
        for (_, count), users in sorted(one for one in states.items() if one[0][0] == run_hash(run)):
            for entry in items[taken:count]:
                features = {name: values[None] for name, values in entry.features.items()}
                attributes = {name: [values] for name, values in entry.body["attributes"].items()}
                recommender.add_items(features, [entry.key], [entry.body["title"]], attributes=attributes)
            taken = count
            names = list(users)
            calls = [names] if exact else [[name] for name in names]
            lists = [one for call in calls for one in recommender.recommend(call, k=LENGTH)]
            expected = {name: digest([one.to_dict()]) for name, one in zip(names, lists, strict=True)}
            wrong += sum(values != {expected[name]} for name, values in users.items())
    return wrong


def soak(runs: Sequence[Path], folder: Path, seconds: float) -> dict[str, Any]:
    """Load for some seconds.

    Args:
        runs: Two of the same shop, with features "text" and "image" (colours) and an attribute.
        folder: To be made, for the store and what the server is told to serve.
        seconds: How long.
    Returns: As JSON; "ok" says whether all is well.
    """
    import torch

    # As the server computes.
    torch.set_num_threads(1)
    folder.mkdir()
    link, store = folder / "run", folder / "store.sqlite"
    link.symlink_to(runs[0])
    with server(link, "--no-request-log", store=store) as (url, pid):
        found = _Soak(url, runs, link, seconds)
        requests = [request("POST", "/recommend", {"users": [user], "k": LENGTH}) for user in found.quiet]
        tried = min(5.0, seconds / 4)
        most = run_loop(load(url, requests, CONNECTIONS, tried), tried + PATIENCE)["requests_per_second"]
        run_loop(found.run(pid, most / 2), seconds + PATIENCE)
    wrong = wrong_answers(found, store)
    late = [one for one in found.resident if one[0] >= seconds / 3]
    record = {
        "seconds": seconds,
        "requests": found.latencies.told(found.took) | {"rate": most / 2, "due": found.due},
        "counts": dict(found.counts),
        "events": sum(map(len, found.acknowledged.values())),
        "answers_compared": len(found.lists),
        "wrong_answers": wrong,
        "faults": dict(found.faults),
        "resident_bytes": found.resident,
        "slope_bytes_per_second": slope(least(late, min(2 * RELOADS_EVERY, seconds / 30))),
        "max_slope": MAX_SLOPE,
    }
    record["ok"] = not found.faults and not wrong and record["slope_bytes_per_second"] <= MAX_SLOPE
    sizes = [size for _, size in late]
    print(
        f"soak: {sum(found.latencies.statuses.values())} requests at {most / 2:.0f} a second, "
        f"{record['events']} events, {dict(found.counts)}; {len(found.lists)} answers compared, {wrong} wrong; faults "
        f"{dict(found.faults) or 'none'}; memory {min(sizes) / 1e6:.0f} to {max(sizes) / 1e6:.0f} MB, "
        f"{record['slope_bytes_per_second'] / 1024:.1f} KiB/s (at most {MAX_SLOPE / 1024:.0f})",
        flush=True,
    )
    return record
