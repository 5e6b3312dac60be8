"""Events, items and runs that take over: one after another, on disk before they are answered."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any, NamedTuple

import numpy as np
import torch

from hellm._files import WriteError
from hellm.features.noted import NotedEncoder
from hellm.models.graph.content import ItemContent
from hellm.serve.answers import known_ids
from hellm.serve.errors import Overloaded, RequestError
from hellm.serve.state import Snapshot
from hellm.serve.store import Entry, Store, state_after

__all__ = ["Stored", "Takeover", "replayed", "with_item", "write"]

logger = logging.getLogger(__name__)

# Stored entries that are taken up together: every time, the tables of all items and all events are copied.
_AT_ONCE = 2048


class Takeover(NamedTuple):
    """A run that is to be served from now on.

    Attributes:
        snapshot: With the stored entries up to its revision.
        skipped: Those that did not fit it.
        learned: Number of the last entry that the run was trained with, if somebody says so.
    """

    snapshot: Snapshot
    skipped: int = 0
    learned: int | None = None


class Stored(NamedTuple):
    """What came of a job.

    Attributes:
        stored: Entries that are new.
        duplicates: Entries that had been there.
        skipped: Of a run that took over: entries that do not fit it.
        snapshot: What is served since.
    """

    stored: int
    duplicates: int
    skipped: int
    snapshot: Snapshot


def write(
    snapshot: Snapshot, store: Store | None, jobs: Sequence[Takeover | Sequence[Entry]]
) -> tuple[Snapshot, list[Any]]:
    """Do all jobs in their order, put what is new on disk in one transaction, and only then let it count.

    Returns: What is to be served now, and for each job a `Stored` or an exception.
    """
    known = {}
    if store is not None:
        for kind in ("event", "item"):
            found = store.find(kind, [one.key for one in _entries(jobs) if one.kind == kind])
            known |= {(kind, key): entry for key, entry in found.items()}
    change = _Change(snapshot)
    results: list[Any] = []
    for job in jobs:
        try:
            results.append(_taken_over(change, store, job) if isinstance(job, Takeover) else _added(change, known, job))
        except Exception as error:
            results.append(error)
    new = change.applied()
    if change.entries:
        assert store is not None  # which alone has entries
        try:
            new = replace(new, revision=store.append(change.entries))
        except WriteError as error:
            logger.error("nothing can be stored: %s", error)
            failure = Overloaded("nothing can be stored at the moment", retry_after=10)
            return snapshot, [one if isinstance(one, Exception) else failure for one in results]
    done = [Stored(one[0], one[1], one[2], new) if isinstance(one, tuple) else one for one in results]
    return new, done


def replayed(snapshot: Snapshot, entries: Iterable[Entry]) -> tuple[Snapshot, int]:
    """Take up entries of a store again.

    Returns: The snapshot with them, and how many do not fit its run: events of items that it lacks, items that it
        cannot take. Items that the run has by now are none of them.
    """
    skipped, entries = 0, iter(entries)
    while some := list(islice(entries, _AT_ONCE)):
        # On more threads, the bits of an item depend on how many come with it.
        together = torch.get_num_threads() == 1
        try:
            snapshot, lost = (_together if together else _one_by_one)(snapshot, some)
        except ValueError:
            snapshot, lost = _one_by_one(snapshot, some)
        skipped, snapshot = skipped + lost, replace(snapshot, revision=some[-1].number)
    return snapshot, skipped


def _one_by_one(snapshot: Snapshot, entries: Sequence[Entry]) -> tuple[Snapshot, int]:
    """With the entries that fit, and how many do not."""
    change, skipped = _Change(snapshot), 0
    for entry in entries:
        try:
            change.add(entry)
        except (RequestError, ValueError):
            skipped += 1
    return change.applied(), skipped


def _together(snapshot: Snapshot, entries: Sequence[Entry]) -> tuple[Snapshot, int]:
    """As `_one_by_one`, bit for bit, in few steps. Raises: ValueError, an item that the model cannot take."""
    known, state, items, events = snapshot.recommender.item_ids, snapshot.state, {}, []
    for entry in entries:
        if entry.kind == "item":
            if entry.key in known or entry.key in items:
                continue
            items[entry.key] = entry
        elif entry.body["item"] in known or entry.body["item"] in items:
            events.append((entry.body["user"], entry.body["item"]))
        else:
            continue
        state = state_after(state, entry)
    content = snapshot.recommender.content
    for _, alike in groupby(items.values(), lambda entry: _known_by(content, entry)):
        snapshot = _with_items(snapshot, list(alike))
    if events:
        users, bought = zip(*events, strict=True)
        snapshot = snapshot.changed(lambda recommender: recommender.add_events(users, bought))
    lost = sum(one.kind == "event" for one in entries) - len(events)
    return replace(snapshot, state=state), lost


class _Change:
    """Entries on the way into a snapshot.

    Events are taken up many at a time, also with items between them: an item has the same row and key before and after.

    Attributes:
        snapshot: With the items so far, and their state and that of the events.
        entries: What is to be stored.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot, self.entries = snapshot, []
        self._events: list[tuple[str, str]] = []

    def applied(self) -> Snapshot:
        """The snapshot with all that was added."""
        if self._events:
            users, items = zip(*self._events, strict=True)
            self._events = []
            self.snapshot = self.snapshot.changed(lambda recommender: recommender.add_events(users, items))
        return self.snapshot

    def add(self, entry: Entry) -> None:
        """Raises: RequestError, an unknown item. ValueError, an item that the model cannot take."""
        known = self.snapshot.recommender.item_ids
        if entry.kind == "event":
            known_ids([entry.body["item"]], known, self.snapshot.nearest_items, "item")
            self._events.append((entry.body["user"], entry.body["item"]))
        elif entry.key in known:
            return
        else:
            self.snapshot = with_item(self.snapshot, entry)
        self.snapshot = replace(self.snapshot, state=state_after(self.snapshot.state, entry))


