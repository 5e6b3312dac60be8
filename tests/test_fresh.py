"""Items that came while a server was running: the program that measures how well they are found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.encoders import save_text_encoder

for needed in ("fastapi", "uvicorn"):
    pytest.importorskip(needed, reason='needs the extra: pip install "hellm[serve]"')
pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[encoders]"')
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from benchmarks import fresh  # noqa: E402
from hellm.data import load_dataset, save_dataset  # noqa: E402
from hellm.recommend import Recommender  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An item-cold split, a run that was trained without its cold items, and the encoder of its texts."""
    top = tmp_path_factory.mktemp("fresh")
    (top / "encoder").mkdir()
    encoder = save_text_encoder(top / "encoder")
    data, run = fresh.sample(top, 120, 160, 2, text=encoder, image=None)
    save_dataset(data, top / "data")
    return top / "data", run, f"text={encoder}"


def test_cold_items_are_unknown_to_what_is_trained(made):
    data, warm = load_dataset(made[0]), load_dataset(made[1].parent / "warm")
    cold = set(np.array(data.item_ids.ids)[np.unique(data.items[data.split > 0])])
    known = Recommender.load(made[1])
    assert cold and not cold & set(known.item_ids.ids) and not cold & set(warm.item_ids.ids)
    assert warm.num_events == (data.split == 0).sum() and known.item_ids == warm.item_ids
    row, now = data.item_ids.indices(warm.item_ids.ids[-1:])[0], warm.num_items - 1
    assert (
        warm.item_titles[now] == data.item_titles[row]
        and warm.item_attributes["brand"][now] == data.item_attributes["brand"][row]
    )
    assert np.array_equal(warm.item_features["image"].values[now], data.item_features["image"].values[row])


def test_new_items_are_found_by_the_server_as_by_the_library(made, tmp_path):
    data, run, encoder = made
    out = tmp_path / "fresh.json"
    # In a process of its own: a browser of other tests keeps an event loop running in this one.
    command = [
        sys.executable,
        "-m",
        "benchmarks.fresh",
        "--data",
        data,
        "--run",
        run,
        "--encoder",
        encoder,
        "--out",
        out,
    ]
    subprocess.run([str(one) for one in command], cwd=ROOT, check=True, timeout=600)
    found = json.loads(out.read_text())
    assert found["lists_of_the_library"] == found["lists"] == 2 * found["users"] > 0
    assert {"text", "image", "brand"} <= set(found["placed_by"]) and found["new_items"] == 32
    every, among_new = found["among_all_items"], found["among_new_items"]
    assert every["most_popular"] == 0
    for one in (every, among_new):
        assert 0 <= one["low"] <= one["recall"] <= one["high"] <= 1 and 0 < one["chance"] <= 1
    # The first 20 of 32.
    assert among_new["chance"] == 20 / 32 and every["recall"] <= among_new["recall"]
    assert 0 < found["seconds"]["median"] <= found["seconds"]["most"]


def test_a_run_that_knows_the_new_items_is_refused(made, tmp_path):
    data = load_dataset(made[0])
    recommender = Recommender.load(made[1])
    row = int(data.items[data.split == 2][0])
    recommender.add_items({"image": data.item_features["image"].values[[row]]}, [data.item_ids.ids[row]])
    with pytest.raises(ValueError, match="--run must be trained without the cold items of --data, got one that knows"):
        fresh.measured(data, recommender.save(tmp_path / "saved"))


def test_recall_has_an_interval_over_users():
    wanted = [frozenset("ab"), frozenset("c"), frozenset("d")]
    found = fresh.recall([["a"], ["c", "x"], []], wanted)
    assert found["recall"] == pytest.approx(0.5) and found["low"] < 0.5 < found["high"]
