"""The recommender over any model: for known users, for bare histories, items like an item, reasons, and new items.

U = users, I = items, D = embedding width, B = users asked for at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._folders import new_folder
from hellm.data import DataError, IdMap, ItemFeatures
from hellm.evaluate import HistoryScorer, top_items
from hellm.models.item_content import ItemContent
from hellm.recommend import explain
from hellm.recommend.catalogue import history_lists, rows_of, side_of, take_rows
from hellm.recommend.results import Reason, Recommendations, RecommendedItem
from hellm.recommend.served import NewItems, ServedModel, load_served

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Recommender"]

logger = logging.getLogger(__name__)

_BATCH = 1024
_CONTENT = "content.safetensors"
# Splits whose events a user is known by, when an event of the key is to be found.
_KNOWN = {"valid": (0,), "test": (0, 1)}


class Recommender:
    """Answers from a run directory alone; the data set is not needed.

    `Recommender.load(run_directory)` makes one, whatever the run is of. What an item scores for a user is the dot
    product of the user's query and the item's key.

    Args:
        model: What gives queries and keys, see `hellm.recommend.served`.
        ids: As in ids.parquet: side, index, id, title.
        histories: As in histories.parquet: user, item, split, grouped by user and in time order.
        content: What the items look and read like, for reasons and for new items; None where the run has no features.

    Raises: ValueError, tables that do not fit the ids.
    """

    def __init__(
        self, model: ServedModel, ids: pl.DataFrame, histories: pl.DataFrame, content: ItemContent | None = None
    ) -> None:
        self.model, self.content = model, content
        self._ids, self._events = ids, histories
        self.user_ids, _ = side_of(ids, "user")
        self.item_ids, self.item_titles = side_of(ids, "item")
        self.item = model.item_keys()
        tables = {"user": (model.user, self.num_users), "item": (self.item, self.num_items)}
        for name, (table, count) in tables.items():
            if table is not None and len(table) != count:
                raise ValueError(f"ids must name the {len(table)} {name}s of the model, got {count}")
        # Copies: torch does not take the read-only arrays that a table lends.
        self._users, self._items, self._split = (np.array(histories[name]) for name in ("user", "item", "split"))
        self._indptr = np.concatenate([[0], np.bincount(self._users, minlength=self.num_users).cumsum()])
        self._is_trained = np.bincount(self._users[self._split == 0], minlength=self.num_users) > 0
        trained = self._items[self._split == 0]
        self.popularity = torch.from_numpy(np.bincount(trained, minlength=self.num_items)).float()
        self._scorers: dict[tuple[str, str], Any] = {}

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @classmethod
    def load(cls, path: str | Path, *, device: str = "cpu") -> Recommender:
        """The recommender of a finished run of stage 1, SASRec or fine-tuning, or one that `save` wrote.

        `device` is where SASRec and language models read histories; answers and tables stay on the CPU.

        Raises: FileNotFoundError, no such folder or a run without its outputs. DataError, a damaged file. For a
            fine-tuning run also what `RecommenderLLM.from_pretrained` raises.
        """
        import polars as pl
        from safetensors import SafetensorError

        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"run directory {path} does not exist")
        for name in ("embeddings.safetensors", "ids.parquet", "histories.parquet"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} holds no {name}: it is no run directory, or the run is not finished")
        file = path / "ids.parquet"
        try:
            ids = pl.read_parquet(file, glob=False)
            _, titles = side_of(ids, "item")
            file = path / "histories.parquet"
            histories = pl.read_parquet(file, glob=False)
            file = path / "embeddings.safetensors"
            model = load_served(path, titles)
            model.to(device)
        except (SafetensorError, pl.exceptions.PolarsError, KeyError) as error:
            raise DataError(f"{file}: damaged or not of a run: {error}") from None
        content = ItemContent.load(path / _CONTENT) if (path / _CONTENT).is_file() else None
        try:
            return cls(model, ids, histories, content)
        except ValueError as error:
            raise DataError(f"{path}: {error}") from None

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `load` needs, and nothing else of the run, into a new folder.

        Raises: FileExistsError, the folder is not empty and `overwrite` is False, or it is not one that `save` wrote.
        """
        path = Path(path)
        with new_folder(path, kind="recommender", overwrite=overwrite) as new:
            self.model.save(new)
            self._ids.write_parquet(new / "ids.parquet")
            self._events.write_parquet(new / "histories.parquet")
            if self.content is not None:
                self.content.save(new / _CONTENT)
        return path

    def scorer(self, split: str, device: str = "cpu") -> Any:
        """The scorer that `hellm.evaluate` takes, for finding events of `split`: "valid" or "test".

        With a model of histories, users are known by their events before that split; else by their trained embedding.

        Raises: ValueError, another split.
        """
        if split not in _KNOWN:
            raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
        on_cpu = torch.device(device).type == "cpu"
        if self.model.user is not None:
            return self if on_cpu else self.model.scorer_on(device)
        key = (split, device)
        if key not in self._scorers:
            known = np.isin(self._split, _KNOWN[split])
            indptr = np.concatenate([[0], np.bincount(self._users[known], minlength=self.num_users).cumsum()])
            items = torch.from_numpy(self._items[known])
            model = self.model if on_cpu else self.model.scorer_on(device)
            self._scorers[key] = HistoryScorer(model, torch.from_numpy(indptr), items)
        return self._scorers[key]

    def scores(self, users: Tensor) -> Tensor:
        """[B] int64 rows of the users -> [B, I] float32, by what the model knows of them from training events."""
        if self.model.user is not None:
            return self.model.user[users] @ self.item.T
        return self.scorer("valid").scores(users)

    def recommend(
        self,
        users: str | Iterable[str] | None = None,
        histories: Sequence[str] | Sequence[Sequence[str]] | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
        filter: Callable[[str], bool] | None = None,
    ) -> list[Recommendations]:
        """The k best items of each user, or of each bare history.

        Stage 1 knows its users by trained embeddings; other models read all of a user's events. Users without events to
        go by (for stage 1: training events) and empty histories get the most popular items, and `basis` says so. A bare
        history may be of somebody the run has never seen.

        Args:
            users: Ids of known users.
            histories: Item ids of one history, in time order, or several such histories. Give this or `users`.
            k: List length, 1 <= k <= I. Lists are shorter where fewer items are left.
            exclude_seen: Leave out all items of the history: for known users, of all their events.
            candidates: Item ids to choose from, e.g. what is in stock; None is all.
            filter: Item id -> whether it may be recommended; asked once for each candidate.
        Returns: One list per user or history, in their order; equal scores by item row.
        Raises: ValueError, both or neither of `users` and `histories`, k out of range, or no candidates. DataError, an
            unknown id (naming the nearest ones).
        """
        if (users is None) == (histories is None):
            raise ValueError(f"give either users or histories, got {'neither' if users is None else 'both'}")
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k must be in [1, {self.num_items}] (the number of items), got {k}")
        allowed = self._allowed(candidates, filter)
        rows, basis = None, "history"
        if users is not None:
            names = [users] if isinstance(users, str) else [str(one) for one in users]
            rows = rows_of(self.user_ids, names, "user")
            indptr, items = take_rows(self._indptr, self._items, rows)
        else:
            lists = history_lists(histories)
            names = [None] * len(lists)
            items = rows_of(self.item_ids, [one for history in lists for one in history], "item")
            indptr = np.concatenate([[0], np.cumsum([len(history) for history in lists], dtype=np.int64)])
        personal = np.diff(indptr) > 0
        if rows is not None and self.model.user is not None:
            personal, basis = self._is_trained[rows], "user"
        answers = []
        for start in range(0, len(names), _BATCH):
            part = np.arange(start, min(start + _BATCH, len(names)))
            own = take_rows(indptr, items, part)
            if basis == "user":
                queries = self.model.user[torch.from_numpy(rows[part])]
            else:
                queries = self.model.embed(*(torch.from_numpy(one) for one in own))
            best = self._best(queries, personal[part], own if exclude_seen else None, allowed, k)
            for place, found in zip(part.tolist(), best, strict=True):
                answers.append(Recommendations(names[place], basis if personal[place] else "popularity", found))
        return answers

    def similar_items(self, item: str, k: int = 10) -> list[RecommendedItem]:
        """The k items whose keys have the largest cosine with that of `item`, itself left out.

        Raises: ValueError, k out of [1, I - 1]. DataError, an unknown id.
        """
        if not 1 <= k < self.num_items:
            raise ValueError(f"k must be in [1, {self.num_items - 1}] (the other items), got {k}")
        row = int(rows_of(self.item_ids, [str(item)], "item")[0])
        cosine = F.cosine_similarity(self.item[row : row + 1], self.item)
        cosine[row] = -torch.inf
        return self._named(top_items(cosine.unsqueeze(0), k)[0], cosine)

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
        if (user is None) == (history is None):
            raise ValueError(f"give either user or history, got {'neither' if user is None else 'both'}")
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        row = int(rows_of(self.item_ids, [str(item)], "item")[0])
        if user is not None:
            events = slice(*self._indptr[rows_of(self.user_ids, [str(user)], "user")[0] :][:2])
            rows = self._items[events]
            if self.model.user is not None:
                rows = rows[self._split[events] == 0]
        else:
            rows = rows_of(self.item_ids, history, "item")
        rows = np.unique(rows[rows != row])
        if not len(rows):
            return []
        shared = explain.shared_users(self._users, self._items, row, rows)
        links = explain.content_links(self.content, row, rows)
        keys, view = (explain.cosines(table, row, rows) for table in (self.item, self.model.graph_view))
        return [
            Reason(
                self.item_ids.ids[rows[i]],
                self.item_titles[rows[i]],
                int(shared[i]),
                None if links is None else links[i],
                None if view is None else float(view[i]),
                float(keys[i]),
            )
            for i in explain.choose(shared, links, keys, k)
        ]

    def add_items(
        self,
        features: Mapping[str, ItemFeatures | np.ndarray | Tensor],
        ids: Iterable[str],
        titles: Sequence[str | None] | None = None,
    ) -> None:
        """Take up items that came after training; they rank at once, and nothing is trained.

        A new item joins the content hyperedges of its nearest items in each modality. Its key follows from theirs, as
        the model allows: see `ServedGraph`, `ServedSASRec` (the mean of its neighbours) and `ServedLLM`. Old items keep
        their rows, keys and scores, so old lists change only where a new item enters. In how many goes items are added
        does not matter.

        Args:
            features: Modality -> rows [n, dim] as the encoder of the run's data gives them; rows of zeros are missing.
            ids: n ids that the run does not have.
            titles: n titles, None or "" where there is none.
        Raises: ValueError, a run without item content, features of an unknown modality, another width or count, an item
            without any feature, ids that are known or repeated, or a model that cannot take items. Nothing has changed
            then.
        """
        if self.content is None:
            raise ValueError(f"new items need item content, and the run holds no {_CONTENT}: its data had no features")
        tensors = {name: _as_tensor(one) for name, one in features.items()}
        known = self.item_ids.copy()
        names = self._new_ids(ids, known)
        titles = [None] * len(names) if titles is None else [one or None for one in titles]
        for name, count in {
            "titles": len(titles),
            **{f"features[{key!r}]": len(x) for key, x in tensors.items()},
        }.items():
            if count != len(names):
                raise ValueError(f"{name} must be of the {len(names)} new items, got {count}")
        if not names:
            return
        nearest = self.content.nearest(tensors)
        placed = torch.stack([x.any(dim=1) for x in tensors.values()]).any(dim=0)
        if not placed.all():
            lost = names[int((~placed).nonzero()[0])]
            raise ValueError(f"features must place every item, but item {lost!r} has none in {', '.join(tensors)}")
        weights = self.content.weights(nearest, self.popularity[: self.content.num_placing] > 0)
        alone = np.setdiff1d(np.arange(len(names)), weights.indices()[0].numpy())
        if len(alone):
            logger.warning(
                "%d new items, %s first, are like no item with training events: they rank by content alone",
                len(alone),
                names[int(alone[0])],
            )
        self.model.add(NewItems(tensors, titles, self.content, nearest, weights))
        self.content = self.content.extended(tensors, nearest)
        self._append_ids(names, titles, known)

    def history(self, user: str) -> list[RecommendedItem]:
        """All events of a user in time order; the score is the user's score of the item.

        Raises: DataError, an unknown id.
        """
        row = int(rows_of(self.user_ids, [str(user)], "user")[0])
        items = torch.from_numpy(self._items[self._indptr[row] : self._indptr[row + 1]])
        return self._named(items, self.scores(torch.tensor([row]))[0])

    def has_training_events(self, users: np.ndarray, items: np.ndarray) -> bool:
        """Whether the run was trained on exactly these events, given as rows and grouped by user."""
        train = self._split == 0
        return np.array_equal(self._users[train], users) and np.array_equal(self._items[train], items)

    def _best(self, queries: Tensor, personal: np.ndarray, seen, allowed: Tensor | None, k: int) -> list:
        scores = queries @ self.item.T
        scores[torch.from_numpy(~personal)] = self.popularity
        if seen is not None:
            indptr, items = seen
            row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
            scores[torch.from_numpy(row), torch.from_numpy(items)] = -torch.inf
        if allowed is not None:
            scores[:, ~allowed] = -torch.inf
        return [self._named(items, own) for items, own in zip(top_items(scores, k), scores, strict=True)]

    def _named(self, items: Tensor, scores: Tensor) -> list[RecommendedItem]:
        rows = items[items >= 0]
        pairs = zip(rows.tolist(), scores[rows].tolist(), strict=True)
        return [RecommendedItem(self.item_ids.ids[row], self.item_titles[row], score) for row, score in pairs]

    def _allowed(self, candidates: Iterable[str] | None, filter: Callable[[str], bool] | None) -> Tensor | None:
        if candidates is None and filter is None:
            return None
        rows = np.arange(self.num_items)
        if candidates is not None:
            rows = rows_of(self.item_ids, [str(one) for one in candidates], "item")
            if not len(rows):
                raise ValueError("candidates must hold at least one item, got none")
        if filter is not None:
            rows = np.array([row for row in np.unique(rows).tolist() if filter(self.item_ids.ids[row])], dtype=np.int64)
        mask = torch.zeros(self.num_items, dtype=torch.bool)
        mask[torch.from_numpy(rows)] = True
        return mask

    def _new_ids(self, ids: Iterable[str], known: IdMap) -> list[str]:
        """The ids, added to `known`."""
        names = [ids] if isinstance(ids, str) else [str(one) for one in ids]
        for name in names:
            if name in known:
                raise ValueError(
                    f"ids must be new and distinct, got {name!r} {'again' if name in self.item_ids else 'twice'}"
                )
            known.add([name])
        return names

    def _append_ids(self, names: list[str], titles: list[str | None], known: IdMap) -> None:
        import polars as pl

        rows = {
            "side": ["item"] * len(names),
            "index": [*range(self.num_items, len(known))],
            "id": names,
            "title": titles,
        }
        self._ids = pl.concat([self._ids, pl.DataFrame(rows, schema=self._ids.schema)])
        self.item_ids, self.item_titles = known, self.item_titles + titles
        self.popularity = torch.cat([self.popularity, torch.zeros(len(names))])
        self.item, self._scorers = self.model.item_keys(), {}


def _as_tensor(features: ItemFeatures | np.ndarray | Tensor) -> Tensor:
    if isinstance(features, ItemFeatures):
        features = np.where(features.mask[:, None], features.values, np.float32(0))
    return torch.as_tensor(features).float()
