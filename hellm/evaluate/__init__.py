"""Evaluation of any scorer: ranking metrics, protocols, slices, intervals and comparisons."""

from __future__ import annotations

from .datasets import evaluate_dataset, evaluate_protocols
from .histories import HistoryModel, HistoryScorer, evaluate_histories
from .protocols import PROTOCOLS, Candidates, Protocol, get_protocol
from .ranking import Scorer, ranking_metrics, top_items
from .result import PairedComparison, RankingResult, mean_result, paired_bootstrap, seeds_summary
from .slices import length_groups, popularity_groups

__all__ = [
    "PROTOCOLS",
    "Candidates",
    "HistoryModel",
    "HistoryScorer",
    "PairedComparison",
    "Protocol",
    "RankingResult",
    "Scorer",
    "evaluate_dataset",
    "evaluate_histories",
    "evaluate_protocols",
    "get_protocol",
    "length_groups",
    "mean_result",
    "paired_bootstrap",
    "popularity_groups",
    "ranking_metrics",
    "seeds_summary",
    "top_items",
]
