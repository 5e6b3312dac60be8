"""Which implementation of the operators runs: what is usable here, why the rest is not, and explicit choice.

Nobody chose: the first of `BACKENDS` that is usable and, on a GPU, has passed the self-test on its architecture.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch

from hellm.ops import _verified

BACKENDS = ("native", "cuda", "nvrtc", "triton", "torch")
# Those that run on GPUs and are chosen automatically only where their self-test passed.
GPU_BACKENDS = frozenset({"cuda", "nvrtc", "triton"})

_explicit: contextvars.ContextVar[str | None] = contextvars.ContextVar("hellm_backend", default=None)


@functools.cache
def native() -> ModuleType | ImportError:
    """The compiled extension, or the error that says why it cannot be loaded."""
    try:
        from hellm import _C
    except ImportError as error:
        return error
    return _C


@functools.cache
def triton() -> ModuleType | ImportError:
    """The Triton kernels, or the error that says why they cannot be loaded."""
    try:
        importlib.import_module("triton")
        return importlib.import_module("hellm.kernels")
    except ImportError as error:
        if getattr(error, "name", None) != "hellm.kernels":
            return error
    # A source checkout keeps them beside the package.
    source = Path(__file__).resolve().parents[2] / "kernels" / "__init__.py"
    if not source.is_file():
        return ImportError("this installation has no hellm.kernels", name="hellm.kernels")
    spec = importlib.util.spec_from_file_location("hellm.kernels", source)
    module = sys.modules["hellm.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def unusable(name: str, device: torch.device | str) -> str | None:
    """Why backend `name` cannot run on a device ("cpu", "cuda", "cuda:1"); None if it can."""
    if name == "torch":
        return None
    return _UNUSABLE[name](torch.device(device))


def _native_unusable(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f'it serves the CPU, not {device.type}; on NVIDIA GPUs the compiled kernels are "cuda" and "nvrtc"'
    if isinstance(native(), ImportError):
        return f"the compiled extension hellm._C cannot be loaded: {native()}"
    return None


def _triton_unusable(device: torch.device) -> str | None:
    if isinstance(triton(), ImportError):
        return f"Triton cannot be loaded: {triton()}"
    if device.type == "cpu" and not triton().INTERPRETED:
        return "Triton needs a GPU; its interpreter runs on the CPU where TRITON_INTERPRET=1 was set before the start"
    return _too_old(device)


def _cuda_unusable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "the CUDA kernels need an NVIDIA GPU"
    if isinstance(native(), ImportError):
        return f"the compiled extension hellm._C cannot be loaded: {native()}"
    built = native().cuda_architectures()
    if not built:
        return "the extension was built without GPU kernels; building it where nvcc is, with HELLM_CUDA=ON, adds them"
    found = architecture(device)
    if found is not None and not any(_runs_on(entry, int(found.removeprefix("sm_"))) for entry in built.split(", ")):
        return _too_old(device) or f"the extension was built for compute capability {built}, {device} has {found}"
    return _too_old(device)


def _runs_on(entry: str, capability: int) -> bool:
    """Whether a GPU (90 for sm_90) runs what was compiled for an entry like "90", "90a" or "80+PTX"."""
    number = int(re.match(r"\d+", entry)[0])
    # A later GPU of the same generation runs the machine code, any later one what it can compile from PTX.
    return number <= capability and (entry.endswith("+PTX") or number // 10 == capability // 10)


def _nvrtc_unusable(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "the CUDA kernels need an NVIDIA GPU"
    if isinstance(native(), ImportError):
        return f"the launch plans are in the compiled extension hellm._C, which cannot be loaded: {native()}"
    if importlib.util.find_spec("cupy") is None:
        extra = f"cuda{(torch.version.cuda or '12').partition('.')[0]}"
        return f'CuPy, which compiles the kernels at first use, is not installed: pip install "hellm[{extra}]"'
    # Importing CuPy takes a second, so whatever else stands in the way is asked first.
    return _too_old(device) or _cupy_failure()


@functools.cache
def _cupy_failure() -> str | None:
    """What importing CuPy raises; None if nothing."""
    try:
        importlib.import_module("cupy")
    except Exception as error:  # one built for another CUDA version raises whatever its libraries do
        return f"CuPy cannot be imported: {type(error).__name__}: {error}"
    return None


_UNUSABLE: dict[str, Callable[[torch.device], str | None]] = {
    "native": _native_unusable,
    "cuda": _cuda_unusable,
    "nvrtc": _nvrtc_unusable,
    "triton": _triton_unusable,
}


def _too_old(device: torch.device) -> str | None:
    """Why a GPU is too old for the kernels; None if it is not, or there is none to ask."""
    found = architecture(device)
    if found is None or torch.version.hip or int(found.removeprefix("sm_")) >= 80:
        return None
    return f"the kernels need compute capability sm_80 or newer, {device} has {found}"


@functools.cache
def architecture(device: torch.device) -> str | None:
    """ "sm_90" for a GPU of compute capability 9.0; None for another device, or where torch sees no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def untested(name: str, device: torch.device | str) -> str | None:
    """Why backend `name` is never chosen automatically on a device, though it may be usable; None if it may be."""
    if name not in GPU_BACKENDS:
        return None
    device = torch.device(device)
    if device.type == "cpu":
        return "on the CPU it serves tests"
    found = architecture(device)
    if found is None:
        return "untested on a GPU"
    if _verified.passed(name, device):
        return None
    return f"untested on {found}: used when asked for by name, or once `hellm info --selftest` has passed here"


def chosen() -> str | None:
    """The explicit choice in force in this thread, or None."""
    return _explicit.get()


def select(device: torch.device | str) -> str:
    """Backend that serves a device: the explicit choice, else the first usable one that may be chosen.

    Raises:
        RuntimeError: the explicitly chosen backend cannot run there.
    """
    name = chosen()
    if name is None:
        return next(name for name in BACKENDS if untested(name, device) is None and unusable(name, device) is None)
    reason = unusable(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} cannot run on {device}: {reason}; see `hellm info`")
    return name


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Use one backend inside the block: a name of `BACKENDS`.

    "native" is compiled for the CPU; "cuda" (compiled by nvcc), "nvrtc" (the same text, compiled by CuPy at first use)
    and "triton" run on GPUs; "torch" is the definition in plain torch.

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
