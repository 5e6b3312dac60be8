"""Experiments on real users: who is shown which arm, what was shown, and how the arms compare.

A user's arm follows from a hash, so that no list of assignments has to be kept or shared; an exposure is a row of a
parquet file with the probability that it had, and what users did afterwards is read from any events.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hellm._files import DataError, atomic_path, reading

from .result import _bootstrap_means, _percentile_interval, paired_gain

if TYPE_CHECKING:
    import polars as pl

__all__ = ["OUTCOMES", "arm_of", "compare_arms", "read_exposures", "write_exposures"]

OUTCOMES = {
    "converted": "users with an event on an item that they were shown, after they were shown it",
    "events_on_shown": "events on items that a user was shown, after that, for each user",
    "events": "events after the first exposure, for each user",
}
"""Outcome -> what it is the mean of."""
# Arms whose numbers of users are as unlikely as this under their probabilities were not filled at random.
_MISMATCH = 0.001


def arm_of(user: str, experiment: str, arms: Mapping[str, float]) -> tuple[str, float]:
    """The arm of a user, the same whenever and wherever it is asked for.

    Args:
        user: Id.
        experiment: Name; another one divides the users anew, independently of the first.
        arms: Name -> weight > 0, in their order.
    Returns: The arm, and its probability.
    Raises: ValueError, no arm, or a weight that is not finite and > 0.
    """
    if not arms:
        raise ValueError("arms must be at least one, got none")
    for name, weight in arms.items():
        if not 0 < weight < math.inf:
            raise ValueError(f"arms[{name!r}] must be finite and > 0, got {weight}")
    digest = hashlib.sha256(f"{experiment}\0{user}".encode()).digest()
    place = int.from_bytes(digest[:8], "big") / 2**64 * sum(arms.values())
    chosen, passed = "", 0.0
    for chosen, weight in arms.items():  # noqa: B007 (the last arm takes what rounding leaves)
        passed += weight
        if place < passed:
            break
    return chosen, arms[chosen] / sum(arms.values())


def write_exposures(file: str | PathLike[str], exposures: Sequence[Mapping[str, Any]]) -> None:
    """Write exposures into a parquet file.

    Args:
        file: To write, whole or not at all.
        exposures: Each with "user", "experiment", "arm" (texts), "propensity" (its probability), "time" (seconds since
            1970) and "items" (ids that were shown, best first).
    """
    import polars as pl

    with atomic_path(file) as temporary:
        pl.DataFrame(list(exposures), schema=_schema()).write_parquet(temporary)


def read_exposures(path: str | PathLike[str]) -> pl.DataFrame:
    """The exposures of a file, or of all parquet files in a folder.

    Raises: FileNotFoundError; DataError naming the file, columns other than those of `write_exposures`, or a propensity
        outside (0, 1].
    """
    import polars as pl

    files = sorted(Path(path).glob("*.parquet")) if Path(path).is_dir() else [Path(path)]
    if not files or not files[0].is_file():
        raise FileNotFoundError(f"{path} must be a parquet file of exposures, or a folder with such files")
    tables = []
    for file in files:
        with reading(file):
            table = pl.read_parquet(file, glob=False)
            missing = [name for name in _schema() if name not in table.columns]
            if missing:
                raise DataError(f"{file}: must have the columns {', '.join(_schema())}, lacks {', '.join(missing)}")
            tables.append(table.select(pl.col(name).cast(kind) for name, kind in _schema().items()))
        if not tables[-1]["propensity"].is_between(0, 1, closed="right").all():
            raise DataError(f"{file}: propensity must lie in (0, 1]")
    return pl.concat(tables)


def compare_arms(
    exposures: pl.DataFrame,
    outcomes: pl.DataFrame,
    *,
    outcome: str = "converted",
    control: str | None = None,
    days: float | None = None,
    level: float = 0.95,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """What users of each arm did after what they were shown.

    Users are what is drawn, so means and intervals (percentile bootstrap) are over users, each weighted by one over the
    propensity. Where every user was in both arms, the difference is paired by user; otherwise arms are independent.

    Args:
        exposures: As `read_exposures` gives, of one experiment.
        outcomes: Columns user, item (ids), time (seconds since 1970).
        outcome: One of `OUTCOMES`.
        control: The arm that others are compared with; None is the first by name.
        days: Only events within so many days after an exposure count; None is all.
        level, num_samples, seed: Of the bootstrap.
    Returns: "experiment", "outcome", "control", "paired", "arms" (name -> "users", "exposures", "value", "low", "high",
        "difference": None for the control, else difference, low and high), "mismatch" (probability of such different
        numbers of users, if arms were filled at random; None where they are paired) and "notes".
    Raises: ValueError, an unknown outcome or control, exposures of several experiments, or of no or only one arm.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome must be one of {', '.join(OUTCOMES)}, got {outcome!r}")
    experiments, arms = (sorted(exposures[name].unique().to_list()) for name in ("experiment", "arm"))
    if len(experiments) != 1:
        raise ValueError(f"exposures must be of one experiment, got {', '.join(experiments) or 'none'}")
    if len(arms) < 2:
        raise ValueError(f"exposures must be of at least two arms, got {', '.join(arms) or 'none'}")
    control = arms[0] if control is None else control
    if control not in arms:
        raise ValueError(f"control must be one of the arms {', '.join(arms)}, got {control!r}")
    values = _values(exposures, outcomes, outcome, days)
    tables = {arm: values.filter(values["arm"] == arm).sort("user") for arm in arms}
    paired = all(table["user"].equals(tables[control]["user"]) for table in tables.values())
    means = {arm: _means(table, num_samples, seed + place) for place, (arm, table) in enumerate(tables.items())}
    report = {}
    for arm, table in tables.items():
        value, drawn = means[arm]
        low, high = _percentile_interval(drawn[:, None], level)[:, 0]
        difference = None
        if arm != control and paired:
            pair = (table["value"].to_numpy(), tables[control]["value"].to_numpy())
            difference = paired_gain(*pair, level=level, num_samples=num_samples, seed=seed)
        elif arm != control:
            interval = _percentile_interval((drawn - means[control][1])[:, None], level)[:, 0]
            difference = (value - means[control][0], *interval)
        report[arm] = {
            "users": len(table),
            "exposures": int((exposures["arm"] == arm).sum()),
            "value": value,
            "low": float(low),
            "high": float(high),
            "difference": None
            if difference is None
            else dict(zip(("difference", "low", "high"), map(float, difference), strict=True)),
        }
    mismatch = None if paired else _mismatch(tables)
    notes = []
    if mismatch is not None and mismatch < _MISMATCH:
        notes.append(
            f"the arms have other numbers of users than their probabilities say (p = {mismatch:.1g}): exposures were "
            "lost or users were not divided at random, and the comparison may mean nothing"
        )
    crossed = int(sum(len(table) for table in tables.values()) - exposures["user"].n_unique())
    if crossed and not paired:
        notes.append(f"users who were in several arms count in each ({crossed} times more than there are users)")
    return {
        "experiment": experiments[0],
        "outcome": outcome,
        "control": control,
        "level": level,
        "paired": paired,
        "arms": report,
        "mismatch": mismatch,
        "notes": notes,
    }


