"""Training triples of stage 1 beside a Python loop."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.registry import CPU, TARGETS, Entry, Outputs, Setup, Target, Workload, register
from hellm.training.samplers import TripleSampler


class LoopSampler:
    """Training triples drawn in a Python loop: distinct users, a positive of each, a negative by rejection.

    Args:
        draw: [0, high) integers. The published loaders draw each through `numpy.random.randint(0, high, size=1)[0]`,
            the default; `random.randrange` is the fast form.
    """

    def __init__(self, users: np.ndarray, items: np.ndarray, num_items: int, batch_size: int, draw=None) -> None:
        self.histories: dict[int, list[int]] = {}
        for user, item in zip(users.tolist(), items.tolist(), strict=True):
            self.histories.setdefault(user, []).append(item)
        self.users, self.num_items, self.batch_size = list(self.histories), num_items, batch_size
        self.draw = draw or (lambda high: int(np.random.randint(low=0, high=high, size=1)[0]))

    def sample(self) -> tuple[list[int], list[int], list[int]]:
        users = random.sample(self.users, min(self.batch_size, len(self.users)))
        positives, negatives = [], []
        for user in users:
            history = self.histories[user]
            positives.append(history[self.draw(len(history))])
            while True:
                negative = self.draw(self.num_items)
                if negative not in history:
                    break
            negatives.append(negative)
        return users, positives, negatives


# ------------------------------------------------------------------------------------------------------- cases


def _sampler(setup: Setup, *, size_name: str) -> Workload:
    size = inputs.SIZES["tiny" if setup.tiny else size_name]
    users, items = inputs.interactions(size)
    steps, batch_size = 10, min(1024, size.num_users // 2)
    ours = TripleSampler(users, items, size.num_users, size.num_items, batch_size=batch_size)
    known = np.unique(users * size.num_items + items)
    epochs = iter(range(10**9))

    def sampled() -> Outputs:
        epoch = next(epochs)
        return [_as_tensor(ours.sample(epoch, step)) for step in range(steps)]

    def looped(draw: Callable[[int], int] | None) -> Callable[[], Outputs]:
        loop = LoopSampler(users, items, size.num_items, batch_size, draw)
        return lambda: [_as_tensor(loop.sample()) for _ in range(steps)]

    def verify(found: Outputs, expected: Outputs) -> float:
        """0 if users are distinct, positives known and negatives not, in batches of one shape; else infinite."""
        for batch, other in zip(found, expected, strict=True):
            user, positive, negative = batch.numpy()
            distinct = len(np.unique(user)) == len(user)
            right = np.isin(user * size.num_items + positive, known).all()
            wrong = np.isin(user * size.num_items + negative, known).any()
            if batch.shape != other.shape or not distinct or not right or wrong:
                return float("inf")
        return 0.0

    return Workload(
        entries=[
            Entry("hellm", sampled, "hellm"),
            Entry("Python loop, published draws", looped(None), note="numpy.random.randint for each number"),
            Entry("Python loop, fastest draws", looped(_fast_draw), note="random.random for each number"),
        ],
        parameters={**size._asdict(), "batch": batch_size, "steps": steps},
        work=float(steps * batch_size),
        unit="triple",
        verify=verify,
    )


def _fast_draw(high: int) -> int:
    return int(random.random() * high)


def _as_tensor(triples) -> Tensor:
    return torch.from_numpy(np.stack([np.asarray(ids, dtype=np.int64) for ids in triples]))


for _name, _size in (("TikTok", "tiktok"), ("Sports", "sports")):
    _title = f"10 steps of training triples, {_name} size"
    register("Stage-1 training", _sampler, f"sampler-{_size}", _title, devices=(CPU,), size_name=_size)
    TARGETS.append(Target(f"sampler-{_size}", "hellm", "published draws", 20.0, device=CPU))
