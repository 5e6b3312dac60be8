"""Step sizes over a run."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["constant_schedule", "cosine_schedule"]


def constant_schedule(rate: float) -> Callable[[int, int], float]:
    """(epoch, step) -> `rate`."""
    return lambda epoch, step: rate


def cosine_schedule(
    rate: float, *, num_steps: int, num_epochs: int, warmup_epochs: float, low: float = 0.0, first: float = 1.0
) -> Callable[[int, int], float]:
    """(epoch, step) -> step size: linear growth to `rate` over the warm-up, then a cosine down to `low`.

    Args:
        rate: largest step size.
        num_steps: of an epoch.
        num_epochs: after which `low` is reached.
        warmup_epochs: of growth; 0 starts at `rate`.
        low: smallest step size after the warm-up; no more than `rate` is taken.
        first: where growth starts, in warm-up steps above 0.
    """
    warmup, total = warmup_epochs * num_steps, num_epochs * num_steps
    low = min(low, rate)

    def schedule(epoch: int, step: int) -> float:
        done = epoch * num_steps + step
        if done < warmup:
            return rate * min(1.0, (done + first) / warmup)
        share = (done - warmup) / max(1.0, total - warmup)
        return low + (rate - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    return schedule
