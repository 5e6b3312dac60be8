"""What the runs of an ablation say beside each other: means, intervals, differences to the full model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hellm.artifact.test_users import read_test_users
from hellm.config import FinetuneConfig, config_to_dict
from hellm.evaluate import RankingResult, get_protocol, mean_result, paired_bootstrap, seeds_summary
from hellm.evaluate.compare import LEVEL

__all__ = ["ablation_report"]


def ablation_report(ran: Mapping[str, Any], config: FinetuneConfig, dataset, out: Path) -> dict[str, Any]:
    """What `run_ablations` returned, with each row's means, intervals and differences to the full model.

    Args:
        ran: What it returned.
        config: Settings of the full model.
        dataset: Of the runs.
        out: Folder of the runs.
    Returns: Plain values: what `ran` has, what was compared and how, and per row "valid", "test" (metric -> mean over
        seeds and interval) and "difference_to_full" (metric -> paired difference on the same users).
    """
    k = 10 if 10 in config.ks else max(config.ks)
    protocol = get_protocol(config.protocol)
    seeds = len(ran["seeds"])
    full = _test_result(ran["rows"][0], protocol, out)
    shown = [f"recall@{k}", f"ndcg@{k}"]
    rows = []
    for row in ran["rows"]:
        tests = [one["test"] for one in row["runs"].values()]
        summary = {
            "valid": _means([one["valid"]["metrics"] for one in row["runs"].values()]),
            "test": _intervals(tests),
            "difference_to_full": None,
            **{
                name: float(np.mean([one[name] for one in row["runs"].values()]))
                for name in ("training_seconds", "users_per_second", "num_trained_parameters")
            },
        }
        if rows:
            summary["difference_to_full"] = _differences(summary, rows[0], _test_result(row, protocol, out), full)
        rows.append({**row, **summary})
    monitor = config.monitor[0]
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "protocol": protocol.name,
        "protocol_description": protocol.description,
        "num_users": tests[0]["num_users"],
        "num_items": tests[0]["num_items"],
        "chosen_by": list(config.monitor),
        "shown": shown,
        "compared": monitor if monitor in tests[0]["confidence_intervals"] else shown[-1],
        "interval": f"95% t-interval over {seeds} seeds" if seeds > 1 else "95% bootstrap interval over users",
        "config": config_to_dict(config),
        "seeds": ran["seeds"],
        "skipped": ran["skipped"],
        "rows": rows,
    }


def _means(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([run[name] for run in runs])) for name in runs[0]}


def _intervals(tests: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Metric -> mean, low, high: over seeds where there are several, else over users."""
    names = list(tests[0]["confidence_intervals"])
    if len(tests) > 1:
        return seeds_summary([{name: test["metrics"][name] for name in names} for test in tests], level=LEVEL)
    (test,) = tests
    return {
        name: {"mean": test["metrics"][name], "low": low, "high": high}
        for name, (low, high) in test["confidence_intervals"].items()
    }


def _test_result(row: Mapping[str, Any], protocol, out: Path):
    """The row's test with each user's mean over the seeds; None where a run has no values of single users."""
    asked = [read_test_users(out / one["run"]) for one in row["runs"].values()]
    found = [one for one in asked if one is not None]
    if len(found) < len(asked):
        return None
    num_items = next(iter(row["runs"].values()))["test"]["num_items"]
    return mean_result(
        [
            RankingResult({name: float(one.mean()) for name, one in values.items()}, values, users, num_items, protocol)
            for users, values in found
        ]
    )


def _differences(row: Mapping[str, Any], full: Mapping[str, Any], a, b) -> dict[str, dict[str, Any]]:
    """Metric -> difference to the full model, with a paired interval where both have values of single users."""
    if a is None or b is None:
        means = {name: row["test"][name]["mean"] - full["test"][name]["mean"] for name in row["test"]}
        return {name: {"difference": mean, "low": None, "high": None} for name, mean in means.items()}
    return {name: vars(paired_bootstrap(a, b, name, level=LEVEL)) for name in a.per_user}
