"""The losses of a step, whose gradients are those of one process however many there are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from hellm.training.processes import Processes

__all__ = ["Losses", "Objective", "ReplicatedObjective", "ShardedObjective", "objective_of"]

Losses = Callable[[int, int], Mapping[str, Tensor]]
"""(epoch, step) -> named weighted loss terms, whose sum is minimised; of several processes, the share of this one."""


class Objective:
    """Losses as they are: of one process, or of several that send what they need of each other themselves.

    Attributes:
        is_shared: whether the model is whole in no process, so that whatever runs it runs in all of them.
    """

    def __init__(self, losses: Losses, *, is_shared: bool = False) -> None:
        self._losses, self.is_shared = losses, is_shared

    def __call__(self, epoch: int, step: int) -> Mapping[str, Tensor]:
        """The terms of a step."""
        return self._losses(epoch, step)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a step to those that there are."""
        loss.backward()

    @contextlib.contextmanager
    def sending(self, now: bool) -> Iterator[None]:
        """Of a step: whether its gradients are sent, with all that have been added up since they last were."""
        yield

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        """For use of the model outside its losses."""
        yield


class ReplicatedObjective(Objective):
    """Every process has the whole model; DistributedDataParallel, as accelerate sets it up, sums gradients.

    It gives their mean, so they are multiplied by the number of processes before.
    """

    def __init__(self, model: nn.Module, losses: Losses, processes: Processes) -> None:
        self._accelerator, self._count = processes.accelerator, processes.count
        self._module = self._wrapped(_Module(model, losses))
        super().__init__(self._module)

    def _wrapped(self, module: nn.Module) -> Any:
        return self._accelerator.prepare_model(module)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss * self._count)

    @contextlib.contextmanager
    def sending(self, now: bool) -> Iterator[None]:
        with contextlib.nullcontext() if now else self._accelerator.no_sync(self._module):
            yield


class ShardedObjective(ReplicatedObjective):
    """Every process has its part of each weight (FSDP2); whole ones are there while a layer runs.

    accelerate has it for GPUs only, so it is torch's own.

    Args:
        model: on the CPU; its parameters become `DTensor` parameters, of which an optimiser is made afterwards.
        layers: modules of it that are gathered one at a time.
    """

    def __init__(self, model: nn.Module, losses: Losses, processes: Processes, layers: Iterable[nn.Module]) -> None:
        self._mesh, self._layers = processes.mesh(), layers
        super().__init__(model, losses, processes)
        self.is_shared = True

    def _wrapped(self, module: nn.Module) -> Any:
        from torch.distributed.fsdp import fully_shard

        for layer in self._layers:
            fully_shard(layer, mesh=self._mesh)
        return fully_shard(module, mesh=self._mesh)

    @contextlib.contextmanager
    def sending(self, now: bool) -> Iterator[None]:
        self._module.set_requires_gradient_sync(now)
        yield

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[None]:
        self._module.unshard()
        try:
            yield
        finally:
            self._module.reshard()


def objective_of(model: nn.Module, losses: Losses, processes: Processes) -> Objective:
    """That of a model which every process has whole."""
    return Objective(losses) if processes.count == 1 else ReplicatedObjective(model, losses, processes)


class _Module(nn.Module):
    """Losses as what DistributedDataParallel and FSDP2 can wrap."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self._losses = model, losses

    def forward(self, epoch: int, step: int) -> dict[str, Tensor]:
        return dict(self._losses(epoch, step))
