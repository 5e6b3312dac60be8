"""Entries of a store taken up again, many in one step, are the same state as one after another."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from served import COLOUR_FEATURES, COLOURS, MODELS, features, save_run

from hellm.serve import writer
from hellm.serve.state import Snapshot, load_snapshot
from hellm.serve.store import Entry

pytestmark = pytest.mark.usefixtures("one_thread")


def item(number: int, known_by: dict[str, np.ndarray], colours: list[str] | None = None) -> Entry:
    attributes = {} if colours is None else {"colour": colours}
    body = {"title": f"Novelty {number}", "attributes": attributes}
    return Entry("item", f"new {number}", body, known_by, number=number)


def event(number: int, user: str, item: str) -> Entry:
    return Entry("event", str(number), {"user": user, "item": item}, number=number)


def entries() -> list[Entry]:
    """Items known by this and that, and between them events, of new users and new items among them."""
    found, draw = [], np.random.default_rng(0)
    text, image = features(60, 3), features(60, 4, COLOUR_FEATURES)
    for number in range(0, 180, 3):
        own = {"text": text[number // 3]}
        if number % 4:
            own["image"] = image[number // 3]
        colours = [COLOURS[number % 3]] if number % 5 == 0 else None
        found.append(item(number + 1, own, colours))
        found.append(event(number + 2, f"u{draw.integers(4)}", f"new {draw.choice(number // 3 + 1) * 3 + 1}"))
        found.append(event(number + 3, f"late {draw.integers(9)}", "i2"))
    return found


def same(one: Snapshot, other: Snapshot) -> None:
    assert (one.state, one.revision) == (other.state, other.revision)
    ours, theirs = one.recommender, other.recommender
    assert (ours.item_ids, ours.user_ids, ours.item_titles) == (theirs.item_ids, theirs.user_ids, theirs.item_titles)
    assert torch.equal(ours.item, theirs.item) and ours.events.equals(theirs.events)
    for name, table in ours.content.features.items():
        assert torch.equal(table, theirs.content.features[name])
        assert torch.equal(ours.content.neighbours[name], theirs.content.neighbours[name])
    users = ["u1", "u2", "late 3"]
    assert ours.recommend(users, k=20) == theirs.recommend(users, k=20)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("at_once", [7, 1000])
def test_many_in_one_step_are_the_same_bits(kind, at_once, tmp_path, monkeypatch):
    snapshot = load_snapshot(save_run(tmp_path / "run", kind, pictures=True))
    # One that is there already is none of those that do not fit; an event of an unknown item is.
    stored = [*entries(), item(181, {"text": features(1)[0]}), event(182, "u1", "nothing"), event(183, "u1", "i1")]
    stored[-3] = stored[-3]._replace(key="new 1")
    one_by_one, steps = snapshot, []
    for entry in stored:
        one_by_one, _ = writer.replayed(one_by_one, [entry])
    changed = Snapshot.changed
    monkeypatch.setattr(Snapshot, "changed", lambda *given: steps.append(1) or changed(*given))
    monkeypatch.setattr(writer, "_AT_ONCE", at_once)
    together, skipped = writer.replayed(snapshot, stored)
    same(together, one_by_one)
    assert skipped == 1 and len(together.recommender.item_ids) == len(snapshot.recommender.item_ids) + 60
    if at_once == 1000:
        # Of items that follow one another and are known by the same, and of all events.
        assert len(steps) < 60


def test_an_item_that_does_not_fit_takes_no_other_along(tmp_path):
    snapshot = load_snapshot(save_run(tmp_path / "run", "fused", pictures=True))
    stored = entries()
    stored[30] = stored[30]._replace(features={"text": np.ones(3, np.float32)})
    one_by_one, lost = snapshot, 0
    for entry in stored:
        one_by_one, skipped = writer.replayed(one_by_one, [entry])
        lost += skipped
    together, skipped = writer.replayed(snapshot, stored)
    same(together, one_by_one)
    assert skipped == lost >= 1 and stored[30].key not in together.recommender.item_ids
