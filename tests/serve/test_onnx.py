"""`hellm serve --onnx`: onnxruntime reads the histories, within 1e-4 of torch, for the run that was exported alone."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from served import DATA, Process, features, same, save_run, serving
from support.planted_runs import make_run

from hellm.artifact.run_hash import run_hash
from hellm.cli import main
from hellm.data import DataError
from hellm.export import ExportError, OnnxEncoder, export
from hellm.recommend import Recommender, ServedLLM
from hellm.serve.replay import replay
from hellm.serve.state import load_snapshot

for name in ("onnx", "onnxruntime", "onnxscript"):
    pytest.importorskip(name, reason='needs the extra: pip install "hellm[export]"')
pytestmark = pytest.mark.usefixtures("one_thread")
HISTORIES = [["i1", "i4"], ["i2"], ["i7", "i7", "i7"], [f"i{row}" for row in range(18)], []]
ASKED = {"histories": HISTORIES, "k": 18, "exclude_seen": False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory, one_thread):
    """Name -> run and export; making a graph takes seconds."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}
    for name, kind, seed in (("graph", "graph", 0), ("other", "graph", 1), ("fused", "fused", 0)):
        run = save_run(folder / name, kind, seed=seed)
        export(run, folder / f"{name}-onnx", "onnx")
        found[name] = run, folder / f"{name}-onnx"
    return found


@pytest.fixture
def encoded(monkeypatch) -> list[list[int]]:
    """Items of the histories that onnxruntime has read."""
    found, encode = [], OnnxEncoder.__call__

    def noted(self, indptr, items):
        found.extend(items[start:stop].tolist() for start, stop in itertools.pairwise(indptr.tolist()))
        return encode(self, indptr, items)

    monkeypatch.setattr(OnnxEncoder, "__call__", noted)
    return found


def close(found: list[dict], expected: list[dict]) -> bool:
    """Whether lists have the same items with scores within 1e-4."""
    for one, other in zip(found, expected, strict=True):
        scores, expected_scores = ({item["item"]: item["score"] for item in lists["items"]} for lists in (one, other))
        assert scores.keys() == expected_scores.keys()
        assert all(abs(score - expected_scores[item]) <= 1e-4 for item, score in scores.items())
    return True


@pytest.mark.parametrize("kind", ["graph", "fused"])
def test_lists_are_those_of_torch(exported, encoded, kind, tmp_path):
    run, folder = exported[kind]
    torch_lists = [one.to_dict() for one in Recommender.load(run).recommend(**ASKED)]
    expected = Recommender.load(run)
    expected.encode_with(OnnxEncoder(folder))
    with serving(run, tmp_path / "store.sqlite", source={"onnx": folder}) as client:
        encoded.clear()
        answer = same(client.post("/recommend", ASKED))
        assert encoded == [[int(item[1:]) for item in one] for one in HISTORIES]
        assert answer["model_version"] == f"{expected.model.kind}-{run_hash(run)[:12]}-onnx"
        assert answer["lists"] == [one.to_dict() for one in expected.recommend(**ASKED)]
        assert close(answer["lists"], torch_lists)
        assert answer["lists"][-1] == torch_lists[-1]
        # Whoever else is asked for.
        assert client.service.snapshot.is_row_exact
        alone = [same(client.post("/recommend", ASKED | {"histories": [one]}))["lists"][0] for one in HISTORIES]
        assert alone == answer["lists"]
        users = same(client.post("/recommend", {"users": ["u1", "u2"], "k": 5}))["lists"]
        assert close(users, [one.to_dict() for one in Recommender.load(run).recommend(["u1", "u2"], k=5)])


@pytest.mark.parametrize("kind", ["graph", "fused"])
def test_items_that_came_later_are_read_by_torch(exported, encoded, kind, tmp_path):
    run, folder = exported[kind]
    expected, by_torch = Recommender.load(run), Recommender.load(run)
    expected.encode_with(OnnxEncoder(folder))
    new = features(1, 5)
    for one in (expected, by_torch):
        one.add_items({"text": new}, ["n"], ["new"])
    asked = {"histories": [["i1", "n"], ["i1", "i4"]], "k": 19, "exclude_seen": False}
    with serving(run, tmp_path / "store.sqlite", source={"onnx": folder}) as client:
        same(client.post("/items", {"id": "n", "title": "new", "features": {"text": new[0].tolist()}}))
        encoded.clear()
        first, second = same(client.post("/recommend", asked))["lists"]
    with_new, without = (one.to_dict() for one in by_torch.recommend(**asked))
    assert encoded == [[1, 4]]
    assert first == with_new and close([second], [without])
    assert [first, second] == [one.to_dict() for one in expected.recommend(**asked)]


