"""Settings of the fusion of finished runs."""

from __future__ import annotations

from dataclasses import dataclass

from hellm.config._checks import require

__all__ = ["FuseConfig"]


@dataclass(frozen=True)
class FuseConfig:
    """Which towers a fused model has, and with what weights: by validation alone.

    Args:
        monitor: the one validation metric, ndcg@k or recall@k, that a tower must improve to be kept.
        level: coverage of the interval of that improvement, which must lie above 0.
        max_scores: validation scores held at once over all towers, 4 bytes each; bounds the users that are looked at.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`.
        eval_batch_size: users scored at once.
        seed: of the halves of the validation users and the bootstrap.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_threads: CPU threads of torch; null leaves torch's choice.
    """

    monitor: tuple[str, ...] = ("ndcg@10",)
    level: float = 0.9
    max_scores: int = 2**29
    ks: tuple[int, ...] = (5, 10, 20)
    protocol: str = "recbole-sequential"
    eval_batch_size: int = 1024
    seed: int = 2024
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        metric, _, k = "".join(self.monitor).partition("@")
        known = len(self.monitor) == 1 and metric in ("ndcg", "recall") and k.isdigit() and int(k) >= 1
        require(known, "monitor", "one of ndcg@k and recall@k", self.monitor)
        require(0 < self.level < 1, "level", "in (0, 1)", self.level)
        require(self.max_scores >= 1, "max_scores", ">= 1", self.max_scores)
        require(len(self.ks) > 0 and min(self.ks, default=0) >= 1, "ks", "list lengths >= 1", self.ks)
        require(self.eval_batch_size >= 1, "eval_batch_size", ">= 1", self.eval_batch_size)
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", "null or >= 1", self.num_threads)
