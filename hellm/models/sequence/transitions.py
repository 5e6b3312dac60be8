"""What follows what: counts of one item after another, spread over items that are alike. Nothing is trained.

I = items, B = histories, n = new items.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm import ops
from hellm._files import reading
from hellm.artifact import read_embeddings, write_embeddings
from hellm.artifact.files import EMBEDDINGS
from hellm.data import Histories
from hellm.hypergraph import Hypergraph

__all__ = ["ItemPairs", "TransitionModel"]

# Histories scored at once: the columns of a [I, B] block.
_BATCH = 128
# Width of the sketch that items are compared by.
_SKETCH = 128


class ItemPairs(NamedTuple):
    """Weights of pairs of items.

    Attributes:
        source, target: [m] int64 item rows.
        weight: [m] float32.
    """

    source: Tensor
    target: Tensor
    weight: Tensor

    def hypergraph(self, num_items: int) -> Hypergraph:
        """Sources as hyperedges of their targets."""
        index = torch.stack([self.target, self.source])
        return Hypergraph(index, num_vertices=num_items, num_hyperedges=num_items, incidence_weight=self.weight)


class TransitionModel:
    """Scores of items by how often they followed those of a history.

        scores(h) = d(h) A N A^T
        d(h)_i = decay^age of item i in the history, age 0 being its last item
        N_ij = (sum_l T_il + 1)^-exponent T_ij,   T_ij = sum of decay^(lag - 1) where j came lag <= max_lag after i
        A = I + diag(w) S,   S = shares of the items that are nearest by content
        w_i = content_weight, and 1 for an item that nothing followed and that followed nothing

    A hyperedge holds what has followed an item, so N is the incidence of a directed hypergraph of items, and A is a
    step of convolution over the item hypergraph on either side of it: what followed an item follows others like it, and
    items like the one that followed as well. An item without transitions, a new one, is read as its average neighbour.
    Counts of this form are the sequential rules of Ludewig and Jannach (2018,
    "Evaluation of session-based recommendation algorithms"), who find them hard to beat.

    Args:
        num_items: I.
        transitions: T: the item before, the one after.
        similar: S: an item, one of its nearest, shares that sum to 1; None without content.
        content_weight: >= 0.
        decay: In (0, 1].
        exponent: Of the popularity of the item before, >= 0.

    Attributes:
        following: N, as pairs.
    """

    def __init__(
        self,
        num_items: int,
        transitions: ItemPairs,
        similar: ItemPairs | None = None,
        *,
        content_weight: float = 0.0,
        decay: float = 0.5,
        exponent: float = 0.5,
    ) -> None:
        self.num_items, self.transitions, self.similar = num_items, transitions, similar
        self.content_weight, self.decay, self.exponent = content_weight, decay, exponent
        followed = torch.zeros(num_items).index_add_(0, transitions.source, transitions.weight)
        scaled = transitions.weight * (followed + 1)[transitions.source] ** -exponent
        self.following = transitions._replace(weight=scaled)
        self._next = self.following.hypergraph(num_items)
        alike = None if similar is None else self._weighed(similar)
        self._alike = alike.hypergraph(num_items) if alike is not None and len(alike.weight) else None

    @classmethod
    def fit(
        cls,
        histories: Histories,
        num_items: int,
        *,
        max_lag: int = 10,
        decay: float = 0.5,
        exponent: float = 0.5,
        similar: ItemPairs | None = None,
        content_weight: float = 0.0,
    ) -> TransitionModel:
        """Count the transitions of histories.

        Args:
            histories: Of all users, training events only.
            num_items: I.
            max_lag: Steps after an item within which another counts as following it, >= 1.
            decay, exponent, similar, content_weight: See the class.
        """
        owners, items = histories.owners, histories.items
        keys, weights = np.zeros(0, dtype=np.int64), np.zeros(0)
        for lag in range(1, min(max_lag, max(histories.lengths, default=0) - 1) + 1):
            same = owners[lag:] == owners[:-lag]
            pairs = items[:-lag][same] * num_items + items[lag:][same]
            new = np.full(len(pairs), decay ** (lag - 1))
            keys, place = np.unique(np.concatenate([keys, pairs]), return_inverse=True)
            weights = np.bincount(place, weights=np.concatenate([weights, new]), minlength=len(keys))
        transitions = ItemPairs(*(torch.from_numpy(one) for one in (keys // num_items, keys % num_items, weights)))
        transitions = transitions._replace(weight=transitions.weight.float())
        return cls(num_items, transitions, similar, content_weight=content_weight, decay=decay, exponent=exponent)

    def history_scores(self, indptr: Tensor, items: Tensor) -> Tensor:
        """[B, I] float32 scores >= 0 of all items after histories in time order, given as CSR."""
        histories = Histories.checked((indptr, items), "histories", self.num_items)
        ages = np.repeat(histories.indptr[1:], histories.lengths) - np.arange(len(histories.items)) - 1
        decayed = torch.from_numpy(np.power(float(self.decay), ages)).float()
        rows, owners = torch.from_numpy(histories.items), torch.from_numpy(histories.owners)
        scores = torch.empty(histories.num_users, self.num_items)
        for start in range(0, histories.num_users, _BATCH):
            stop = min(start + _BATCH, histories.num_users)
            part = slice(*histories.indptr[[start, stop]].tolist())
            x = torch.zeros(self.num_items, stop - start)
            x.index_put_((rows[part], owners[part] - start), decayed[part], accumulate=True)
            x = self._spread(x, transpose=False)
            scores[start:stop] = self._spread(ops.incidence_product(x, self._next), transpose=True).T
        return scores

    def item_keys(self) -> Tensor:
        """[I, D] float32 sketch of what comes before and after each item, for comparing items by cosine."""
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (self.num_items, _SKETCH), generator=generator).float() * 2 - 1
        before, after = (ops.incidence_product(signs, self._next, transpose=way) for way in (False, True))
        return self._spread(torch.cat([before, after], dim=1), transpose=True)

    def extended(self, similar: Tensor) -> TransitionModel:
        """A model with n more items, which follow what their nearest items follow.

        Args:
            similar: [n, I] sparse shares of the items that are nearest by content.
        """
        new, known = similar.coalesce().indices()
        pairs = ItemPairs(new + self.num_items, known, similar.coalesce().values().float())
        if self.similar is not None:
            pairs = ItemPairs(*(torch.cat(both) for both in zip(self.similar, pairs, strict=True)))
        settings = {name: getattr(self, name) for name in _SETTINGS}
        return TransitionModel(self.num_items + similar.shape[0], self.transitions, pairs, **settings)

    def save(self, run_directory: str | os.PathLike[str]) -> None:
        """Write embeddings.safetensors."""
        graphs = {"transitions": self.transitions, "similar": self.similar}
        tensors = {
            f"{name}.{part}": value
            for name, pairs in graphs.items()
            if pairs is not None
            for part, value in pairs._asdict().items()
        }
        metadata = {name: str(getattr(self, name)) for name in ("num_items", *_SETTINGS)}
        write_embeddings(run_directory, "transitions", tensors, metadata)

    @classmethod
    def load(cls, run_directory: str | os.PathLike[str]) -> TransitionModel:
        """The model that `save` wrote. Raises: As `read_embeddings`; ValueError, a file of another kind."""
        kind, tensors, metadata = read_embeddings(run_directory)
        if kind != "transitions":
            raise ValueError(f"{Path(run_directory) / EMBEDDINGS} must hold transitions, got a model of kind {kind!r}")

        def pairs(name: str) -> ItemPairs:
            return ItemPairs(*(tensors[f"{name}.{part}"] for part in ItemPairs._fields))

        with reading(Path(run_directory) / EMBEDDINGS):
            similar = pairs("similar") if "similar.source" in tensors else None
            settings = {name: float(metadata[name]) for name in _SETTINGS}
            return cls(int(metadata["num_items"]), pairs("transitions"), similar, **settings)

    def _spread(self, x: Tensor, *, transpose: bool) -> Tensor:
        """A^T x, or A x with `transpose`, of [I, B]: weight that goes to the nearest items, or is read from them."""
        if self._alike is None:
            return x
        return x + ops.incidence_product(x, self._alike, transpose=transpose)

    def _weighed(self, similar: ItemPairs) -> ItemPairs:
        """diag(w) S, without zeros."""
        counted = torch.zeros(self.num_items, dtype=torch.bool)
        counted[torch.cat([self.transitions.source, self.transitions.target])] = True
        weight = similar.weight * torch.where(counted, self.content_weight, 1.0)[similar.source]
        kept = weight > 0
        return ItemPairs(similar.source[kept], similar.target[kept], weight[kept])


_SETTINGS = ("content_weight", "decay", "exponent")
