"""What a run holds: its files, their format, and their reading and writing."""

from __future__ import annotations

from hellm.artifact.embeddings import FORMAT, Embeddings, read_embeddings, write_embeddings
from hellm.artifact.evaluation_log import log_test_evaluation, read_test_evaluations
from hellm.artifact.files import RUN_LAYOUT
from hellm.artifact.run_directory import RunDirectory, check_run
from hellm.artifact.tables import histories_table, ids_table, read_histories, read_ids

__all__ = [
    "FORMAT",
    "RUN_LAYOUT",
    "Embeddings",
    "RunDirectory",
    "check_run",
    "histories_table",
    "ids_table",
    "log_test_evaluation",
    "read_embeddings",
    "read_histories",
    "read_ids",
    "read_test_evaluations",
    "write_embeddings",
]
