"""Items as tokens of a language model.

B = histories, T = items of the longest, I = items of the catalogue, F = width of all item embeddings side by side,
W = width of the language model, S = tokens of the longest history, M = tokens of the longest title.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hellm.models.dropout import Dropout
from hellm.models.shallow_copy import shallow_copy

__all__ = ["ItemTokens", "check_item_embeddings", "last_hidden", "right_align"]

_ID_STD = 0.1


class ItemTokens(nn.Module):
    """The item projector, the frozen tables that it reads, and the order of tokens in a history.

        key_i = Linear(GELU(Linear(concat of the embeddings of item i)))  [+ Linear(id_i)]
        token_i = token_scale * key_i

    Args:
        tables: named float tables [I, d]; frozen, and not part of the state.
        width: W.
        token_scale: root mean square of item tokens at the start, where `normalise` is set.
        titles: ids [I, M] and lengths [I] of title tokens that follow an item, or None.
        normalise: divide each table by its root mean square, and start with keys of unit root mean square; else raw
            tables and torch's initialisation.
        id_dim: width of a trained embedding of each item, for what the tables do not tell; 0 is none.
        dropout: of the tables.
    """

    features: Tensor
    title_ids: Tensor
    title_lengths: Tensor | None
    id_embedding: nn.Embedding | None
    id_projector: nn.Linear | None

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        width: int,
        *,
        token_scale: float = 1.0,
        titles: tuple[Tensor, Tensor] | None = None,
        normalise: bool = True,
        id_dim: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.widths = {name: table.shape[1] for name, table in tables.items()}
        self.width, self.token_scale = width, token_scale
        self.table_scales = {name: _rms(table) if normalise else 1.0 for name, table in tables.items()}
        self.tables = dict(tables)
        self.register_buffer("features", self._join(tables), persistent=False)
        start = sum(self.widths[name] for name in list(tables)[: _place(tables, "graph")])
        self._graph = slice(start, start + self.widths.get("graph", 0))
        ids, lengths = titles if titles is not None else (torch.zeros(len(self.features), 0, dtype=torch.int64), None)
        self.register_buffer("title_ids", ids, persistent=False)
        self.register_buffer("title_lengths", lengths, persistent=False)
        first, last = nn.Linear(self.features.shape[1], width), nn.Linear(width, width)
        self.projector = nn.Sequential(first, nn.GELU(), last)
        self.dropout = Dropout(dropout)
        self.id_embedding = self.id_projector = None
        if id_dim:
            self.id_embedding = nn.Embedding(len(self.features), id_dim)
            self.id_projector = nn.Linear(id_dim, width, bias=False)
            # Small beside what the tables tell of an item.
            nn.init.normal_(self.id_embedding.weight, std=_ID_STD)
            nn.init.normal_(self.id_projector.weight, std=id_dim**-0.5)
        if normalise:
            self._scale_keys(last)

    @property
    def num_items(self) -> int:
        return len(self.features)

    @property
    def max_tokens_per_item(self) -> int:
        """1 + M."""
        return 1 + self.title_ids.shape[1]

    def graph(self, items: Tensor) -> Tensor:
        """Graph embeddings of `items`, at the scale in which they enter the model."""
        return self.features[items, self._graph]

    def keys(self, rows: Tensor | None = None) -> Tensor:
        """[I, W] projected items, or [n, W] of the items `rows` [n] int64."""
        return self._project(slice(None) if rows is None else rows)

    def _project(self, rows: Tensor | slice) -> Tensor:
        projected = self.projector(self.dropout(self.features[rows]))
        if self.id_embedding is None or self.id_projector is None:
            return projected
        ids = self.id_embedding.weight if isinstance(rows, slice) else self.id_embedding(rows)
        return projected + self.id_projector(ids)

    def rescale(self, table_scales: Mapping[str, float]) -> None:
        """Divide the tables by these instead: those of the catalogue that the model was trained on."""
        if dict(table_scales) != self.table_scales:
            self.table_scales = dict(table_scales)
            self.features = self._join(self.tables).to(self.features)

    def extended(
        self, tables: Mapping[str, Tensor], titles: tuple[Tensor, Tensor] | None, ids: Tensor | None = None
    ) -> ItemTokens:
        """A copy with more items, after those there are, and the same projector.

        `ids` [n, id_dim] are their embeddings, where the model has them; None is zeros.

        Raises: ValueError, tables of other names or widths.
        """
        widths = check_item_embeddings(tables)
        if widths != self.widths:
            raise ValueError(f"item_embeddings must have the widths {self.widths}, got {widths}")
        other = shallow_copy(self)
        other.features = torch.cat([self.features, self._join(tables).to(self.features)])
        other.tables = {name: torch.cat([table, tables[name].to(table)]) for name, table in self.tables.items()}
        if self.id_embedding is not None:
            known = self.id_embedding.weight.detach()
            new = known.new_zeros(len(other.features) - len(known), known.shape[1]) if ids is None else ids.to(known)
            other.id_embedding = nn.Embedding.from_pretrained(torch.cat([known, new]), freeze=False)
        if self.title_lengths is not None:
            assert titles is not None  # items either all come with titles or none
            ids, lengths = (x.to(self.features.device) for x in titles)
            longest = max(ids.shape[1], self.title_ids.shape[1])
            both = [nn.functional.pad(x, (0, longest - x.shape[1])) for x in (self.title_ids, ids)]
            other.title_ids, other.title_lengths = torch.cat(both), torch.cat([self.title_lengths, lengths])
        return other

    def forward(
        self, items: Tensor, mask: Tensor, embed_text: Callable[[Tensor], Tensor], context: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The tokens of left-aligned histories.

        Args:
            items: [B, T] int64.
            mask: [B, T] bool, True at items.
            embed_text: token ids to token embeddings [..., W].
            context: [B, T, W], added to the projected items; None is nothing.
        Returns: tokens [B, S, W], left-aligned; which of them are used [B, S]; and the place [B, T] of the last token
            of each item, None where it is the item's own place.
        """
        token = self._project(items)
        if context is not None:
            token = token + context
        token = token * self.token_scale
        if self.title_lengths is None or self.max_tokens_per_item == 1:
            return token, mask, None
        titles = embed_text(self.title_ids[items]).to(token)
        slots = torch.cat([token.unsqueeze(2), titles], dim=2).flatten(1, 2)
        length = torch.where(mask, 1 + self.title_lengths[items], 0)
        place = torch.arange(self.max_tokens_per_item, device=items.device)
        used = (place < length.unsqueeze(2)).flatten(1)
        # A stable sort moves the used slots to the front and keeps their order.
        order = (~used).long().sort(dim=1, stable=True).indices
        size = int(length.sum(1).max()) if len(length) else 0
        slots = slots.gather(1, order[:, :size].unsqueeze(2).expand(-1, -1, self.width))
        used = torch.arange(size, device=items.device) < length.sum(1, keepdim=True)
        return slots, used, (length.cumsum(1) - 1).clamp(min=0)

    def _join(self, tables: Mapping[str, Tensor]) -> Tensor:
        dtype = torch.get_default_dtype()
        return torch.cat([tables[name].detach().to(dtype) / self.table_scales[name] for name in self.widths], dim=1)

    @torch.no_grad()
    def _scale_keys(self, last: nn.Linear) -> None:
        if not self.features.is_meta and len(self.features):
            some = slice(0, 4096)
            keys = self.projector(self.features[some])
            if self.id_embedding is not None and self.id_projector is not None:
                keys += self.id_projector(self.id_embedding.weight[some])
                self.id_projector.weight.div_(_rms(keys))
            last.weight.div_(_rms(keys))
            last.bias.div_(_rms(keys))


