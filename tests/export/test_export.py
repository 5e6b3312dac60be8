"""Runs in other forms: the same answers, and refusals by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from saved_llm import save_tiny_llm
from support.command_line import last_json
from support.planted_runs import DATA, MODELS, make_model, make_recommender, make_run

import hellm.export.index
import hellm.export.onnx
from hellm.artifact import ids_table
from hellm.artifact.run_hash import run_hash
from hellm.data import Histories
from hellm.evaluate import history_scores, top_items
from hellm.export import FORMATS, ExportError, ItemIndex, export
from hellm.export.encoders import encoder_of, scorer_of, without_queries
from hellm.export.index import build_index, index_report
from hellm.export.sample import sample_histories
from hellm.models.histories import pad_histories
from hellm.recommend import Recommender, ServedFused, ServedLLM

pytestmark = pytest.mark.usefixtures("same_threads")
WITH_QUERIES = [name for name in MODELS if name != "transitions"]
needs_onnx = pytest.mark.skipif(
    any(not hellm.export.onnx._is_installed(name) for name in hellm.export.onnx.PACKAGES),
    reason='needs the extra: pip install "hellm[export]"',
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: make_run(folder, name) for name in MODELS}


def hard_histories() -> Histories:
    """Empty, of one item, of one item again and again, longer than any model reads."""
    draw = np.random.default_rng(0)
    lists = [[], [3], [5, 5, 5], [1, 2, 1, 2, 1], *(draw.integers(0, DATA.num_items, size) for size in (4, 5, 30))]
    return Histories.of_lists(lists)


def padded(histories: Histories, width: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Items with rows of anything behind the end, and lengths."""
    items, mask = pad_histories(*(torch.from_numpy(one) for one in histories))
    wide = torch.full((len(items), max(width, items.shape[1])), DATA.num_items - 1)
    wide[:, : items.shape[1]][mask] = items[mask]
    return wide, torch.from_numpy(histories.lengths)


class TestEncoders:
    @pytest.mark.parametrize("name", [*MODELS, "pre-norm"])
    @pytest.mark.parametrize("width", [1, 40])
    def test_padded_histories_give_queries_and_scores_of_the_model(self, name, width):
        model, histories = make_model(name), hard_histories()
        indptr, items = (torch.from_numpy(one) for one in histories)
        given = padded(histories, width)
        with torch.no_grad():
            scores = history_scores(model, model.item_keys(), indptr, items)
            torch.testing.assert_close(scorer_of(model)(*given), scores, rtol=1e-5, atol=1e-5)
            encoder = encoder_of(model)
            if name == "transitions":
                assert encoder is None
            else:
                torch.testing.assert_close(encoder(*given), model.embed(indptr, items), rtol=1e-5, atol=1e-5)

    def test_towers_without_queries_are_known(self):
        assert [without_queries(make_model(name)) for name in MODELS] == [[], [], [""], [], ["transitions"]]

    def test_language_models_are_refused_with_the_reason(self):
        llm = ServedLLM.__new__(ServedLLM)
        with pytest.raises(
            ExportError, match="a language model is not exported to ONNX: what reads a history is a deco"
        ):
            scorer_of(llm)
        fused = ServedFused.__new__(ServedFused)
        fused.model = make_model("fused").model
        fused.model.towers["llm"] = llm
        with pytest.raises(
            ExportError, match=r"tower 'llm': a language model is not exported .* hellm fuse without it"
        ):
            encoder_of(fused)


class TestSample:
    def test_all_lengths_and_an_empty_one(self):
        recommender = make_recommender("graph")
        lengths = recommender.histories.lengths
        chosen = sample_histories(recommender, 1000)
        assert sorted(chosen.lengths) == sorted(lengths.tolist())
        few = sample_histories(recommender, 5)
        assert few.num_users == 6 and few.lengths[-1] == 0
        assert few.lengths.max() == lengths.max() and few.lengths[:-1].min() == lengths[lengths > 0].min()


