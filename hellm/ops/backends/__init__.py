"""Which implementation of the operators runs: the first available one that may be chosen, or the explicit choice."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

from hellm.ops.backends._backend import Backend, GpuBackend
from hellm.ops.backends.gpu import Cuda
from hellm.ops.backends.native import Native
from hellm.ops.backends.nvrtc import Nvrtc
from hellm.ops.backends.plain import Plain
from hellm.ops.backends.triton import Triton

__all__ = ["BACKENDS", "GPU_BACKENDS", "Backend", "GpuBackend", "backend", "chosen", "select"]

# In the order in which they are asked.
BACKENDS: dict[str, Backend] = {one.name: one for one in (Native(), Cuda(), Nvrtc(), Triton(), Plain())}
GPU_BACKENDS = {name: one for name, one in BACKENDS.items() if isinstance(one, GpuBackend)}

_explicit: contextvars.ContextVar[str | None] = contextvars.ContextVar("hellm_backend", default=None)


def chosen() -> str | None:
    """The name of the explicit choice in force in this thread, or None."""
    return _explicit.get()


def select(device: torch.device) -> Backend:
    """Backend that serves a device: the explicit choice, else the first available one that may be chosen.

    Raises:
        RuntimeError: the explicitly chosen backend cannot run there.
    """
    name = chosen()
    if name is None:
        return next(one for one in BACKENDS.values() if one.verified(device) and one.available(device))
    reason = BACKENDS[name].unavailable(device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}; see `hellm info`")
    return BACKENDS[name]


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside the block: "native", "cuda", "nvrtc", "triton" or "torch".

    "native" is compiled for the CPU; "cuda" (compiled by nvcc), "nvrtc" (the same text, compiled by CuPy at first use)
    and "triton" run on GPUs; "torch" is the definition in plain torch.

    Raises:
        ValueError: an unknown name.
        RuntimeError: at the first operator call, if that backend cannot run on the device of its inputs.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {tuple(BACKENDS)}, got {name!r}")
    token = _explicit.set(name)
    try:
        yield
    finally:
        _explicit.reset(token)
