"""Served models as torch modules over padded histories, which is the form that can leave Python.

B = histories, T = width of the padded batch, I = items, D = embedding width, E = pairs of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm.models import SASRec
from hellm.models.sequence import TransitionModel
from hellm.models.sequence.transitions import ItemPairs
from hellm.recommend.served import ServedFused, ServedGraph, ServedLLM, ServedModel, ServedSASRec, ServedTransitions

__all__ = ["Encoder", "ExportError", "Scorer", "encoder_of", "scorer_of", "without_queries"]


class ExportError(ValueError):
    """A model that cannot be exported; the message names it and says why."""


class Encoder(nn.Module):
    """Queries [B, D] float32 of histories; an empty history gives zeros.

    `forward(items, lengths)` takes item rows [B, T] int64 in time order with padding at the end, whatever it holds as
    long as it is a row, and lengths [B] int64 in [0, T]; T >= 1.
    """


class Scorer(nn.Module):
    """Scores [B, I] float32 of all items after histories, given as to `Encoder`."""


class FoldInEncoder(Encoder):
    """See `hellm.models.FoldIn`."""

    def __init__(self, model: ServedGraph) -> None:
        super().__init__()
        self.source: Tensor
        self.view: Tensor | None
        self.exponent = model.exponent
        self.register_buffer("source", model.tensors["fold_in_source"])
        self.register_buffer("view", model.tensors.get("fold_in_view"))

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(items.shape[1])
        mask = place < lengths.unsqueeze(1)
        # In order, the same items stand side by side, and each counts once; padding comes last.
        items = torch.where(mask, items, self.source.shape[0]).sort(dim=1).values
        again = F.pad(items[:, 1:] == items[:, :-1], (1, 0))
        kept = (mask & ~again).float()
        items = items.clamp(max=self.source.shape[0] - 1)
        count = kept.sum(1, keepdim=True).clamp(min=1)
        user = (self.source[items] * kept.unsqueeze(2)).sum(1) / count**self.exponent
        if self.view is not None:
            user = user + F.normalize((self.view[items] * kept.unsqueeze(2)).sum(1), dim=1)
        return user


class SASRecEncoder(Encoder):
    """See `hellm.models.SASRec`: here all histories are padded to one width, at most `max_length`."""

    def __init__(self, model: SASRec) -> None:
        super().__init__()
        self.table: Tensor
        self.model, self.max_length = model, model.max_length
        self.register_buffer("table", model.item_keys())

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        # The last max_length items, from column 0 on; what stands behind them is masked by causality.
        last = items.shape[1] - 1
        place = torch.arange(self.max_length)
        source = ((lengths - self.max_length).clamp(min=0).unsqueeze(1) + place).clamp(max=last)
        model, lengths = self.model, lengths.clamp(max=self.max_length)
        x = self.table[items.gather(1, source)] + model.position_embedding.weight
        x = model.norm(x)
        for block in model.blocks:
            x = _block(block, x)
        x = model.last_norm(x)
        rows = (lengths - 1).clamp(min=0)[:, None, None].expand(-1, 1, x.shape[2])
        return x.gather(1, rows).squeeze(1) * (lengths > 0).unsqueeze(1)


def _block(block: Any, x: Tensor) -> Tensor:
    if block.norm_first:
        x = x + _attention(block, block.attention_norm(x))
        return x + block.feedforward(block.feedforward_norm(x))
    x = block.attention_norm(x + _attention(block, x))
    return block.feedforward_norm(x + block.feedforward(x))


def _attention(block: Any, x: Tensor) -> Tensor:
    # [3, B, heads, T, D / heads]
    query, key, value = block.query_key_value(x).unflatten(2, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return block.output(mixed.transpose(1, 2).flatten(2))


class FusedEncoder(Encoder):
    """Queries of the towers that have them, weighted and side by side."""

    def __init__(self, encoders: Sequence[Encoder], weights: Sequence[float]) -> None:
        super().__init__()
        self.encoders, self.weights = nn.ModuleList(encoders), list(weights)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        pairs = zip(self.weights, self.encoders, strict=True)
        return torch.cat([weight * encoder(items, lengths) for weight, encoder in pairs], dim=1)


class DotScorer(Scorer):
    """Scores by query and key."""

    def __init__(self, encoder: Encoder, keys: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.register_buffer("keys", keys)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        return self.encoder(items, lengths) @ self.keys.T


class TransitionScorer(Scorer):
    """See `hellm.models.sequence.TransitionModel`."""

    def __init__(self, model: TransitionModel) -> None:
        super().__init__()
        self.num_items, self.decay, self.content_weight = model.num_items, model.decay, model.content_weight
        pairs = {"following": model.following}
        if model.similar is not None and model.content_weight:
            pairs["similar"] = model.similar
        for name, one in pairs.items():
            for part, value in one._asdict().items():
                self.register_buffer(f"{name}_{part}", value)
        self.spreads = "similar" in pairs

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(items.shape[1])
        age = lengths.unsqueeze(1) - 1 - place
        weight = torch.where(age >= 0, torch.pow(self.decay, age.clamp(min=0).float()), 0.0)
        x = torch.zeros(items.shape[0], self.num_items).scatter_add(1, items, weight).T
        if self.spreads:
            similar = self._pairs("similar")
            x = x + self.content_weight * _product(similar.target, similar.source, similar.weight, x)
        following = self._pairs("following")
        x = _product(following.target, following.source, following.weight, x)
        if self.spreads:
            x = x + self.content_weight * _product(similar.source, similar.target, similar.weight, x)
        return x.T

    def _pairs(self, name: str) -> ItemPairs:
        return ItemPairs(*(getattr(self, f"{name}_{part}") for part in ItemPairs._fields))


def _product(rows: Tensor, columns: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The matrix [I, I] with `weight` [E] at (rows, columns), times [I, B]."""
    return torch.zeros_like(x).index_add(0, rows, x[columns] * weight.unsqueeze(1))


