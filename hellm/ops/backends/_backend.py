"""What every backend has in common.

A backend has a method for each operator that it has kernels for, which takes the operator's argument tuple; the others
are computed in plain torch. One for GPUs is chosen automatically only where its self-test has passed.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from pathlib import Path

import torch

from hellm.ops.backends import loaders, verified


class Backend:
    """One implementation of the operators.

    Attributes:
        name: as `hellm.ops.backend` takes it.
    """

    name: str

    def unavailable(self, device: torch.device) -> str | None:
        """Why it cannot run on a device; None if it can."""
        raise NotImplementedError

    def available(self, device: torch.device) -> bool:
        return self.unavailable(device) is None

    def unverified(self, device: torch.device) -> str | None:
        """Why it is never chosen automatically on a device, though it may be available; None if it may be."""
        return None

    def verified(self, device: torch.device) -> bool:
        return self.unverified(device) is None


class GpuBackend(Backend):
    """One whose kernels run on GPUs.

    Attributes:
        compiler: the package that compiles its kernels at first use.
        extension: whether it needs the compiled extension.
    """

    compiler: str | None = None
    extension: bool = True

    def unverified(self, device: torch.device) -> str | None:
        if device.type == "cpu":
            return "on the CPU it serves tests"
        found = loaders.architecture(device)
        if found is None:
            return "untested on a GPU"
        if verified.tested(self, found) and self.available(device) and verified.passed(self, found):
            return None
        return f"untested on {found}: used when asked for by name, or once `hellm info --selftest` has passed here"

    def kernels(self) -> Iterable[Path]:
        """The files of its kernels."""
        return loaders.device_code().glob("*.cuh")

    @functools.cache  # noqa: B019 (backends live as long as the process)
    def source_digest(self) -> str:
        """Of the text that decides what it computes: the operators, its calls and its kernels."""
        here = Path(__file__).resolve().parent
        operators, shared = here.parent.glob("*.py"), [Path(__file__), here / "_pointers.py"]
        classes = [cls for cls in type(self).__mro__ if issubclass(cls, GpuBackend) and cls is not GpuBackend]
        calls = [Path(inspect.getfile(cls)) for cls in classes]
        return verified.digest([*sorted(operators), *shared, *dict.fromkeys(calls), *sorted(self.kernels())])

    @functools.cache  # noqa: B019
    def key(self) -> list[str | None]:
        """What a result on this machine depends on: source, compiled extension, versions, driver."""
        extension = getattr(loaders.native(), "__file__", None) if self.extension else None
        driver = Path("/proc/driver/nvidia/version")
        return [
            self.source_digest(),
            extension and verified.digest([Path(extension)]),
            torch.__version__,
            self.compiler and importlib.import_module(self.compiler).__version__,
            driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else None,
        ]


def no_nvidia_gpu(device: torch.device) -> str | None:
    if device.type != "cuda" or torch.version.hip:
        return "the CUDA kernels need an NVIDIA GPU"
    return None


def too_old(device: torch.device) -> str | None:
    """Why a GPU is too old for the kernels; None if it is not, or there is none to ask."""
    found = loaders.architecture(device)
    if found is None or torch.version.hip or int(found.removeprefix("sm_")) >= 80:
        return None
    return f"the kernels need compute capability sm_80 or newer, {device} has {found}"
