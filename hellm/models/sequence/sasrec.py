"""SASRec: self-attention over the sequence of a user's items.

Kang and McAuley 2018, arXiv:1808.09781, with the blocks of BERT (post-norm, GELU) or of GPT-2 (pre-norm), over items
that are known by a trained embedding, by their content, or by both (`ItemEncoder`).

B = histories, T = longest of them in a batch, N = items in all of them, D = embedding width, I = items.
"""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm._files import reading
from hellm._rows import full_tiles
from hellm.artifact import read_embeddings, write_embeddings
from hellm.artifact.files import EMBEDDINGS
from hellm.models.dropout import Dropout
from hellm.models.histories import check_histories, pad_histories
from hellm.models.sequence.item_encoder import ItemEncoder, WhitenedContent
from hellm.models.shallow_copy import shallow_copy

__all__ = ["SASRec"]

_KEYS = "sequence_embedding"
_CONTENT = "content."
# Histories embedded at once: bounds the padded copies inside attention.
_BATCH = 1024
_INIT_STD = 0.02
# Width of the first group of histories that share an attention block; each next one is twice as wide.
_SHORTEST = 8


class SASRec(nn.Module):
    """Next-item model: the score of item i after a history is <hidden state of its last item, embedding of i>.

        x = dropout(norm(e[items] + position_embedding[place]))
        x = norm(x + dropout(causal_attention(x)))       per layer
        x = norm(x + dropout(feedforward(x)))

    or, with `norm_first`, x + dropout(part(norm(x))) for each part and a norm at the end. e is what `ItemEncoder` makes
    of the items. All but attention runs on the N items themselves, so padding costs next to nothing.

    Args:
        num_items: I, >= 1.
        content: modality -> whitened features, which enter the embeddings of the items.
        item_id: give every item a trained embedding.
        content_hidden_dim: width of the hidden layer between content and embedding; 0 is none.
        content_dropout: of the whitened features, in [0, 1).
        embedding_dim: D, a multiple of `num_heads`.
        num_layers: attention blocks, >= 1.
        num_heads: attention heads, >= 1.
        feedforward_dim: inner width of the feed-forward part, >= 1.
        max_length: latest items of a history that are read, >= 1.
        dropout: probability at the input, in attention and after each part of a block, in [0, 1).
        norm_first: normalise what a part reads, instead of what it leaves.
    Raises: ValueError, an argument out of its range, or content that does not fit.
    """

    def __init__(
        self,
        num_items: int,
        *,
        content: Mapping[str, WhitenedContent] | None = None,
        item_id: bool = True,
        content_hidden_dim: int = 0,
        content_dropout: float = 0.0,
        embedding_dim: int = 64,
        num_layers: int = 2,
        num_heads: int = 2,
        feedforward_dim: int = 256,
        max_length: int = 50,
        dropout: float = 0.5,
        norm_first: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "num_items": num_items,
            "embedding_dim": embedding_dim,
            "num_layers": num_layers,
            "num_heads": num_heads,
            "feedforward_dim": feedforward_dim,
            "max_length": max_length,
        }
        self.settings: dict[str, Any] = sizes | {
            "dropout": dropout,
            "norm_first": norm_first,
            "item_id": item_id,
            "content_hidden_dim": content_hidden_dim,
            "content_dropout": content_dropout,
        }
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be >= 1, got {value}")
        if embedding_dim % num_heads:
            raise ValueError(f"embedding_dim must be a multiple of num_heads {num_heads}, got {embedding_dim}")
        for name in ("dropout", "content_dropout"):
            if not 0 <= self.settings[name] < 1:
                raise ValueError(f"{name} must be in [0, 1), got {self.settings[name]}")
        self.num_items, self.max_length, self.embedding_dim = num_items, max_length, embedding_dim
        self.items = ItemEncoder(
            num_items,
            embedding_dim,
            item_id=item_id,
            content=content,
            hidden_dim=content_hidden_dim,
            dropout=content_dropout,
        )
        self.position_embedding = nn.Embedding(max_length, embedding_dim)
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(
            _Block(embedding_dim, num_heads, feedforward_dim, dropout, norm_first) for _ in range(num_layers)
        )
        self.last_norm = nn.LayerNorm(embedding_dim) if norm_first else nn.Identity()
        self.apply(_initialise)

    @property
    def device(self) -> torch.device:
        return self.position_embedding.weight.device

    def forward(self, items: Tensor, mask: Tensor, table: Tensor | None = None) -> Tensor:
        """Hidden state after each item, given the items up to it.

        Args:
            items: [B, T] int64 item rows, T <= max_length; what stands outside `mask` is not read.
            mask: [B, T] bool, True at items, which are in time order. Padding may stand on either side.
            table: [I, D] embeddings of the items, `self.items()`, where they are at hand.
        Returns: [B, T, D] float32, zero outside `mask`.
        Raises: ValueError, T > max_length or shapes that differ.
        """
        if items.ndim != 2 or items.shape != mask.shape:
            raise ValueError(f"items and mask must be [B, T] alike, got {list(items.shape)} and {list(mask.shape)}")
        if items.shape[1] > self.max_length:
            raise ValueError(f"items must be at most max_length {self.max_length} wide, got {items.shape[1]}")
        length, order = mask.sum(1).sort(stable=True)
        row, column = mask[order].nonzero(as_tuple=True)
        row = order[row]
        groups = _groups(length, fixed=not self.training)
        place = torch.cat([group.place for group in groups])
        x = F.embedding(items[row, column], self.items() if table is None else table) + self.position_embedding(place)
        x = self.dropout(self.norm(x))
        if not self.training:
            # With fixed widths of attention as well, a history has the same bits whatever others are beside it.
            x = full_tiles(x)
        for block in self.blocks:
            x = block(x, groups)
        x = self.last_norm(x)[: len(row)]
        hidden = x.new_zeros(*items.shape, x.shape[1])
        hidden[row, column] = x
        return hidden

    @torch.no_grad()
    def embed(self, indptr: Tensor, items: Tensor, table: Tensor | None = None) -> Tensor:
        """Queries of histories: the hidden state of the last item, in evaluation mode.

        Args:
            indptr: [B + 1] int64, where each history starts in `items`.
            items: [indptr[-1]] int64 item rows in time order; the last `max_length` of a history count.
            table: [I, D] `item_keys()`, where they are at hand.
        Returns: [B, D] float32; an empty history gives zeros, so every item scores 0.
        Raises: ValueError, an item outside [0, I) or offsets that do not fit `items`.
        """
        indptr, items = (torch.as_tensor(values, device=self.device).long() for values in (indptr, items))
        check_histories(indptr, items, self.num_items)
        queries = self.position_embedding.weight.new_zeros(len(indptr) - 1, self.embedding_dim)
        training = self.training
        if training:  # else nothing is written, as other threads may read
            self.eval()
        table = self.items() if table is None else table
        for start in range(0, len(queries), _BATCH):
            offsets = indptr[start : start + _BATCH + 1]
            part = items[offsets[0] : offsets[-1]]
            padded, mask = pad_histories(offsets - offsets[0], part, max_length=self.max_length)
            if padded.shape[1]:
                last = (mask.sum(1) - 1).clamp(min=0)
                hidden = self(padded, mask, table)
                queries[start : start + _BATCH] = hidden[torch.arange(len(last), device=last.device), last]
        if training:
            self.train()
        return queries

    @torch.no_grad()
    def item_keys(self) -> Tensor:
        """[I, D] float32, without gradient: what queries are multiplied with, in evaluation mode."""
        training = self.items.training
        if training:
            self.items.eval()
        keys = self.items().detach()
        if training:
            self.items.train()
        return keys

    def extended(self, content: Mapping[str, Tensor], mean: Callable[[Tensor], Tensor]) -> SASRec:
        """A model with new items at the end, which shares all else with this one; this one keeps its items.

        Args:
            content: modality -> features [n, C] as they came; a modality that is not given is missing.
            mean: [I, D] trained embeddings -> [n, D] those that the new items get.
        """
        items = self.items.extended(content, mean)
        other = shallow_copy(self)
        other.items, other.num_items = items, items.num_items
        other.settings = self.settings | {"num_items": items.num_items}
        return other

    def save(self, run_directory: str | os.PathLike[str]) -> None:
        """Write embeddings.safetensors.

        It holds "sequence_embedding" [I, D], every weight, the content that the items are read by, and the shape of the
        model.
        """
        tensors = self.state_dict() | {_KEYS: self.item_keys()}
        for place, modality in enumerate(self.items.modalities):
            for part, value in self.items.content(modality)._asdict().items():
                tensors[f"{_CONTENT}{place}.{part}"] = value
        metadata = {"sasrec": json.dumps(self.settings), "modalities": json.dumps(self.items.modalities)}
        write_embeddings(run_directory, "sequence", tensors, metadata)

    @classmethod
    def load(cls, run_directory: str | os.PathLike[str]) -> SASRec:
        """The model that `save` wrote, on the CPU, in evaluation mode.

        Raises: FileNotFoundError, no such file. ValueError, a file that holds no such model.
        """
        kind, tensors, metadata = read_embeddings(run_directory)
        path = Path(run_directory) / EMBEDDINGS
        if kind != "sequence" or _KEYS not in tensors:
            raise ValueError(f"{path} must hold a SASRec model, got {', '.join(sorted(tensors)[:4]) or 'nothing'}")
        keys = tensors.pop(_KEYS)
        # Runs of version 0.1 had items by ids alone, whose table is what they are known by.
        if not any(name.startswith("items.") for name in tensors):
            tensors["items.id_embedding.weight"] = keys
        with reading(path):
            parts = WhitenedContent._fields
            content = {
                modality: WhitenedContent(*(tensors.pop(f"{_CONTENT}{place}.{part}") for part in parts))
                for place, modality in enumerate(json.loads(metadata.get("modalities", "[]")))
            }
            model = cls(**json.loads(metadata["sasrec"]), content=content)
        try:
            model.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit its own settings: {error}") from None
        return model.eval()