def check_item_embeddings(tables: Mapping[str, Tensor]) -> dict[str, int]:
    """Widths of the tables.

    Raises: ValueError, no table, one that is not [I, d] or not finite, or different numbers of rows.
    """
    if not tables:
        raise ValueError("item_embeddings must hold at least one table [items, width], got none")
    wrong = [f"{name} {list(table.shape)}" for name, table in tables.items() if table.ndim != 2 or not table.shape[1]]
    if wrong:
        raise ValueError(f"item_embeddings must be tables [items, width], got {', '.join(wrong)}")
    rows = {name: len(table) for name, table in tables.items()}
    if len(set(rows.values())) > 1:
        raise ValueError(f"item_embeddings must have one row per item, got {rows}")
    for name, table in tables.items():
        if table.is_meta:
            continue
        finite = torch.isfinite(table.to(torch.get_default_dtype())).all(dim=1)
        if not finite.all():
            row = int((~finite).nonzero()[0])
            raise ValueError(f"item_embeddings[{name!r}] must be finite, got NaN or infinity in row {row}")
    return {name: table.shape[1] for name, table in tables.items()}


def last_hidden(hidden: Tensor, mask: Tensor, empty: Tensor) -> Tensor:
    """[B, W] of hidden [B, T, W] at the last item of each left-aligned row; `empty` [1, W] where a row has none."""
    if hidden.shape[1] == 0:
        return empty.expand(len(hidden), -1)
    length = mask.sum(1)
    rows = torch.arange(len(hidden), device=hidden.device)
    return torch.where(length.unsqueeze(1) > 0, hidden[rows, (length - 1).clamp(min=0)], empty)


def right_align(tokens: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Left-aligned tokens [B, S, W] and their mask [B, S], with the padding in front instead."""
    size = tokens.shape[1]
    if size == 0:
        return tokens, used
    place = torch.arange(size, device=tokens.device) - (size - used.sum(1, keepdim=True))
    source = place.clamp(min=0).unsqueeze(2).expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, source), place >= 0


def _place(tables: Mapping[str, Tensor], name: str) -> int:
    return list(tables).index(name) if name in tables else 0


def _rms(x: Tensor) -> float:
    return 1.0 if x.is_meta or not x.numel() else max(float(x.double().square().mean().sqrt()), 1e-12)
