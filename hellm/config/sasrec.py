"""Settings of the sequence model."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Literal

from hellm.config._checks import require
from hellm.config.loop import LoopConfig

__all__ = ["CONTENT_TOWER", "SASRecConfig"]


@dataclass(frozen=True)
class SASRecConfig(LoopConfig):
    """The sequence model SASRec.

    Args:
        item_id: give every item a trained embedding.
        content: features and attributes (brand, category, ...) of the data set that the embeddings of the items are
            made from as well; null takes all there are, [] none.
        content_components: whitened directions of each modality that are kept; null keeps all.
        content_hidden_dim: width of the hidden layer between content and embedding; 0 is none.
        content_dropout: probability on the whitened features.
        embedding_dim: width of items and hidden states, a multiple of `num_heads`.
        num_layers: attention blocks.
        num_heads: attention heads.
        feedforward_dim: inner width of the feed-forward part of a block.
        max_length: latest items of a history that are read.
        dropout: probability at the input, in attention and after each part of a block.
        norm_first: normalise what each part of a block reads, instead of what it leaves.
        loss: "cross_entropy" over the whole catalogue, or "bce" with one uniform negative per position (the paper).
        sampled_items: items drawn anew for every step that stand for the whole catalogue in the softmax, without bias
            in what it divides by; null takes all items.
        learning_rate: Adam step size, the largest of a schedule.
        schedule: of the step size: "constant", or "cosine", which ends near 0 at `max_epochs` and so wants those set to
            the epochs that are meant.
        warmup_epochs: epochs of linear growth from 0, with "cosine".
        batch_size: positions per step, at least `max_length`; fewer where the data has fewer.
        protocol: evaluation protocol, see `hellm.evaluate`; sequence models are usually scored with nothing masked.
        seed: of initialisation, order and sampling.
    """

    item_id: bool = True
    content: tuple[str, ...] | None = None
    content_components: int | None = 256
    content_hidden_dim: int = 0
    content_dropout: float = 0.0
    embedding_dim: int = 64
    num_layers: int = 2
    num_heads: int = 2
    feedforward_dim: int = 256
    max_length: int = 50
    dropout: float = 0.5
    norm_first: bool = False
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"
    sampled_items: int | None = None
    learning_rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 1.0
    batch_size: int = 2048
    validate_every: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("embedding_dim", "num_layers", "num_heads", "feedforward_dim", "max_length"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(
            self.embedding_dim % self.num_heads == 0,
            "embedding_dim",
            f"a multiple of num_heads {self.num_heads}",
            self.embedding_dim,
        )
        for name in ("dropout", "content_dropout"):
            require(0 <= getattr(self, name) < 1, name, "in [0, 1)", getattr(self, name))
        require(self.content_hidden_dim >= 0, "content_hidden_dim", ">= 0", self.content_hidden_dim)
        components = self.content_components
        require(components is None or components >= 1, "content_components", ">= 1 or null", components)
        require(self.item_id or self.content != (), "content", "not empty where item_id is false", self.content)
        require(isfinite(self.learning_rate) and self.learning_rate > 0, "learning_rate", "> 0", self.learning_rate)
        sampled = self.sampled_items
        require(sampled is None or sampled >= 1, "sampled_items", "null or >= 1", sampled)
        require(sampled is None or self.loss == "cross_entropy", "sampled_items", "null with loss bce", sampled)
        require(isfinite(self.warmup_epochs) and self.warmup_epochs >= 0, "warmup_epochs", ">= 0", self.warmup_epochs)
        require(self.batch_size >= self.max_length, "batch_size", f">= max_length {self.max_length}", self.batch_size)


CONTENT_TOWER = SASRecConfig(
    item_id=False,
    content_components=None,
    content_hidden_dim=256,
    embedding_dim=128,
    feedforward_dim=512,
    dropout=0.2,
    learning_rate=2e-3,
    schedule="cosine",
    max_epochs=24,
    # A cosine gains most at its end.
    patience=12,
)
"""A sequence model that knows items by their content alone, and so ranks new ones like any other."""
