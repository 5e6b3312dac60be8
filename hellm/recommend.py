"""Recommendations from a finished run: for known users, for bare histories, and items like an item.

U = users, I = items, D = embedding width, B = users asked for at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm.data import DataError, IdMap
from hellm.data._files import new_folder
from hellm.evaluate import top_items
from hellm.models import FoldIn

if TYPE_CHECKING:
    import polars as pl

__all__ = ["Reason", "Recommendations", "RecommendedItem", "Recommender"]

_BATCH = 1024
# Above this many ids the nearest names are looked for among those with the same beginning only.
_MAX_COMPARED = 20_000


@dataclass(frozen=True)
class RecommendedItem:
    """One item of a list: its id, its title if it has one, and the score it is ranked by."""

    item: str
    title: str | None
    score: float


@dataclass(frozen=True)
class Recommendations:
    """The list of one user.

    Attributes:
        user: Id, None for a bare history.
        basis: What the scores are: "user" (the trained user embedding), "history" (an embedding made from the history)
            or "popularity" (training events per item), where there is no history to go by.
        items: Best first.
    """

    user: str | None
    basis: Literal["user", "history", "popularity"]
    items: list[RecommendedItem]

    def __iter__(self) -> Iterator[RecommendedItem]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes."""
        return asdict(self)


@dataclass(frozen=True)
class Reason:
    """What ties one history item to a recommended item.

    Attributes:
        item: Id of the history item.
        title: Its title, if it has one.
        shared_users: Users with events on both items.
        content_similarity: Cosine in the item hypergraph's embedding, which comes from pictures, texts and the like;
            None where the run has no item hypergraph.
        similarity: Cosine of the two items' full embeddings.
    """

    item: str
    title: str | None
    shared_users: int
    content_similarity: float | None
    similarity: float


