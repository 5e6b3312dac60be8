"""An experiment from its files: exposures, and events of any form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from hellm.data import DataError, IdMap
from hellm.data.append import load_newer
from hellm.evaluate.ab import compare_arms, read_exposures

__all__ = ["compare_experiment"]


def compare_experiment(
    exposures: str | Path,
    events: str | Path,
    *,
    outcome: str = "converted",
    control: str | None = None,
    days: float | None = None,
    seed: int = 0,
    **reading: Any,
) -> dict[str, Any]:
    """`hellm.evaluate.ab.compare_arms` of files.

    Args:
        exposures: File or folder, see `read_exposures`.
        events: What users did, file or folder of any form that `load_dataset` reads, with times.
        outcome, control, days, seed: See `compare_arms`.
        **reading: Of `load_dataset`, for `events`.
    Raises: As `compare_arms` and `read_exposures`; DataError, events without times.
    """
    import polars as pl

    shown, data = read_exposures(exposures), load_newer(events, IdMap(), IdMap(), **reading)
    if data.timestamps is None:
        raise DataError(f"{events}: must have times, as only what follows an exposure counts, got none")
    outcomes = pl.DataFrame(
        {
            "user": np.array(data.user_ids.ids, dtype=object)[data.users],
            "item": np.array(data.item_ids.ids, dtype=object)[data.items],
            "time": data.timestamps.astype(np.float64),
        },
        schema={"user": pl.String, "item": pl.String, "time": pl.Float64},
    )
    return compare_arms(shown, outcomes, outcome=outcome, control=control, days=days, seed=seed)
