"""test_users.safetensors: the test metrics of every user, for comparing runs user by user without another test."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from hellm._files import atomic_path, reading
from hellm.artifact.files import TEST_USERS

__all__ = ["read_test_users", "write_test_users"]


def write_test_users(run: str | os.PathLike[str], result: Any) -> None:
    """Write users and their metrics, of a `hellm.evaluate.RankingResult`."""
    from safetensors.numpy import save_file

    tables = {"users": result.users, **result.per_user}
    with atomic_path(Path(run) / TEST_USERS) as temporary:
        save_file({name: np.ascontiguousarray(values) for name, values in tables.items()}, temporary)


def read_test_users(run: str | os.PathLike[str]) -> tuple[np.ndarray, dict[str, np.ndarray]] | None:
    """Users [U] int64 and, by metric, their test values [U] float64; None for a run of an earlier version.

    Raises: DataError naming the file, a damaged one.
    """
    from safetensors.numpy import load_file

    file = Path(run) / TEST_USERS
    if not file.is_file():
        return None
    with reading(file):
        values = load_file(file)
        return values.pop("users"), values
