"""Recommender models."""

from __future__ import annotations

from hellm.models.fold_in import FoldIn
from hellm.models.graph_encoder import EncoderOutput, GraphEncoder
from hellm.models.language_model import load_language_model
from hellm.models.recommender_llm import RecommenderLLM
from hellm.models.sequence import SASRec

__all__ = ["EncoderOutput", "FoldIn", "GraphEncoder", "RecommenderLLM", "SASRec", "load_language_model"]