def test_answers_are_replayed_with_the_export(exported, tmp_path, capsys):
    (run, folder), store, log = exported["fused"], tmp_path / "store.sqlite", tmp_path / "answers.jsonl"
    asked = {"histories": HISTORIES, "k": 5}
    with serving(run, store, answer_log=log, source={"onnx": folder}) as client:
        same(client.post("/recommend", asked))
        same(client.post("/events", {"events": [{"id": "1", "user": "u1", "item": "i5"}]}))
        same(client.post("/recommend", {"users": ["u1"]}))
    with serving(run, store, answer_log=log) as client:
        same(client.post("/recommend", asked))
    assert [one.verdict for one in replay(log, [run], store, onnx=[folder])] == ["same"] * 3
    outcomes = replay(log, [run], store)
    assert [one.verdict for one in outcomes] == ["impossible", "impossible", "same"]
    assert outcomes[0].reason == f"onnxruntime has read the histories, and no export of run {run_hash(run)} is given"
    by = [json.loads(line)["computed_by"] for line in log.read_text().splitlines()]
    assert ["onnxruntime" in one for one in by] == [True, True, False]
    command = ["replay", log, run, "--store", store, "--onnx", folder, exported["graph"][1]]
    assert main(list(map(str, command))) == 0
    assert capsys.readouterr().out == "3 of 3 answers have the same bits\n"


def test_a_reload_takes_the_export_of_the_new_run(exported, tmp_path):
    run, folder = exported["graph"]
    other, other_onnx = exported["other"]
    link, onnx = tmp_path / "run", tmp_path / "onnx"

    def point(link, target):
        (tmp_path / "new").symlink_to(target)
        os.replace(tmp_path / "new", link)

    point(link, run)
    point(onnx, folder)
    with serving(link, source={"onnx": onnx}) as client:
        before = same(client.post("/recommend", ASKED))
        point(link, other)
        response = client.post("/admin/reload")
        assert response.status_code == 409
        message = response.json()["errors"][0]["message"]
        assert f"must be exported from run {run_hash(other)}, got an export of {run_hash(run)}" in message
        assert same(client.post("/recommend", ASKED)) == before
        point(onnx, other_onnx)
        assert same(client.post("/admin/reload"))["model_version"].endswith(f"{run_hash(other)[:12]}-onnx")
        expected = Recommender.load(other)
        expected.encode_with(OnnxEncoder(onnx))
        answer = same(client.post("/recommend", ASKED))
        assert answer["lists"] == [one.to_dict() for one in expected.recommend(**ASKED)]


def test_what_cannot_be_used_is_refused(exported, tmp_path, monkeypatch):
    run, folder = exported["graph"]
    copied = shutil.copytree(folder, tmp_path / "copied")
    # Another encoder under the same name.
    shutil.copy(exported["other"][1] / "encoder.onnx", copied)
    with pytest.raises(ExportError, match=r"queries and scores must be within 0\.0001 of torch, got [1-9]"):
        load_snapshot(run, onnx=copied)
    (copied / "encoder.onnx").write_bytes(b"no graph")
    with pytest.raises(DataError, match=r"encoder\.onnx: damaged, or not of hellm export"):
        load_snapshot(run, onnx=copied)
    with pytest.raises(FileNotFoundError):
        load_snapshot(run, onnx=tmp_path / "none")
    export(run, tmp_path / "parquet", "parquet")
    with pytest.raises(ExportError, match="must be an export to onnx, got parquet"):
        load_snapshot(run, onnx=tmp_path / "parquet")
    counts = make_run(tmp_path, "transitions")
    with pytest.raises(ExportError, match="transitions have no queries that ONNX could make"):
        load_snapshot(counts, onnx=folder)
    # As an export of transitions is.
    (copied / "encoder.onnx").unlink()
    with pytest.raises(ExportError, match=r"holds no encoder\.onnx: the model that was exported has no queries"):
        OnnxEncoder(copied)
    recommender = Recommender.load(run)
    monkeypatch.setattr(type(recommender), "model", ServedLLM.__new__(ServedLLM))
    with pytest.raises(ExportError, match="a language model is not exported to ONNX"):
        OnnxEncoder.of_run(folder, recommender, run_hash(run))
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ImportError, match=r'need the package onnxruntime: pip install "hellm\[export\]"'):
        load_snapshot(run, onnx=folder)


def test_a_query_has_the_same_bits_alone_and_in_any_order(exported):
    encoder = OnnxEncoder(exported["graph"][1])
    draw = np.random.default_rng(0)
    lists = [draw.integers(0, DATA.num_items, size) for size in (3, 0, 9, 1, 5)]

    def queries(lists):
        indptr = torch.tensor([0, *np.cumsum([len(one) for one in lists])])
        return encoder(indptr, torch.from_numpy(np.concatenate(lists)))

    together = queries(lists)
    assert not together[1].any() and together.dtype == torch.float32
    assert torch.equal(queries(lists[::-1]).flip(0), together)
    assert all(torch.equal(queries([one])[0], query) for one, query in zip(lists, together, strict=True))


def test_the_command_serves_with_it(exported, capsys):
    run, folder = exported["graph"]
    assert main(["serve", str(run), "--store", "none", "--onnx", str(exported["fused"][1])]) == 2
    assert "must be exported from run" in capsys.readouterr().err
    process = Process(run, "--store", "none", "--onnx", str(folder)).until_ready()
    try:
        answer = same(process.http.post("/recommend", json={"histories": [["i1"]]}))
        assert answer["model_version"].endswith("-onnx")
    finally:
        assert process.stop() == 0
