"""One recommender under many threads: the same bits as alone, and items come whole or not at all.

The long form takes a minute: HELLM_SLOW=1 python -m pytest tests/test_recommend_threads.py
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import time

import numpy as np
import polars as pl
import pytest
import torch
from recommender_contract import planted_blocks
from saved_llm import save_tiny_llm

from hellm.data import ItemFeatures
from hellm.models import SASRec
from hellm.models.graph.content import ItemContent
from hellm.recommend import Recommender, ServedGraph, ServedLLM, ServedSASRec

THREADS, WRITERS = 20, 3
SECONDS = 60.0 if os.environ.get("HELLM_SLOW") else 1.5
DATA = planted_blocks()


def features(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)


def served_graph(folder):
    draw = torch.Generator().manual_seed(0)
    sizes = {"user": DATA.num_users, "item": DATA.num_items, "fold_in_source": DATA.num_items}
    return ServedGraph({name: torch.randn(size, 8, generator=draw) for name, size in sizes.items()}, 0.5)


def served_sasrec(folder):
    torch.manual_seed(0)
    return ServedSASRec(SASRec(DATA.num_items, embedding_dim=8, num_layers=1, num_heads=1, feedforward_dim=8).eval())


def served_llm(folder):
    pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
    pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')
    from hellm.models import RecommenderLLM, load_language_model

    tables = {"text": torch.from_numpy(features(DATA.num_items, 0)), "graph": torch.randn(DATA.num_items, 4)}
    titles = [f"item {row}" if row % 2 else None for row in range(DATA.num_items)]
    base = load_language_model(save_tiny_llm(folder))
    model = RecommenderLLM(*base, tables, item_titles=titles, titles=True, max_length=8, learned_prefix=True)
    return ServedLLM(model, tables)


MODELS = {"stage 1": served_graph, "SASRec": served_sasrec, "language model": served_llm}


@pytest.fixture(params=MODELS)
def recommender(request, tmp_path_factory) -> Recommender:
    sides = {"user": DATA.num_users, "item": DATA.num_items}
    ids = pl.DataFrame(
        [
            (side, row, f"{side[0]}{row}", f"item {row}" if side == "item" and row % 2 else None)
            for side, count in sides.items()
            for row in range(count)
        ],
        schema={"side": pl.String, "index": pl.Int64, "id": pl.String, "title": pl.String},
        orient="row",
    )
    users, items = DATA.train
    events = pl.DataFrame({"user": users, "item": items, "split": np.zeros(len(users), np.int8)})
    content = ItemContent.of({"text": ItemFeatures.from_values(features(DATA.num_items, 0))}, k=4)
    return Recommender(MODELS[request.param](tmp_path_factory.mktemp("base")), ids, events, content)


def at_once(*works, seconds: float | None = None) -> list[str]:
    """Run each in a thread of its own, again and again for so long; what they raised."""
    errors, stop = [], time.monotonic() + (seconds or 0)

    def run(work):
        try:
            work()
            while time.monotonic() < stop:
                work()
        except BaseException as error:
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    finally:
        sys.setswitchinterval(interval)
    return errors


def questions(recommender: Recommender) -> list:
    old = [f"i{row}" for row in range(DATA.num_items)]
    return [
        lambda: recommender.recommend("u1", k=3, candidates=old),
        lambda: recommender.recommend(["u1", "u5", "u3"], k=5, candidates=old),
        lambda: recommender.recommend(histories=[["i1", "i4"], [], ["i2"]], k=3, candidates=old),
        lambda: recommender.explain("i7", history=["i1", "i4"]),
        lambda: recommender.scores(torch.arange(4))[:, : DATA.num_items].tolist(),
    ]


def test_many_readers_get_the_same_bits_as_one(recommender):
    asked = questions(recommender)
    expected = [ask() for ask in asked]

    def check(number):
        assert asked[number]() == expected[number]

    works = [lambda number=number: check(number % len(asked)) for number in range(THREADS)]
    assert at_once(*works, seconds=SECONDS) == []


def test_readers_beside_writers_see_old_or_new(recommender, tmp_path):
    """Answers on the old items stay as they were; what is saved then loads."""
    asked = questions(recommender)
    expected = [ask() for ask in asked]
    counts = [0] * WRITERS

    def add(writer):
        if counts[writer] < 200:
            names = [f"n{writer}_{counts[writer]}_{row}" for row in range(2)]
            recommender.add_items({"text": features(2, counts[writer])}, names, ["a title", None])
            counts[writer] += 1

    def check(number):
        answer = asked[number]()
        if number == 4:
            np.testing.assert_allclose(answer, expected[number], rtol=1e-5, atol=1e-5)
        else:
            assert [getattr(one, "basis", one) for one in answer] == [getattr(o, "basis", o) for o in expected[number]]

    def whole():
        current = recommender._current
        sizes = {len(current.ids), len(current.titles), len(current.keys), len(current.popularity)}
        sizes |= {current.content.num_items, len(current.table) - DATA.num_users, len(current.model.item_keys())}
        assert len(sizes) == 1 and (sizes.pop() - DATA.num_items) % 2 == 0
        recommender.similar_items("i1", k=3)
        recommender.recommend(histories=[[recommender.item_ids.ids[-1]]], k=3)

    works = [lambda writer=writer: add(writer) for writer in range(WRITERS)]
    works += [whole, whole]
    works += [lambda number=number: check(number % len(asked)) for number in range(THREADS - len(works))]
    assert at_once(*works, seconds=SECONDS) == []
    assert recommender.num_items == DATA.num_items + 2 * sum(counts) and sum(counts) >= WRITERS
    loaded = Recommender.load(recommender.save(tmp_path / "saved"))
    assert loaded.recommend("u1", k=9) == recommender.recommend("u1", k=9)


def test_what_is_saved_while_items_come_is_one_state(recommender, tmp_path):
    saved = []

    def add():
        number = recommender.num_items
        recommender.add_items({"text": features(1, number)}, [f"n{number}"])

    def save():
        if len(saved) < 5:
            saved.append(recommender.save(tmp_path / f"saved{len(saved)}"))

    assert at_once(add, save, seconds=1.0) == []
    sizes = [Recommender.load(path).num_items for path in saved]
    assert sizes == sorted(sizes) and sizes[-1] <= recommender.num_items


def test_a_failed_addition_changes_nothing_and_blocks_nobody(recommender):
    before = recommender._current
    with pytest.raises(ValueError, match="ids must be new"):
        recommender.add_items({"text": features(1, 0)}, ["i1"])
    assert recommender._current is before
    recommender.add_items({"text": features(1, 0)}, ["new"])
    assert before.ids is not recommender.item_ids and len(before.ids) == DATA.num_items == len(before.keys)


def test_a_copy_takes_items_of_its_own(recommender):
    other = copy.deepcopy(recommender)
    other.add_items({"text": features(1, 0)}, ["new"])
    assert (recommender.num_items, other.num_items) == (DATA.num_items, DATA.num_items + 1)
