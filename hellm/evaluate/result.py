"""Results of one evaluation, their uncertainty, and comparisons between results.

Shape letters: U evaluated users, M metrics, S bootstrap samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from .protocols import Protocol

# Bytes of drawn user indices and counts held at once while resampling.
_BOOTSTRAP_MEMORY = 1 << 26


@dataclass(frozen=True)
class RankingResult:
    """Metrics of one scorer on one split.

    Attributes:
        metrics: "recall@10" -> value. Means over `users`, except coverage@k and gini@k, which describe all
            lists together.
        per_user: "recall@10" -> [U] float64, the values behind each mean.
        users: [U] int64, the users averaged over, in the order of `per_user`.
        num_items: Catalogue size that was ranked.
        protocol: How it was evaluated.
        split: "valid" or "test".
        by_target: Label of a group of items -> the accuracy with its targets alone, where that was asked for.
    """

    metrics: dict[str, float]
    per_user: dict[str, np.ndarray]
    users: np.ndarray
    num_items: int
    protocol: Protocol
    split: str = "test"
    by_target: Mapping[str, RankingResult] = field(default_factory=dict)

    @property
    def num_users(self) -> int:
        return len(self.users)

    def confidence_intervals(
        self, level: float = 0.95, num_samples: int = 1000, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap interval over users of every metric in `per_user`.

        It says how far the mean would move with other users of the same kind, not with another training seed.

        Args:
            level: Coverage, in (0, 1).
            num_samples: Resamples, >= 1.
            seed: Same seed, same intervals.
        Returns: name -> (low, high).
        Raises: ValueError, `level` or `num_samples` out of range.
        """
        names = list(self.per_user)
        means = _bootstrap_means(np.stack([self.per_user[name] for name in names], axis=1), num_samples, seed)
        low, high = _percentile_interval(means, level)
        return {name: (float(low[i]), float(high[i])) for i, name in enumerate(names)}

    def of_users(self, chosen: np.ndarray) -> RankingResult:
        """The same of some of the users, without what describes all lists together.

        Args:
            chosen: [U] bool, at least one of them True.
        """
        per_user = {name: values[chosen] for name, values in self.per_user.items()}
        metrics = {name: float(values.mean()) for name, values in per_user.items()}
        return replace(self, metrics=metrics, per_user=per_user, users=self.users[chosen], by_target={})

    def slices(self, groups: np.ndarray) -> dict[str, dict[str, float]]:
        """Means per group of users, for instance by history length.

        Args:
            groups: [U] label of each user of `users`.
        Returns: label -> {"num_users": n, "recall@10": mean, ...}, labels in sorted order.
        Raises: ValueError, one label per user is required.
        """
        groups = np.asarray(groups)
        if groups.shape != (self.num_users,):
            raise ValueError(f"groups must have shape ({self.num_users},), got {groups.shape}")
        labels, place, count = np.unique(groups, return_inverse=True, return_counts=True)
        means = {name: np.bincount(place, weights=values) / count for name, values in self.per_user.items()}
        return {
            str(label): {"num_users": int(count[i])} | {name: float(mean[i]) for name, mean in means.items()}
            for i, label in enumerate(labels)
        }

    def to_dict(self, *, level: float | None = None, num_samples: int = 1000, seed: int = 0) -> dict:
        """Plain values that `json.dumps` takes; with `level`, confidence intervals as well."""
        result = {
            "split": self.split,
            "protocol": self.protocol.name,
            "protocol_description": self.protocol.description,
            "num_users": self.num_users,
            "num_items": self.num_items,
            "metrics": dict(self.metrics),
        }
        if level is not None:
            intervals = self.confidence_intervals(level, num_samples, seed)
            result["confidence_level"] = level
            result["confidence_intervals"] = {name: list(interval) for name, interval in intervals.items()}
        return result


