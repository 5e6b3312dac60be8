"""Settings of the transition model."""

from __future__ import annotations

from dataclasses import dataclass

from hellm.config._checks import require
from hellm.config.loop import StageConfig

__all__ = ["TransitionsConfig"]


@dataclass(frozen=True)
class TransitionsConfig(StageConfig):
    """What followed what, counted. Of several values validation takes the best, one setting after the other.

    Args:
        decay: weights of an item for each step that it lies further back, each in (0, 1].
        content_weight: shares that items alike in content take of an item's weight and give of their scores, each >= 0.
        content: modalities of the data set that tell which items are alike; null takes all there are, [] none.
        content_neighbours: items in a neighbourhood, the item itself included.
        max_lag: steps after an item within which another counts as following it.
        exponent: of the popularity of the item before, which its followers are divided by.
        monitor: the validation metric that is looked at.
        protocol: evaluation protocol, see `hellm.evaluate`; sequence models are usually scored with nothing masked.
        seed: not used; there is nothing random.
        device: "auto", "cpu", "cuda" or "cuda:N": where neighbours are searched; scores are computed on the CPU.
    """

    decay: tuple[float, ...] = (0.5, 0.3, 0.7)
    content_weight: tuple[float, ...] = (0.5, 0.0, 0.2, 1.0)
    content: tuple[str, ...] | None = None
    content_neighbours: int = 10
    max_lag: int = 10
    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.decay) > 0, "decay", "at least one number", self.decay)
        require(all(0 < one <= 1 for one in self.decay), "decay", "numbers in (0, 1]", self.decay)
        require(len(self.content_weight) > 0, "content_weight", "at least one number", self.content_weight)
        require(
            all(0 <= one < float("inf") for one in self.content_weight), "content_weight", ">= 0", self.content_weight
        )
        for name in ("content_neighbours", "max_lag"):
            require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        require(0 <= self.exponent < float("inf"), "exponent", ">= 0", self.exponent)
        metric, _, k = "".join(self.monitor).partition("@")
        require(
            len(self.monitor) == 1 and bool(metric) and k.isdigit() and int(k) >= 1,
            "monitor",
            "one metric@k",
            self.monitor,
        )
