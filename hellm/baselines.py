"""Simple recommenders to compare with: popularity, chance, and ItemKNN, BPR and ALS through the `implicit` library.

All follow the scorer contract of `hellm.evaluate`: `scores(users)`, [B] int64 -> [B, num_items] float32.
The default settings were chosen on the validation splits of the TikTok and Beauty data sets.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
import torch

from hellm.data import Dataset, Histories


@runtime_checkable
class Events(Protocol):
    """What is read of a `Dataset`."""

    @property
    def num_users(self) -> int: ...

    @property
    def num_items(self) -> int: ...

    def pairs(self, split: str) -> tuple[np.ndarray, np.ndarray]: ...


Interactions: TypeAlias = Events | tuple[np.ndarray, np.ndarray]


class Baseline:
    """Shared part: reading the training pairs, and the checks around `scores`.

    Attributes:
        num_users, num_items: Sizes seen in `fit`.
    """

    num_users: int
    num_items: int

    def fit(self, data: Interactions, num_users: int | None = None, num_items: int | None = None) -> Baseline:
        """Fits on the training events only.

        Args:
            data: A `Dataset` (its train split is used), or a pair (users, items) of [n] integer arrays.
            num_users, num_items: Sizes; required with arrays, taken from the data set otherwise.
        Returns: self.
        Raises: ValueError, sizes missing or exceeded, or no events. ImportError, without the `implicit` library.
        """
        if isinstance(data, Events):
            users, items = data.pairs("train")
            num_users, num_items = data.num_users, data.num_items
        else:
            users, items = (np.asarray(part, dtype=np.int64) for part in data)
        if num_users is None or num_items is None:
            raise ValueError("num_users and num_items must be given with arrays of pairs")
        if users.shape != items.shape or users.ndim != 1:
            raise ValueError(
                f"users and items must be 1-dimensional and equally long, got {users.shape}, {items.shape}"
            )
        if not len(users):
            raise ValueError("training pairs must not be empty")
        for name, values, size in (("users", users, num_users), ("items", items, num_items)):
            _check_range(name, values, size)
        self.num_users, self.num_items = int(num_users), int(num_items)
        self._fit(users, items)
        return self

    def scores(self, users: torch.Tensor) -> torch.Tensor:
        """[B] int64 user indices -> [B, num_items] float32, higher is better; to be read, not written.

        Raises: RuntimeError, before `fit`. ValueError, a user out of range.
        """
        if not hasattr(self, "num_users"):
            raise RuntimeError(f"{type(self).__name__} must be fitted before scores() is called")
        index = torch.as_tensor(users).cpu().numpy()
        _check_range("users", index, self.num_users)
        return self._scores(index)

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        raise NotImplementedError

    def _scores(self, users: np.ndarray) -> torch.Tensor:
        raise NotImplementedError


class Popularity(Baseline):
    """Every user gets the items with the most training events."""

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        self.item_counts = torch.from_numpy(np.bincount(items, minlength=self.num_items).astype(np.float32))

    def _scores(self, users: np.ndarray) -> torch.Tensor:
        return self.item_counts.expand(len(users), -1)


class Random(Baseline):
    """Every user gets the items in an order of the user's own: what is found without knowing anything.

    Args:
        seed: Of the orders. A user has the same in every batch.
    """

    def __init__(self, *, seed: int = 0) -> None:
        self.seed = seed

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        pass

    def _scores(self, users: np.ndarray) -> torch.Tensor:
        rows = [np.random.default_rng((self.seed, user)).random(self.num_items, np.float32) for user in users.tolist()]
        return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, self.num_items)


class ItemKNN(Baseline):
    """Items similar to those in the user's history: score_i = sum of similarity(j, i) over history items j.

    Similarity is the inner product of the items' weighted user vectors, kept for the nearest neighbours of each j,
    itself excluded (Sarwar et al. 2001). A user without history scores 0 everywhere.

    Args:
        num_neighbors: Neighbours kept per item, >= 1.
        weighting: "bm25" (K1 1.2, B 0.75) and "tfidf" let users with long histories count less, which matters where
            a few users hold a large part of the events; "cosine" weighs all users alike.
        seed: Unused: nothing here is random.
    """

    def __init__(self, num_neighbors: int = 200, weighting: str = "bm25", *, seed: int = 0) -> None:
        self.num_neighbors = _at_least_one("num_neighbors", num_neighbors)
        if weighting not in ("bm25", "tfidf", "cosine"):
            raise ValueError(f"weighting must be 'bm25', 'tfidf' or 'cosine', got {weighting!r}")
        self.weighting = weighting

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        with _implicit("ItemKNN"):
            from implicit.nearest_neighbours import ItemItemRecommender, bm25_weight, normalize, tfidf_weight
        self.history = _interaction_matrix(users, items, self.num_users, self.num_items)
        weigh = {
            # Its type is read off the default, which is a whole number.
            "bm25": lambda vectors: bm25_weight(vectors, K1=1.2, B=0.75),  # pyright: ignore[reportArgumentType]
            "tfidf": lambda vectors: normalize(tfidf_weight(vectors)),
            "cosine": normalize,
        }[self.weighting]
        # The library counts an item among its own neighbours.
        model = ItemItemRecommender(K=self.num_neighbors + 1)
        model.fit(weigh(self.history.T.astype(np.float64)).T.tocsr(), show_progress=False)
        similarity = model.similarity
        assert similarity is not None  # as `fit` leaves it
        similarity = similarity.astype(np.float32)
        similarity.setdiag(0)
        similarity.eliminate_zeros()
        self.similarity = similarity

    def with_histories(self, indptr: np.ndarray, items: np.ndarray) -> ItemKNN:
        """The same similarities for other histories: of users that were not there in `fit`, or with later events.

        Args:
            indptr: [num_users + 1] int64, where each user's history starts in `items`.
            items: [indptr[-1]] int64.
        """
        other = copy.copy(self)
        histories = Histories(indptr, items)
        other.num_users = histories.num_users
        other.history = _interaction_matrix(histories.owners, items, other.num_users, self.num_items)
        return other

    def _scores(self, users: np.ndarray) -> torch.Tensor:
        return torch.from_numpy((self.history[users] @ self.similarity).toarray())


class _Factors(Baseline):
    """Scores are inner products of user and item factors."""

    def _keep(self, model: Any) -> None:
        self.user_factors = torch.from_numpy(np.asarray(model.user_factors, dtype=np.float32))
        self.item_factors = torch.from_numpy(np.asarray(model.item_factors, dtype=np.float32))

    def _scores(self, users: np.ndarray) -> torch.Tensor:
        return self.user_factors[torch.from_numpy(users)] @ self.item_factors.T


class BPR(_Factors):
    """Matrix factorisation with item bias and the pairwise loss of Rendle et al. 2009, uniform verified negatives.

    Args:
        factors: Embedding size, >= 1.
        learning_rate: Step of plain SGD, > 0.
        regularization: L2 weight, >= 0.
        iterations: Passes over the events, >= 1.
        seed: Starting factors and samples.
        num_threads: 1 is reproducible; more race for the shared factors. 0 is all cores.
    """

    def __init__(
        self,
        factors: int = 64,
        learning_rate: float = 0.05,
        regularization: float = 0.01,
        iterations: int = 100,
        *,
        seed: int = 0,
        num_threads: int = 1,
    ) -> None:
        self.factors = _at_least_one("factors", factors)
        self.iterations = _at_least_one("iterations", iterations)
        if learning_rate <= 0:
            raise ValueError(f"learning_rate must be > 0, got {learning_rate}")
        self.learning_rate = learning_rate
        self.regularization = _not_negative("regularization", regularization)
        self.seed, self.num_threads = seed, num_threads

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        with _implicit("BPR"):
            from implicit.bpr import BayesianPersonalizedRanking
        model = BayesianPersonalizedRanking(
            factors=self.factors,
            learning_rate=self.learning_rate,
            regularization=self.regularization,
            iterations=self.iterations,
            use_gpu=False,
            num_threads=self.num_threads,
            random_state=self.seed,
        )
        model.fit(_interaction_matrix(users, items, self.num_users, self.num_items), show_progress=False)
        self._keep(model)


class ALS(_Factors):
    """Weighted matrix factorisation by alternating least squares (Hu, Koren and Volinsky 2008).

    Args:
        factors: Embedding size, >= 1.
        regularization: L2 weight, >= 0.
        alpha: Confidence of an observed event; an unobserved pair has 1. > 0.
        iterations: Alternations, >= 1.
        seed: Starting factors.
        num_threads: 0 is all cores; the result does not depend on it.
    """

    def __init__(
        self,
        factors: int = 64,
        regularization: float = 1.0,
        alpha: float = 20.0,
        iterations: int = 30,
        *,
        seed: int = 0,
        num_threads: int = 0,
    ) -> None:
        self.factors = _at_least_one("factors", factors)
        self.iterations = _at_least_one("iterations", iterations)
        if alpha <= 0:
            raise ValueError(f"alpha must be > 0, got {alpha}")
        self.alpha = alpha
        self.regularization = _not_negative("regularization", regularization)
        self.seed, self.num_threads = seed, num_threads

    def _fit(self, users: np.ndarray, items: np.ndarray) -> None:
        with _implicit("ALS"):
            from implicit.als import AlternatingLeastSquares
        with _single_threaded_blas():
            model = AlternatingLeastSquares(
                factors=self.factors,
                regularization=self.regularization,
                alpha=self.alpha,
                iterations=self.iterations,
                use_gpu=False,
                num_threads=self.num_threads,
                random_state=self.seed,
            )
            model.fit(_interaction_matrix(users, items, self.num_users, self.num_items), show_progress=False)
        self._keep(model)


def _popularity(*, seed: int = 0) -> Popularity:
    return Popularity()


BASELINES: Mapping[str, Callable[..., Baseline]] = MappingProxyType(
    {"popularity": _popularity, "random": Random, "itemknn": ItemKNN, "bpr": BPR, "als": ALS}
)
"""Name -> factory taking the settings and `seed`; defaults stand in each class."""


def fit_baseline(name: str, dataset: Dataset, seed: int = 0, **settings: Any) -> Baseline:
    """The named baseline, fitted on the train split of `dataset`.

    Args:
        name: One of `BASELINES`.
        dataset: Data set whose train split is used.
        seed: Seed of whatever is random.
        **settings: Override the default settings of that baseline.

    Raises:
        ValueError: An unknown name or a wrong setting.
        ImportError: The `implicit` library is missing.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline must be one of {', '.join(BASELINES)}, got {name!r}")
    return BASELINES[name](seed=seed, **settings).fit(dataset)


@contextmanager
def _implicit(name: str):
    try:
        yield
    except ImportError as error:
        raise ImportError(f'{name} needs the implicit library: pip install "hellm[baselines]"') from error


@contextmanager
def _single_threaded_blas():
    """The library parallelises over rows itself; a threaded BLAS inside would fight it (and makes it warn)."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, "blas"):
        yield


def _interaction_matrix(users: np.ndarray, items: np.ndarray, num_users: int, num_items: int):
    """[num_users, num_items] scipy CSR of ones, float32, sorted indices; repeated events count once."""
    from scipy.sparse import csr_matrix

    matrix = csr_matrix((np.ones(len(users), dtype=np.float32), (users, items)), shape=(num_users, num_items))
    matrix.sum_duplicates()
    matrix.data[:] = 1
    return matrix


def _check_range(name: str, values: np.ndarray, size: int) -> None:
    outside = values[(values < 0) | (values >= size)]
    if len(outside):
        raise ValueError(f"{name} must be in [0, {size}), got {outside[0]}")


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")
    return value


def _not_negative(name: str, value: float) -> float:
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}")
    return value