class Recommender:
    """Answers from embeddings, ids and histories alone; neither the data set nor the model is needed.

    `Recommender.load(run_directory)` makes one. A user scores an item by the dot product of their embeddings.

    Args:
        tensors: As in embeddings.safetensors: "user" [U, D], "item" [I, D], "fold_in_source" [I, D], and where the run
            has them "fold_in_view" [I, D] and "item_hypergraph" [I, D].
        fold_in_exponent: See `hellm.models.FoldIn`.
        ids: As in ids.parquet: side, index, id, title.
        histories: As in histories.parquet: user, item, split, grouped by user and in time order.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], fold_in_exponent: float, ids: pl.DataFrame, histories: pl.DataFrame
    ) -> None:
        self._tensors, self._ids, self._events = dict(tensors), ids, histories
        self.user, self.item = tensors["user"], tensors["item"]
        self.fold_in = FoldIn(tensors["fold_in_source"], tensors.get("fold_in_view"), fold_in_exponent)
        self.user_ids, _ = _side(ids, "user")
        self.item_ids, self.item_titles = _side(ids, "item")
        # Copies: torch does not take the read-only arrays that a table lends.
        users, self._items = (np.array(histories[name]) for name in ("user", "item"))
        train = self._is_train = histories["split"].to_numpy() == 0
        self._indptr = np.concatenate([[0], np.bincount(users, minlength=self.num_users).cumsum()])
        self._is_trained = np.bincount(users[train], minlength=self.num_users) > 0
        self.popularity = torch.from_numpy(np.bincount(self._items[train], minlength=self.num_items)).float()

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @classmethod
    def load(cls, path: str | Path) -> Recommender:
        """The recommender of a finished run, or one that `save` wrote.

        Raises: FileNotFoundError, no such folder or a run without its outputs. DataError, a damaged file.
        """
        import polars as pl
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_dir():
            raise FileNotFoundError(f"run directory {path} does not exist")
        for name in ("embeddings.safetensors", "ids.parquet", "histories.parquet"):
            if not (path / name).is_file():
                raise FileNotFoundError(f"{path} holds no {name}: it is no run directory, or the run is not finished")
        file = path / "embeddings.safetensors"
        try:
            with safe_open(file, framework="pt") as content:
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (not a mapping)
                exponent = float((content.metadata() or {})["fold_in_exponent"])
            file = path / "ids.parquet"
            ids = pl.read_parquet(file)
            file = path / "histories.parquet"
            histories = pl.read_parquet(file)
            recommender = cls(tensors, exponent, ids, histories)
        except (SafetensorError, pl.exceptions.PolarsError, KeyError) as error:
            raise DataError(f"{file}: damaged or not of a run: {error}") from None
        recommender._check_sizes(path)
        return recommender

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write what `load` needs, and nothing else of the run, into a new folder.

        Raises: FileExistsError, the folder exists and `overwrite` is False, or it holds no recommender to overwrite.
        """
        from safetensors.torch import save_file

        path = Path(path)
        if overwrite and path.exists() and not (path / "embeddings.safetensors").is_file():
            raise FileExistsError(f"{path} holds no embeddings.safetensors, so it is no recommender to overwrite")
        with new_folder(path, overwrite=overwrite) as new:
            metadata = {"fold_in_exponent": str(self.fold_in.exponent)}
            save_file(self._tensors, new / "embeddings.safetensors", metadata=metadata)
            self._ids.write_parquet(new / "ids.parquet")
            self._events.write_parquet(new / "histories.parquet")
        return path

    def scores(self, users: Tensor) -> Tensor:
        """[B] int64 rows of the user table -> [B, I] float32: the scorer that `hellm.evaluate` takes."""
        return self.user[users] @ self.item.T

    def recommend(
        self,
        users: str | Iterable[str] | None = None,
        histories: Sequence[str] | Sequence[Sequence[str]] | None = None,
        k: int = 10,
        *,
        exclude_seen: bool = True,
        candidates: Iterable[str] | None = None,
    ) -> list[Recommendations]:
        """The k best items of each user, or of each bare history.

        Users without training events and empty histories get the most popular items, and `basis` says so. A history is
        embedded by `hellm.models.FoldIn`, so it may be of somebody the run has never seen.

        Args:
            users: Ids of known users.
            histories: Item ids of one history, or several such histories. Give this or `users`.
            k: List length, 1 <= k <= I. Lists are shorter where fewer items are left.
            exclude_seen: Leave out all items of the history: for known users, of all their events.
            candidates: Item ids to choose from, e.g. what is in stock; None is all.
        Returns: One list per user or history, in their order; equal scores by item row.
        Raises: ValueError, both or neither of `users` and `histories`, k out of range, or no candidates. DataError, an
            unknown id (naming the nearest ones).
        """
        if (users is None) == (histories is None):
            raise ValueError(f"give either users or histories, got {'neither' if users is None else 'both'}")
        self._check_k(k)
        allowed = self._candidate_mask(candidates)
        if users is not None:
            names = [users] if isinstance(users, str) else [str(one) for one in users]
            rows = _rows(self.user_ids, names, "user")
            indptr, seen = _take_rows(self._indptr, self._items, rows)
            vectors, personal, basis = self.user[torch.from_numpy(rows)], self._is_trained[rows], "user"
        else:
            lists = _history_lists(histories)
            names, basis = [None] * len(lists), "history"
            seen = _rows(self.item_ids, [one for history in lists for one in history], "item")
            indptr = np.concatenate([[0], np.cumsum([len(history) for history in lists], dtype=np.int64)])
            vectors, personal = self.fold_in.embed(indptr, seen), np.diff(indptr) > 0
        answers = []
        for start in range(0, len(names), _BATCH):
            part = slice(start, start + _BATCH)
            own_seen = _take_rows(indptr, seen, np.arange(len(names))[part]) if exclude_seen else None
            lists_of_items = self._best(vectors[part], personal[part], own_seen, allowed, k)
            for name, is_personal, items in zip(names[part], personal[part], lists_of_items, strict=True):
                answers.append(Recommendations(name, basis if is_personal else "popularity", items))
        return answers

    def similar_items(self, item: str, k: int = 10) -> list[RecommendedItem]:
        """The k items whose embeddings have the largest cosine with that of `item`, itself left out.

        Raises: ValueError, k out of [1, I - 1]. DataError, an unknown id.
        """
        if not 1 <= k < self.num_items:
            raise ValueError(f"k must be in [1, {self.num_items - 1}] (the other items), got {k}")
        row = int(_rows(self.item_ids, [str(item)], "item")[0])
        cosine = F.cosine_similarity(self.item[row : row + 1], self.item)
        cosine[row] = -torch.inf
        return self._named(top_items(cosine.unsqueeze(0), k)[0], cosine)

    def explain(
        self, item: str, *, user: str | None = None, history: Sequence[str] | None = None, k: int = 3
    ) -> list[Reason]:
        """The k items of a history that stand closest to `item`, with what ties them to it.

        Args:
            item: Id of a recommended item.
            user: Id of a known user; the training history counts.
            history: Item ids. Give this or `user`.
            k: Most reasons, >= 1.
        Raises: ValueError, both or neither of `user` and `history`, or k < 1. DataError, an unknown id.
        """
        if (user is None) == (history is None):
            raise ValueError(f"give either user or history, got {'neither' if user is None else 'both'}")
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        row = int(_rows(self.item_ids, [str(item)], "item")[0])
        if user is not None:
            events = slice(*self._indptr[_rows(self.user_ids, [str(user)], "user")[0] :][:2])
            rows = self._items[events][self._is_train[events]]
        else:
            rows = _rows(self.item_ids, history, "item")
        rows = np.unique(rows[rows != row])
        if not len(rows):
            return []
        buyers = self._events["user"].to_numpy()
        of_item = np.isin(buyers, buyers[self._items == row])
        pairs = np.unique(np.stack([buyers[of_item], self._items[of_item]]), axis=1)
        shared = np.bincount(pairs[1], minlength=self.num_items)[rows]
        full, content = (_cosines(self._tensors.get(name), row, rows) for name in ("item", "item_hypergraph"))
        order = np.lexsort((rows, -full, -shared))[:k]
        return [
            Reason(
                self.item_ids.ids[rows[i]],
                self.item_titles[rows[i]],
                int(shared[i]),
                None if content is None else float(content[i]),
                float(full[i]),
            )
            for i in order
        ]

    def history(self, user: str) -> list[RecommendedItem]:
        """All events of a user in time order; the score is the user's score of the item.

        Raises: DataError, an unknown id.
        """
        row = int(_rows(self.user_ids, [str(user)], "user")[0])
        items = torch.from_numpy(self._items[self._indptr[row] : self._indptr[row + 1]])
        return self._named(items, self.scores(torch.tensor([row]))[0])

    def has_training_events(self, users: np.ndarray, items: np.ndarray) -> bool:
        """Whether the run was trained on exactly these events, given as rows and grouped by user."""
        own_users, own_items = (self._events[name].to_numpy()[self._is_train] for name in ("user", "item"))
        return np.array_equal(own_users, users) and np.array_equal(own_items, items)

    def _best(self, vectors: Tensor, personal: np.ndarray, seen, allowed: Tensor | None, k: int) -> list:
        scores = vectors @ self.item.T
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

    def _candidate_mask(self, candidates: Iterable[str] | None) -> Tensor | None:
        if candidates is None:
            return None
        rows = _rows(self.item_ids, [str(one) for one in candidates], "item")
        if not len(rows):
            raise ValueError("candidates must hold at least one item, got none")
        mask = torch.zeros(self.num_items, dtype=torch.bool)
        mask[torch.from_numpy(rows)] = True
        return mask

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.num_items:
            raise ValueError(f"k must be in [1, {self.num_items}] (the number of items), got {k}")

    def _check_sizes(self, path: Path) -> None:
        for name, table, count in (("user", self.user, self.num_users), ("item", self.item, self.num_items)):
            if len(table) != count:
                raise DataError(f"{path}: ids.parquet names {count} {name}s, embeddings.safetensors has {len(table)}")