@needs_onnx
class TestOnnx:
    @pytest.mark.parametrize("name", ["graph", "transitions", "sum"])
    def test_onnxruntime_gives_the_scores_of_the_model(self, name, runs, tmp_path):
        import onnxruntime

        report = export(runs[name], tmp_path / "out", "onnx")
        assert report["largest_difference"]["scores"] <= 1e-4 and report["same_top_10"] == 1
        assert report["histories"] == DATA.num_users and report["run"] == run_hash(runs[name])
        assert json.loads((tmp_path / "out" / "export.json").read_text()) == report
        recommender, histories = Recommender.load(runs[name]), hard_histories()
        indptr, items = (torch.from_numpy(one) for one in histories)
        expected = history_scores(recommender.model, recommender.item, indptr, items)
        expected[0] = recommender.popularity
        session = onnxruntime.InferenceSession(tmp_path / "out" / "scores.onnx")
        given = dict(zip(("items", "lengths"), (one.numpy() for one in padded(histories)), strict=True))
        (scores,) = session.run(None, given)
        np.testing.assert_allclose(scores, expected, atol=1e-4)
        assert json.loads((tmp_path / "out" / "items.json").read_text()) == recommender.item_ids.ids
        assert (tmp_path / "out" / "encoder.onnx").is_file() is (name != "transitions")
        if name != "transitions":
            session = onnxruntime.InferenceSession(tmp_path / "out" / "encoder.onnx")
            (query,) = session.run(["query"], {key: value[:1] for key, value in given.items()})
            assert not query.any()
            (query,) = session.run(["query"], given)
            np.testing.assert_allclose(query, recommender.model.embed(indptr, items), atol=1e-4)
            np.testing.assert_array_equal(np.load(tmp_path / "out" / "keys.npy"), recommender.item)
        notes = {
            "graph": ["known users of this run have trained embeddings"],
            "transitions": [],
            "sum": ["query and keys are without transitions, which has scores only"],
        }[name]
        assert [one[: len(note)] for one, note in zip(report["notes"][1:], notes, strict=True)] == notes

    def test_a_graph_that_differs_from_torch_is_not_kept(self, runs, tmp_path, monkeypatch):
        class Off(torch.nn.Module):
            def __init__(self, encoder):
                super().__init__()
                self.encoder = encoder

            def forward(self, items, lengths):
                return self.encoder(items, lengths) + 2e-4

        monkeypatch.setattr(hellm.export.onnx, "encoder_of", lambda model: Off(encoder_of(model)))
        with pytest.raises(ExportError, match=r"encoder\.onnx: query must be within 0\.0001 of torch, got 0\.0002"):
            export(runs["graph"], tmp_path / "out", "onnx")
        assert list(tmp_path.iterdir()) == []

    def test_language_model_runs_are_refused(self, tmp_path, fails):
        pytest.importorskip("transformers")
        pytest.importorskip("peft")
        from hellm.models import RecommenderLLM, load_language_model

        tables = {"text": torch.randn(DATA.num_items, 8)}
        base = load_language_model(save_tiny_llm(tmp_path / "llm"))
        model = RecommenderLLM(
            *base, tables, item_titles=[None] * DATA.num_items, titles=False, max_length=8, graph_context="none"
        )
        known = make_recommender("graph")
        ids = ids_table(known.user_ids, known.item_ids, known.item_titles)
        run = Recommender(ServedLLM(model, tables), ids, known.events).save(tmp_path / "run")
        fails(
            "export", run, "--to", "onnx", "--out", tmp_path / "out", match="a language model is not exported to ONNX"
        )
        assert not (tmp_path / "out").exists()
        assert export(run, tmp_path / "vectors", "parquet")["basis"] == "history"


class TestParquet:
    @pytest.mark.parametrize("name", WITH_QUERIES)
    def test_products_of_the_vectors_are_the_scores(self, name, runs, tmp_path):
        report = export(runs[name], tmp_path / "out", "parquet")
        users, items = (pl.read_parquet(tmp_path / "out" / f"{side}.parquet") for side in ("users", "items"))
        recommender = Recommender.load(runs[name])
        assert (
            items["item"].to_list() == recommender.item_ids.ids and items["title"].to_list() == recommender.item_titles
        )
        assert items.schema["vector"] == pl.Array(pl.Float32, report["width"])
        np.testing.assert_array_equal(items["vector"].to_numpy(), recommender.item)
        assert users["user"].to_list() == recommender.user_ids.ids[:-1] and report["users_left_out"] == 1
        assert set(users["basis"]) == {"user" if name == "graph" else "history"} == {report["basis"]}
        if name == "sum":
            assert report["notes"] == ["the vectors are without transitions, which has scores and no vectors"]
            return
        answers = recommender.recommend(users["user"].to_list(), k=3, exclude_seen=False)
        scores = torch.from_numpy(users["vector"].to_numpy() @ items["vector"].to_numpy().T)
        best = [[recommender.item_ids.ids[row] for row in rows] for rows in top_items(scores, 3).tolist()]
        assert best == [[item.item for item in one] for one in answers]

    @pytest.mark.parametrize("to", ["parquet", "usearch"])
    def test_counts_have_no_vectors(self, runs, tmp_path, to):
        pytest.importorskip("usearch")
        with pytest.raises(ExportError, match=f"--to {to} needs vectors .* transitions rank by what followed what"):
            export(runs["transitions"], tmp_path / "out", to)


