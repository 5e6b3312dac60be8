"""Answers computed again from run and store: the same bits, or the reason why not."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest
import torch
from served import MODELS, features, same, save_run, serving

from hellm.artifact.run_hash import run_hash
from hellm.cli import main
from hellm.data import DataError
from hellm.serve.answers import QUESTIONS
from hellm.serve.replay import replay
from hellm.serve.store import Entry, Store

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=MODELS)
def any_run(request, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("run") / "run", request.param)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [save_run(folder / f"run{seed}", seed=seed) for seed in range(2)]


def item(name: str, seed: int) -> dict:
    return {"id": name, "title": f"thing {name}", "features": {"text": features(1, seed)[0].tolist()}}


def ask_all(client) -> list[dict]:
    """Every question, for users and histories that events and new items change."""
    newest = client.recommender.item_ids.ids[-1]
    return [
        same(client.post("/recommend", {"users": ["u1", "u2"], "k": 8, "explain": 1})),
        same(client.post("/recommend", {"histories": [["i1", newest], []], "filters": {"colour": ["red"]}})),
        same(client.post("/recommend", {"users": ["u1", "who"], "unknown": "ignore", "exclude": ["i3"]})),
        same(client.get(f"/items/{newest}/similar?k=4")),
        same(client.get("/users/u1/history")),
        same(client.post("/explain", {"item": "i7", "user": "u1"})),
    ]


def live(client) -> list[dict]:
    """Events and items in several goes, with questions between them."""
    answers = ask_all(client)
    same(client.post("/events", {"events": [{"id": "1", "user": "u1", "item": "i5", "time": 1.5}]}))
    answers += ask_all(client)
    same(client.post("/items", item("n1", 1) | {"attributes": {"colour": ["red"]}}))
    same(client.post("/events", {"events": [{"id": "2", "user": "somebody", "item": "n1"}]}))
    same(client.post("/events", {"events": [{"id": str(n), "user": "u1", "item": f"i{n}"} for n in range(3, 6)]}))
    answers += ask_all(client)
    same(client.post("/items", item("n2", 2)))
    return answers + ask_all(client)


def verdicts(outcomes) -> set[tuple[str, str]]:
    return {(one.verdict, one.reason) for one in outcomes}


def test_the_same_bits_after_events_and_items(any_run, tmp_path):
    log, store = tmp_path / "answers.jsonl", tmp_path / "store.sqlite"
    with serving(any_run, store, answer_log=log) as client:
        answers = live(client)
        # While the server goes on.
        outcomes = replay(log, [any_run], store)
        later = same(client.post("/events", {"events": [{"id": "9", "user": "u1", "item": "i9"}]}))
    assert verdicts(outcomes) == {("same", "")} and [one.answer for one in outcomes] == answers
    assert [one.place for one in outcomes] == [*range(1, 25)]
    assert sorted({one["revision"] for one in answers}) == [0, 1, 6, 7] and later["revision"] == 8
    assert len({one["state"] for one in answers}) == 4 and answers[0]["state"] == run_hash(any_run)
    # After it has ended, and in any order.
    lines = log.read_text().splitlines()
    log.write_text("\n".join(reversed(lines)))
    again = replay(log, [any_run], store)
    assert verdicts(again) == {("same", "")} and [one.answer for one in again] == answers[::-1]


def test_the_same_bits_after_reloads_and_restarts(runs, tmp_path):
    log, store, link = tmp_path / "answers.jsonl", tmp_path / "store.sqlite", tmp_path / "run"
    link.symlink_to(runs[0])
    with serving(link, store, answer_log=log) as client:
        answers = live(client)
        link.unlink()
        link.symlink_to(runs[1])
        same(client.post("/admin/reload"))
        answers += ask_all(client)
        # The same run, which is now told to have been trained with the first event.
        told = same(client.post("/admin/reload", {"learned": 1}))
        answers += ask_all(client)
        same(client.post("/events", {"events": [{"id": "9", "user": "u2", "item": "i9"}]}))
        answers += ask_all(client)
    with serving(link, store, answer_log=log) as client:
        answers += ask_all(client)
    assert told["learned"] == 1 and answers[-1]["learned"] == 1 and answers[0]["learned"] == 0
    assert answers[-1] == answers[-7] and len({one["state"] for one in answers}) == 7
    outcomes = replay(log, runs, store)
    assert verdicts(outcomes) == {("same", "")} and [one.answer for one in outcomes] == answers
    alone = replay(log, runs[1:], store)
    assert [one.verdict for one in alone] == ["impossible"] * 24 + ["same"] * 24
    hashes = [run_hash(run) for run in runs]
    assert {one.reason for one in alone[:24]} == {f"it is of run {hashes[0]}, and {runs[1]} is {hashes[1]}"}


def test_the_same_bits_whatever_came_together(runs, tmp_path):
    """Events, items, questions and reloads of many clients at once, so that writes and answers share their turns."""
    log, store, link = tmp_path / "answers.jsonl", tmp_path / "store.sqlite", tmp_path / "run"
    link.symlink_to(runs[0])
    with serving(link, store, answer_log=log) as client:

        def ask(worker: int) -> list[str]:
            draw, states = np.random.default_rng(worker), []
            with httpx.Client(base_url=client.url, timeout=60) as http:
                for turn in range(12):
                    user, bought = f"u{draw.integers(40)}", f"i{draw.integers(18)}"
                    if worker == 0 and turn % 4 == 1:
                        new = tmp_path / "new"
                        new.symlink_to(runs[turn % 8 // 4])
                        os.replace(new, link)
                        same(http.post("/admin/reload"))
                    elif draw.random() < 0.15:
                        same(http.post("/items", json=item(f"n{worker}-{turn}", worker * 100 + turn)))
                    event = {"id": f"{worker}-{turn}", "user": user, "item": bought}
                    same(http.post("/events", json={"events": [event]}))
                    asked = {"users": [user]} if turn % 2 else {"histories": [[bought, "i1"]]}
                    states.append(same(http.post("/recommend", json=asked | {"k": 6}))["state"])
            return states

        with ThreadPoolExecutor(6) as pool:
            states = [state for found in pool.map(ask, range(6)) for state in found]
    outcomes = replay(log, runs, store)
    assert len(outcomes) == 72 and len(set(states)) > 20
    assert verdicts(outcomes) == {("same", "")}
    assert {one.answer["run_hash"] for one in outcomes} == {run_hash(run) for run in runs}


def test_entries_that_did_not_fit_a_run_are_left_out_again(runs, tmp_path):
    log, store, link = tmp_path / "answers.jsonl", tmp_path / "store.sqlite", tmp_path / "run"
    without = save_run(tmp_path / "without", seed=1, content=False)
    link.symlink_to(runs[0])
    with serving(link, store) as client:
        live(client)
    link.unlink()
    link.symlink_to(without)
    with serving(link, store, answer_log=log) as client:
        assert client.service.skipped == 3
        same(client.post("/recommend", {"users": ["u1", "u2"]}))
    assert verdicts(replay(log, [without], store)) == {("same", "")}


@pytest.fixture(scope="module")
def logged(runs, tmp_path_factory, one_thread):
    """Log and store of a server that has ended, and what it answered."""
    folder = tmp_path_factory.mktemp("logged")
    with serving(runs[0], folder / "store.sqlite", answer_log=folder / "answers.jsonl") as client:
        answers = live(client)
    return folder / "answers.jsonl", folder / "store.sqlite", answers


def last(log, run, store):
    return replay(log, [run], store)[-1]


def test_a_state_that_cannot_be_reached_is_told(runs, logged, tmp_path):
    log, store, answers = logged
    outcomes = replay(log, runs[:1], None)
    assert [one.verdict for one in outcomes] == ["same"] * 6 + ["impossible"] * 18
    assert outcomes[6].reason == "events and items up to revision 1 were taken up, and no store is given"
    missing = tmp_path / "missing.sqlite"
    assert last(log, runs[0], missing).reason.endswith(
        f"up to revision 7 were taken up, and there is no store {missing}"
    )
    assert not missing.exists()
    copied = tmp_path / "copied.sqlite"
    shutil.copy(store, copied)
    with sqlite3.connect(copied) as database:
        database.execute("DELETE FROM entries WHERE number = 7")
    outcomes = replay(log, runs[:1], copied)
    assert [one.verdict for one in outcomes] == ["same"] * 18 + ["impossible"] * 6
    assert outcomes[-1].reason == f"there is no entry 7 in {copied}"
    with sqlite3.connect(copied) as database:
        body = json.dumps({"user": "u1", "item": "i6", "time": 1.5})
        database.execute("UPDATE entries SET body = ? WHERE number = 1", [body])
    outcomes = replay(log, runs[:1], copied)
    assert [one.verdict for one in outcomes] == ["same"] * 6 + ["impossible"] * 18
    assert "the entries are not those that the server had" in outcomes[6].reason
    other = tmp_path / "other.sqlite"
    opened = Store(other)
    opened.append([Entry("event", "1", {"user": "u3", "item": "i1", "time": None})])
    opened.close()
    reason = replay(log, runs[:1], other)[6].reason
    assert f"the state was {answers[6]['state']}, and run and store up to revision 1 give " in reason
    (tmp_path / "no.sqlite").write_bytes(b"no database, but long enough to be taken for one" * 100)
    with pytest.raises(DataError, match="not a log of hellm serve"):
        replay(log, runs[:1], tmp_path / "no.sqlite")


def test_other_bits_are_told_with_what_has_changed(runs, logged, tmp_path, monkeypatch):
    log, store, _ = logged
    asked, ask = [], QUESTIONS["recommend"]
    counted = lambda *given: asked.append(torch.get_num_threads()) or ask[1](*given)  # noqa: E731
    monkeypatch.setitem(QUESTIONS, "recommend", (ask[0], counted))
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    lines[0]["sha256"] = "0" * 64
    lines[0]["computed_by"] |= {"torch": "1.0", "threads": 3}
    lines[1]["sha256"] = "0" * 64
    changed = tmp_path / "answers.jsonl"
    changed.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    threads = torch.get_num_threads()
    outcomes = replay(changed, runs[:1], store)
    assert torch.get_num_threads() == threads
    assert [one.verdict for one in outcomes] == ["different"] * 2 + ["same"] * 22
    # The threads are those of then: bits may depend on them.
    assert sorted(asked) == [1] * 11 + [3]
    assert outcomes[0].reason == f"the answer has another SHA-256; torch 1.0 then and {torch.__version__} now"
    assert outcomes[1].reason.endswith("; nothing is known to differ in how it is computed")


def test_answers_that_a_client_has_kept(runs, logged, tmp_path):
    _, store, answers = logged
    kept = [
        {"question": "recommend", "request": {"users": ["u1", "u2"], "k": 8, "explain": 1}, "answer": answers[0]},
        {"question": "history", "request": {"id": "u1"}, "answer": answers[10]},
    ]
    file = tmp_path / "kept.json"
    file.write_text(json.dumps(kept))
    assert verdicts(replay(file, runs[:1], store)) == {("same", "")}
    file.write_text(json.dumps(kept[1]))
    assert verdicts(replay(file, runs[:1], store)) == {("same", "")}
    score = kept[0]["answer"]["lists"][1]["items"][2]["score"]
    # The next number that there is.
    other = float(torch.nextafter(torch.tensor(score), torch.tensor(torch.inf)))
    kept[0]["answer"] = json.loads(json.dumps(answers[0]))
    kept[0]["answer"]["lists"][1]["items"][2]["score"] = other
    kept[1]["answer"] = answers[10] | {"items": answers[10]["items"][1:]}
    file.write_text(json.dumps(kept))
    first, second = replay(file, runs[:1], store)
    assert first.verdict == second.verdict == "different"
    assert first.reason.startswith(f"lists[1].items[2].score was {other} and is {score}; ")
    assert second.reason.startswith("items was [{")


def test_lines_that_hold_no_answer_are_named(runs, logged, tmp_path):
    log, store, _ = logged
    good = json.loads(log.read_text().splitlines()[0])
    wrong = [
        ("{", "it is no JSON object"),
        ("[]", "it is no JSON object"),
        (good | {"question": "why"}, "question must be one of recommend, similar, history, explain, got 'why'"),
        (good | {"question": ["why"]}, "question must be one of"),
        (good | {"sha256": None}, "it must hold the answer, or sha256 and receipt"),
        (good | {"request": {"users": ["u1"], "k": 0}}, "request: k: Input should be greater than or equal to 1"),
        (good | {"request": None}, "request: Input should be"),
        (good | {"receipt": {}}, "receipt: model_version: Field required"),
        (good | {"answer": {"lists": []}}, "answer: model_version: Field required"),
        (good | {"request": {"users": ["nobody"]}}, "the request is refused: unknown user 'nobody'"),
        (good | {"receipt": good["receipt"] | {"learned": 3}}, r"revision must be at least 3 (learned), got 0"),
    ]
    file = tmp_path / "answers.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line) for line, _ in wrong]
    file.write_text("\n".join([*lines, "", json.dumps(good)]))
    outcomes = replay(file, runs[:1], store)
    assert [one.place for one in outcomes] == [*range(1, 12), 13]
    assert outcomes[-1].verdict == "same"
    for outcome, (_, reason) in zip(outcomes, wrong, strict=False):
        assert outcome.verdict == "impossible" and reason in outcome.reason, outcome
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="holds no answers"):
        replay(tmp_path / "empty.jsonl", runs[:1], store)
    (tmp_path / "cut.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        replay(tmp_path / "cut.json", runs[:1], store)


def test_the_log_has_what_was_asked_and_nothing_else(runs, tmp_path):
    log = tmp_path / "answers.jsonl"
    with serving(runs[0], answer_log=log) as client:
        same(client.post("/recommend", {"users": ["u1"]}, headers={"user-agent": "somebody's browser"}))
        same(client.get("/users/u1/history"))
        client.get("/users/nobody/history")
        client.post("/recommend", {"users": ["nobody"]})
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600
    first, second = (json.loads(line) for line in log.read_text().splitlines())
    assert first["request"] == {"users": ["u1"]} and second["request"] == {"id": "u1"}
    for line in (first, second):
        assert set(line) == {"question", "request", "receipt", "sha256", "computed_by"}
        assert set(line["receipt"]) == {
            *("model_version", "run_hash", "data_fingerprint", "learned", "revision", "state")
        }
        names = {"hellm", "torch", "threads", "processor", "instruction_set", "device"}
        assert set(line["computed_by"]) == names
    with serving(runs[0], answer_log=None) as client:
        same(client.post("/recommend", {"users": ["u1"]}))
        assert client.app.state.answer_log is None
    assert len(log.read_text().splitlines()) == 2


def test_a_log_that_is_moved_away_is_begun_again(runs, tmp_path):
    log = tmp_path / "answers.jsonl"
    with serving(runs[0], answer_log=log) as client:
        same(client.post("/recommend", {"users": ["u1"]}))
        log.rename(tmp_path / "old.jsonl")
        same(client.post("/recommend", {"users": ["u2"]}))
    old, new = ((tmp_path / name).read_text().splitlines() for name in ("old.jsonl", "answers.jsonl"))
    assert [json.loads(*lines)["request"] for lines in (old, new)] == [{"users": ["u1"]}, {"users": ["u2"]}]
    assert stat.S_IMODE(os.stat(log).st_mode) == 0o600


def test_a_log_that_cannot_be_written_stops_no_answer(runs, tmp_path, caplog, monkeypatch):
    folder = tmp_path / "logs"
    folder.mkdir()
    log = folder / "answers.jsonl"
    monkeypatch.setattr("logging.Logger.propagate", True, raising=False)
    with serving(runs[0], answer_log=log) as client:
        shutil.rmtree(folder)
        for _ in range(3):
            same(client.post("/recommend", {"users": ["u1"]}))
        folder.mkdir()
        same(client.post("/recommend", {"users": ["u2"]}))
    told = [one.getMessage() for one in caplog.records if one.name == "hellm.serve.answer_log"]
    assert told == [f"answers are missing in the answer log: {log} cannot be written: no such file or directory"]
    assert [json.loads(line)["request"] for line in log.read_text().splitlines()] == [{"users": ["u2"]}]


def test_the_command(runs, logged, tmp_path, capsys):
    log, store, answers = logged
    assert main(["replay", str(log), *map(str, runs), "--store", str(store)]) == 0
    assert capsys.readouterr().out == "24 of 24 answers have the same bits\n"
    assert main(["replay", str(log), str(runs[0]), "--store", "none"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "6 of 24 answers have the same bits" and len(lines) == 1 + 18
    assert lines[1] == (
        f"  {log}:7: recommend cannot be computed again: events and items up to revision 1 were taken up, and no store "
        "is given"
    )
    # Beside the run, as the server has it.
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    shutil.copy(store, tmp_path / "run.events.sqlite")
    assert main(["replay", str(log), f"{run}/", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["same"], report["different"], report["impossible"]) == (24, 0, 0)
    assert [one["answer"] for one in report["answers"]] == answers
    assert main(["replay", str(tmp_path / "none"), str(run)]) == 2
    assert main(["replay", str(log), str(tmp_path)]) == 2
