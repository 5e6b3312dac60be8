"""The settings that stages have in common."""

from __future__ import annotations

from dataclasses import dataclass

from hellm.config._checks import require

__all__ = ["LoopConfig", "StageConfig"]


@dataclass(frozen=True)
class StageConfig:
    """What every stage has.

    Args:
        monitor: validation metrics; a validation improves when any of them beats its own best.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`.
        eval_batch_size: users scored at once.
        seed: of everything that is drawn.
        device: "auto", "cpu", "cuda" or "cuda:N".
        num_threads: CPU threads of torch; null leaves torch's choice.
    """

    monitor: tuple[str, ...] = ("ndcg@10",)
    ks: tuple[int, ...] = (5, 10, 20)
    protocol: str = "recbole-sequential"
    eval_batch_size: int = 1024
    seed: int = 2024
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        require(self.eval_batch_size >= 1, "eval_batch_size", ">= 1", self.eval_batch_size)
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", "null or >= 1", self.num_threads)
        require(self.seed >= 0, "seed", ">= 0", self.seed)
        require(len(self.monitor) > 0, "monitor", "at least one metric", self.monitor)
        require(len(self.ks) > 0 and min(self.ks, default=0) >= 1, "ks", "list lengths >= 1", self.ks)
        for metric in self.monitor:
            name, _, k = metric.partition("@")
            require(bool(name) and k.isdigit() and int(k) >= 1, "monitor", "metric@k with k >= 1", metric)


@dataclass(frozen=True)
class LoopConfig(StageConfig):
    """What every stage has that is trained by epochs.

    Args:
        max_epochs: upper limit of training.
        validate_every: epochs between validations.
        patience: non-improving validations tolerated; training stops at the next one.
        checkpoint_every: epochs between checkpoints; every validation writes one as well.
        tensorboard: write TensorBoard events into the run directory.
    """

    max_epochs: int = 200
    validate_every: int = 1
    patience: int = 5
    checkpoint_every: int = 5
    tensorboard: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_epochs", "validate_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(self.patience >= 0, "patience", ">= 0", self.patience)
