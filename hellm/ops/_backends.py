"""Which implementation of the operators runs: what is usable here, why the rest is not, and explicit choice."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator
from types import ModuleType

BACKENDS = ("native", "torch")

_explicit: contextvars.ContextVar[str | None] = contextvars.ContextVar("hellm_backend", default=None)


@functools.cache
def native() -> ModuleType | ImportError:
    """The compiled extension, or the error that says why it cannot be loaded."""
    try:
        from hellm import _C
    except ImportError as error:
        return error
    return _C


def unusable(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot run on a device type ("cpu", "cuda"); None if it can."""
    if name == "torch":
        return None
    if device_type != "cpu":
        return f"the compiled extension has no {device_type} kernels"
    if isinstance(native(), ImportError):
        return f"the compiled extension hellm._C cannot be loaded: {native()}"
    return None


def select(device_type: str) -> str:
    """Backend that serves a device type: the explicit choice, else the first usable one.

    Raises:
        RuntimeError: the explicitly chosen backend cannot run there.
    """
    chosen = _explicit.get()
    if chosen is None:
        return next(name for name in BACKENDS if unusable(name, device_type) is None)
    reason = unusable(chosen, device_type)
    if reason is not None:
        raise RuntimeError(f"backend {chosen!r} cannot run on {device_type}: {reason}; see `hellm info`")
    return chosen


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside the block: "native" (compiled) or "torch" (the reference in plain torch).

    Raises:
        ValueError: an unknown name.
        RuntimeError: at the first operator call, if that backend cannot run on the device of its inputs.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {BACKENDS}, got {name!r}")
    token = _explicit.set(name)
    try:
        yield
    finally:
        _explicit.reset(token)