def _side(ids: pl.DataFrame, side: str) -> tuple[IdMap, list[str | None]]:
    rows = ids.filter(ids["side"] == side).sort("index")
    return IdMap(rows["id"].to_list()), [title or None for title in rows["title"].to_list()]


def _rows(ids: IdMap, names: Iterable[str], kind: str) -> np.ndarray:
    """Rows [n] int64 of ids; an unknown one is an error that names the nearest."""
    names = [str(one) for one in names]
    for name in names:
        if name not in ids:
            nearest = _nearest(name, ids.ids)
            hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
            raise DataError(f"unknown {kind} {name!r} among the {len(ids)} {kind}s of the run{hint}")
    return ids.indices(names)


def _nearest(name: str, known: Sequence[str]) -> list[str]:
    if len(known) > _MAX_COMPARED:
        known = [one for one in known if one[:2] == name[:2]][:_MAX_COMPARED]
    return difflib.get_close_matches(name, known, n=3, cutoff=0.5)


def _history_lists(histories: Sequence[str] | Sequence[Sequence[str]]) -> list[list[str]]:
    if isinstance(histories, str):
        raise ValueError(f"histories must be a list of item ids or of such lists, got the text {histories!r}")
    lists = list(histories)
    is_single = not lists or not isinstance(lists[0], (list, tuple, np.ndarray))
    return [[str(one) for one in history] for history in ([lists] if is_single else lists)]


def _take_rows(indptr: np.ndarray, items: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The CSR of some rows of a CSR."""
    count = indptr[rows + 1] - indptr[rows]
    new = np.concatenate([[0], np.cumsum(count, dtype=np.int64)])
    place = np.arange(new[-1]) + np.repeat(indptr[rows] - new[:-1], count)
    return new, items[place]


def _cosines(table: Tensor | None, row: int, rows: np.ndarray) -> np.ndarray | None:
    if table is None:
        return None
    return F.cosine_similarity(table[row : row + 1], table[torch.from_numpy(rows)]).numpy()
