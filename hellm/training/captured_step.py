"""One training step over fixed memory, so that a GPU replays it as a CUDA graph: one launch in place of hundreds."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hellm.training.processes import Processes
from hellm.training.step import Step, total_loss

__all__ = ["CapturedStep"]

# What must not happen in a capture happens in these: kernels are compiled, scales and optimiser state made.
_WARM_UP_STEPS = 3


class CapturedStep(Step):
    """A step that updates every time, in this process alone.

    What changes from step to step, `inputs` and the learning rate, is written into tensors that stay in place. The
    first steps run as they are, the next one is captured, and it and all later ones are replays: every call trains
    once, and nothing waits for the device. A step whose inputs have other shapes than those of (0, 0), as the last
    of an epoch may, runs as it is, too.

    Args:
        model: trained in place.
        optimizer: over its parameters, on one device; on a GPU made with `capturable=True`.
        inputs: (epoch, step) -> tensors on the CPU; asked for (0, 0) at once, for its shapes.
        losses: those tensors, on the device of the parameters -> named weighted loss terms, whose sum is minimised. It
            must not look at values, and depend on nothing but its arguments, the model and torch's generators.
        num_steps: steps of an epoch.
        learning_rate: (epoch, step) -> step size, on a GPU rounded to float32.
        capture: replay a CUDA graph; False runs every step as it is, with the same numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        inputs: Callable[[int, int], Sequence[Tensor]],
        losses: Callable[..., Mapping[str, Tensor]],
        num_steps: int,
        *,
        learning_rate: Callable[[int, int], float],
        capture: bool,
    ) -> None:
        self.model, self.optimizer, self.num_steps, self.processes = model, optimizer, num_steps, Processes()
        self._inputs, self._losses = inputs, losses
        self._learning_rate, self._capture = learning_rate, capture
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._device = self._parameters[0].device
        self._fixed = [torch.empty_like(x, device=self._device) for x in inputs(0, 0)]
        # One for all: torch keeps the freed memory of every stream for that stream alone.
        self._stream = torch.cuda.Stream(self._device) if capture and self._device.type == "cuda" else None
        self._warm_up_steps = 0
        self._replay: Callable[[], None] | None = None
        self._terms: dict[str, Tensor] = {}

    def run(self, epoch: int, step: int) -> Mapping[str, Tensor]:
        """Raises: RuntimeError, the step cannot be captured."""
        given = self._inputs(epoch, step)
        with torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext():
            self._set_rate(self._learning_rate(epoch, step))
            if [x.shape for x in given] != [x.shape for x in self._fixed]:
                return self._train_as_it_is([x.to(self._device) for x in given])
            for fixed, x in zip(self._fixed, given, strict=True):
                # A fresh pinned tensor each time: torch keeps its memory until the copy is done.
                fixed.copy_(x.pin_memory() if fixed.is_cuda else x, non_blocking=True)
            if not self._capture:
                return self._train_as_it_is(self._fixed)
            if self._replay is None and self._warm_up_steps < _WARM_UP_STEPS:
                self._warm_up_steps += 1
                with _on(self._stream):
                    return self._train_as_it_is(self._fixed)
            if self._replay is None:
                self._replay, self._terms = _record(functools.partial(self._train, self._fixed), self._stream)
            self._replay()
            # torch does not see that a replay writes, and caches of what follows from the weights ask it.
            for parameter in self._parameters:
                torch.autograd.graph.increment_version(parameter)
            return self._terms

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            # A number at the start, and again once a checkpoint was loaded. Fused updates on a GPU read float32.
            if not isinstance(group["lr"], Tensor):
                dtype = torch.float64 if self._device.type == "cpu" else torch.float32
                group["lr"] = torch.zeros((), dtype=dtype, device=self._device)
            group["lr"].fill_(rate)

    def _train(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        terms = self._losses(*inputs)
        total_loss(terms).backward()
        self.optimizer.step()
        # No gradient outlives the step: in a capture all live in memory of the graph.
        self.optimizer.zero_grad(set_to_none=True)
        return {name: term.detach() for name, term in terms.items()}

    def _train_as_it_is(self, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*step\\(\\) is running without CUDA graph capture")
            return self._train(inputs)


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Another stream, as torch asks of the steps before a capture, between what comes before and after on this one."""
    assert stream is not None  # on a GPU
    outer = torch.cuda.current_stream()
    stream.wait_stream(outer)
    with torch.cuda.stream(stream):
        yield
    outer.wait_stream(stream)


def _record(
    body: Callable[[], dict[str, Tensor]], stream: torch.cuda.Stream | None
) -> tuple[Callable[[], None], dict[str, Tensor]]:
    """Capture `body` on a stream without running it. Returns: what runs it, and where its outputs will stand."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            outputs = body()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        cause = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(
            f"the training step cannot be captured as a CUDA graph ({cause[0]}); capture false trains without one"
        ) from error
    return graph.replay, outputs