@dataclass(frozen=True)
class PairedComparison:
    """Difference a - b of one metric on the same users, with its bootstrap interval."""

    metric: str
    difference: float
    low: float
    high: float
    level: float
    num_users: int

    @property
    def significant(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(
    a: RankingResult, b: RankingResult, metric: str, *, level: float = 0.95, num_samples: int = 1000, seed: int = 0
) -> PairedComparison:
    """Whether `a` differs from `b` in `metric`, by resampling users with both of their values.

    Raises:
        ValueError: The results are not of the same users, split and protocol, or have no per-user `metric`.
    """
    for name, result in (("a", a), ("b", b)):
        if metric not in result.per_user:
            raise ValueError(f"metric must be one of {', '.join(result.per_user)} in {name}, got {metric!r}")
    if a.split != b.split or a.protocol != b.protocol:
        raise ValueError(
            f"a and b must have the same split and protocol, got {a.split}/{a.protocol.name} "
            f"and {b.split}/{b.protocol.name}"
        )
    if not np.array_equal(a.users, b.users):
        raise ValueError(f"a and b must be of the same users in the same order, got {a.num_users} and {b.num_users}")
    gain = paired_gain(a.per_user[metric], b.per_user[metric], level=level, num_samples=num_samples, seed=seed)
    return PairedComparison(metric, *gain, level, a.num_users)


def paired_gain(
    a: np.ndarray, b: np.ndarray, *, level: float = 0.95, num_samples: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b [U] over users, and its percentile bootstrap interval (low, high)."""
    differences = a - b
    low, high = _percentile_interval(_bootstrap_means(differences[:, None], num_samples, seed), level)
    return float(differences.mean()), float(low[0]), float(high[0])


def mean_result(results: Sequence[RankingResult]) -> RankingResult:
    """Each user's mean over results of the same users, split, protocol and metrics, for instance of several seeds.

    Raises: ValueError, no results, or results that differ in one of these.
    """
    if not results:
        raise ValueError("results must have at least one, got none")
    first = results[0]
    for place, one in enumerate(results):
        for what in ("split", "protocol", "num_items"):
            if getattr(one, what) != getattr(first, what):
                raise ValueError(f"results must have the same {what}, number {place} differs from the first")
        if not np.array_equal(one.users, first.users) or list(one.metrics) != list(first.metrics):
            raise ValueError(f"results must be of the same users and metrics, number {place} differs from the first")
    return replace(
        first,
        metrics={name: float(np.mean([one.metrics[name] for one in results])) for name in first.metrics},
        per_user={name: np.mean([one.per_user[name] for one in results], axis=0) for name in first.per_user},
        by_target={label: mean_result([one.by_target[label] for one in results]) for label in first.by_target},
    )


def seeds_summary(runs: Sequence[Mapping[str, float]], *, level: float = 0.95) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and Student-t interval of each metric over training seeds.

    Args:
        runs: One metrics dict per seed, all with the same names.
        level: Coverage of the interval of the mean, in (0, 1).
    Returns: name -> {"mean", "sd" (n - 1), "low", "high", "num_runs"}; with one run sd, low and high are NaN.
    Raises: ValueError, no runs, runs with different metrics, or `level` out of range. ImportError, without scipy.
    """
    _check_level(level)
    if not runs:
        raise ValueError("runs must have at least one metrics dict, got none")
    for i, run in enumerate(runs):
        if set(run) != set(runs[0]):
            raise ValueError(f"runs must have the same metrics, run {i} differs in {sorted(set(run) ^ set(runs[0]))}")
    n = len(runs)
    quantile = _student_t_quantile((1 + level) / 2, n - 1) if n > 1 else np.nan
    summary = {}
    for name in runs[0]:
        values = np.array([run[name] for run in runs], dtype=np.float64)
        mean, sd = float(values.mean()), float(values.std(ddof=1)) if n > 1 else float("nan")
        half = float(quantile * sd / np.sqrt(n))
        summary[name] = {"mean": mean, "sd": sd, "low": mean - half, "high": mean + half, "num_runs": n}
    return summary


def _student_t_quantile(probability: float, degrees: int) -> float:
    try:
        from scipy.stats import t
    except ImportError as error:
        raise ImportError('seeds_summary needs scipy: pip install "hellm[baselines]"') from error
    return float(t.ppf(probability, degrees))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")


def _percentile_interval(means: np.ndarray, level: float) -> np.ndarray:
    """[2, M] low and high of means [S, M]."""
    _check_level(level)
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)


def _bootstrap_means(values: np.ndarray, num_samples: int, seed: int) -> np.ndarray:
    """[S, M] means of values [U, M] over users drawn with replacement.

    Each resample is a row of draw counts, so all metrics of a chunk of resamples are one matrix product.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be >= 1, got {num_samples}")
    num_users = len(values)
    rng = np.random.default_rng(seed)
    chunk = max(1, _BOOTSTRAP_MEMORY // (24 * num_users))
    means = []
    for start in range(0, num_samples, chunk):
        size = min(chunk, num_samples - start)
        drawn = rng.integers(num_users, size=(size, num_users)) + num_users * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * num_users).reshape(size, num_users)
        means.append(counts @ values / num_users)
    return np.concatenate(means)
