"""Sends a server nonsense and looks at what it answers; a program, since it takes its time.

    python tests/serve/bad_requests.py --count N [--seed S] [--threads N] [--out FILE]

Every request is wrong in one of many ways: values, ids, sizes, depth, encodings, content types, paths, pictures, HTTP
itself, clients that are slow, close half of a connection or break it off. The server, a process of its own, must answer
each with a 4xx, which says what is wrong and in which field, or close the connection where HTTP is broken or nobody
can be waiting for an answer; never with a 5xx. Between them good requests are answered with the bits of
`Recommender`, at the end nothing has been stored, and the memory of the server has grown by no more than `SETTLING`
and `LEAK` a request since a third of them was sent. Prints a line for each failure and, last, a JSON object.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import io
import json
import os
import random
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402
from served import DATA, Process, save_run  # noqa: E402
from test_fuzz import BODIES, spoilt  # noqa: E402

LEAK, SETTLING = 512, 4 << 20
"""Bytes a request, and bytes for what the allocator and caches still take."""
MAX_BODY = 1 << 20
SLOWEST = 120.0
"""Seconds after which an answer counts as missing; the server gives a slow client up after 10 to 20."""
JSON = "Content-Type: application/json\r\n"
CONTENT_TYPES = ("", "text/plain", "image/png", "application/x-www-form-urlencoded", "application/json/x")
CONTENT_TYPES += ("multipart/form-data", "multipart/form-data; boundary=x")
PATHS = ("/recommend", "/explain", "/events", "/items", "/admin/reload")


@dataclass
class Wrong:
    """A request that is wrong.

    Attributes:
        sent: What is sent, in parts with a pause between them.
        field: What an answer must name, where it must be one.
        may_close: The server may close the connection instead of an answer.
        then: What the client does then: "wait", "half" (it closes its own side) or "break" (it breaks the connection).
    """

    sent: list[bytes]
    field: str | None = None
    may_close: bool = False
    then: str = "wait"


def post(path: str, body: bytes, head: str = JSON, **about: Any) -> Wrong:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{head}Content-Length: {len(body)}\r\n\r\n"
    return Wrong([head.encode("latin-1") + body], **about)


def get(path: str, method: str = "GET", **about: Any) -> Wrong:
    return Wrong([f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1")], **about)


def noise(draw: random.Random, most: int) -> bytes:
    return draw.randbytes(draw.randint(1, most))


def wrong_value(draw: random.Random) -> Wrong:
    path, body = draw.choice(BODIES)
    body, field = spoilt(np.random.default_rng(draw.randrange(2**32)), body)
    return post(path, json.dumps(body).encode(), field=field)


def unknown_id(draw: random.Random) -> Wrong:
    name = draw.choice(["", "i", "u"]) + "".join(
        chr(draw.choice([draw.randrange(33, 127), 0x20AC, 0x1F600])) for _ in "abcd"
    )
    body, path, field = draw.choice(
        [
            ({"users": ["u1", name]}, "/recommend", "users[1]"),
            ({"histories": [["i1"], ["i2", name]]}, "/recommend", "histories[1][1]"),
            ({"users": ["u1"], "exclude": [name]}, "/recommend", "exclude[0]"),
            ({"users": ["u1"], "candidates": ["i1", name]}, "/recommend", "candidates[1]"),
            ({"users": ["u1"], "filters": {name: ["red"]}}, "/recommend", "filters"),
            ({"item": name, "user": "u1"}, "/explain", "item"),
            ({"item": "i1", "user": name}, "/explain", "user"),
            ({"events": [{"id": "e", "user": "u1", "item": name}]}, "/events", "events[0].item"),
        ]
    )
    return post(path, json.dumps(body, ensure_ascii=draw.random() < 0.5).encode(), field=field)


def too_large(draw: random.Random) -> Wrong:
    many = draw.randint(MAX_BODY + 1, 2 * MAX_BODY)
    head = f"POST {draw.choice(PATHS)} HTTP/1.1\r\nHost: localhost\r\n{JSON}"
    part = f"{MAX_BODY // 4:x}\r\n".encode() + b"x" * (MAX_BODY // 4) + b"\r\n"
    users = json.dumps({"users": ["u1"] * draw.randint(257, 500)}).encode()
    return draw.choice(
        [
            # The length is told and nothing follows, all of it follows, or the length is not told.
            Wrong([f"{head}Content-Length: {many}\r\n\r\n".encode()], field="content-length"),
            Wrong([f"{head}Content-Length: {many}\r\n\r\n".encode() + b"[" * many], "content-length", may_close=True),
            Wrong([f"{head}Transfer-Encoding: chunked\r\n\r\n".encode(), *[part] * 5, b"0\r\n\r\n"], may_close=True),
            Wrong([f"{head}Content-Length: {10**30}\r\n\r\n".encode()], may_close=True),
            post("/recommend", users, field="users"),
            post("/recommend", json.dumps({"users": ["u1"], "k": 10 ** draw.randint(3, 400)}).encode()),
        ]
    )


def too_deep(draw: random.Random) -> Wrong:
    depth = draw.choice([10, 300, 5000, 100_000])
    opening, closing = draw.choice([(b"[", b"]"), (b'{"users":', b"}")])
    body = opening * depth + b"1" + closing * draw.choice([0, depth])
    return post(draw.choice(("/recommend", "/events", "/items")), body)


def wrong_encoding(draw: random.Random) -> Wrong:
    body = json.dumps({"users": ["Zoë"]}, ensure_ascii=False)
    content = draw.choice(
        [
            body.encode("latin-1"),
            body.encode("utf-16")[:-1],
            body.encode()[:-3],
            b"\xef\xbb\xbf" + body.encode(),
            b'{"users": ["\\ud800"]}',
            b'{"users": ["u1"], "k": NaN}',
            b'{"users": ["u1"], "k": 1e999}',
            b'{"users": ["u1"], "k": 3',
            noise(draw, 200),
        ]
    )
    return post(draw.choice(("/recommend", "/explain", "/events")), content)


def wrong_content_type(draw: random.Random) -> Wrong:
    kind = draw.choice(CONTENT_TYPES)
    return post(draw.choice(("/recommend", "/items")), noise(draw, 100), f"Content-Type: {kind}\r\n")


def wrong_path(draw: random.Random) -> Wrong:
    # Not a slash, which would make another path of it, or the end of a line.
    name = "".join(f"%{byte:02x}" for byte in noise(draw, 40) if byte not in b"/\n") or "%20"
    return draw.choice(
        [
            get(f"/items/{name}/similar", field="id"),
            get(f"/users/{name}/history", field="id"),
            get(f"/items/i1/similar?k={draw.choice(['0', '-1', 'x', '501', '1.5', '9' * 400])}", field="k"),
            get(f"/items/{'i' * 600}/similar", field="id"),
            get(f"/none{name}"),
            get("/recommend", method=draw.choice(["GET", "PUT", "DELETE", "PATCH"])),
            get("/items/..%2f..%2fetc%2fpasswd/similar"),
        ]
    )


def wrong_picture(draw: random.Random) -> Wrong:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 40), (draw.randrange(256), 0, 0)).save(file, draw.choice(["PNG", "JPEG"]))
    whole = file.getvalue()
    content = draw.choice([whole[: draw.randint(1, len(whole) // 2)], noise(draw, 300), b"GIF89a" + noise(draw, 30)])
    picture = base64.b64encode(content).decode()
    if draw.random() < 0.3:
        picture = picture[:-1] + "%"
    body = {"id": f"n{draw.randrange(10**9)}", "picture": picture, "attributes": {"colour": ["red"]}}
    return post("/items", json.dumps(body).encode(), field="picture")


def broken_http(draw: random.Random) -> Wrong:
    content = draw.choice(
        [
            noise(draw, 300) + b"\r\n\r\n",
            b"GET / HTP/1.1\r\n\r\n",
            b"GET /health/live HTTP/9.9\r\nHost: localhost\r\n\r\n",
            b"GET /no way HTTP/1.1\r\nHost: localhost\r\n\r\n",
            b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
            b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
            b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
            b"GET /recommend HTTP/1.1\r\nHost: localhost\r\nno colon\r\n\r\n",
            b"GET /recommend HTTP/1.1\r\nX: " + b"x" * 200_000 + b"\r\n\r\n",
            b"\x16\x03\x01\x02\x00" + noise(draw, 200) + b"\r\n\r\n",
        ]
    )
    # Some noise is the beginning of something: then nothing more comes.
    return Wrong([content], may_close=True, then=draw.choice(["wait", "half"]))


def slow(draw: random.Random) -> Wrong:
    head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\n{JSON}Content-Length: 20\r\n\r\n".encode()
    return draw.choice(
        [
            # Never more than this: not the whole head, or not the whole body.
            Wrong([head[: draw.randint(1, len(head) - 1)]], may_close=True),
            Wrong([head + b"{"]),
            # All of it, letter by letter, and wrong.
            Wrong([bytes([one]) for one in head + b'{"users": ["nobody"]'], may_close=True),
        ]
    )


def leaving(draw: random.Random) -> Wrong:
    body = json.dumps({"users": [f"u{draw.randrange(DATA.num_users)}"]}).encode()
    whole = post("/recommend", body).sent[0]
    return Wrong([whole[: draw.randint(1, len(whole) - 1)]], may_close=True, then=draw.choice(["half", "break"]))


# How often each is sent.
KINDS: dict[Callable[[random.Random], Wrong], float] = {
    wrong_value: 30,
    unknown_id: 20,
    too_large: 5,
    too_deep: 5,
    wrong_encoding: 10,
    wrong_content_type: 5,
    wrong_path: 10,
    wrong_picture: 5,
    broken_http: 5,
    slow: 1,
    leaving: 4,
}


def answer_to(address: tuple[str, int], wrong: Wrong) -> tuple[int, bytes]:
    """Status and body; 0 where the connection was closed. Raises: TimeoutError, neither."""
    with socket.create_connection(address, timeout=SLOWEST) as connection:
        received = b""
        try:
            for number, part in enumerate(wrong.sent):
                if number:
                    time.sleep(0.001)
                connection.sendall(part)
            if wrong.then == "break":
                # The other side is told by a reset.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return 0, b""
            if wrong.then == "half":
                connection.shutdown(socket.SHUT_WR)
        except (BrokenPipeError, ConnectionResetError):
            # Answered before all was sent.
            pass
        with contextlib.suppress(ConnectionResetError):
            while not _is_whole(received) and (part := connection.recv(65536)):
                received += part
    if not received:
        return 0, b""
    head, _, body = received.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def _is_whole(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    at = head.lower().find(b"content-length:")
    return bool(end) and at >= 0 and len(body) >= int(head[at + 15 :].split(b"\r\n")[0])


def fault_of(wrong: Wrong, status: int, body: bytes) -> str | None:
    """What is wrong with an answer; None is nothing."""
    if status == 0:
        return None if wrong.may_close else "no answer"
    if not 400 <= status < 500:
        return f"answered with {status}"
    if wrong.may_close and body.startswith(b"Invalid HTTP"):
        return None
    try:
        errors = json.loads(body)["errors"]
        named = [error["field"] or "" for error in errors]
        told = all(error["message"] for error in errors) and errors
    except (ValueError, KeyError, TypeError):
        return f"answered with {status} and {body[:100]!r}"
    if not told:
        return f"answered with {status} and no reason"
    if wrong.field is not None and not any(name.startswith(wrong.field) for name in named):
        return f"answered with {status}, which names {named} and not {wrong.field}"
    return None


def resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sent(folder: Path, count: int, *, seed: int = 0, threads: int = 16) -> dict[str, Any]:
    """Send `count` wrong requests from several threads. Returns: what came of it, as JSON; "ok" where all is well."""
    from hellm.recommend import Recommender

    run, store = save_run(folder / "run", pictures=True), folder / "store.sqlite"
    expected = {user: one.to_dict() for user in _users() for one in Recommender.load(run).recommend(user, k=5)}
    process = Process(run, "--store", str(store), "--no-request-log", "--max-body", str(MAX_BODY >> 20))
    counts: Counter[str] = Counter()
    faults: list[str] = []
    sizes: list[int] = []
    lock, numbers = threading.Lock(), iter(range(count))
    url = urlsplit(process.url)
    address = (url.hostname, url.port)

    def work(place: int) -> None:
        while True:
            with lock:
                number = next(numbers, None)
                if number is not None and number % max(1, count // 200) == 0:
                    sizes.append(resident(process.process.pid))
            if number is None:
                return
            draw = random.Random(f"{seed} {number}")
            kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
            wrong = kind(draw)
            try:
                status, body = answer_to(address, wrong)
                fault = fault_of(wrong, status, body)
            except (OSError, ValueError) as error:
                status, fault = -1, f"{type(error).__name__}: {error}"
            good = number % 20 == 0 and _good_fault(address, expected, draw)
            with lock:
                counts[f"{kind.__name__}: {status or 'closed'}"] += 1
                counts["good: 200"] += number % 20 == 0 and not good
                for one in (fault, good):
                    if one:
                        text = wrong.sent[0][:300] if one is fault else b"a good request"
                        faults.append(f"{kind.__name__} {number}: {one}; sent {text!r}")

    try:
        process.until_ready()
        workers = [threading.Thread(target=work, args=[place], daemon=True) for place in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        sizes.append(resident(process.process.pid))
        ready = process.http.get("/health/ready")
        if ready.status_code != 200 or ready.json()["revision"]:
            faults.append(f"at the end: {ready.status_code}, {ready.text}")
        if (code := process.stop()) != 0:
            faults.append(f"the server ended with {code}: {''.join(process.logs)[-300:]}")
    finally:
        if process.process.poll() is None:
            process.stop(signal.SIGKILL)
    errors = [line for line in process.logs if '"level": "error"' in line]
    faults += [f"logged: {line.strip()[:300]}" for line in errors[:5]]
    grown = sizes[-1] - max(sizes[: max(1, len(sizes) // 3)])
    return {
        "count": count,
        "answers": dict(sorted(counts.items())),
        "faults": faults,
        "resident_bytes": sizes,
        "grown_bytes": grown,
        "may_grow_bytes": SETTLING + LEAK * count * 2 // 3,
        "ok": not faults,
    }


def _users() -> list[str]:
    return [f"u{row}" for row in range(DATA.num_users)]


def _good_fault(address: tuple[str, int], expected: dict[str, dict], draw: random.Random) -> str | None:
    user = draw.choice(_users())
    status, body = answer_to(address, post("/recommend", json.dumps({"users": [user], "k": 5}).encode()))
    if status != 200:
        return f"a good request was answered with {status}"
    return None if json.loads(body)["lists"] == [expected[user]] else "a good request was answered with other bits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=16)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = sent(Path(folder), args.count, seed=args.seed, threads=args.threads)
    found |= {"seconds": round(time.monotonic() - started, 1)}
    found["ok"] = found["ok"] and found["grown_bytes"] <= found["may_grow_bytes"]
    for fault in found["faults"]:
        print(fault, flush=True)
    print(json.dumps({name: value for name, value in found.items() if name not in ("faults", "resident_bytes")}))
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
