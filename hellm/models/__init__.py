"""Recommender models."""

from __future__ import annotations

from hellm.models.fused import FusedModel
from hellm.models.graph import EncoderOutput, FoldIn, GraphEncoder, ItemContent
from hellm.models.llm import RecommenderLLM, load_language_model
from hellm.models.sequence import SASRec

__all__ = [
    "EncoderOutput",
    "FoldIn",
    "FusedModel",
    "GraphEncoder",
    "ItemContent",
    "RecommenderLLM",
    "SASRec",
    "load_language_model",
]
