"""Settings of the transition model."""

from __future__ import annotations

from dataclasses import dataclass

from hellm.config._checks import require

__all__ = ["TransitionsConfig"]


@dataclass(frozen=True)
class TransitionsConfig:
    """What followed what, counted. Of several values validation takes the best, one setting after the other.

    Args:
        decay: weights of an item for each step that it lies further back, each in (0, 1].
        content_weight: shares that items alike in content take of an item's weight and give of their scores, each >= 0.
        content: modalities of the data set that tell which items are alike; null takes all there are, [] none.
        content_neighbours: items in a neighbourhood, the item itself included.
        max_lag: steps after an item within which another counts as following it.
        exponent: of the popularity of the item before, which its followers are divided by.
        monitor: the validation metric that is looked at.
        ks: list lengths of the metrics.
        protocol: evaluation protocol, see `hellm.evaluate`; sequence models are usually scored with nothing masked.
        eval_batch_size: users scored at once.
        seed: not used; there is nothing random.
        device: "auto", "cpu", "cuda" or "cuda:N": where neighbours are searched; scores are computed on the CPU.
        num_threads: CPU threads of torch; null leaves torch's choice.
    """

    decay: tuple[float, ...] = (0.5, 0.3, 0.7)
    content_weight: tuple[float, ...] = (0.5, 0.0, 0.2, 1.0)
    content: tuple[str, ...] | None = None
    content_neighbours: int = 10
    max_lag: int = 10
    exponent: float = 0.5
    monitor: tuple[str, ...] = ("ndcg@10",)
    ks: tuple[int, ...] = (5, 10, 20)
    protocol: str = "recbole-sequential"
    eval_batch_size: int = 1024
    seed: int = 2024
    device: str = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        require(len(self.decay) > 0, "decay", "at least one number", self.decay)
        require(all(0 < one <= 1 for one in self.decay), "decay", "numbers in (0, 1]", self.decay)
        require(len(self.content_weight) > 0, "content_weight", "at least one number", self.content_weight)
        require(
            all(0 <= one < float("inf") for one in self.content_weight), "content_weight", ">= 0", self.content_weight
        )
        for name in ("content_neighbours", "max_lag", "eval_batch_size"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(0 <= self.exponent < float("inf"), "exponent", ">= 0", self.exponent)
        metric, _, k = "".join(self.monitor).partition("@")
        require(
            len(self.monitor) == 1 and bool(metric) and k.isdigit() and int(k) >= 1,
            "monitor",
            "one metric@k",
            self.monitor,
        )
        require(len(self.ks) > 0 and min(self.ks, default=0) >= 1, "ks", "list lengths >= 1", self.ks)
        require(self.num_threads is None or self.num_threads >= 1, "num_threads", "null or >= 1", self.num_threads)
