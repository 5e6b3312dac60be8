"""All that a recommender answers from, in one piece that never changes, and what takes its place when something comes.

U = users, I = items, n = new items, D = embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hellm._rows import dot_products
from hellm.artifact.files import CONTENT
from hellm.data import Histories, IdMap, ItemFeatures
from hellm.evaluate import HistoryScorer, history_scores
from hellm.models.graph.content import ItemContent
from hellm.recommend.catalogue import id_list, rows_of
from hellm.recommend.events import HISTORY, KNOWN, Events
from hellm.recommend.hyperedges import hyperedge_row, missing_hypergraph, same_queries, without_hyperedge
from hellm.recommend.served import NewItems, ServedModel

__all__ = ["QueryEncoder", "State"]

logger = logging.getLogger(__name__)


class QueryEncoder(Protocol):
    """Makes queries of histories in place of a model.

    Attributes:
        num_items: Items of the model when the encoder was made; those are all that it knows.
    """

    num_items: int

    def __call__(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries [B, D] float32 of histories in time order, given as CSR."""
        ...


@dataclass(frozen=True)
class State:
    """What `Recommender.add_items` and `add_events` replace: a reader sees the old or the new.

    Attributes:
        model: What gives queries and keys.
        content: What the items look and read like, or None.
        user_ids: Of the users.
        ids: Of the items.
        titles: [I].
        keys: [I, D] float32.
        popularity: [I] float32 training events.
        events: What is known of the users.
        encoder: What makes queries of histories; None is the model.
        scorers: (split, device) -> scorer, as they are asked for.
    """

    model: ServedModel
    content: ItemContent | None
    user_ids: IdMap
    ids: IdMap
    titles: list[str | None]
    keys: Tensor
    popularity: Tensor
    events: Events
    encoder: QueryEncoder | None = None
    scorers: dict[tuple[str, str], Any] = field(default_factory=dict)

    def scorer(self, split: str, device: str = "cpu") -> Any:
        """See `Recommender.scorer`; None where the trained embeddings of the users are the scorer."""
        on_cpu = torch.device(device).type == "cpu"
        if self.model.user is not None and not (self.events.split == HISTORY).any():
            return None if on_cpu and not self.events.has_arrived.any() else self.model.scorer_on(device)
        key = (split, device)
        if key not in self.scorers:
            model = self.model if on_cpu or self.model.user is not None else self.model.scorer_on(device)
            self.scorers[key] = HistoryScorer(model, *self.events.of_splits(KNOWN[split]))
        return self.scorers[key]

    def known(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of users [B]: whom there is anything to go by, and who is known by the history, both [B] bool."""
        arrived = self.events.has_arrived[rows]
        if self.model.user is None:
            return self.events.histories.lengths[rows] > 0, np.ones(len(rows), bool)
        return self.events.is_trained[rows] | arrived, arrived

    def scores(self, rows: np.ndarray, histories: Histories, read: np.ndarray) -> Tensor:
        """Scores [B, I] of all items for users.

        Args:
            rows: [B] of the users; of those who are known by the history, anything.
            histories: Of the users.
            read: [B] bool: who is known by the history; others by the trained embedding.
        """
        user = self.model.user
        if user is None or read.all():
            return self.history_scores(histories)
        by_row = torch.from_numpy(rows[~read])
        if not read.any():
            return dot_products(user[by_row], self.keys)
        scores = torch.empty(len(rows), len(self.ids))
        scores[torch.from_numpy(~read)] = dot_products(user[by_row], self.keys)
        scores[torch.from_numpy(read)] = self.history_scores(histories.take(np.flatnonzero(read)))
        return scores

    def history_scores(self, histories: Histories) -> Tensor:
        """Scores [B, I] of all items after histories."""
        queries = None if self.encoder is None else self._queries(self.encoder, histories)
        indptr, items = (torch.from_numpy(part) for part in histories)
        return history_scores(self.model, self.keys, indptr, items, queries)

    def _queries(self, encoder: QueryEncoder, histories: Histories) -> Tensor:
        """[B, D] of an encoder, and of the model where a history has items that the encoder does not know."""
        newer = np.zeros(len(histories.lengths), bool)
        newer[histories.owners[histories.items >= encoder.num_items]] = True
        queries = torch.empty(len(newer), self.keys.shape[1])
        for chosen, embed in ((~newer, encoder), (newer, self.model.embed)):
            if chosen.any():
                part = histories.take(np.flatnonzero(chosen))
                queries[torch.from_numpy(chosen)] = embed(*(torch.from_numpy(one) for one in part))
        return queries

    @cached_property
    def missing_hypergraph(self) -> str | None:
        """See `hellm.recommend.hyperedges.missing_hypergraph`."""
        return missing_hypergraph(self.model, self.content, self.popularity > 0)

    def without_hyperedge(self, modality: str, name: str) -> State:
        """See `Recommender.without_hyperedge`."""
        if self.content is None or self.missing_hypergraph is not None:
            raise ValueError(self.missing_hypergraph)
        row = hyperedge_row(self.content, self.ids, modality, name)
        trained = self.popularity > 0
        model, content = without_hyperedge(self.model, self.content, trained, modality, row)
        encoder = self.encoder if same_queries(self.model, model) else None
        return replace(self, model=model, content=content, keys=model.item_keys(), scorers={}, encoder=encoder)

    def with_events(self, users: Iterable[str], items: Iterable[str]) -> State:
        """See `Recommender.add_events`."""
        users, rows = id_list(users, "users"), rows_of(self.ids, id_list(items, "items"), "item")
        if len(users) != len(rows):
            raise ValueError(f"users and items must be of the same events, got {len(users)} and {len(rows)}")
        if not users:
            return self
        known = self.user_ids
        if not all(user in known for user in users):
            known = known.copy()
            known.add(users)
        events = self.events.extended(known.indices(users), rows, len(known))
        return replace(self, user_ids=known, events=events, scorers={})

    def with_items(
        self,
        features: Mapping[str, ItemFeatures | np.ndarray | Tensor],
        ids: Iterable[str],
        titles: Sequence[str | None] | None,
        attributes: Mapping[str, Sequence[Sequence[str]]],
    ) -> State:
        """See `Recommender.add_items`."""
        content = self.content
        if content is None:
            raise ValueError(f"new items need item content, and the run holds no {CONTENT}: its data had no features")
        tensors = {name: _as_tensor(one) for name, one in features.items()} | content.indicators(attributes)
        # Sums over modalities have the same bits in whatever order they are given.
        places = {name: place for place, name in enumerate(content.modalities)}
        tensors = dict(sorted(tensors.items(), key=lambda pair: places.get(pair[0], len(places))))
        known = self.ids.copy()
        names = _new_ids(ids, known, self.ids)
        texts: list[str | None] = [None] * len(names)
        if titles is not None:
            texts = [one or None for one in id_list(titles, "titles", missing=True)]
        counts = {"titles": len(texts)} | {f"features[{key!r}]": len(x) for key, x in tensors.items()}
        for name, count in counts.items():
            if count != len(names):
                raise ValueError(f"{name} must be of the {len(names)} new items, got {count}")
        if not names:
            return self
        new = NewItems.of(tensors, texts, content, self.popularity[: content.num_placing] > 0)
        placed = torch.stack([x.any(dim=1) for x in tensors.values()]).any(dim=0)
        if not placed.all():
            lost = names[int((~placed).nonzero()[0])]
            raise ValueError(f"features must place every item, but item {lost!r} has none in {', '.join(tensors)}")
        alone = np.setdiff1d(np.arange(len(names)), new.weights.indices()[0].numpy())
        if len(alone):
            logger.warning(
                "%d new items, %s first, are like no item with training events: they rank by content alone",
                len(alone),
                names[int(alone[0])],
            )
        model = self.model.extended(new)
        keys = model.item_keys()
        broken = (~torch.isfinite(keys[len(self.keys) :]).all(dim=1)).nonzero()
        if len(broken):
            lost = names[int(broken[0])]
            raise ValueError(f"features must give every item a finite key, but item {lost!r} gets NaN or infinity")
        return replace(
            self,
            model=model,
            content=content.extended(tensors, new.nearest),
            ids=known,
            titles=self.titles + texts,
            keys=keys,
            popularity=torch.cat([self.popularity, torch.zeros(len(names))]),
            scorers={},
        )


def _new_ids(ids: Iterable[str], known: IdMap, before: IdMap) -> list[str]:
    """The ids, added to `known`."""
    names = [ids] if isinstance(ids, str) else id_list(ids, "ids")
    for name in names:
        if name in known:
            raise ValueError(f"ids must be new and distinct, got {name!r} {'again' if name in before else 'twice'}")
        known.add([name])
    return names


def _as_tensor(features: ItemFeatures | np.ndarray | Tensor) -> Tensor:
    if isinstance(features, ItemFeatures):
        features = np.where(features.mask[:, None], features.values, np.float32(0))
    return torch.as_tensor(features).float()
