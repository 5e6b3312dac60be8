"""`hellm serve` as a process: where it listens, what it logs, how it ends, and what a kill leaves."""

from __future__ import annotations

import json
import signal
import socket
import sqlite3
import threading
import time

import httpx
import numpy as np
import pytest
from served import Process, same, save_run

from hellm.cli import main
from hellm.recommend import Recommender

pytestmark = pytest.mark.usefixtures("same_threads")
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "run")


def stopped(process: Process) -> None:
    """End it also where a test has failed."""
    if process.process.poll() is None:
        process.stop(signal.SIGKILL)


def test_it_serves_until_sigterm_and_logs_nobody(run, tmp_path, capsys):
    key_file, answer_log = tmp_path / "key", str(tmp_path / "answers.jsonl")
    key_file.write_text(f"{KEY}\n")
    options = ["--store", "none", "--api-key-file", str(key_file), "--answer-log", answer_log]
    process = Process(run, *options).until_ready()
    try:
        assert process.url.startswith("http://127.0.0.1:")
        asked = {"users": ["u1", "u5"], "k": 4}
        answer = same(process.http.post("/recommend", json=asked, headers={"x-api-key": KEY}))
        assert answer["lists"] == [one.to_dict() for one in Recommender.load(run).recommend(**asked)]
        assert process.http.post("/recommend", json=asked).status_code == 401
        wrong = {"x-api-key": "wrong-key-of-some-length"}
        assert process.http.post("/recommend", json=asked, headers=wrong).status_code == 401
        process.http.headers["x-api-key"] = KEY
        assert process.http.get("/users/private-person/history?k=private-query").status_code == 404
        assert process.http.post("/recommend", json={"users": ["private-person"]}).status_code == 422
        assert process.http.post("/recommend", json={"private-field": 1}).status_code == 422
        assert process.http.get("/private-path").status_code == 404
        assert process.stop() == 0
    finally:
        stopped(process)
    lines = [json.loads(line) for line in process.logs]
    asked = [line for line in lines if line["event"] == "request" and not line["route"].startswith("/health")]
    assert [(line["method"], line["route"], line["status"]) for line in asked] == [
        ("POST", "/recommend", 200),
        ("POST", "none", 401),
        ("POST", "none", 401),
        ("GET", "/users/{id}/history", 404),
        ("POST", "/recommend", 422),
        ("POST", "/recommend", 422),
        ("GET", "none", 404),
    ]
    assert all(line["ms"] > 0 for line in asked)
    text = "".join(process.logs)
    for word in ("private", "u1", "u5", KEY, "wrong-key", "127.0.0.1"):
        assert word not in text, word
    assert main(["replay", answer_log, str(run), "--store", "none"]) == 0
    assert capsys.readouterr().out == "1 of 1 answers have the same bits\n"


def test_sigterm_answers_what_is_open(run):
    """A request whose body is still on its way when the signal comes."""
    process = Process(run, "--store", "none").until_ready()
    try:
        address, body = httpx.URL(process.url), json.dumps({"users": ["u1"]}).encode()
        head = f"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        head += "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
        with socket.create_connection((address.host, address.port), timeout=20) as connection:
            connection.sendall(head.encode())
            # The server waits for the body.
            assert connection.recv(100).startswith(b"HTTP/1.1 100 ")
            process.process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 20
            while takes_connections(address) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert not takes_connections(address)
            # uvicorn gives everybody a tenth of a second, whatever it is told of draining.
            time.sleep(0.5)
            assert process.process.poll() is None
            connection.sendall(body)
            answer = b""
            while part := connection.recv(65536):
                answer += part
        head, _, content = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        expected = Recommender.load(run).recommend("u1")
        assert json.loads(content)["lists"] == [one.to_dict() for one in expected]
        assert process.process.wait(20) == 0
    finally:
        stopped(process)


def takes_connections(address: httpx.URL) -> bool:
    try:
        socket.create_connection((address.host, address.port), timeout=5).close()
    except OSError:
        return False
    return True


def test_a_kill_loses_nothing_that_was_answered(run, tmp_path):
    """Killed at random moments while events arrive; each is sent again until it is answered, as a sender would."""
    store, draw = tmp_path / "store.sqlite", np.random.default_rng(0)
    answered: list[int] = []
    number = 0
    for _ in range(3):
        process = Process(run, "--store", str(store), "--no-request-log").until_ready()
        try:
            timer = threading.Timer(float(draw.uniform(0.05, 0.4)), process.process.kill)
            timer.start()
            try:
                while True:
                    event = {"id": str(number), "user": "somebody", "item": f"i{number % 18}"}
                    same(process.http.post("/events", json={"events": [event]}))
                    answered.append(number)
                    number += 1
            except httpx.TransportError:
                pass
            timer.join()
            assert process.process.wait(20) == -signal.SIGKILL
        finally:
            stopped(process)
    assert len(answered) > 3
    with sqlite3.connect(store) as database:
        stored = [int(key) for (key,) in database.execute("SELECT key FROM entries ORDER BY number")]
    # One may have been stored that nobody was told of.
    assert stored[: len(answered)] == answered and len(stored) <= len(answered) + 1
    process = Process(run, "--store", str(store)).until_ready()
    try:
        history = same(process.http.get("/users/somebody/history"))["items"]
        assert [one["item"] for one in history] == [f"i{number % 18}" for number in stored]
        assert process.stop() == 0
    finally:
        stopped(process)


def test_what_was_given_wrong_is_told_before_anything_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HELLM_API_KEY", raising=False)
    short = tmp_path / "short"
    short.write_text("key")
    for options, message in (
        (["--port", "70000"], "--port must be in 0..65535, got 70000"),
        (["--host", "0.0.0.0"], "--host 0.0.0.0 lets other machines ask, so it needs a key"),
        (["--api-key-file", short], "an API key must have at least 16 letters of ASCII"),
        (["--api-key-file", tmp_path / "none"], "no such file"),
        (["--num-threads", "0"], "--num-threads must be >= 1, got 0"),
        (["--encoder", "text"], "--encoder must be of the form MODALITY=NAME, got 'text'"),
        ([], "run"),
    ):
        assert main(["serve", str(tmp_path / "no-run"), "--store", "none", *map(str, options)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("hellm: error: ") and message in error
    monkeypatch.setenv("HELLM_API_KEY", "short")
    assert main(["serve", str(tmp_path / "no-run"), "--store", "none"]) == 2
    assert "HELLM_API_KEY in the environment: an API key" in capsys.readouterr().err


def test_an_address_in_use_is_told(run, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--store", "none", "--skip-selftest", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1 port {port}: address already in use" in capsys.readouterr().err
