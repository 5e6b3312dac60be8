"""Evaluation of any scorer: ranking metrics, protocols, slices, intervals and comparisons."""

from __future__ import annotations

from hellm.artifact.evaluation_log import log_test_evaluation, read_test_evaluations

from .agreement import overlap, rank_biased_overlap
from .compare import Row, compare
from .datasets import evaluate_dataset, evaluate_protocols
from .histories import HistoryModel, HistoryScorer, evaluate_histories, history_scores
from .metrics import METRICS
from .protocols import PROTOCOLS, Candidates, Protocol, get_protocol
from .ranking import Scorer, ranking_metrics, top_items
from .result import PairedComparison, RankingResult, mean_result, paired_bootstrap, paired_gain, seeds_summary
from .slices import length_groups, popularity_groups

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Candidates",
    "HistoryModel",
    "HistoryScorer",
    "PairedComparison",
    "Protocol",
    "RankingResult",
    "Row",
    "Scorer",
    "compare",
    "evaluate_dataset",
    "evaluate_histories",
    "evaluate_protocols",
    "get_protocol",
    "history_scores",
    "length_groups",
    "log_test_evaluation",
    "mean_result",
    "overlap",
    "paired_bootstrap",
    "paired_gain",
    "popularity_groups",
    "rank_biased_overlap",
    "ranking_metrics",
    "read_test_evaluations",
    "seeds_summary",
    "top_items",
]
