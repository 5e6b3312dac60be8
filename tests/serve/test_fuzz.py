"""Hundreds of requests that are wrong somewhere, and what schemathesis makes of the OpenAPI description."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from served import features, same, save_run, serving

pytestmark = pytest.mark.usefixtures("one_thread")

KEY = "a-key-of-some-length"
EVENT = {"id": "e", "user": "u1", "item": "i1", "time": 1.5}
ITEM = {
    "id": "n",
    "title": "new",
    "description": "A thing.",
    "picture": "aGVsbG8=",
    "attributes": {"colour": ["red"]},
    "features": {"text": features(1)[0].tolist()},
}
# Every field of every body, with values that fit.
BODIES = [
    (
        "/recommend",
        {
            "users": ["u1", "u2"],
            "k": 3,
            "exclude_seen": True,
            "exclude": ["i1"],
            "candidates": ["i2", "i3"],
            "filters": {"colour": ["red"]},
            "explain": 1,
            "unknown": "error",
        },
    ),
    ("/recommend", {"histories": [["i1"], ["i2", "i3"]]}),
    ("/explain", {"item": "i1", "user": "u1", "k": 2}),
    ("/explain", {"item": "i1", "history": ["i2"]}),
    ("/events", {"events": [EVENT, EVENT | {"id": "f"}]}),
    ("/items", ITEM),
    ("/admin/reload", {"learned": 0}),
]
# Of no type that any field takes.
STRANGE = [{"x": 1}, {"x": [{}]}, [[{}]], [None], [{"x": []}]]


@pytest.fixture(scope="module")
def client(tmp_path_factory, one_thread):
    run = save_run(tmp_path_factory.mktemp("run") / "run")
    with serving(run, tmp_path_factory.mktemp("store") / "store.sqlite") as client:
        yield client


@pytest.fixture(scope="module")
def keyed(tmp_path_factory, one_thread):
    run, store = save_run(tmp_path_factory.mktemp("run") / "run"), tmp_path_factory.mktemp("store") / "store.sqlite"
    with serving(run, store, api_key=KEY) as client:
        yield client


def places(value: Any, at: tuple = ()) -> list[tuple]:
    """Where something is, in a body, itself left out."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inside for place in [(*at, key), *places(one, (*at, key))]]


def spoilt(draw: np.random.Generator, body: dict) -> tuple[dict, str]:
    """A body with one value of a type that it cannot be or one field too many, and the field that must be named."""
    body = copy.deepcopy(body)
    all_places = places(body)
    *path, key = all_places[draw.integers(len(all_places))]
    holder = body
    for step in path:
        holder = holder[step]
    if draw.random() < 0.3:
        name = f"extra{draw.integers(100)}"
        while not isinstance(holder, dict) or (path and path[0] in ("filters", "attributes", "features")):
            holder, path = body, []
        holder[name] = None
        return body, path_name([*path, name])
    holder[key] = STRANGE[draw.integers(len(STRANGE))]
    return body, path_name([*path, key])


def path_name(path: list) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def test_a_value_that_is_wrong_is_named(client):
    draw = np.random.default_rng(0)
    before = client.service.snapshot
    for _ in range(600):
        path, body = BODIES[draw.integers(len(BODIES))]
        body, field = spoilt(draw, body)
        response = client.post(path, body)
        assert response.status_code == 422, (path, body, response.text)
        named = [error["field"] or "" for error in response.json()["errors"]]
        assert any(name.startswith(field) for name in named), (path, body, field, named)
    assert client.service.snapshot is before and client.service.store.last == 0


def test_bytes_of_any_kind_are_refused(client):
    draw = np.random.default_rng(1)
    head = {"content-type": "application/json"}
    for number in range(300):
        path, body = BODIES[draw.integers(len(BODIES))]
        content = bytearray(json.dumps(body).encode())
        # Cut off, so that it is no JSON, with bytes turned into others.
        del content[draw.integers(len(content)) :]
        for place in draw.integers(max(len(content), 1), size=number % 4) if content else ():
            content[place] = draw.integers(256)
        if path == "/admin/reload" and not content:
            continue
        response = client.http.post(path, content=bytes(content), headers=head)
        assert response.status_code in (400, 422) and response.json()["errors"], (path, content, response.text)
    assert client.service.store.last == 0


def test_paths_of_any_kind_are_refused(client):
    draw = np.random.default_rng(2)
    for _ in range(200):
        name = "".join(f"%{byte:02x}" for byte in draw.integers(256, size=draw.integers(1, 40)))
        for path in (f"/items/{name}/similar", f"/users/{name}/history", f"/{name}"):
            response = client.get(path)
            assert 400 <= response.status_code < 500 and response.json()["errors"], (path, response.text)
    same(client.post("/recommend", {"users": ["u1"]}))


OPERATIONS = [
    *(("POST", path) for path in ("/recommend", "/explain", "/events", "/items", "/admin/reload")),
    *(("GET", path) for path in ("/items/{id}/similar", "/users/{id}/history")),
    *(("GET", path) for path in ("/health/live", "/health/ready", "/metrics")),
]
WITHOUT_INPUT = ("/health/live", "/health/ready", "/metrics")


def ask_as_described(
    client, method: str, path: str, mode: str, examples: int, headers: dict | None = None
) -> list[int]:
    """Statuses of requests that schemathesis makes up; each answer is checked against the description.

    With the headers of a key, schemathesis also asks without the key and with another, and wants that to be refused.
    """
    schemathesis = pytest.importorskip("schemathesis", reason='needs the extra: pip install "hellm[dev]"')
    hypothesis = pytest.importorskip("hypothesis")
    description = schemathesis.openapi.from_dict(client.app.openapi())
    description.config.update(base_url=client.url, request_timeout=120)
    # Keys that are made up beside the one given would be taken for what opened the door.
    description.config.generation.update(with_security_parameters=headers is None)
    operation = description[path][method]
    # A description cannot say which ids there are, so a request that fits it may still be refused.
    left_out = [schemathesis.checks.CHECKS.get_one("positive_data_acceptance")]
    mode = schemathesis.GenerationMode[mode]
    statuses = []

    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
    def ask(case):
        status = case.call_and_validate(excluded_checks=left_out, headers=headers).status_code
        # Among those that contradict it are some that leave out what may be left out.
        if case.meta.generation.mode == mode:
            statuses.append(status)

    ask()
    return statuses


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_are_as_described(client, method, path):
    assert max(ask_as_described(client, method, path, "POSITIVE", 30)) < 500


@pytest.mark.parametrize(("method", "path"), [one for one in OPERATIONS if one[1] not in WITHOUT_INPUT])
def test_what_contradicts_the_description_is_refused(client, method, path):
    statuses = ask_as_described(client, method, path, "NEGATIVE", 30)
    assert set(statuses) <= {400, 404, 405, 415, 422} and len(statuses) >= 10


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_a_missing_key_is_answered_as_described(keyed, method, path):
    expected = {200} if path.startswith("/health") else {401}
    assert set(ask_as_described(keyed, method, path, "POSITIVE", 3)) == expected


@pytest.mark.parametrize("headers", [{"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}], ids=["header", "bearer"])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_answers_with_the_key_are_as_described(keyed, method, path, headers):
    statuses = set(ask_as_described(keyed, method, path, "POSITIVE", 3, headers))
    assert 401 not in statuses and max(statuses) < 500
