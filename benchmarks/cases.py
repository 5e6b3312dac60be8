"""Every case and target, in the order of the tables; a new file of them is named here."""

# ruff: isort: skip_file
from __future__ import annotations

from benchmarks import ceilings  # noqa: F401
from benchmarks.ops import info_nce, item_cross_entropy, hypergraph_conv, bipartite_propagate, knn  # noqa: F401
from benchmarks.registry import CASES, TARGETS
from benchmarks.training import samplers, pretrain  # noqa: F401

__all__ = ["CASES", "TARGETS"]
