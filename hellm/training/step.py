"""What the training loop repeats: a step of losses, their backward pass, and the update where one is due."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hellm.training.objective import Losses, Objective
from hellm.training.processes import Processes

__all__ = ["EagerStep", "Step", "total_loss"]


class Step:
    """One training step; `hellm.training.loop.fit` repeats it.

    Attributes:
        model: what is trained.
        optimizer: over its parameters.
        num_steps: steps of an epoch.
        accumulate: steps that make one update; the last update of an epoch may have fewer.
        processes: those that train together. The first does all but the steps.
        is_shared: whether no process has the whole model, so that whatever runs it runs in all of them.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    num_steps: int
    accumulate: int = 1
    processes: Processes
    is_shared: bool = False

    def run(self, epoch: int, step: int) -> Mapping[str, Tensor]:
        """Train one step. Returns: its loss terms, without a graph, valid until the next call."""
        raise NotImplementedError

    def whole_model(self) -> contextlib.AbstractContextManager[None]:
        """For use of the model between steps."""
        return contextlib.nullcontext()

    def updates(self, step: int) -> bool:
        """Whether weights change at the end of this step of an epoch."""
        return (step + 1) % self.accumulate == 0 or step + 1 == self.num_steps


class EagerStep(Step):
    """A step that runs as it is written.

    Args:
        model: trained in place.
        optimizer: over the model's parameters.
        losses: what is minimised. It must depend on nothing but its arguments, the model and torch's generators. In
            several processes it is an `Objective` of the shares that this process has, whose sum over the processes is
            what one process would give.
        num_steps: steps of an epoch.
        learning_rate: (epoch, step) -> step size.
        accumulate: steps whose mean gradient makes one update.
        max_grad_norm: gradients longer than this are scaled down to it; None leaves them.
        processes: those that train together; None is this one alone.

    Attributes:
        objective: what is minimised.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        losses: Losses | Objective,
        num_steps: int,
        *,
        learning_rate: Callable[[int, int], float],
        accumulate: int = 1,
        max_grad_norm: float | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model, self.optimizer, self.num_steps, self.accumulate = model, optimizer, num_steps, accumulate
        self.processes = processes or Processes()
        self.objective = losses if isinstance(losses, Objective) else Objective(losses)
        self._learning_rate, self._max_grad_norm = learning_rate, max_grad_norm
        self.is_shared = self.objective.is_shared

    def whole_model(self) -> contextlib.AbstractContextManager[None]:
        return self.objective.whole_model()

    def run(self, epoch: int, step: int) -> Mapping[str, Tensor]:
        self.processes.seed_step(epoch, step)
        with self.objective.sending(self.updates(step)):
            terms = self.objective(epoch, step)
            first = step - step % self.accumulate
            self.objective.backward(total_loss(terms) / (min(first + self.accumulate, self.num_steps) - first))
        if self.updates(step):
            self._update(self._learning_rate(epoch, step))
        return {name: term.detach() for name, term in terms.items()}

    def _update(self, rate: float) -> None:
        if self._max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def total_loss(terms: Mapping[str, Tensor]) -> Tensor:
    """The sum of the terms of a loss."""
    return functools.reduce(torch.add, terms.values())
