"""Stage 2: a language model that reads item tokens and graph context, and ranks the catalogue."""

from __future__ import annotations

from hellm.models.llm.language_model import load_language_model
from hellm.models.llm.recommender import RecommenderLLM

__all__ = ["RecommenderLLM", "load_language_model"]