class _Group(NamedTuple):
    """Histories of similar length: N of their items, in rows and places of a [B, T] block."""

    row: Tensor
    place: Tensor
    shape: tuple[int, int]


def _groups(length: Tensor, *, fixed: bool = False) -> list[_Group]:
    """Histories of ascending length [B] as groups up to 8, 16, 32, ... long, so that few short ones pad to a long one.

    Every history starts in column 0, so that causality alone keeps padding out of attention. A group is as wide as its
    longest history, or with `fixed` as its kind may be.
    """
    lengths, groups, start, width = length.tolist(), [], 0, _SHORTEST
    while start < len(lengths) or not groups:
        stop = bisect.bisect_right(lengths, width)
        if stop > start or stop == len(lengths):
            place = torch.arange(lengths[stop - 1] if stop else 0, device=length.device)
            row, place = (place < length[start:stop, None]).nonzero(as_tuple=True)
            longest = lengths[stop - 1] if stop else 0
            groups.append(_Group(row, place, (stop - start, width if fixed and longest else longest)))
        start, width = stop, 2 * width
    return groups


class _Block(nn.Module):
    """Causal self-attention and a feed-forward part, each with its residual and norm, over rows [N, D]."""

    def __init__(self, dim: int, num_heads: int, feedforward_dim: int, dropout: float, norm_first: bool) -> None:
        super().__init__()
        self.num_heads, self.norm_first = num_heads, norm_first
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.output = nn.Linear(dim, dim)
        self.attention_norm = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(nn.Linear(dim, feedforward_dim), nn.GELU(), nn.Linear(feedforward_dim, dim))
        self.feedforward_norm = nn.LayerNorm(dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, groups: list[_Group]) -> Tensor:
        if self.norm_first:
            x = x + self.dropout(self._attention(self.attention_norm(x), groups))
            return x + self.dropout(self.feedforward(self.feedforward_norm(x)))
        x = self.attention_norm(x + self.dropout(self._attention(x, groups)))
        return self.feedforward_norm(x + self.dropout(self.feedforward(x)))

    def _attention(self, x: Tensor, groups: list[_Group]) -> Tensor:
        query_key_value, sizes = self.query_key_value(x), [len(group.row) for group in groups]
        parts = query_key_value[: sum(sizes)].split(sizes)
        mixed = [self._attention_of_group(*pair) for pair in zip(parts, groups, strict=True)]
        mixed.append(x.new_zeros(len(x) - sum(sizes), x.shape[1]))
        return self.output(torch.cat(mixed))

    def _attention_of_group(self, query_key_value: Tensor, group: _Group) -> Tensor:
        padded = query_key_value.new_zeros(*group.shape, query_key_value.shape[1])
        padded[group.row, group.place] = query_key_value
        # [3, B, heads, T, D / heads]
        query, key, value = padded.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2)[group.row, group.place].flatten(1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=_INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
