"""Recommendations from a finished run of any kind: to known users, to bare histories, and of items that came later."""

from __future__ import annotations

from hellm.recommend.recommender import Recommender
from hellm.recommend.results import ContentLink, Reason, Recommendations, RecommendedItem
from hellm.recommend.served import ServedGraph, ServedLLM, ServedModel, ServedSASRec

__all__ = [
    "ContentLink",
    "Reason",
    "Recommendations",
    "RecommendedItem",
    "Recommender",
    "ServedGraph",
    "ServedLLM",
    "ServedModel",
    "ServedSASRec",
]
