"""Settings of the fusion of finished runs."""

from __future__ import annotations

from dataclasses import dataclass

from hellm.config._checks import require
from hellm.config.loop import StageConfig

__all__ = ["FuseConfig"]


@dataclass(frozen=True)
class FuseConfig(StageConfig):
    """Which towers a fused model has, and with what weights: by validation alone.

    Args:
        monitor: the one validation metric, ndcg@k or recall@k, that a tower must improve to be kept; a longer list than
            is shown hears of more users' events, so that a gain is shown by fewer of them.
        level: coverage of the interval of that improvement, which must lie above 0.
        max_scores: validation scores held at once over all towers, 4 bytes each; bounds the users that are looked at.
        seed: of the halves of the validation users and the bootstrap.
    """

    monitor: tuple[str, ...] = ("ndcg@20",)
    level: float = 0.9
    max_scores: int = 2**29

    def __post_init__(self) -> None:
        super().__post_init__()
        metric, _, k = "".join(self.monitor).partition("@")
        known = len(self.monitor) == 1 and metric in ("ndcg", "recall") and k.isdigit() and int(k) >= 1
        require(known, "monitor", "one of ndcg@k and recall@k", self.monitor)
        require(0 < self.level < 1, "level", "in (0, 1)", self.level)
        require(self.max_scores >= 1, "max_scores", ">= 1", self.max_scores)
