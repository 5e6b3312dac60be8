"""Every endpoint answers what `Recommender` answers on the same state, bit for bit, whoever else asks meanwhile."""

from __future__ import annotations

import copy
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from PIL import Image
from served import DATA, MODELS, features, same, save_run, serving
from support.encoders import save_text_encoder

from hellm.recommend import Recommender
from hellm.serve.schema import RecommendRequest

pytestmark = pytest.mark.usefixtures("one_thread")
ITEMS = [f"i{row}" for row in range(DATA.num_items)]
USERS = [f"u{row}" for row in range(DATA.num_users)]


@pytest.fixture(scope="module", params=MODELS)
def run(request, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "run", request.param)


@pytest.fixture(scope="module")
def expected(run) -> Recommender:
    return Recommender.load(run)


@pytest.fixture(scope="module")
def client(run, tmp_path_factory, one_thread):
    with serving(run, tmp_path_factory.mktemp("store") / "store.sqlite") as client:
        yield client


def plain(lists) -> list[dict]:
    return [one.to_dict() for one in lists]


ASKED = [
    ({"users": ["u1"]}, {"users": ["u1"]}),
    ({"users": ["u1", "u5", "u1"], "k": 3}, {"users": ["u1", "u5", "u1"], "k": 3}),
    ({"users": ["u2"], "exclude_seen": False, "k": 18}, {"users": ["u2"], "exclude_seen": False, "k": 18}),
    ({"histories": [["i1", "i4"], [], ["i2"]], "k": 4}, {"histories": [["i1", "i4"], [], ["i2"]], "k": 4}),
    ({"histories": [[]]}, {"histories": [[]]}),
    ({"users": ["u1"], "candidates": ["i3", "i7", "i5"]}, {"users": ["u1"], "candidates": ["i3", "i7", "i5"]}),
    ({"users": ["u1"], "exclude": ["i3", "i7"]}, {"users": ["u1"], "exclude": ["i3", "i7"]}),
    ({"users": ["u1"], "filters": {"colour": ["red"]}}, {"users": ["u1"], "attributes": {"colour": ["red"]}}),
    (
        {"users": ["u1"], "filters": {"colour": ["red", "blue"]}, "candidates": ITEMS[:9], "exclude": ["i0"]},
        {"users": ["u1"], "attributes": {"colour": ["red", "blue"]}, "candidates": ITEMS[:9], "exclude": ["i0"]},
    ),
]


@pytest.mark.parametrize(("body", "arguments"), ASKED)
def test_recommend_is_that_of_the_recommender(client, expected, body, arguments):
    answer = same(client.post("/recommend", body))
    assert answer["lists"] == plain(expected.recommend(**arguments))
    assert answer["ignored"] == {}


def test_filters_leave_what_has_a_value(client, expected):
    found = {
        one.item for one in expected.recommend("u1", k=18, attributes={"colour": ["green"]}, exclude_seen=False)[0]
    }
    assert found == {item for row, item in enumerate(ITEMS) if row % 3 == 1}
    assert {one.item for one in expected.recommend("u1", k=18, exclude=["i3"], exclude_seen=False)[0]} == {*ITEMS} - {
        "i3"
    }


def test_reasons_are_those_of_the_recommender(client, expected):
    answer = same(client.post("/recommend", {"users": ["u3"], "k": 3, "explain": 2}))
    for item in answer["lists"][0]["items"]:
        assert item["reasons"] == [one.to_dict() for one in expected.explain(item["item"], user="u3", k=2)]
    answer = same(client.post("/recommend", {"histories": [["i1", "i4"]], "k": 3, "explain": 1}))
    for item in answer["lists"][0]["items"]:
        assert item["reasons"] == [one.to_dict() for one in expected.explain(item["item"], history=["i1", "i4"], k=1)]
    (popular,) = same(client.post("/recommend", {"histories": [[]], "k": 1, "explain": 1}))["lists"]
    assert popular["basis"] == "popularity" and popular["items"][0]["reasons"] == []


def test_similar_history_and_explain_are_those_of_the_recommender(client, expected):
    assert same(client.get("/items/i3/similar?k=4"))["items"] == [vars(one) for one in expected.similar_items("i3", 4)]
    assert same(client.get("/users/u3/history"))["items"] == [vars(one) for one in expected.history("u3")]
    answer = same(client.post("/explain", {"item": "i7", "user": "u3", "k": 4}))
    assert answer["reasons"] == [one.to_dict() for one in expected.explain("i7", user="u3", k=4)]
    answer = same(client.post("/explain", {"item": "i7", "history": ["i1", "i4"]}))
    assert answer["reasons"] == [one.to_dict() for one in expected.explain("i7", history=["i1", "i4"])]


