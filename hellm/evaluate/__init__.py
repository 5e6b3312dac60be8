"""Evaluation of any scorer: ranking metrics, protocols, intervals and comparisons."""

from __future__ import annotations

from .datasets import evaluate_dataset
from .histories import HistoryModel, HistoryScorer, evaluate_histories
from .protocols import PROTOCOLS, Protocol, get_protocol
from .ranking import Scorer, ranking_metrics, top_items
from .result import PairedComparison, RankingResult, mean_result, paired_bootstrap, seeds_summary

__all__ = [
    "PROTOCOLS",
    "HistoryModel",
    "HistoryScorer",
    "PairedComparison",
    "Protocol",
    "RankingResult",
    "Scorer",
    "evaluate_dataset",
    "evaluate_histories",
    "get_protocol",
    "mean_result",
    "paired_bootstrap",
    "ranking_metrics",
    "seeds_summary",
    "top_items",
]
