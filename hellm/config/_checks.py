"""What settings are held to."""

from __future__ import annotations

from typing import Any

__all__ = ["check_loop", "require"]


def require(condition: bool, name: str, rule: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check_loop(config: Any) -> None:
    """The settings of the training loop, which every stage has."""
    for name in ("max_epochs", "validate_every", "eval_batch_size", "checkpoint_every"):
        require(getattr(config, name) >= 1, name, ">= 1", getattr(config, name))
    require(config.num_threads is None or config.num_threads >= 1, "num_threads", "null or >= 1", config.num_threads)
    for name in ("patience", "seed"):
        require(getattr(config, name) >= 0, name, ">= 0", getattr(config, name))
    require(len(config.monitor) > 0, "monitor", "at least one metric", config.monitor)
    require(len(config.ks) > 0 and min(config.ks, default=0) >= 1, "ks", "list lengths >= 1", config.ks)
    for metric in config.monitor:
        name, _, k = metric.partition("@")
        require(bool(name) and k.isdigit() and int(k) >= 1, "monitor", "metric@k with k >= 1", metric)