def _schema() -> dict[str, Any]:
    import polars as pl

    texts = dict.fromkeys(("user", "experiment", "arm"), pl.String)
    return texts | {"propensity": pl.Float64, "time": pl.Float64, "items": pl.List(pl.String)}


def _values(exposures: pl.DataFrame, outcomes: pl.DataFrame, outcome: str, days: float | None) -> pl.DataFrame:
    """arm, user, propensity (of the first exposure) and value of each user in each arm."""
    import polars as pl

    until = math.inf if days is None else 86400 * days
    keys = ["arm", "user"]
    people = exposures.sort("time").group_by(keys).agg(pl.col("time", "propensity").first())
    events = outcomes.select("user", "item", at="time").with_row_index("event")
    if outcome == "events":
        shown = people.select(*keys, "time").join(events, on="user")
    else:
        shown = exposures.select(*keys, "time", item="items").explode("item").join(events, on=["user", "item"])
    later = shown.filter((pl.col("at") > pl.col("time")) & (pl.col("at") <= pl.col("time") + until))
    # An event counts once, however often its item was shown before.
    counts = later.group_by(keys).agg(value=pl.col("event").n_unique().cast(pl.Float64))
    values = people.join(counts, on=keys, how="left").with_columns(pl.col("value").fill_null(0.0))
    return values.with_columns(pl.col("value").clip(upper_bound=1)) if outcome == "converted" else values


def _means(table: pl.DataFrame, num_samples: int, seed: int) -> tuple[float, np.ndarray]:
    """Weighted mean of the values, and of resamples [S]."""
    weight = 1 / table["propensity"].to_numpy()
    columns = np.stack([weight * table["value"].to_numpy(), weight], axis=1)
    drawn = _bootstrap_means(columns, num_samples, seed)
    return float(columns[:, 0].sum() / columns[:, 1].sum()), drawn[:, 0] / drawn[:, 1]


def _mismatch(tables: Mapping[str, pl.DataFrame]) -> float:
    """The smallest probability, over the arms, of a number of users that is so far from the expected one.

    The normal approximation, times the number of arms (Bonferroni).
    """
    total = sum(map(len, tables.values()))
    found = []
    for table in tables.values():
        share = float(table["propensity"].to_numpy().mean())
        deviation = math.sqrt(total * share * (1 - share))
        found.append(math.erfc(abs(len(table) - total * share) / deviation / math.sqrt(2)) if deviation else 1.0)
    return min(1.0, len(found) * min(found))