def test_every_answer_says_where_it_is_from(client, run):
    from hellm.artifact.run_hash import run_hash

    for answer in (
        client.post("/recommend", {"users": ["u1"]}),
        client.get("/items/i3/similar"),
        client.get("/users/u3/history"),
        client.post("/explain", {"item": "i7", "user": "u3"}),
        client.get("/health/ready"),
    ):
        found = same(answer)
        assert found["run_hash"] == run_hash(run) and found["model_version"].endswith(run_hash(run)[:12])
        assert found["revision"] == 0 and found["data_fingerprint"] is None


def test_requests_that_come_together_have_the_bits_of_one_alone(client, expected):
    """Many clients at once, so that the model answers them in batches."""
    assert client.service.snapshot.is_row_exact
    asked = [{"users": [user]} for user in USERS] + [
        {"histories": [[ITEMS[row], ITEMS[-row - 1], ITEMS[row // 2]][: 1 + row % 3]]} for row in range(DATA.num_items)
    ]
    alone = [plain(expected.recommend(**body)) for body in asked]
    start = threading.Barrier(16)

    def ask(worker: int) -> list:
        with httpx.Client(base_url=client.url) as http:
            start.wait()
            return [
                (n, http.post("/recommend", json=asked[n]).json()) for n in range(worker, len(asked), 4) for _ in "abc"
            ]

    with ThreadPoolExecutor(16) as pool:
        answers = [one for found in pool.map(ask, [n % 4 for n in range(16)]) for one in found]
    assert all(answer["lists"] == alone[number] for number, answer in answers)
    sizes = client.app.state.metrics.batch_size
    assert sizes._sum.get() > sum(bucket.get() for bucket in sizes._buckets), "no request has shared a batch"


def test_a_request_without_merging_has_the_same_bits(run, expected, monkeypatch):
    """Where the machine does not keep bits across calls, each request is a call of its own."""
    from hellm.serve import answers, state

    bodies = [{"users": [user]} for user in USERS]
    snapshot = state.load_snapshot(run)
    assert not snapshot.is_row_exact
    from hellm.serve.schema import RecommendRequest

    calls = []
    ask = Recommender.recommend
    monkeypatch.setattr(
        Recommender, "recommend", lambda self, *args, **named: calls.append(1) or ask(self, *args, **named)
    )
    found = answers.recommend(snapshot, [RecommendRequest(**body) for body in bodies])
    assert len(calls) == len(bodies)
    monkeypatch.undo()
    assert [one["lists"] for one in found] == [plain(expected.recommend(**body)) for body in bodies]


def test_events_count_from_the_next_request_on(run, tmp_path):
    expected = Recommender.load(run)
    with serving(run, tmp_path / "store.sqlite") as client:
        before = same(client.post("/recommend", {"users": ["u7"]}))
        events = [
            {"id": "1", "user": "u1", "item": "i5"},
            {"id": "2", "user": "somebody", "item": "i3", "time": 1.5},
            {"id": "3", "user": "u1", "item": "i2"},
            {"id": "4", "user": "somebody", "item": "i6"},
        ]
        answer = same(client.post("/events", {"events": events}))
        assert (answer["stored"], answer["duplicates"], answer["revision"]) == (4, 0, 4)
        expected.add_events(["u1", "somebody", "u1", "somebody"], ["i5", "i3", "i2", "i6"])
        found = same(client.post("/recommend", {"users": ["u1", "somebody"]}))
        assert found["lists"] == plain(expected.recommend(["u1", "somebody"])) and found["revision"] == 4
        assert [one["basis"] for one in found["lists"]] == ["history", "history"]
        history = same(client.get("/users/somebody/history"))["items"]
        assert history == [vars(one) for one in expected.history("somebody")]
        assert [one["item"] for one in history] == ["i3", "i6"]
        assert not {"i3", "i6"} & {one["item"] for one in found["lists"][1]["items"]}
        assert same(client.post("/recommend", {"users": ["u7"]}))["lists"] == before["lists"]


def test_a_new_item_ranks_in_the_next_request(run, tmp_path):
    expected = Recommender.load(run)
    new = features(1, 5)
    expected.add_items({"text": new}, ["new"], ["A <b>new</b> thing"], attributes={"colour": [["red"]]})
    with serving(run, tmp_path / "store.sqlite") as client:
        body = {"id": "new", "title": "A <b>new</b> thing", "features": {"text": new[0].tolist()}}
        body["attributes"] = {"colour": ["red"], "size": ["XL"]}
        answer = same(client.post("/items", body))
        assert answer["stored"] is True and answer["placed_by"] == ["text", "colour"]
        found = same(client.post("/recommend", {"users": ["u1"], "k": 19, "exclude_seen": False}))
        assert found["lists"] == plain(expected.recommend("u1", k=19, exclude_seen=False))
        assert "new" in {one["item"] for one in found["lists"][0]["items"]}
        assert same(client.get("/items/new/similar"))["items"] == [vars(one) for one in expected.similar_items("new")]


def test_what_is_stored_is_there_after_a_restart(run, tmp_path):
    store = tmp_path / "store.sqlite"
    asked = {"users": ["u1", "somebody"], "k": 8}
    with serving(run, store) as client:
        same(client.post("/items", {"id": "n1", "title": "one", "features": {"text": features(1, 1)[0].tolist()}}))
        same(client.post("/events", {"events": [{"id": "1", "user": "somebody", "item": "n1"}]}))
        same(client.post("/items", {"id": "n2", "attributes": {"colour": ["blue"]}}))
        same(client.post("/events", {"events": [{"id": "2", "user": "u1", "item": "n2"}]}))
        before = same(client.post("/recommend", asked))
    with serving(run, store) as client:
        assert same(client.post("/recommend", asked)) == before and before["revision"] == 4


def test_a_copy_of_the_snapshot_is_never_written_to(client, expected):
    recommender = client.recommender
    other = copy.copy(recommender)
    other.add_events(["u1"], ["i5"])
    assert recommender.recommend("u1") == expected.recommend("u1") != other.recommend("u1")


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(256, size=(40, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def test_a_new_item_by_photo_and_title_is_in_the_next_answer(tmp_path):
    """Encoded, stored and ranked before it is acknowledged, whoever is asked for; nobody waits for a cache."""
    run, store = save_run(tmp_path / "run", pictures=True), tmp_path / "store.sqlite"
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    expected = Recommender.load(run)
    encoders = {"text": save_text_encoder(encoder)}
    with serving(run, store, source={"encoders": encoders}) as client:
        for number in range(3):
            item = {"id": f"new{number}", "title": "red mug"}
            files = {"picture": ("photo.png", picture(number))}
            stored = same(client.http.post("/items", data={"item": json.dumps(item)}, files=files))
            assert (stored["placed_by"], stored["revision"]) == (["text", "image"], number + 1)
            asked = {"k": DATA.num_items + number + 1, "exclude_seen": False}
            answer = same(client.post("/recommend", {"users": ["u1", "u5"], **asked}))
            assert answer["revision"] == stored["revision"]
            assert all(f"new{number}" in {one["item"] for one in found["items"]} for found in answer["lists"])
            # With the bits of a recommender that was given the same.
            features = next(client.service.store.entries(number)).features
            rows = {name: values[None] for name, values in features.items()}
            expected.add_items(rows, [item["id"]], [item["title"]])
            assert answer["lists"] == plain(expected.recommend(["u1", "u5"], **asked))


@pytest.mark.parametrize(
    "body", [{"users": ["u1"]}, {"users": ["u1", "who"]}, {"users": []}, {"users": 3}, {"k": 1.0}, []]
)
@pytest.mark.parametrize("path", ["/recommend", "/explain", "/events"])
def test_the_shortcut_answers_as_the_long_way(client, path, body):
    """FastAPI takes any kind of JSON, the shortcut the usual one; what is answered is the same."""
    answers = [
        client.http.post(path, content=json.dumps(body), headers={"content-type": kind})
        for kind in ("application/json", "application/vnd.shop+json")
    ]
    short, long = ((one.status_code, one.json(), one.headers["content-type"]) for one in answers)
    assert short == long


def test_the_shortcut_is_taken_by_what_fits(client, monkeypatch):
    taken = []
    validate = RecommendRequest.model_validate_json
    monkeypatch.setattr(RecommendRequest, "model_validate_json", lambda body: taken.append(body) or validate(body))
    same(client.post("/recommend", {"users": ["u1"]}))
    assert len(taken) == 1
    counted = 'hellm_requests_total{method="POST",route="/recommend",status="200"}'
    before = float(client.get("/metrics").text.split(counted)[1].split()[0])
    same(client.post("/recommend", {"users": ["u1"]}))
    assert float(client.get("/metrics").text.split(counted)[1].split()[0]) == before + 1
