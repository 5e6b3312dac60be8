"""Recommender models."""

from __future__ import annotations

from hellm.models.fold_in import FoldIn
from hellm.models.graph_encoder import EncoderOutput, GraphEncoder

__all__ = ["EncoderOutput", "FoldIn", "GraphEncoder"]
