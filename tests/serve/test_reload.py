"""`POST /admin/reload`: another run takes over between two requests, or the one before stays and the error says why."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path

import httpx
import pytest
import torch
from served import DATA, MODELS, features, graph, same, save_run, serving

from hellm.artifact.files import EMBEDDINGS
from hellm.artifact.run_hash import run_hash
from hellm.data import DataError
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender
from hellm.serve.state import load_snapshot

pytestmark = pytest.mark.usefixtures("one_thread")
USERS = [f"u{row}" for row in range(DATA.num_users)]
ASKED = {"users": USERS[:6], "k": 8}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    return [save_run(folder / f"run{seed}", seed=seed) for seed in range(2)]


@pytest.fixture
def link(runs, tmp_path) -> Path:
    """What the server is told to serve: run 0."""
    (tmp_path / "run").symlink_to(runs[0])
    return tmp_path / "run"


def point(link: Path, run: Path) -> None:
    new = link.with_name("new")
    new.symlink_to(run)
    os.replace(new, link)


def lists_of(run: Path) -> list[dict]:
    return [one.to_dict() for one in Recommender.load(run).recommend(**ASKED)]


def metric(client, outcome: str) -> float:
    return client.app.state.metrics.reloads.labels(outcome)._value.get()


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 409, response.text
    return response.json()["errors"][0]["message"]


def test_another_run_takes_over(link, runs):
    old, new = map(lists_of, runs)
    assert old != new
    with serving(link) as client:
        assert same(client.post("/recommend", ASKED))["lists"] == old
        point(link, runs[1])
        assert same(client.post("/recommend", ASKED))["lists"] == old
        told = same(client.post("/admin/reload"))
        assert told["run_hash"] == run_hash(runs[1]) != run_hash(runs[0]) and told["skipped"] == 0
        answer = same(client.post("/recommend", ASKED))
        assert answer["lists"] == new and answer["model_version"] == told["model_version"]
        # Requests may share a call in the new run as well.
        assert client.service.snapshot.is_row_exact
        assert f'hellm_run{{model_version="{told["model_version"]}"}} 1.0' in client.get("/metrics").text
        assert (metric(client, "done"), metric(client, "failed")) == (1, 0)


def test_the_run_of_reload_from_takes_over(runs):
    with serving(runs[0], source={"reload_from": runs[1]}) as client:
        assert same(client.post("/admin/reload", {}))["run_hash"] == run_hash(runs[1])
        assert same(client.post("/recommend", ASKED))["lists"] == lists_of(runs[1])


def test_an_item_is_not_known_by_features_of_another_encoder(link, tmp_path):
    """They are as wide as those of the run that takes over, and mean something else."""
    content = Recommender.load(link).content
    other = ItemContent(
        content.features, content.neighbours, attributes=content.attributes, encoders={"text": {"encoder": "another"}}
    )
    after, store = save_run(tmp_path / "after", content=other), tmp_path / "store.sqlite"
    vector = features(1, 7)[0].tolist()
    items = [
        {"id": "both", "features": {"text": vector}, "attributes": {"colour": ["red"]}},
        {"id": "text", "features": {"text": vector}},
    ]
    with serving(link, store) as client:
        for item in items:
            assert same(client.post("/items", item))["stored"]
        point(link, after)
        assert same(client.post("/admin/reload"))["skipped"] == 1
        found = client.recommender
        assert "both" in found.item_ids and "text" not in found.item_ids
        expected = Recommender.load(after)
        expected.add_items({}, ["both"], attributes={"colour": [["red"]]})
        assert torch.equal(found.item, expected.item)
    # So it is after a start, and the encoder that they are by takes them.
    with serving(after, store) as client:
        assert torch.equal(client.recommender.item, expected.item)
    before = save_run(tmp_path / "before")
    with serving(before, store) as client:
        assert {"both", "text"} <= set(client.recommender.item_ids.ids)


def test_a_run_that_cannot_be_served_leaves_the_one_before(link, runs, tmp_path):
    broken = Path(shutil.copytree(runs[1], tmp_path / "broken"))
    (broken / EMBEDDINGS).write_bytes((broken / EMBEDDINGS).read_bytes()[:-8])
    empty = tmp_path / "empty"
    empty.mkdir()
    with serving(link) as client:
        before = same(client.post("/recommend", ASKED))
        for number, (target, why) in enumerate([(broken, EMBEDDINGS), (empty, "no run directory"), (None, EMBEDDINGS)]):
            link.unlink()
            if target is not None:
                link.symlink_to(target)
            message = refusal(client.post("/admin/reload"))
            assert message.startswith("the run cannot take over, the one before stays: ") and why in message
            assert same(client.post("/recommend", ASKED)) == before
            assert metric(client, "failed") == number + 1
            if target is None:
                link.symlink_to(runs[1])
        # A failure is no obstacle to the next.
        assert same(client.post("/admin/reload"))["run_hash"] == run_hash(runs[1])


def test_a_run_that_cannot_rank_is_not_served(tmp_path, monkeypatch):
    spoilt = graph()
    spoilt.tensors["item"][3, 2] = torch.nan
    monkeypatch.setitem(MODELS, "spoilt", lambda seed: spoilt)
    with pytest.raises(DataError, match="item keys must be finite, got NaN or infinity"):
        load_snapshot(save_run(tmp_path / "run", "spoilt"))


def test_one_reload_at_a_time(link, runs, monkeypatch):
    with serving(link) as client:
        loading, held, load = threading.Event(), threading.Event(), client.service._load

        def slow(learned):
            loading.set()
            assert held.wait(20)
            return load(learned)

        monkeypatch.setattr(client.service, "_load", slow)
        answers: list[httpx.Response] = []
        first = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{client.url}/admin/reload", timeout=60)), daemon=True
        )
        first.start()
        try:
            assert loading.wait(20)
            assert refusal(client.post("/admin/reload")) == "a reload is going on already"
            # Readers do not wait for it.
            same(client.post("/recommend", ASKED))
        finally:
            held.set()
            first.join(20)
        same(answers[0])
        same(client.post("/admin/reload"))


def test_what_is_stored_is_taken_up_by_the_new_run(link, runs, tmp_path):
    expected = Recommender.load(runs[1])
    new = features(1, 5)
    expected.add_items({"text": new}, ["n"], ["new"])
    expected.add_events(["u1", "somebody"], ["n", "i3"])
    with serving(link, tmp_path / "store.sqlite") as client:
        same(client.post("/items", {"id": "n", "title": "new", "features": {"text": new[0].tolist()}}))
        events = [{"id": "1", "user": "u1", "item": "n"}, {"id": "2", "user": "somebody", "item": "i3"}]
        same(client.post("/events", {"events": events}))
        point(link, runs[1])
        told = same(client.post("/admin/reload"))
        assert (told["revision"], told["skipped"]) == (3, 0)
        found = same(client.post("/recommend", {"users": ["u1", "somebody"], "k": 9}))
        assert found["lists"] == [one.to_dict() for one in expected.recommend(["u1", "somebody"], k=9)]


def test_what_was_learned_is_not_taken_up_again(link, runs, tmp_path):
    store, expected = tmp_path / "store.sqlite", Recommender.load(runs[1])
    expected.add_events(["u2"], ["i5"])
    asked = {"users": ["u1", "u2"]}
    with serving(link, store) as client:
        for number, (user, item) in enumerate([("u1", "i4"), ("u2", "i5")]):
            same(client.post("/events", {"events": [{"id": str(number), "user": user, "item": item}]}))
        point(link, runs[1])
        assert same(client.post("/admin/reload", {"learned": 1}))["revision"] == 2
        answer = same(client.post("/recommend", asked))
        assert answer["lists"] == [one.to_dict() for one in expected.recommend(**asked)]
    # Nor at the next start.
    with serving(link, store) as client:
        assert same(client.post("/recommend", asked)) == answer


def test_entries_that_do_not_fit_the_new_run_are_counted(link, tmp_path):
    without = save_run(tmp_path / "without", seed=1, content=False)
    with serving(link, tmp_path / "store.sqlite") as client:
        same(client.post("/items", {"id": "n", "title": "new", "features": {"text": features(1, 5)[0].tolist()}}))
        events = [{"id": str(number), "user": "u1", "item": item} for number, item in enumerate(("n", "i3"))]
        same(client.post("/events", {"events": events}))
        point(link, without)
        assert same(client.post("/admin/reload"))["skipped"] == 2
        assert same(client.get("/users/u1/history"))["items"][-1]["item"] == "i3"
        assert "hellm_entries_skipped_total 2.0" in client.get("/metrics").text.splitlines()


def test_no_request_fails_and_no_answer_is_of_two_runs(link, runs):
    """Readers ask without a pause while the runs take over from each other."""
    expected = {run_hash(run): lists_of(run) for run in runs}
    with serving(link) as client:
        stop = threading.Event()
        found: list[list[tuple[int, str, bool]]] = [[] for _ in range(4)]

        def ask(own: list) -> None:
            with httpx.Client(base_url=client.url, timeout=60) as http:
                while not stop.is_set():
                    response = http.post("/recommend", json=ASKED)
                    body = response.json()
                    whose = body.get("run_hash", "")
                    own.append((response.status_code, whose, body.get("lists") == expected.get(whose)))

        readers = [threading.Thread(target=ask, args=[own], daemon=True) for own in found]
        for reader in readers:
            reader.start()
        try:
            for turn in range(8):
                point(link, runs[(turn + 1) % 2])
                told = same(client.post("/admin/reload"))
                assert told["run_hash"] == run_hash(runs[(turn + 1) % 2])
                # Nobody is answered by the run before from here on.
                assert same(client.post("/recommend", ASKED))["run_hash"] == told["run_hash"]
        finally:
            stop.set()
            for reader in readers:
                reader.join(20)
        answers = [one for own in found for one in own]
        assert {status for status, _, _ in answers} == {200}
        assert all(whole for _, _, whole in answers)
        assert {whose for _, whose, _ in answers} == set(expected)
