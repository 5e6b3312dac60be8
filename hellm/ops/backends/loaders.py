"""What the backends are made of: the compiled extension, the Triton kernels, the device code; which GPU there is."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

_PACKAGE = Path(__file__).resolve().parents[2]


@functools.cache
def native() -> ModuleType | ImportError:
    """The compiled extension, or the error that says why it cannot be loaded."""
    try:
        from hellm import _C
    except ImportError as error:
        return error
    return _C


def extension() -> ModuleType:
    """The compiled extension. Raises: ImportError, where it cannot be loaded."""
    return _loaded(native())


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
    source = _PACKAGE.parent / "kernels" / "__init__.py"
    if not source.is_file():
        return ImportError("this installation has no hellm.kernels", name="hellm.kernels")
    spec = importlib.util.spec_from_file_location("hellm.kernels", source)
    assert spec is not None and spec.loader is not None  # of a file that is there
    module = sys.modules["hellm.kernels"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def triton_kernels() -> ModuleType:
    """The Triton kernels. Raises: ImportError, where they cannot be loaded."""
    return _loaded(triton())


def _loaded(found: ModuleType | ImportError) -> ModuleType:
    if isinstance(found, ImportError):
        raise found
    return found


def device_code() -> Path:
    """Where the .cuh files are: beside this package when installed, csrc/cuda in a source checkout.

    Raises:
        FileNotFoundError: in neither place.
    """
    for candidate in (_PACKAGE / "cuda", _PACKAGE.parent / "csrc" / "cuda"):
        if (candidate / "common.cuh").is_file():
            return candidate
    raise FileNotFoundError(f"common.cuh must be in {_PACKAGE / 'cuda'}: the installation is incomplete")


@functools.cache
def architecture(device: torch.device) -> str | None:
    """ "sm_90" for a GPU of compute capability 9.0; None for another device, or where torch sees no GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))