class FusedScorer(Scorer):
    """The sum of scores: by query and key together, and of towers that have no queries."""

    def __init__(self, scorers: Sequence[Scorer], weights: Sequence[float]) -> None:
        super().__init__()
        self.scorers, self.weights = nn.ModuleList(scorers), list(weights)

    def forward(self, items: Tensor, lengths: Tensor) -> Tensor:
        parts = [w * scorer(items, lengths) for w, scorer in zip(self.weights, self.scorers, strict=True)]
        return torch.stack(parts).sum(0)


def without_queries(model: ServedModel) -> list[str]:
    """Towers that rank by scores alone, which no vector stands for; a model of one piece has the name ""."""
    towers = model.towers if isinstance(model, ServedFused) else {"": model}
    return [name for name, tower in towers.items() if hasattr(tower, "history_scores")]


def encoder_of(model: ServedModel) -> Encoder | None:
    """What makes queries of histories; None where there are no queries. Raises: ExportError, a language model."""
    if isinstance(model, ServedFused):
        made = {name: _of_tower(name, tower, encoder_of) for name, tower in model.towers.items()}
        encoders = {name: one for name, one in made.items() if one is not None}
        return FusedEncoder(list(encoders.values()), [model.weights[name] for name in encoders]) if encoders else None
    if isinstance(model, ServedGraph):
        return FoldInEncoder(model)
    if isinstance(model, ServedSASRec):
        return SASRecEncoder(model.model)
    if isinstance(model, ServedTransitions):
        return None
    raise _refusal(model)


def scorer_of(model: ServedModel) -> Scorer:
    """What scores all items after histories. Raises: ExportError, a language model."""
    if isinstance(model, ServedTransitions):
        return TransitionScorer(model.model)
    encoder = encoder_of(model)
    scorers: list[Scorer] = [] if encoder is None else [DotScorer(encoder, model.item_keys())]
    if not isinstance(model, ServedFused):
        return scorers[0]
    weights = [1.0] * len(scorers)
    for name in without_queries(model):
        scorers.append(scorer_of(model.towers[name]))
        weights.append(model.weights[name])
    return FusedScorer(scorers, weights)


def _of_tower(name: str, tower: ServedModel, make: Any) -> Any:
    try:
        return make(tower)
    except ExportError as error:
        raise ExportError(
            f"tower {name!r}: {error}; hellm fuse without it makes a model that can be exported"
        ) from None


def _refusal(model: ServedModel) -> ExportError:
    if isinstance(model, ServedLLM):
        return ExportError(
            "a language model is not exported to ONNX: what reads a history is a decoder of transformers, with its "
            "tokenizer, adapters and prefixes of its own, which hellm runs itself"
        )
    return ExportError(f"models of type {type(model).__name__} are not exported to ONNX: nothing says how")
