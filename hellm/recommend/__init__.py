"""Recommendations from a finished run of any kind: to known users, to bare histories, and of items that came later."""

from __future__ import annotations

from hellm.recommend.hyperedges import Hyperedge
from hellm.recommend.recommender import Recommender
from hellm.recommend.results import ContentLink, Reason, Recommendations, RecommendedItem
from hellm.recommend.served import ServedFused, ServedGraph, ServedLLM, ServedModel, ServedSASRec, ServedTransitions

__all__ = [
    "ContentLink",
    "Hyperedge",
    "Reason",
    "Recommendations",
    "RecommendedItem",
    "Recommender",
    "ServedFused",
    "ServedGraph",
    "ServedLLM",
    "ServedModel",
    "ServedSASRec",
    "ServedTransitions",
]
