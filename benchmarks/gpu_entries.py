"""One piece of work on a device and the implementations of it, ours beside the forms others offer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from hellm import ops
from hellm.ops.backends import BACKENDS, GPU_BACKENDS

# In this order: what the time must suffice for comes first, what needs minutes of compiling last.
KINDS = ("native", "cuda", "peer", "triton", "torch", "compile", "nvrtc")

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Entry:
    """One implementation: `kind` is a backend of ours, "peer", or "compile" for a peer that torch.compile makes.

    `tolerance` is its largest error relative to the largest true value.
    """

    label: str
    run: Run
    tolerance: float = 1e-4
    kind: str = "peer"

    @property
    def hellm(self) -> bool:
        """Whether it runs a kernel of ours."""
        return self.kind in GPU_BACKENDS or self.kind == "native"


@dataclass
class Case:
    """Implementations of the same work, in `unit`s; entries come out in the order of their kinds.

    `truth` is the float64 result, if any; `graph`: capture them as CUDA graphs too; `ceiling`: the case and entry whose
    rate is the limit.
    """

    entries: list[Entry]
    work: float
    unit: str = "FLOP"
    truth: list[Tensor] | None = None
    graph: bool = True
    ceiling: tuple[str, str] | None = None
    parameters: dict[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.entries.sort(key=lambda entry: KINDS.index(entry.kind))


def usable_backends(device: torch.device, nvrtc: bool = False) -> list[str]:
    """Backends that can run there, plain torch last; those in question are asked for by name."""
    names = [name for name, backend in BACKENDS.items() if backend.available(device)]
    return [name for name in names if nvrtc or name != "nvrtc"]


def on(backend: str, function: Callable, *arguments, **settings) -> Callable:
    """A call under an explicit backend."""

    def run(*more):
        with ops.backend(backend):
            return function(*arguments, *more, **settings)

    return run


def at_precision(precision: str, run: Run) -> Run:
    """Under a float32 matmul precision of torch, which its products and the operators without an argument follow."""

    def set_and_run() -> Sequence[Tensor]:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return set_and_run


def gradients(function: Callable, leaves: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Run:
    """Outputs and the gradients in the leaves."""

    def run() -> Sequence[Tensor]:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        return [*found, *torch.autograd.grad(found, leaves, cotangents)]

    return run


def compiled(function: Callable, mode: str | None = None) -> Callable:
    """torch.compile at the first call, for the shapes of that call and with nothing left of earlier ones."""
    made: list[Callable] = []

    def call(*arguments):
        if not made:
            torch._dynamo.reset()
            made.append(torch.compile(function, dynamic=False, mode=mode))
        return made[0](*arguments)

    return call


def in_bfloat16(run: Run) -> Run:
    """Under autocast."""

    def cast_and_run() -> Sequence[Tensor]:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run()

    return cast_and_run


# What stock products of float32 rows can be told to do.
PRECISIONS: tuple[tuple[str, Callable[[Run], Run]], ...] = (
    ("float32", partial(at_precision, "highest")),
    ("TF32", partial(at_precision, "high")),
    ("bfloat16", in_bfloat16),
)