class TestIndex:
    @pytest.fixture(autouse=True)
    def installed(self):
        pytest.importorskip("usearch", reason='needs the extra: pip install "hellm[export]"')

    def test_nearest_in_the_index_are_the_best_by_score(self):
        """Keys of very different length, where the nearest by angle or distance are others."""
        draw = torch.Generator().manual_seed(0)
        keys = torch.randn(500, 8, generator=draw) * torch.rand(500, 1, generator=draw) * 5
        queries = torch.randn(50, 8, generator=draw)
        index = build_index(keys)
        report = index_report(index, keys, queries)
        assert report["reached"] and report["recall"]["recall@100"] >= 0.99 and report["items"] == 500
        rows, scores = index.search(queries, 10)
        expected = top_items(queries @ keys.T, 10)
        assert (rows == expected).float().mean() > 0.98
        torch.testing.assert_close(scores, (queries @ keys.T).gather(1, rows), atol=1e-4, rtol=1e-5)

    def test_search_widens_until_the_target_is_reached(self, monkeypatch):
        draw = torch.Generator().manual_seed(0)
        keys, queries = torch.randn(3000, 32, generator=draw), torch.randn(40, 32, generator=draw)
        index = build_index(keys)
        narrow = index_report(index, keys, queries)
        monkeypatch.setattr(hellm.export.index, "TARGET", 1 - 1e-9)
        wide = index_report(index, keys, queries)
        assert narrow["reached"] and narrow["expansion_search"] == 128
        assert wide["expansion_search"] == index.index.expansion_search > 128
        assert wide["recall"]["recall@100"] > narrow["recall"]["recall@100"]

    def test_an_index_that_misses_items_says_so(self, monkeypatch):
        draw = torch.Generator().manual_seed(0)
        keys, queries = torch.randn(200, 8, generator=draw), torch.randn(20, 8, generator=draw)
        index = build_index(keys[:100])
        report = index_report(index, keys, queries)
        assert not report["reached"] and not report["pays"] and report["recall"]["recall@100"] < 0.8

    @pytest.mark.parametrize("name", WITH_QUERIES)
    def test_export_is_loaded_and_finds_what_recommend_finds(self, name, runs, tmp_path):
        report = export(runs[name], tmp_path / "out", "usearch")
        index, ids = ItemIndex.load(tmp_path / "out")
        recommender = Recommender.load(runs[name])
        assert ids == recommender.item_ids.ids and report["recall"] == {"recall@10": 1.0, "recall@18": 1.0}
        assert index.index.expansion_search == report["expansion_search"]
        assert report["queries"] == DATA.num_users - 1
        assert any("without transitions" in note for note in report["notes"]) is (name == "sum")
        if name == "graph":
            (answer,) = recommender.recommend("u1", k=5, exclude_seen=False)
            rows, scores = index.search(recommender.model.user[1:2], 5)
            assert [ids[row] for row in rows[0]] == [item.item for item in answer]
            assert scores[0].tolist() == pytest.approx([item.score for item in answer], abs=1e-5)


class TestCommand:
    @pytest.mark.parametrize("to", FORMATS)
    def test_report_is_printed_and_written(self, runs, tmp_path, call, to):
        if to == "onnx":
            pytest.importorskip("onnxscript")
        pytest.importorskip("usearch")
        argv = ["export", runs["fused"], "--to", to, "--out", tmp_path / "out"]
        code, out, err = call(*argv, "--json")
        assert (code, err) == (0, "")
        assert last_json(out) == json.loads((tmp_path / "out" / "export.json").read_text())
        code, _, err = call(*argv)
        assert code == 2 and "--overwrite replaces it" in err
        code, out, _ = call(*argv, "--overwrite")
        expected = {"onnx": "scores: at most", "usearch": "recall@10 1.0000", "parquet": "18 items and 35 users"}
        assert code == 0 and expected[to] in out

    def test_other_forms_are_named(self, runs, tmp_path, fails):
        argv = ["export", runs["graph"], "--to", "csv", "--out", tmp_path / "out"]
        fails(*argv, match="to must be one of onnx, usearch, parquet, got 'csv'")

    def test_missing_packages_name_the_extra(self, runs, tmp_path, monkeypatch):
        monkeypatch.setattr(hellm.export.onnx, "_is_installed", lambda name: name != "onnxscript")
        with pytest.raises(ImportError, match=r'ONNX needs the package onnxscript: pip install "hellm\[export\]"'):
            export(runs["graph"], tmp_path / "out", "onnx")
