"""How entries are made: ours on a device, peers of stock products, and what a run is told to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.registry import Entry, Outputs, Run, Setup
from hellm import ops
from hellm.ops.backends import BACKENDS

# Tolerances by precision where `hellm` chooses its backend: 16-bit products beside float32 ones.
ON_CPU = {"highest": 1e-4, "high": 3e-3, "medium": 3e-2}


def candidates(
    setup: Setup,
    make: Callable[[str], Run],
    tolerances: dict[str, float],
    *,
    nvrtc: bool = False,
    takes: Callable[[str, str], bool] = lambda backend, precision: True,
) -> list[Entry]:
    """Ours: `make(precision)` as `hellm` chooses by itself, or on a GPU under every backend that `takes` it.

    Args:
        tolerances: precision -> tolerance; "" where there is one precision.
        nvrtc: whether the backend that compiles the text of "cuda" is among them: once for each operator.
    """
    if not setup.gpu:
        labels = ["hellm", *(f"hellm, {precision}" for precision in list(tolerances)[1:])]
        return [
            Entry(label, make(precision), "hellm", tolerance)
            for label, (precision, tolerance) in zip(labels, tolerances.items(), strict=True)
        ]
    return [
        Entry(f"hellm {backend}" + (f", {precision}" if precision else ""), on(backend, make(precision)), backend, most)
        for precision, most in tolerances.items()
        for backend in usable_backends(setup.device, nvrtc)
        if takes(backend, precision)
    ]


def stock(
    setup: Setup, label: str, make: Callable[[], Run], tolerances: Sequence[float], kind: str = "peer", note: str = ""
) -> list[Entry]:
    """A peer of stock products: in float32, and on a GPU with what else they can be told to do.

    `tolerances` of a GPU, for float32 and for less.
    """
    if not setup.gpu:
        return [Entry(label, make(), kind, note=note)]
    exact, rough = tolerances
    return [
        Entry(f"{label}, {name}", at(make()), kind, exact if name == "float32" else rough, note)
        for name, at in PRECISIONS
    ]


def usable_backends(device: torch.device, nvrtc: bool = False) -> list[str]:
    """Backends that can run there, plain torch last; those in question are asked for by name."""
    names = [name for name, backend in BACKENDS.items() if backend.available(device)]
    return [name for name in names if nvrtc or name != "nvrtc"]


def on(backend: str, run: Run) -> Run:
    """Under an explicit backend."""

    def choose_and_run() -> Outputs:
        with ops.backend(backend):
            return run()

    return choose_and_run


def at_precision(precision: str, run: Run) -> Run:
    """Under a float32 matmul precision of torch, which its products and the operators without an argument follow."""

    def set_and_run() -> Outputs:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            return run()
        finally:
            torch.set_float32_matmul_precision(before)

    return set_and_run


def gradients(function: Callable, leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> Run:
    """Outputs and the gradients in the leaves; outputs alone where no leaf needs one."""

    def run() -> Outputs:
        found = function(*leaves)
        found = found if isinstance(found, tuple) else (found,)
        if not any(leaf.requires_grad for leaf in leaves):
            return found
        return [*found, *torch.autograd.grad(found, leaves, cotangents)]

    return run


def wide(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same in float64, needing gradients as they do."""
    return [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def by_torch(function: Callable, leaves: Sequence[Tensor], cotangents: Sequence[Tensor] | None = None) -> Run:
    """`gradients` of an operator's definition in float64."""
    doubles = None if cotangents is None else [t.double() for t in cotangents]
    return lambda: [t.detach() for t in on("torch", gradients(function, wide(leaves), doubles))()]


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

    def cast_and_run() -> Outputs:
        with torch.autocast("cuda", torch.bfloat16, cache_enabled=False):
            return run()

    return cast_and_run


# What stock products of float32 rows can be told to do.
PRECISIONS: tuple[tuple[str, Callable[[Run], Run]], ...] = (
    ("float32", partial(at_precision, "highest")),
    ("TF32", partial(at_precision, "high")),
    ("bfloat16", in_bfloat16),
)
