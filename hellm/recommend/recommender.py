"""The recommender over any model: for known users, for bare histories, items like an item, reasons, and new items.

U = users, I = items, D = embedding width, B = users asked for at once.
"""

from __future__ import annotations

import copy
import math
import operator
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._folders import new_folder
from hellm._pretrained import LOADING
from hellm.artifact.files import CONTENT, EMBEDDINGS, HISTORIES, IDS
from hellm.artifact.tables import ids_table, read_histories, read_ids, side_of
from hellm.data import DataError, Histories, IdMap, ItemFeatures
from hellm.evaluate import top_items
from hellm.models.graph.content import ItemContent
from hellm.recommend import explain
from hellm.recommend.card import training_facts, write_card
from hellm.recommend.catalogue import history_lists, id_list, rows_of
from hellm.recommend.events import KNOWN, Events
from hellm.recommend.hyperedges import Hyperedge, hyperedges_of
from hellm.recommend.results import Reason, Recommendations, RecommendedItem
from hellm.recommend.served import ServedFused, ServedModel, load_served
from hellm.recommend.state import QueryEncoder, State

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Recommender"]

_BATCH = 1024


class Recommender:
    """Answers from a run directory alone; the data set is not needed.

    `Recommender.load(run_directory)` makes one, whatever the run is of. What an item scores for a user is the dot
    product of the user's query and the item's key.

    Many threads may use one at the same time: an answer is of what was known before or after a call of `add_items` or
    `add_events`, never of a part of it, and several such calls follow one another. `copy.copy` gives one that goes its
    own way from there and shares what both know.

    Args:
        model: What gives queries and keys, see `hellm.recommend.served`.
        ids: As in ids.parquet: side, index, id, title.
        histories: As in histories.parquet: user, item, split, grouped by user and in time order.
        content: What the items look and read like, for reasons and for new items; None where the run has no features.

    Attributes:
        training: What is recorded of the training, for the model card (`hellm.recommend.card.training_facts`).

    Raises: ValueError, tables that do not fit the ids.
    """

    def __init__(
        self, model: ServedModel, ids: pl.DataFrame, histories: pl.DataFrame, content: ItemContent | None = None
    ) -> None:
        user_ids, _ = side_of(ids, "user")
        item_ids, titles = side_of(ids, "item")
        keys = model.item_keys()
        events = Events.of_table(histories, len(user_ids))
        num_users = len(user_ids)
        if model.user is not None and events.has_arrived[len(model.user) :].all():
            # Who came after training has events and no row.
            num_users = min(num_users, len(model.user))
        for name, rows, count in (("user", model.user, num_users), ("item", keys, len(item_ids))):
            if rows is not None and len(rows) != count:
                raise ValueError(f"ids must name the {len(rows)} {name}s of the model, got {count}")
        trained = events.items[events.split == 0]
        popularity = torch.from_numpy(np.bincount(trained, minlength=len(item_ids))).float()
        self._current = State(model, content, user_ids, item_ids, titles, keys, popularity, events)
        self._adding = threading.Lock()
        self.training: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_adding"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._adding = threading.Lock()

    @property
    def model(self) -> ServedModel:
        return self._current.model

    @property
    def content(self) -> ItemContent | None:
        return self._current.content

    @property
    def user_ids(self) -> IdMap:
        return self._current.user_ids

    @property
    def item_ids(self) -> IdMap:
        return self._current.ids

    @property
    def item_titles(self) -> list[str | None]:
        return self._current.titles

    @property
    def item(self) -> Tensor:
        """[I, D] float32 keys."""
        return self._current.keys

    @property
    def popularity(self) -> Tensor:
        """[I] float32 training events."""
        return self._current.popularity

    @property
    def histories(self) -> Histories:
        """Item rows of all events of every user."""
        return self._current.events.histories

    @property
    def events(self) -> pl.DataFrame:
        """Of every event user and item (rows) and split: 0 train, 1 validation, 2 test, 3 history only."""
        return self._current.events.table()

    @property
    def is_trained(self) -> np.ndarray:
        """[U] bool: users with training events."""
        return self._current.events.is_trained

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        language_model: str | os.PathLike[str] | None = None,
    ) -> Recommender:
        """The recommender of a finished run of stage 1, SASRec or fine-tuning, or one that `save` wrote.

        Args:
            path: Its folder. Nothing in it is run: one of a stranger can be loaded.
            device: Where SASRec and language models read histories; answers and tables stay on the CPU.
            language_model: Where the language model of a fine-tuning run is now; None is where it was in training.
        Raises: FileNotFoundError, no such folder or a run without its outputs. DataError, a damaged file. For a
            fine-tuning run also what `RecommenderLLM.from_pretrained` raises.
        """
        import polars as pl

        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"run directory {path} does not exist")
        for name in (EMBEDDINGS, IDS, HISTORIES):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} holds no {name}: it is no run directory, or the run is not finished")
        try:
            ids = read_ids(path)
            histories = read_histories(path, ids)
            _, titles = side_of(ids, "item")
            with LOADING:
                model = load_served(path, titles, language_model)
            model.to(device)
        except (KeyError, pl.exceptions.PolarsError) as error:
            raise DataError(f"{path}: damaged or not of a run: {error}") from None
        content = ItemContent.load(path / CONTENT) if (path / CONTENT).is_file() else None
        try:
            recommender = cls(model, ids, histories, content)
        except (ValueError, LookupError, TypeError, RuntimeError) as error:
            raise DataError(f"{path}: {error}") from None
        recommender.training = training_facts(path)
        return recommender

    def encode_with(self, encoder: QueryEncoder) -> None:
        """Let an encoder make the queries of histories from the next answer on, in place of the model.

        Histories with items that came later than the encoder are read by the model as before, and so are evaluations.

        Args:
            encoder: Of the same model, such as `hellm.export.OnnxEncoder`.
        """
        with self._adding:
            self._current = replace(self._current, encoder=encoder)

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `load` needs, and nothing else of the run, into a new folder, with a model card.

        With `overwrite`, `path` holds the old or the new recommender at every moment, also when this is killed.

        Raises: FileExistsError, the folder is not empty and `overwrite` is False, or it is not one that `save` wrote.
        """
        path = Path(path)
        items = self._current
        with new_folder(path, kind="recommender", overwrite=overwrite) as new:
            items.model.save(new)
            ids_table(items.user_ids, items.ids, items.titles).write_parquet(new / IDS)
            items.events.table().write_parquet(new / HISTORIES)
            if items.content is not None:
                items.content.save(new / CONTENT)
            write_card(new, self)
        return path

    def scorer(self, split: str, device: str = "cpu") -> Any:
        """The scorer that `hellm.evaluate` takes, for finding events of `split`: "valid" or "test".

        With a model of histories, users are known by their events before that split; else by their trained embedding,
        or folded in from those events where the run was trained with users kept out.

        Raises: ValueError, another split.
        """
        if split not in KNOWN:
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        return self._current.scorer(split, device) or self

    def scores(self, users: Tensor) -> Tensor:
        """[B] int64 rows of the users -> [B, I] float32, by what the model knows of them from training events.

        Users with events that came after training are scored by all of their events.
        """
        return self._scores(self._current, users.numpy())

    def _scores(self, state: State, rows: np.ndarray) -> Tensor:
        read, histories = state.events.has_arrived[rows], state.events.histories.take(rows)
        if state.model.user is not None or read.all():
            return state.scores(rows, histories, read)
        scores = state.scorer("valid").scores(torch.from_numpy(rows))
        if read.any():
            places = np.flatnonzero(read)
            scores[torch.from_numpy(places)] = state.history_scores(histories.take(places))
        return scores

    def recommend(
        self,
        users: str | Iterable[str] | None = None,
        histories: Sequence[str] | Sequence[Sequence[str]] | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        exclude: Iterable[str] = (),
        candidates: Iterable[str] | None = None,
        attributes: Mapping[str, Iterable[str]] | None = None,
        filter: Callable[[str], bool] | None = None,
    ) -> list[Recommendations]:
        """The k best items of each user, or of each bare history.

        Stage 1 knows its users by trained embeddings; other models read all of a user's events, and so does stage 1 for
        users with events that came after training. Users without events to go by (for stage 1: training events) and
        empty histories get the most popular items, and `basis` says so. A bare history may be of somebody the run has
        never seen.

        Args:
            users: Ids of known users.
            histories: Item ids of one history, in time order, or several such histories. Give this or `users`; of an
                empty history, [[]].
            k: List length, 1 <= k <= I. Lists are shorter where fewer items are left.
            exclude_seen: Leave out all items of the history: for known users, of all their events.
            exclude: Item ids that are left out of every list.
            candidates: Item ids to choose from, e.g. what is in stock; None is all.
            attributes: Attribute -> values, e.g. {"brand": ["acme"]}: an item must have one of them, of each attribute.
            filter: Item id -> whether it may be recommended; asked once for each candidate.
        Returns: One list per user or history, in their order, none for none; equal scores by item row.
        Raises: ValueError, both or neither of `users` and `histories`, k out of range, no candidates, an attribute or
            value that the run does not know, or a score that is not finite. DataError, an unknown id (naming the
            nearest ones).
        """
        if (users is None) == (histories is None):
            raise ValueError(f"give either users or histories, got {'neither' if users is None else 'both'}")
        current = self._current
        k = _length(k, len(current.ids), "the number of items")
        allowed = _allowed(current, candidates, id_list(exclude, "exclude"), attributes or {}, filter)
        asked, answers = _Asked.of(current, users, histories), []
        for start in range(0, len(asked.names), _BATCH):
            part = np.arange(start, min(start + _BATCH, len(asked.names)))
            own = asked.histories.take(part)
            scores = current.scores(asked.rows[part], own, asked.read[part])
            best = _best(current, scores, asked.personal[part], own if exclude_seen else None, allowed, k)
            for place, found in zip(part.tolist(), best, strict=True):
                basis = "popularity" if not asked.personal[place] else "history" if asked.read[place] else "user"
                answers.append(Recommendations(asked.names[place], basis, found))
        return answers

    def similar_items(self, item: str, k: int = 10) -> list[RecommendedItem]:
        """The k items whose keys have the largest cosine with that of `item`, itself left out.

        Raises: ValueError, k out of [1, I - 1]. DataError, an unknown id.
        """
        current = self._current
        k = _length(k, len(current.ids) - 1, "the other items")
        row = int(rows_of(current.ids, [str(item)], "item")[0])
        cosine = F.cosine_similarity(current.keys[row : row + 1], current.keys)
        cosine[row] = -torch.inf
        return _named(current, top_items(cosine.unsqueeze(0), k)[0], cosine)

    def explain(
        self, item: str, *, user: str | None = None, history: Sequence[str] | None = None, k: int = 3
    ) -> list[Reason]:
        """The history items that tie a user to `item`: by shared buyers, and by likeness in each modality.

        Args:
            item: Id of a recommended item.
            user: Id of a known user; the events count that `recommend` goes by.
            history: Item ids. Give this or `user`.
            k: Most reasons, >= 1. They alternate: the strongest by shared users, the strongest of each modality, ...
        Raises: ValueError, both or neither of `user` and `history`, or k < 1. DataError, an unknown id.
        """
        current = self._current
        rows = self._rows_of_history(current, user, history)
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        row = int(rows_of(current.ids, [str(item)], "item")[0])
        rows = np.unique(rows[rows != row])
        if not len(rows):
            return []
        shared = explain.shared_users(current.events.users, current.events.items, row, rows)
        links = explain.content_links(current.content, row, rows)
        keys, graph_view = explain.cosines(current.keys, row, rows), current.model.graph_view
        view = None if graph_view is None else explain.cosines(graph_view, row, rows)
        reasons = [
            Reason(
                current.ids.ids[rows[i]],
                current.titles[rows[i]],
                int(shared[i]),
                None if links is None else links[i],
                None if view is None else float(view[i]),
                float(keys[i]),
            )
            for i in explain.choose(shared, links, keys, k)
        ]
        for one in reasons:
            _check_finite(one.item, similarity=one.similarity, content_similarity=one.content_similarity)
        return reasons

    def hyperedges(self, item: str) -> list[Hyperedge]:
        """The hyperedges of the item hypergraph that hold an item; none where the run has no item content.

        Raises: DataError, an unknown id.
        """
        current = self._current
        row = int(rows_of(current.ids, [str(item)], "item")[0])
        if current.content is None:
            return []
        return hyperedges_of(current.content, current.model, row, current.ids, current.titles)

    @property
    def missing_hypergraph(self) -> str | None:
        """Why `without_hyperedge` cannot answer for this run, in a sentence; None where it can."""
        return self._current.missing_hypergraph

    def without_hyperedge(self, modality: str, name: str) -> Recommender:
        """The run as if one hyperedge of its item hypergraph had not been there.

        The hypergraph is convolved again without it, by the operators and with the weights as they were trained, so
        its answers are exact for the trained model; a training without the hyperedge would come to other weights. This
        one stays as it is.

        Args:
            modality: That the hyperedge is of, or an attribute.
            name: Id of the item it is around, or the value of the attribute; see `hyperedges`.
        Raises: ValueError, a run that does not hold what it takes (see `missing_hypergraph`), or no such hyperedge.
        """
        recommender = copy.copy(self)
        recommender._current = self._current.without_hyperedge(modality, name)
        return recommender

    def rank(self, item: str, *, user: str | None = None, history: Sequence[str] | None = None) -> int:
        """Place of an item, from 1 on, among the items that a user or a history has not had, itself included.

        It is the place in what `recommend` gives, where that names the item.

        Raises: ValueError, both or neither of `user` and `history`. DataError, an unknown id.
        """
        if (user is None) == (history is None):
            raise ValueError(f"give either user or history, got {'neither' if user is None else 'both'}")
        current = self._current
        row = int(rows_of(current.ids, [str(item)], "item")[0])
        asked = _Asked.of(current, user, None if history is None else [id_list(history, "history")])
        scores = current.scores(asked.rows, asked.histories, asked.read)[0] if asked.personal[0] else current.popularity
        own, scores = float(scores[row]), scores.clone()
        scores[torch.from_numpy(asked.histories.items)] = -torch.inf
        scores[row] = own
        return 1 + int((scores > own).sum()) + int((scores[:row] == own).sum())

    def lifts(
        self, items: Iterable[str], *, user: str | None = None, history: Sequence[str] | None = None
    ) -> list[dict[str, float]]:
        """How far each tower of a fused model lifts items above the mean item, for a user or a history.

        What the towers add to a score starts anywhere, and only differences between items rank them; so the mean over
        all items is taken off. The lifts of an item add up to its score less the mean score.

        Args:
            items: Ids, for example of a list of recommendations.
            user: Id of a known user.
            history: Item ids. Give this or `user`.
        Returns: Tower -> lift, the largest first, for each item; none of them for a model of one piece, or where there
            is no history to go by.
        Raises: ValueError, both or neither of `user` and `history`. DataError, an unknown id.
        """
        current = self._current
        rows = self._rows_of_history(current, user, history)
        chosen = torch.from_numpy(rows_of(current.ids, id_list(items, "items"), "item"))
        if not isinstance(current.model, ServedFused) or not len(rows):
            return [{} for _ in chosen]
        parts = current.model.parts(torch.tensor([0, len(rows)]), torch.from_numpy(rows))
        lifts = {name: (part[0, chosen] - part[0].mean()).tolist() for name, part in parts.items()}
        found = [dict(zip(lifts, values, strict=True)) for values in zip(*lifts.values(), strict=True)]
        return [dict(sorted(one.items(), key=lambda pair: -pair[1])) for one in found]

    def _rows_of_history(self, current: State, user: str | None, history: Sequence[str] | None) -> np.ndarray:
        """The events that a user is known by, or those of a history, in time order."""
        if (user is None) == (history is None):
            raise ValueError(f"give either user or history, got {'neither' if user is None else 'both'}")
        if history is not None:
            return rows_of(current.ids, id_list(history, "history"), "item")
        row = rows_of(current.user_ids, [str(user)], "user")[0]
        _, read = current.known(np.array([row]))
        events = slice(*current.events.histories.indptr[row:][:2])
        rows = current.events.items[events]
        return rows if read[0] else rows[current.events.split[events] == 0]

    def add_items(
        self,
        features: Mapping[str, ItemFeatures | np.ndarray | Tensor],
        ids: Iterable[str],
        titles: Sequence[str | None] | None = None,
        *,
        attributes: Mapping[str, Sequence[Sequence[str]]] | None = None,
    ) -> None:
        """Take up items that came after training; they rank at once, and nothing is trained.

        A new item joins the content hyperedges of its nearest items in each modality. Its key follows from theirs, as
        the model allows: see `ServedGraph`, `ServedSASRec` (the mean of its neighbours) and `ServedLLM`. Old items keep
        their rows, keys and scores, so old lists change only where a new item enters. In how many goes items are added
        does not matter. Other threads may ask meanwhile: they see all of the new items or none.

        Args:
            features: Modality -> rows [n, dim] as the encoder of the run's data gives them; rows of zeros are missing.
            ids: n ids that the run does not have.
            titles: n titles, None or "" where there is none.
            attributes: Attribute -> the values of each of the n items, e.g. {"brand": [["acme"], []]}; values that
                the run does not know are ignored.
        Raises: ValueError, a run without item content, features or attributes that it does not know, another width or
            count, an item without any feature or known value, ids that are known or repeated, or a model that cannot
            take items. Nothing has changed then.
        """
        with self._adding:
            self._current = self._current.with_items(features, ids, titles, attributes or {})

    def add_events(self, users: Iterable[str], items: Iterable[str]) -> None:
        """Take up events that came after training; they count from the next answer on, and nothing is trained.

        They are the last events of their users in the order given. A user that the run does not know is taken up. Who
        has such events is known by the history: sequence and language models read it, stage 1 folds it in
        (`hellm.models.FoldIn`). Answers of other users stay as they are, as does popularity, which counts training
        events. Evaluations do not read such events.

        Args:
            users: n ids, one of each event.
            items: n ids of known items.
        Raises: ValueError, counts that differ. DataError, an unknown item (naming the nearest ones). Nothing has
            changed then.
        """
        with self._adding:
            self._current = self._current.with_events(users, items)

    def history(self, user: str) -> list[RecommendedItem]:
        """All events of a user in time order; the score is the user's score of the item.

        Raises: DataError, an unknown id.
        """
        current = self._current
        row = rows_of(current.user_ids, [str(user)], "user")
        items = torch.from_numpy(current.events.histories.take(row).items)
        return _named(current, items, self._scores(current, row)[0])

    def has_training_events(self, users: np.ndarray, items: np.ndarray) -> bool:
        """Whether the run was trained on exactly these events, given as rows and grouped by user."""
        events = self._current.events
        train = events.split == 0
        return np.array_equal(events.users[train], users) and np.array_equal(events.items[train], items)


class _Asked(NamedTuple):
    """For whom lists are made.

    Attributes:
        names: Ids of users, None of histories.
        rows: [n] of the users.
        histories: What they have had.
        personal: [n] bool: there is anything to go by.
        read: [n] bool: known by the history.
    """

    names: Sequence[str | None]
    rows: np.ndarray
    histories: Histories
    personal: np.ndarray
    read: np.ndarray

    @classmethod
    def of(cls, current: State, users: str | Iterable[str] | None, histories: Any) -> _Asked:
        if users is not None:
            names = [users] if isinstance(users, str) else id_list(users, "users")
            rows = rows_of(current.user_ids, names, "user")
            return cls(names, rows, current.events.histories.take(rows), *current.known(rows))
        lists = history_lists(histories)
        asked = Histories.of_lists([rows_of(current.ids, history, "item") for history in lists])
        rows, read = np.zeros(len(lists), np.int64), np.ones(len(lists), bool)
        return cls([None] * len(lists), rows, asked, asked.lengths > 0, read)


def _best(
    items: State, scores: Tensor, personal: np.ndarray, seen: Histories | None, allowed: Tensor | None, k: int
) -> list:
    scores[torch.from_numpy(~personal)] = items.popularity
    if seen is not None:
        scores[torch.from_numpy(seen.owners), torch.from_numpy(seen.items)] = -torch.inf
    if allowed is not None:
        scores[:, ~allowed] = -torch.inf
    return [_named(items, best, own) for best, own in zip(top_items(scores, k), scores, strict=True)]


def _named(items: State, rows: Tensor, scores: Tensor) -> list[RecommendedItem]:
    rows = rows[rows >= 0]
    pairs = zip(rows.tolist(), scores[rows].tolist(), strict=True)
    found = [RecommendedItem(items.ids.ids[row], items.titles[row], score) for row, score in pairs]
    for one in found:
        _check_finite(one.item, score=one.score)
    return found


def _check_finite(item: str, **numbers: float | None) -> None:
    """What leaves a recommender is finite: JSON has no other numbers, and nothing can be ranked by them."""
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name} of item {item!r} must be finite, got {value}: the run has numbers that are not")


def _allowed(
    items: State,
    candidates: Iterable[str] | None,
    exclude: list[str],
    attributes: Mapping[str, Iterable[str]],
    filter: Callable[[str], bool] | None,
) -> Tensor | None:
    """[I] bool; None is all."""
    if candidates is None and filter is None and not exclude and not attributes:
        return None
    mask = torch.full((len(items.ids),), candidates is None)
    if candidates is not None:
        rows = rows_of(items.ids, id_list(candidates, "candidates"), "item")
        if not len(rows):
            raise ValueError("candidates must hold at least one item, got none")
        mask[torch.from_numpy(rows)] = True
    for name, values in attributes.items():
        if items.content is None:
            raise ValueError(f"attributes need item content, and the run holds no {CONTENT}")
        mask &= items.content.has_value(name, id_list(values, f"attributes[{name!r}]"))
    mask[torch.from_numpy(rows_of(items.ids, exclude, "item"))] = False
    if filter is not None:
        for row in mask.nonzero().squeeze(1).tolist():
            mask[row] = bool(filter(items.ids.ids[row]))
    return mask


def _length(k: int, most: int, what: str) -> int:
    try:
        length = operator.index(k)
    except TypeError:
        length = 0
    if not 1 <= length <= most:
        raise ValueError(f"k must be in [1, {most}] ({what}), got {k!r}")
    return length