def with_item(snapshot: Snapshot, entry: Entry) -> Snapshot:
    """A snapshot that ranks an item as well, in the state of the one before.

    Features that were made for a run with another encoder are left out, as those of one width may mean anything.

    Raises: ValueError, one that the model cannot take.
    """
    return _with_items(snapshot, [entry])


def _with_items(snapshot: Snapshot, entries: Sequence[Entry]) -> Snapshot:
    """As `with_item`, of several that a run knows by the same."""
    modalities, names = _known_by(snapshot.recommender.content, entries[0])
    features = {name: np.stack([one.features[name] for one in entries]) for name in modalities}
    attributes = {name: [one.body["attributes"][name] for one in entries] for name in names}
    ids, titles = [one.key for one in entries], [one.body["title"] for one in entries]
    return snapshot.changed(lambda recommender: recommender.add_items(features, ids, titles, attributes=attributes))


def _known_by(content: ItemContent | None, entry: Entry) -> tuple[list[str], list[str]]:
    """Features and attributes of an item that a run of the content takes."""
    if content is None:
        return list(entry.features), []
    features = [name for name in entry.features if _fits(content, entry, name)]
    return features, [name for name in entry.body["attributes"] if name in content.attributes]


def _fits(content: ItemContent, entry: Entry, modality: str) -> bool:
    """Whether features of an item are by the encoder of a run; those of earlier versions do not say."""
    if modality not in entry.encoders:
        return True
    return NotedEncoder.of(entry.encoders, modality).gives_as(NotedEncoder.of(content.encoders, modality))


def _entries(jobs: Sequence[Any]) -> list[Entry]:
    return [entry for job in jobs if not isinstance(job, Takeover) for entry in job]


def _added(change: _Change, known: dict[tuple[str, str], Entry], job: Sequence[Entry]) -> tuple[int, int, int]:
    """All of a job or nothing of it."""
    new: dict[tuple[str, str], Entry] = {}
    for place, entry in enumerate(job):
        key = (entry.kind, entry.key)
        field = f"events[{place}]" if entry.kind == "event" else None
        there = known.get(key) or new.get(key)
        if there is None:
            if entry.kind == "event":
                _check_item(change.snapshot, entry, place)
            elif entry.key in change.snapshot.recommender.item_ids:
                raise RequestError(409, f"item {entry.key!r} is there already", field="id")
            new[key] = entry
        elif not there.same_as(entry):
            raise RequestError(409, f"{entry.kind} {entry.key!r} is there already, and is another", field=field or "id")
    try:
        for entry in new.values():
            change.add(entry)
    except ValueError as error:
        raise RequestError(422, str(error)) from None
    change.entries += new.values()
    known |= new
    return len(new), len(job) - len(new), 0


def _check_item(snapshot: Snapshot, entry: Entry, place: int) -> None:
    known_ids([entry.body["item"]], snapshot.recommender.item_ids, snapshot.nearest_items, f"events[{place}].item")


def _taken_over(change: _Change, store: Store | None, job: Takeover) -> tuple[int, int, int]:
    """A run in place of the one before, with what was stored while it was read."""
    change.applied()
    snapshot, skipped = job.snapshot, 0
    if store is not None:
        snapshot, skipped = replayed(snapshot, store.entries(snapshot.revision))
    # Those of jobs before in this batch, which are not on disk yet.
    snapshot, also = replayed(snapshot, [one._replace(number=snapshot.revision) for one in change.entries])
    if store is not None and job.learned is not None:
        store.set_learned(snapshot.run_hash, job.learned)
    change.snapshot = snapshot
    return 0, 0, job.skipped + skipped + also
