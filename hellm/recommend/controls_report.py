"""What a fused model and its controls say beside each other: differences to the fused model, user by user."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hellm._devices import resolve_device
from hellm._files import read_json
from hellm.artifact.test_users import read_test_users, write_test_users
from hellm.config import FuseConfig, config_to_dict
from hellm.data import Dataset
from hellm.evaluate import (
    RankingResult,
    evaluate_histories,
    get_protocol,
    log_test_evaluation,
    paired_bootstrap,
)
from hellm.evaluate.compare import LEVEL
from hellm.recommend.recommender import Recommender

__all__ = ["controls_report"]

_WITHOUT = "without-"


def controls_report(
    fused: Any,
    dataset: Dataset,
    results: Mapping[str, Mapping[str, Any]],
    runs: Mapping[str, Mapping[str, Path]],
    words: Mapping[str, str],
    skipped: Mapping[str, str],
    out: Path,
) -> dict[str, Any]:
    """The fused model, its controls, and the sum without each tower, with differences to the first.

    Args:
        fused: Its path, result, config (`FuseConfig`) and towers (name -> run).
        dataset: Of the fused run.
        results: Control -> what its fusion came to, in `out`/CONTROL.
        runs: Control -> its towers, as name -> run.
        words: Control -> what it is.
        skipped: Control -> why there is none.
        out: Folder of the controls.
    Returns: See `hellm.recommend.controls.run_controls`.
    """
    result, config = fused.result, fused.config
    full = _test_result(fused.path, result, dataset, config)
    rows = [_row("full", "the fused model as it is", result, fused.towers, None)]
    for name, one in results.items():
        test = _test_result(out / name, one, dataset, config)
        differences = {metric: vars(paired_bootstrap(test, full, metric, level=LEVEL)) for metric in full.per_user}
        rows.append(_row(name, words[name], one, runs[name], differences))
    for name, gains in result["leave_one_out"].items():
        rows.append(_without(name, gains, rows[0]))
    k = 10 if 10 in config.ks else max(config.ks)
    protocol = get_protocol(config.protocol)
    monitor = config.monitor[0]
    return {
        "data": dataset.name,
        "fingerprint": dataset.fingerprint,
        "protocol": protocol.name,
        "protocol_description": protocol.description,
        "num_users": result["test"]["num_users"],
        "num_items": result["test"]["num_items"],
        "chosen_by": list(config.monitor),
        "chosen": "each tower's epoch, the towers and their weights",
        "shown": [f"recall@{k}", f"ndcg@{k}"],
        "compared": monitor if monitor in result["test"]["confidence_intervals"] else f"ndcg@{k}",
        "interval": "95% bootstrap interval over users",
        "config": config_to_dict(config),
        "seeds": [config.seed],
        "skipped": dict(skipped),
        "rows": rows,
    }


def _row(
    name: str,
    words: str,
    result: Mapping[str, Any],
    towers: Mapping[str, Path],
    differences: Mapping[str, Any] | None,
) -> dict[str, Any]:
    test, cost = result["test"], result["seconds_per_1000_users"]
    seconds = [read_json(towers[one] / "result.json").get("seconds") for one in result["weights"]]
    return {
        "name": name,
        "words": words,
        "weights": result["weights"],
        "valid": result["valid"]["metrics"],
        "test": {
            metric: {"mean": test["metrics"][metric], "low": low, "high": high}
            for metric, (low, high) in test["confidence_intervals"].items()
        },
        "difference_to_full": differences,
        "training_seconds": sum(filter(None, seconds)),
        "users_per_second": 1000 / cost if cost else None,
    }


def _without(tower: str, gains: Mapping[str, Mapping[str, float]], full: Mapping[str, Any]) -> dict[str, Any]:
    """The sum without a tower, from what the fused run says that it adds."""
    lost = {
        metric: {"difference": -one["difference"], "low": -one["high"], "high": -one["low"]}
        for metric, one in gains.items()
    }
    return {
        "name": f"{_WITHOUT}{tower}",
        "words": f"the other towers with the weights that they have, without {tower}",
        "weights": {name: weight for name, weight in full["weights"].items() if name != tower},
        "valid": {},
        "test": {
            metric: {"mean": full["test"][metric]["mean"] + one["difference"], "low": None, "high": None}
            for metric, one in lost.items()
        },
        "difference_to_full": lost,
        "training_seconds": None,
        "users_per_second": None,
    }


def _test_result(run: Path, result: Mapping[str, Any], dataset: Dataset, config: FuseConfig) -> RankingResult:
    """The test of a fused run with its values of every user, which earlier versions did not keep."""
    kept, protocol = read_test_users(run), get_protocol(config.protocol)
    if kept is None:
        model = Recommender.load(run, device=resolve_device(config.device)).model
        options = {"protocol": config.protocol, "ks": config.ks, "batch_size": config.eval_batch_size}
        tested = evaluate_histories(model, dataset, split="test", **options)
        names = list(tested.metrics)
        log_test_evaluation(
            run, by="hellm ablate", protocols=[config.protocol], metrics=names, fingerprint=dataset.fingerprint
        )
        write_test_users(run, tested)
        return tested
    users, values = kept
    metrics = {name: result["test"]["metrics"][name] for name in values}
    return RankingResult(metrics, values, users, result["test"]["num_items"], protocol)
