"""Kills a server at random moments and checks what it still knows; a program, since it takes its time.

    python tests/serve/killed.py --moments N [--seed S] [--clients N] [--most N]

Clients send events and new items, each again until it is answered, as a sender would that wants nothing lost. The
server, a process of its own, is killed (SIGKILL) at a random moment: while it starts, while it answers or while it
writes. After the next start, everything that was acknowledged must be there, in the store and in the answers, nothing
twice, and in the order in which each client sent it. Prints a line for each failure and, last, a JSON object of
counts. Every wait has an end (`LIMIT`), after which the program fails instead of going on.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from served import DATA, Process, features, save_run  # noqa: E402

LIMIT = 300.0
"""Seconds that a start, an answer or the end of a client may take."""


class Sender(threading.Thread):
    """One client with users and items of its own.

    Attributes:
        events: Items of the events that were acknowledged, of its user.
        items: Ids of the new items that were acknowledged.
        pending: What was sent last and not answered: (path, body).
    """

    def __init__(self, number: int, seed: int) -> None:
        super().__init__(daemon=True)
        self.number, self.user = number, f"client {number}"
        self._draw = random.Random(1000 * seed + number)
        self.events: list[str] = []
        self.items: list[str] = []
        self.pending: tuple[str, dict] | None = None
        self.url: str | None = None
        self.running = True
        self.is_idle = threading.Event()
        self.refused: list[str] = []
        self.again = self.acknowledged = self._count = 0

    def run(self) -> None:
        while self.running:
            url = self.url
            if url is None:
                self.is_idle.set()
                time.sleep(0.002)
                continue
            self.is_idle.clear()
            try:
                self._send(url)
            except (OSError, http.client.HTTPException):
                # Killed. It is sent again to the next one.
                self.again += 1
                time.sleep(0.002)
            except RuntimeError as error:
                self.refused.append(str(error))
                return

    def _send(self, url: str) -> None:
        address = urlsplit(url)
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=LIMIT)
        try:
            while self.running and self.url == url:
                path, body = self.pending = self.pending or self._next()
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read()
                if response.status == 503:
                    time.sleep(0.01)
                elif response.status == 200:
                    self.pending = None
                    self.acknowledged += 1
                    if path == "/events":
                        self.events += [event["item"] for event in body["events"]]
                    else:
                        self.items.append(body["id"])
                else:
                    raise RuntimeError(f"{path} was answered with {response.status}: {content[:200]!r}")
        finally:
            connection.close()

    def _next(self) -> tuple[str, dict]:
        self._count += 1
        name = f"{self.number}-{self._count}"
        if self._draw.random() < 0.2:
            values = features(1, seed=self._draw.randrange(10**6))[0].tolist()
            return "/items", {"id": f"item {name}", "title": f"Item {name}", "features": {"text": values}}
        known = [f"i{row}" for row in range(DATA.num_items)] + self.items[-5:]
        count = self._draw.choice((1, 1, 1, 5))
        events = [{"id": f"{name}-{n}", "user": self.user, "item": self._draw.choice(known)} for n in range(count)]
        return "/events", {"events": events}


def answered(senders: list[Sender]) -> int:
    """Requests that were acknowledged."""
    return sum(sender.acknowledged for sender in senders)


def until_ready(process: Process) -> None:
    """Raises: TimeoutError."""
    stop = time.monotonic() + LIMIT
    while process.http.get("/health/ready").status_code != 200:
        if time.monotonic() > stop:
            raise TimeoutError(f"not ready after {LIMIT:g} seconds")
        time.sleep(0.01)


def stored_of(store: Path) -> list[tuple[str, str, dict]]:
    """(kind, key, body) in the order in which they were stored."""
    with sqlite3.connect(store) as database:
        rows = database.execute("SELECT kind, key, body FROM entries ORDER BY number").fetchall()
    return [(kind, key, json.loads(body)) for kind, key, body in rows]


def check(process: Process, store: Path, senders: list[Sender]) -> list[str]:
    """What is wrong with a server that nobody writes to."""
    entries, failures = stored_of(store), []
    keys = [(kind, key) for kind, key, _ in entries]
    if len(set(keys)) != len(keys):
        failures.append("something is stored twice")
    there = set(keys)
    for sender in senders:
        events = [body["item"] for kind, _, body in entries if kind == "event" and body["user"] == sender.user]
        # Beyond what was acknowledged at most what was not answered any more.
        pending = []
        if sender.pending is not None and sender.pending[0] == "/events":
            pending = [event["item"] for event in sender.pending[1]["events"]]
        if events not in (sender.events, sender.events + pending):
            failures.append(f"{sender.user}: {len(events)} events stored, {len(sender.events)} acknowledged")
        lost = [item for item in sender.items if ("item", item) not in there]
        if lost:
            failures.append(f"{sender.user}: acknowledged items are lost: {lost}")
        if events:
            answer = process.http.get(f"/users/{sender.user}/history")
            if answer.status_code != 200 or [one["item"] for one in answer.json()["items"]] != events:
                failures.append(f"{sender.user}: the history is not what is stored ({answer.status_code})")
        for item in sender.items[-3:]:
            body = {"histories": [[item]], "candidates": [item], "exclude_seen": False}
            answer = process.http.post("/recommend", json=body)
            if answer.status_code != 200 or [one["item"] for one in answer.json()["lists"][0]["items"]] != [item]:
                failures.append(f"{sender.user}: item {item} does not rank ({answer.status_code})")
    ready = process.http.get("/health/ready").json()
    if ready["revision"] != len(entries):
        failures.append(f"revision {ready['revision']} of a store of {len(entries)}")
    return failures


def killed(folder: Path, moments: int, *, seed: int = 0, clients: int = 4, most: int = 40) -> Counter:
    """Kill a server at `moments` moments.

    Args:
        most: Answers after a start at which it is killed at the latest; by answers, as machines differ in speed.
    Returns: "moments", "failures" and what happened, each counted.
    Raises: TimeoutError, something hangs.
    """
    draw, counts = random.Random(seed), Counter()
    run, store = save_run(folder / "run"), folder / "store.sqlite"
    senders = [Sender(number, seed) for number in range(clients)]
    for sender in senders:
        sender.start()
    try:
        for moment in range(moments + 1):
            process = Process(run, "--store", str(store), "--no-request-log", limit=LIMIT)
            try:
                # One in five is killed before it is ready, perhaps while it takes up what is stored.
                is_ready = moment == moments or draw.random() >= 0.2
                if is_ready:
                    until_ready(process)
                    counts["ready"] += 1
                    failures = check(process, store, senders)
                    counts["failures"] += len(failures)
                    for failure in failures:
                        print(f"after {moment} kills: {failure}", flush=True)
                if moment == moments:
                    break
                for sender in senders:
                    sender.url = process.url
                stop, wanted = time.monotonic() + LIMIT, answered(senders) + draw.randint(0, most)
                # What is killed at its start may never answer.
                while is_ready and answered(senders) < wanted:
                    if time.monotonic() > stop:
                        raise TimeoutError(f"no answers for {LIMIT:g} seconds")
                    time.sleep(0.0005)
                time.sleep(draw.uniform(0, 0.02 if is_ready else 1.0))
                if process.process.poll() is not None:
                    raise RuntimeError(f"the server has ended by itself: {''.join(process.logs)[-600:]}")
            finally:
                for sender in senders:
                    sender.url = None
                process.stop(signal.SIGKILL)
            counts["moments"] += 1
            for sender in senders:
                sender.is_idle.clear()
                if sender.is_alive() and not sender.is_idle.wait(LIMIT):
                    raise TimeoutError(f"a client hangs for {LIMIT:g} seconds")
    finally:
        for sender in senders:
            sender.running, sender.url = False, None
        for sender in senders:
            sender.join(LIMIT)
    counts["events"] = sum(len(sender.events) for sender in senders)
    counts["items"] = sum(len(sender.items) for sender in senders)
    counts["sent_again"] = sum(sender.again for sender in senders)
    for sender in senders:
        for refusal in sender.refused:
            counts["failures"] += 1
            print(f"{sender.user}: {refusal}", flush=True)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--most", type=int, default=40, help="answers from a start to its kill")
    parser.add_argument("--out", type=Path, help="counts, as JSON")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        counts = killed(Path(folder), args.moments, seed=args.seed, clients=args.clients, most=args.most)
    found = json.dumps({**counts, "seconds": round(time.monotonic() - started, 1)})
    print(found)
    if args.out is not None:
        args.out.write_text(found + "\n")
    return 1 if counts["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
