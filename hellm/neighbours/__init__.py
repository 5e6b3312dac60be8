"""Nearest rows of features that need not fit into memory: exact, approximate, and kept for the next time."""

from __future__ import annotations

from hellm.neighbours.approximate import approximate_knn, check_approximate
from hellm.neighbours.kept import key_of, read_found, write_found
from hellm.neighbours.lines import knn_by_lines

__all__ = ["approximate_knn", "check_approximate", "key_of", "knn_by_lines", "read_found", "write_found"]
