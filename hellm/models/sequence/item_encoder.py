"""What items are to a sequence model: a trained embedding each, what their content projects to, or both.

I = items, n = new items, D = embedding width, C = width of the features of a modality, W = whitened components kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hellm._rows import row_products
from hellm.models.shallow_copy import shallow_copy

__all__ = ["ItemEncoder", "WhitenedContent"]

# Directions of less than this share of the largest variance hold rounding and noise only.
_SMALLEST_VARIANCE = 1e-6
# Of fewer items, whitening makes all of them equally far from each other: it fits the items, not their kind.
_ITEMS_PER_DIRECTION = 4


class WhitenedContent(NamedTuple):
    """Features of one modality with uncorrelated columns of variance 1, and the map that made them so.

    Features of pre-trained encoders are narrow cones in which all items look alike; whitening spreads them out
    (Zhang et al. 2024, "Are ID Embeddings Necessary? Whitening Pre-trained Text Embeddings", WhitenRec).

    Attributes:
        table: [I, W] float32; a row of zeros lacks the modality.
        mean: [C] float32.
        matrix: [C, W] float32; table = (features - mean) @ matrix, where there are features.
    """

    table: Tensor
    mean: Tensor
    matrix: Tensor

    @classmethod
    def of(cls, features: Tensor, components: int | None = None) -> WhitenedContent:
        """Fit the map on the rows that have the modality, and apply it.

        Args:
            features: [I, C] float, a row of zeros lacks the modality.
            components: W, the directions of largest variance that are kept, cut to those that vary and to a quarter of
                the rows. None keeps as many as that, in the axes of the features (ZCA).
        """
        present = features.any(dim=1)
        x = features[present].double()
        mean = x.mean(0) if len(x) else features.new_zeros(features.shape[1], dtype=torch.float64)
        x = x - mean
        variance, axes = torch.linalg.eigh(x.T @ x / max(len(x), 1))
        variance, axes = variance.flip(0), axes.flip(1)
        varies = variance > _SMALLEST_VARIANCE * variance[0].clamp(min=torch.finfo(torch.float64).tiny)
        matrix = axes * torch.where(varies, variance.clamp(min=0), torch.inf).rsqrt()
        told = len(x) // _ITEMS_PER_DIRECTION
        kept = max(1, min(components or len(varies), int(varies.sum()), told))
        matrix = matrix[:, :kept]
        if components is None:
            matrix = matrix @ axes[:, :kept].T
        mean, matrix = mean.float(), matrix.float()
        return cls(_whiten(features, mean, matrix), mean, matrix)

    def of_others(self, features: Tensor) -> WhitenedContent:
        """Of other items [n, C]; the map stays."""
        return self._replace(table=_whiten(features.to(self.mean), self.mean, self.matrix))

    def extended(self, features: Tensor) -> WhitenedContent:
        """With new items [n, C] at the end; the map stays.

        Raises: ValueError, another width.
        """
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features must be [n, {len(self.mean)}], got {list(features.shape)}")
        new = _whiten(features.to(self.mean), self.mean, self.matrix, row_products)
        return self._replace(table=torch.cat([self.table, new]))


def _whiten(
    features: Tensor, mean: Tensor, matrix: Tensor, product: Callable[[Tensor, Tensor], Tensor] = torch.matmul
) -> Tensor:
    present = features.any(dim=1, keepdim=True)
    return torch.where(present, product(features.float() - mean, matrix), 0.0)


class ItemEncoder(nn.Module):
    """Embeddings of all items.

        e_i = id_i + sum_m projector_m(x_im)

    over the modalities m that item i has. A projector is one matrix where items have ids, which learn the rest, and a
    network with a hidden layer where content is all there is.

    Args:
        num_items: I, >= 1.
        dim: D, >= 1.
        item_id: Give every item a trained row.
        content: Modality -> whitened features of all items; frozen, and not part of the state.
        hidden_dim: Width of the hidden layer of projectors; 0 is none.
        dropout: Of whitened features, in [0, 1).
    Raises: ValueError, neither ids nor content, or content of other items.
    """

    def __init__(
        self,
        num_items: int,
        dim: int,
        *,
        item_id: bool = True,
        content: Mapping[str, WhitenedContent] | None = None,
        hidden_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        content = dict(content or {})
        if not item_id and not content:
            raise ValueError("items must have ids, content or both, got item_id=False and no content")
        for name, one in content.items():
            if len(one.table) != num_items:
                raise ValueError(f"content[{name!r}] must be of the {num_items} items, got {len(one.table)}")
        self.num_items, self.dim, self.hidden_dim = num_items, dim, hidden_dim
        self.id_embedding = nn.Embedding(num_items, dim) if item_id else None
        # What the items are read by, besides their ids. Numbers stand for them below: names may hold anything.
        self.modalities = list(content)
        self.projectors = nn.ModuleList(
            _projector(one.table.shape[1], hidden_dim, dim, dropout) for one in content.values()
        )
        for place, one in enumerate(content.values()):
            for part, value in one._asdict().items():
                self.register_buffer(f"{part}_{place}", value, persistent=False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def content(self, modality: str) -> WhitenedContent:
        """The whitened features of one modality."""
        place = self.modalities.index(modality)
        return WhitenedContent(*(getattr(self, f"{part}_{place}") for part in WhitenedContent._fields))

    def forward(self, rows: Tensor | None = None) -> Tensor:
        """[I, D] float32, or [n, D] of the items `rows` [n] int64."""
        total = None
        if self.id_embedding is not None:
            total = self.id_embedding.weight if rows is None else self.id_embedding(rows)
        for place, projector in enumerate(self.projectors):
            x = getattr(self, f"table_{place}")
            x = x if rows is None else x[rows]
            projected = projector(x)
            if self.hidden_dim:
                # A hidden layer makes something of nothing.
                projected = projected * x.any(dim=1, keepdim=True)
            total = projected if total is None else total + projected
        assert total is not None  # ids or features: see `__init__`
        return total

    def extended(self, content: Mapping[str, Tensor], mean: Callable[[Tensor], Tensor]) -> ItemEncoder:
        """An encoder with new items at the end, which shares the projectors with this one; this one keeps its items.

        Args:
            content: Modality -> features [n, C] as they came; a modality that is not given is missing, and one that the
                items are not read by is ignored.
            mean: [I, D] trained embeddings -> [n, D] those that the new items get.
        """
        count = len(next(iter(content.values())))
        other = shallow_copy(self)
        other.num_items += count
        for place, modality in enumerate(self.modalities):
            own = self.content(modality)
            new = content[modality] if modality in content else own.mean.new_zeros(count, len(own.mean))
            setattr(other, f"table_{place}", own.extended(new).table)
        if self.id_embedding is not None:
            ids = self.id_embedding.weight.detach()
            other.id_embedding = nn.Embedding.from_pretrained(torch.cat([ids, mean(ids).to(ids)]), freeze=False)
        return other


def _projector(width: int, hidden_dim: int, dim: int, dropout: float) -> nn.Module:
    if not hidden_dim:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, dim, bias=False))
    return nn.Sequential(nn.Dropout(dropout), nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))
