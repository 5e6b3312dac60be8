"""What this installation consists of and can use; shown by `hellm info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

__all__ = ["collect", "processor", "requirements", "run_selftest"]

# Extras of those who work on the package.
_OF_DEVELOPERS = {"dev", "docs"}


def collect() -> dict[str, Any]:
    """Versions, processor, backends and extras as plain values that `json.dumps` takes."""
    import torch

    from hellm import __version__

    versions = {"hellm": __version__, "python": platform.python_version()}
    required = requirements()
    versions |= {name: _version(name) or "missing" for name in required.pop("")}
    versions["platform"] = platform.platform()
    cuda = torch.cuda.is_available()
    devices = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())] if cuda else []
    return {
        "versions": versions,
        "cpu": processor() | {"threads": torch.get_num_threads()},
        "devices": devices,
        "backends": _backends(),
        "extras": [_extra(name, packages) for name, packages in required.items()],
    }


def requirements() -> dict[str, tuple[str, ...]]:
    """Extra -> distributions that it brings; "" has those that are always needed."""
    found: dict[str, tuple[str, ...]] = {}
    for one in importlib.metadata.requires("hellm") or ():
        package = re.split(r"[^\w.-]", one)[0]
        extra = re.search(r"""extra == ['"]([\w-]+)['"]""", one)
        name = extra[1] if extra else ""
        if name not in _OF_DEVELOPERS:
            found[name] = (*found.get(name, ()), package)
    return found


def run_selftest() -> list[dict[str, Any]]:
    """One row per backend, instruction set, operator and dtype; see `hellm.selftest`.

    Each GPU backend is checked in a process of its own, which may take minutes of compiling. The result is kept, as GPU
    backends are chosen automatically only where it was good.
    """
    from hellm.ops.backends import GPU_BACKENDS, verified
    from hellm.selftest import selftest

    rows = selftest()
    verified.record(rows, GPU_BACKENDS)
    return rows


def processor() -> dict[str, Any]:
    """The processor: "model", "cores", "instruction_sets" that have kernels, and the one "in_use"; None without any."""
    from hellm.ops.backends import loaders

    extension = loaders.native()
    usable = not isinstance(extension, ImportError)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": _cpu_model(),
        "cores": cores,
        "instruction_sets": list(extension.instruction_sets()) if usable else [],
        "in_use": extension.instruction_set() if usable else None,
    }


def _cpu_model() -> str:
    """Name of the processor where the system tells it, else its architecture."""
    path = Path("/proc/cpuinfo")
    if sys.platform == "linux" and path.is_file():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def _backends() -> list[dict[str, Any]]:
    import torch

    from hellm._devices import no_cuda_reason
    from hellm.ops.backends import BACKENDS

    rows = []
    for device in map(torch.device, ("cpu", "cuda")):
        reason_for_all = None if device.type == "cpu" else no_cuda_reason()
        for name, backend in BACKENDS.items():
            reason = reason_for_all or backend.unavailable(device)
            note = backend.unverified(device) if device.type == "cuda" else None
            rows.append({"name": name, "device": device.type, "usable": reason is None, "reason": reason, "note": note})
    return rows


def _extra(name: str, packages: tuple[str, ...]) -> dict[str, Any]:
    versions = {package: _version(package) for package in packages}
    return {
        "name": name,
        "found": {package: version for package, version in versions.items() if version is not None},
        "missing": [package for package, version in versions.items() if version is None],
        "install": f'pip install "hellm[{name}]"',
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
