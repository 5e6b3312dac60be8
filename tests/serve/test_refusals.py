"""What is refused, how it is said, and that nothing else happens."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
import time
from dataclasses import replace

import httpx
import pytest
import torch
from served import DATA, features, same, save_run, serving

from hellm.recommend import Recommender

pytestmark = pytest.mark.usefixtures("one_thread")
KEY = "a-key-of-some-length"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "run")


@pytest.fixture(scope="module")
def client(run, tmp_path_factory, one_thread):
    with serving(run, tmp_path_factory.mktemp("store") / "store.sqlite", max_body=100_000, body_timeout=0.5) as client:
        yield client


def refused(response: httpx.Response, status: int) -> dict:
    """The first thing that is wrong."""
    assert response.status_code == status, response.text
    errors = response.json()["errors"]
    assert errors and all(set(one) == {"field", "message", "nearest"} for one in errors)
    return errors[0]


LONG = "x" * 513
WRONG = [
    ("/recommend", {}, None, "give either users or histories, got neither"),
    ("/recommend", {"users": ["u1"], "histories": [[]]}, None, "give either users or histories, got both"),
    ("/recommend", {"users": []}, "users", "at least 1"),
    ("/recommend", {"users": "u1"}, "users", "valid list"),
    ("/recommend", {"users": [1]}, "users[0]", "valid string"),
    ("/recommend", {"users": [""]}, "users[0]", "at least 1 character"),
    ("/recommend", {"users": [LONG]}, "users[0]", "at most 512"),
    ("/recommend", {"users": ["u1"] * 257}, "users", "at most 256"),
    ("/recommend", {"histories": [["i1"] * 1001]}, "histories[0]", "at most 1000"),
    ("/recommend", {"users": ["u1"], "k": 0}, "k", "greater than or equal to 1"),
    ("/recommend", {"users": ["u1"], "k": 501}, "k", "less than or equal to 500"),
    ("/recommend", {"users": ["u1"], "k": 19}, "k", r"must be in \[1, 18\] \(the number of items\), got 19"),
    ("/recommend", {"users": ["u1"], "k": "3"}, "k", "valid integer"),
    ("/recommend", {"users": ["u1"], "k": 1.5}, "k", "valid integer"),
    ("/recommend", {"users": ["u1"], "k": True}, "k", "valid integer"),
    ("/recommend", {"users": ["u1"], "exclude_seen": "no"}, "exclude_seen", "valid boolean"),
    ("/recommend", {"users": ["u1"], "foo": 1}, "foo", "not permitted"),
    ("/recommend", {"users": ["u1"], "unknown": "maybe"}, "unknown", "'error' or 'ignore'"),
    ("/recommend", {"users": ["u1"] * 256, "k": 10, "explain": 5}, None, "lists times k times explain must be at most"),
    ("/recommend", {"users": ["u1", "u111"]}, "users[1]", "unknown user 'u111' among the 36 users of the run"),
    ("/recommend", {"histories": [[], ["i1", "i99"]]}, "histories[1][1]", "unknown item 'i99' among the 18 items"),
    ("/recommend", {"users": ["u1"], "candidates": ["i99"]}, "candidates[0]", "unknown item 'i99'"),
    ("/recommend", {"users": ["u1"], "candidates": []}, "candidates", "at least 1"),
    ("/recommend", {"users": ["u1"], "exclude": ["i1", "i99"]}, "exclude[1]", "unknown item 'i99'"),
    ("/recommend", {"users": ["u1"], "filters": {"size": ["XL"]}}, "filters", r"attributes of the run \(colour\)"),
    ("/recommend", {"users": ["u1"], "filters": {"colour": ["rad"]}}, "filters.colour", "unknown value 'rad'"),
    ("/recommend", {"users": ["u1"], "filters": {"colour": []}}, "filters.colour", "at least 1"),
    ("/recommend", [], None, "valid dictionary"),
    ("/recommend", None, None, "Field required"),
    ("/explain", {"item": "i1"}, None, "give either user or history, got neither"),
    ("/explain", {"item": "i99", "user": "u1"}, "item", "unknown item 'i99'"),
    ("/explain", {"item": "i1", "user": "u99"}, "user", "unknown user 'u99'"),
    ("/explain", {"item": "i1", "history": ["i1", "i99"]}, "history[1]", "unknown item 'i99'"),
    ("/explain", {"item": "i1", "user": "u1", "k": 0}, "k", "greater than or equal to 1"),
    ("/events", {"events": []}, "events", "at least 1"),
    ("/events", {"events": [{"user": "u1", "item": "i1"}]}, "events[0].id", "Field required"),
    ("/events", {"events": [{"id": "1", "user": "u1", "item": "i99"}]}, "events[0].item", "unknown item 'i99'"),
    ("/events", {"events": [{"id": "1", "user": "u1", "item": "i1", "time": -1}]}, "events[0].time", "greater than"),
    ("/items", {"title": "no id"}, "id", "Field required"),
    ("/items", {"id": "n"}, None, r"something that the run knows items by \(text, colour\)"),
    ("/items", {"id": "n", "features": {"text": [1.0]}}, "features.text", "must be 8 finite numbers, got 1"),
    ("/items", {"id": "n", "features": {"text": [1e39] * 8}}, "features.text", "must be 8 finite numbers"),
    ("/items", {"id": "n", "features": {"video": [1.0]}}, "features.video", r"features of the run \(text\)"),
    ("/items", {"id": "n", "features": {"text": [0.0] * 8}}, None, "something that the run knows items by"),
    ("/items", {"id": "n", "attributes": {"colour": ["mauve"]}}, None, "something that the run knows items by"),
    ("/items", {"id": "n", "picture": "%%%"}, "picture", "must be base64"),
    ("/items", {"id": "n", "picture": "aGVsbG8="}, "picture", "the run does not know pictures"),
    ("/items", {"id": "i1", "attributes": {"colour": ["red"]}}, "id", "item 'i1' is there already"),
    ("/admin/reload", {"learned": -1}, "learned", "greater than or equal to 0"),
    ("/admin/reload", {"path": "/etc"}, "path", "not permitted"),
]


@pytest.mark.parametrize(("path", "body", "field", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_what_is_wrong_is_named(client, path, body, field, message):
    before = client.service.snapshot
    error = refused(client.post(path, body), 409 if "there already" in message else 422)
    assert error["field"] == field
    assert re.search(message, error["message"]), error
    assert client.service.snapshot is before


def test_the_nearest_ids_are_named(client):
    assert "u11" in refused(client.post("/recommend", {"users": ["u111"]}), 422)["nearest"]
    assert "i9" in refused(client.get("/items/i99/similar"), 404)["nearest"]
    assert (
        "red" in refused(client.post("/recommend", {"users": ["u1"], "filters": {"colour": ["rad"]}}), 422)["nearest"]
    )
    assert refused(client.get("/users/zzz/history"), 404)["nearest"] == []


def test_paths_and_methods(client):
    refused(client.get("/nothing"), 404)
    refused(client.get("/recommend"), 405)
    refused(client.get("/items/i1/similar?k=0"), 422)
    assert refused(client.get("/items/i1/similar?k=18"), 422)["field"] == "k"
    assert client.get("/docs").status_code == client.get("/redoc").status_code == 404
    # An id may hold anything that a path can.
    assert refused(client.get("/items/..%2f..%2fetc%2fpasswd/similar"), 404)
    assert refused(client.get("/users/%00/history"), 404)["field"] == "id"


def test_bodies_that_are_no_json(client):
    head = {"content-type": "application/json"}
    for body in (b"", b"{", b'{"users": ["\\ud800"]}', b"nul", b'{"users": NaN}', b"1e999"):
        refused(client.http.post("/recommend", content=body, headers=head), 422)
    refused(client.http.post("/recommend", content=b'{"\xff": 1}', headers=head), 400)
    # How deep the parser gets depends on the stack.
    deep = client.http.post("/recommend", content=b"[" * 50_000, headers=head)
    refused(deep, 400 if deep.status_code == 400 else 422)
    refused(client.http.post("/recommend", content=b'{"users": ["u1"]}', headers={"content-type": "text/plain"}), 422)
    refused(client.http.post("/items", content=b"{}", headers={"content-type": "text/plain"}), 415)
    refused(client.http.post("/items", content=b"x", headers={"content-type": "multipart/form-data"}), 400)
    refused(client.http.post("/items", files={"picture": b"x"}), 422)
    refused(client.http.post("/items", data={"item": "{}"}, files={"picture": b"x"}), 422)


def test_bodies_that_are_too_large(client):
    body = json.dumps({"users": ["u1"], "exclude": ["i1"] * 50_000}).encode()
    assert "at most 100000 bytes" in refused(client.http.post("/recommend", content=body), 413)["message"]

    def parts():
        for _ in range(100):
            yield b"x" * 10_000

    # Sent in parts, whose sum nobody says at first. The server answers before all has been sent.
    with contextlib.suppress(httpx.WriteError):
        refused(client.http.post("/recommend", content=parts()), 413)
    address = httpx.URL(client.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000000000000\r\n\r\n")
        assert b" 413 " in connection.recv(100)


def test_a_slow_client_is_given_up(client):
    address = httpx.URL(client.url)
    with socket.create_connection((address.host, address.port)) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        started = time.monotonic()
        assert b" 408 " in connection.recv(100)
        assert time.monotonic() - started >= 0.4
    same(client.post("/recommend", {"users": ["u1"]}))


def test_a_client_that_leaves_is_no_error(client):
    address = httpx.URL(client.url)
    for sent in (
        b"POST /recommend HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{",
        b"GET /heal",
        b"\0\0\0",
    ):
        with socket.create_connection((address.host, address.port)) as connection:
            connection.sendall(sent)
    same(client.post("/recommend", {"users": ["u1"]}))


def test_unknown_ids_can_be_ignored(client):
    body = {"users": ["u1", "who"], "exclude": ["i99"], "candidates": ["i3", "i98", "i97", "i5"], "unknown": "ignore"}
    answer = same(client.post("/recommend", body))
    assert answer["ignored"] == {"users": 1, "exclude": 1, "candidates": 2}
    first, second = answer["lists"]
    (popular,) = client.recommender.recommend(histories=[[]], candidates=["i3", "i5"])
    assert (second["user"], second["basis"]) == ("who", "popularity")
    assert second["items"] == [vars(one) for one in popular.items]
    assert first["items"] == [vars(one) for one in client.recommender.recommend("u1", candidates=["i3", "i5"])[0]]
    body = {"histories": [["i1", "nil"], ["nil"]], "unknown": "ignore", "candidates": ["nil"]}
    answer = same(client.post("/recommend", body))
    assert answer["ignored"] == {"histories": 2, "candidates": 1} and [one["items"] for one in answer["lists"]] == [
        [],
        [],
    ]


def test_events_and_items_are_taken_once(run, tmp_path):
    with serving(run, tmp_path / "store.sqlite") as client:
        event = {"id": "1", "user": "u1", "item": "i5"}
        assert same(client.post("/events", {"events": [event, event]}))["duplicates"] == 1
        assert same(client.post("/events", {"events": [event]})) | {"stored": 0, "duplicates": 1} == same(
            client.post("/events", {"events": [event]})
        )
        other = refused(client.post("/events", {"events": [event | {"item": "i4"}]}), 409)
        assert other["field"] == "events[0]" and "is another" in other["message"]
        item = {"id": "n", "title": "new", "features": {"text": features(1)[0].tolist()}}
        assert same(client.post("/items", item))["stored"] is True
        assert same(client.post("/items", item))["stored"] is False
        refused(client.post("/items", item | {"title": "another"}), 409)
        refused(client.post("/items", item | {"features": {"text": features(1, 3)[0].tolist()}}), 409)
        history = same(client.get("/users/u1/history"))["items"]
        assert [one["item"] for one in history].count("i5") == 1 and client.service.store.last == 2


def test_a_score_that_is_not_finite_is_refused_by_item_and_alone(tmp_path):
    """JSON has no such number. Others that have come at the same time get their answers."""
    from hellm.serve.answers import recommend
    from hellm.serve.schema import RecommendRequest

    path = save_run(tmp_path / "run")
    recommender = Recommender.load(path)
    recommender.model.user[1] = torch.nan
    spoilt = recommender.save(tmp_path / "spoilt")
    with serving(spoilt) as client:
        error = refused(client.post("/recommend", {"users": ["u1"]}), 422)
        assert re.search(r"score of item 'i\d+' must be finite, got nan", error["message"])
        assert client.post("/recommend", {"users": ["u2"]}).status_code == 200
        snapshot = replace(client.service.snapshot, is_row_exact=True)
        asked = [RecommendRequest(users=[user]) for user in ("u0", "u1", "u2")]
        first, second, third = recommend(snapshot, asked)
        assert isinstance(second, ValueError)
        assert [first] == recommend(snapshot, asked[:1]) and [third] == recommend(snapshot, asked[2:])


def test_a_refused_event_keeps_the_others_out(run, tmp_path):
    with serving(run, tmp_path / "store.sqlite") as client:
        events = [{"id": str(n), "user": "u1", "item": item} for n, item in enumerate(["i5", "i99", "i3"])]
        refused(client.post("/events", {"events": events}), 422)
        assert client.service.store.last == 0 and client.service.snapshot.revision == 0


def test_a_run_without_content_takes_no_items(tmp_path):
    with serving(save_run(tmp_path / "run", content=False), tmp_path / "store.sqlite") as client:
        error = refused(client.post("/items", {"id": "n", "title": "new"}), 422)
        assert error["message"] == "the run cannot take new items: its data had no features of items"
        refused(client.post("/recommend", {"users": ["u1"], "filters": {"colour": ["red"]}}), 422)


def test_a_server_without_a_store_takes_nothing(run):
    with serving(run) as client:
        error = refused(client.post("/events", {"events": [{"id": "1", "user": "u1", "item": "i5"}]}), 409)
        assert error["message"] == "this server keeps nothing: it was started without a store"


def test_the_key_is_asked_for(run):
    basic = base64.b64encode(f"anybody:{KEY}".encode()).decode()
    with serving(run, api_key=KEY) as client:
        asked = {"users": ["u1"]}
        for headers in (
            {},
            {"x-api-key": "wrong"},
            {"x-api-key": KEY[:-1]},
            {"authorization": f"Bearer {KEY}x"},
            {"authorization": f"Basic {KEY}"},
            {"authorization": "Basic é".encode()},
            {"authorization": KEY},
        ):
            response = client.post("/recommend", asked, headers=headers)
            assert "needs the API key" in refused(response, 401)["message"]
            assert response.headers["www-authenticate"].startswith("Basic ")
        for headers in ({"x-api-key": KEY}, {"authorization": f"Bearer {KEY}"}, {"authorization": f"Basic {basic}"}):
            same(client.post("/recommend", asked, headers=headers))
        for path in ("/metrics", "/openapi.json", "/nothing"):
            refused(client.get(path), 401)
        assert client.get("/health/live").status_code == client.get("/health/ready").status_code == 200
        # Refused before the body is looked at.
        refused(client.http.post("/recommend", content=b"{"), 401)


def test_the_key_is_compared_in_constant_time(monkeypatch):
    from starlette.datastructures import Headers

    from hellm.serve import guard
    from hellm.serve.settings import Settings

    compared = []
    monkeypatch.setattr(guard.hmac, "compare_digest", lambda *pair: compared.append(pair) or False)
    asked = guard.Guard(None, Settings(api_key=KEY), None, None)
    assert not asked._has_key(Headers({"x-api-key": KEY, "authorization": f"Bearer {KEY}"}))
    assert compared == [(KEY.encode(), KEY.encode())] * 2


def test_other_hosts_and_pages_of_other_sites_are_refused(run):
    with serving(run, allowed_hosts=("127.0.0.1", "shop.example")) as client:
        asked = {"users": ["u1"]}
        for host in ("evil.example", "evil.example:80", ""):
            assert refused(client.post("/recommend", asked, headers={"host": host}), 403)["field"] == "host"
        same(client.post("/recommend", asked, headers={"host": "SHOP.example:8000"}))
        for headers in (
            {"origin": "http://evil.example"},
            {"origin": "null"},
            {"origin": client.url.replace("127", "128")},
            {"sec-fetch-site": "cross-site"},
        ):
            assert refused(client.post("/recommend", asked, headers=headers), 403)["field"] == "origin"
        same(client.post("/recommend", asked, headers={"origin": client.url, "sec-fetch-site": "same-origin"}))


def test_overload_is_told_and_passes(run):
    """While the model is held up, the queue fills; what is over is told 503, the rest is answered afterwards."""
    with serving(run, max_queue=4, max_batch=2, timeout=20.0) as client:
        held, asked = threading.Event(), threading.Event()
        answer = client.service._readers._work

        def slow(jobs):
            asked.set()
            held.wait(20)
            return answer(jobs)

        client.service._readers._work = slow
        responses = []
        threads = [
            threading.Thread(
                target=lambda: responses.append(httpx.post(f"{client.url}/recommend", json={"users": ["u1"]}))
            )
            for _ in range(12)
        ]
        for thread in threads:
            thread.start()
        assert asked.wait(10)
        stop = time.monotonic() + 10
        while sum(one.status_code == 503 for one in responses) < 6 and time.monotonic() < stop:
            time.sleep(0.01)
        refused_at_once = [one for one in responses if one.status_code == 503]
        assert len(refused_at_once) == len(responses) >= 6
        assert all(one.headers["retry-after"] == "1" for one in refused_at_once)
        assert "requests are waiting already" in refused(refused_at_once[0], 503)["message"]
        held.set()
        for thread in threads:
            thread.join()
        assert {one.status_code for one in responses} == {200, 503}
        same(client.post("/recommend", {"users": ["u1"]}))


def test_an_answer_that_takes_too_long_is_given_up(run):
    with serving(run, timeout=0.2) as client:
        held, answer = threading.Event(), client.service._readers._work
        client.service._readers._work = lambda jobs: held.wait(20) and answer(jobs)
        response = client.post("/recommend", {"users": ["u1"]})
        assert "no answer within 0.2 seconds" in refused(response, 503)["message"] and "retry-after" in response.headers
        held.set()
        client.service._readers._work = answer
        same(client.post("/recommend", {"users": ["u1"]}))


def test_an_error_inside_tells_nothing(run, monkeypatch, caplog):
    from hellm.serve import answers

    with serving(run) as client:
        monkeypatch.setattr(answers, "_lists", lambda *args: 1 / 0)
        error = refused(client.post("/recommend", {"users": ["u1"]}), 500)
        assert error == {"field": None, "message": "an error inside hellm; its log says more", "nearest": []}
        monkeypatch.undo()
        same(client.post("/recommend", {"users": ["u1"]}))


def test_nothing_is_answered_before_the_selftest(run, monkeypatch):
    from served import Client

    from hellm.serve import health
    from hellm.serve.readiness import NotReadyError
    from hellm.serve.settings import Settings

    checked = threading.Event()
    monkeypatch.setattr(health, "check_operators", lambda: checked.wait(20))
    client = Client(run, None, Settings(), {})
    try:
        assert client.get("/health/live").json() == {"status": "live"}
        response = client.get("/health/ready")
        assert (response.status_code, response.json()["status"]) == (503, "checking the operators")
        early = client.post("/recommend", {"users": ["u1"]})
        assert "not ready: checking the operators" in refused(early, 503)["message"] and early.headers["retry-after"]
        checked.set()
        same(client.until_ready().post("/recommend", {"users": ["u1"]}))
    finally:
        checked.set()
        client.close()

    def failing():
        raise NotReadyError("the self-test of the operators must pass")

    monkeypatch.setattr(health, "check_operators", failing)
    client = Client(run, None, Settings(), {})
    try:
        while "not able" not in (state := client.get("/health/ready").json()["status"]):
            time.sleep(0.005)
        assert state == "not able to serve: the self-test of the operators must pass"
        assert (
            client.get("/health/ready").status_code == client.post("/recommend", {"users": ["u1"]}).status_code == 503
        )
    finally:
        client.close()


def test_a_failing_selftest_is_told_by_operator(monkeypatch):
    from hellm.serve import readiness

    row = {"op": "knn", "backend": "native", "worst_error": 0.5, "budget": 1e-5, "ok": False}
    monkeypatch.setattr(readiness, "selftest", lambda: [row | {"ok": True}, row])
    with pytest.raises(readiness.NotReadyError, match=r"knn of backend native does not \(error 0.5, budget 1e-05\)"):
        readiness.check_operators()
    monkeypatch.setattr(readiness, "selftest", lambda: [row | {"ok": True}])
    readiness.check_operators()


def test_the_openapi_description_names_what_there_is(client):
    found = same(client.get("/openapi.json"))
    assert set(found["paths"]) == {
        *("/recommend", "/explain", "/events", "/items", "/admin/reload"),
        *("/items/{id}/similar", "/users/{id}/history", "/health/live", "/health/ready", "/metrics"),
    }
    assert {"RecommendRequest", "ItemRequest", "Errors"} <= set(found["components"]["schemas"])
    told = found["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert list(told) == ["text/plain"] == [client.get("/metrics").headers["content-type"].partition(";")[0]]


def test_the_openapi_description_asks_for_the_key_where_there_is_one(client, run):
    ways = {"header": {"x-api-key": KEY}, "bearer": {"authorization": f"Bearer {KEY}"}}
    ways["basic"] = {"authorization": "Basic " + base64.b64encode(f"anybody:{KEY}".encode()).decode()}
    open_to_all = client.app.openapi()
    schemes = open_to_all["components"]["securitySchemes"]
    assert schemes["header"] == {"type": "apiKey", "in": "header", "name": "X-API-Key"}
    assert [schemes[name]["scheme"] for name in ("bearer", "basic")] == ["bearer", "basic"]
    assert "security" not in open_to_all
    with serving(run, api_key=KEY) as keyed:
        for headers in ways.values():
            found = same(keyed.get("/openapi.json", headers=headers))
        assert found["components"]["securitySchemes"] == schemes and found["security"] == [{name: []} for name in ways]
        own = {path: one["get"]["security"] for path, one in found["paths"].items() if "security" in one.get("get", {})}
        assert own == {"/health/live": [], "/health/ready": []}


def test_metrics_count(run, tmp_path):
    with serving(run, tmp_path / "store.sqlite") as client:
        same(client.post("/recommend", {"users": ["u1", "u2"]}))
        refused(client.get("/users/who/history"), 404)
        same(client.post("/events", {"events": [{"id": "1", "user": "somebody", "item": "i5"}]}))
        text = client.get("/metrics").text
        version = client.service.snapshot.model_version
        for line in (
            'hellm_requests_total{method="POST",route="/recommend",status="200"} 1.0',
            'hellm_requests_total{method="GET",route="/users/{id}/history",status="404"} 1.0',
            'hellm_lists_total{basis="user"} 2.0',
            "hellm_events_total 1.0",
            f"hellm_users {DATA.num_users + 1}.0",
            f"hellm_items {DATA.num_items}.0",
            "hellm_revision 1.0",
            f'hellm_run{{model_version="{version}"}} 1.0',
            "hellm_waiting 0.0",
        ):
            assert line in text.splitlines(), line
        assert "somebody" not in text and "who" not in text
