"""On which GPUs each backend has passed the self-test: in this release, and on this machine.

A result counts for the very code that was tested: what `hellm info --selftest` finds on this machine is kept with a
digest of that code and with the versions of what it stands on, what comes with the release with a digest of its source.
Nothing is read or digested until a GPU tensor asks for a choice.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

# Backend -> architecture ("sm_90") -> `source_digest` of what passed the whole self-test when this release was made.
RELEASE: dict[str, dict[str, str]] = {}

_SOURCES = {
    "cuda": ("_library.py", "_products.py", "_losses.py", "reference.py", "_native.py", "_gpu.py"),
    "nvrtc": ("_library.py", "_products.py", "_losses.py", "reference.py", "_native.py", "_gpu.py", "_nvrtc.py"),
    "triton": ("_library.py", "_products.py", "_losses.py", "reference.py", "_native.py", "_triton.py"),
}

_COMPILERS = {"nvrtc": "cupy", "triton": "triton"}


def path() -> Path:
    """Where the results of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "hellm" / "verified.json"


def passed(backend: str, device: torch.device) -> bool:
    """Whether the self-test of a backend passed on a device's architecture, with the code and versions in use."""
    from hellm.ops import _backends  # which imports this module

    architecture = _backends.architecture(device)
    here = _of_this_machine().get(f"{backend} {architecture}")
    released = RELEASE.get(backend, {}).get(architecture)
    if (here is None and released is None) or _backends.unusable(backend, device) is not None:
        return False
    if here is not None and here["key"] == key(backend):
        return here["ok"] is True
    return released == source_digest(backend)


def record(rows: Iterable[Mapping[str, Any]], backends: Iterable[str]) -> None:
    """Keep what the rows of `hellm.ops._selftest.selftest` say of GPU backends; without any, nothing is written."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["backend"] in backends:
            name = f"{row['backend']} {row['instruction_set']}"
            ok = row["ok"] and (name not in found or found[name]["ok"])
            found[name] = {"ok": ok, "key": key(row["backend"])}
    if not found:
        return
    path().parent.mkdir(parents=True, exist_ok=True)
    unfinished = path().with_suffix(f".{os.getpid()}")
    unfinished.write_text(json.dumps({"results": _of_this_machine() | found}), encoding="utf-8")
    unfinished.replace(path())
    _of_this_machine.cache_clear()


@functools.cache
def source_digest(backend: str) -> str:
    """Of the text that decides what a GPU backend computes: its calls and its kernels."""
    from hellm.ops import _backends, _nvrtc

    if backend == "triton":
        kernels = Path(_backends.triton().__file__).parent.glob("*.py")
    else:
        kernels = _nvrtc.folder().glob("*.cuh")
    return _digest([*(Path(__file__).with_name(name) for name in _SOURCES[backend]), *sorted(kernels)])


@functools.cache
def key(backend: str) -> list[str | None]:
    """What a result on this machine depends on: source, compiled extension, versions, driver."""
    from hellm.ops import _backends

    extension = None if backend == "triton" else getattr(_backends.native(), "__file__", None)
    compiler = _COMPILERS.get(backend)
    driver = Path("/proc/driver/nvidia/version")
    return [
        source_digest(backend),
        extension and _digest([Path(extension)]),
        torch.__version__,
        compiler and importlib.import_module(compiler).__version__,
        driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else None,
    ]


def _digest(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        content = file.read_bytes()
        found.update(f"{file.name} {len(content)}\n".encode() + content)
    return found.hexdigest()[:32]


@functools.cache
def _of_this_machine() -> dict[str, dict[str, Any]]:
    """Backend and architecture -> {"ok", "key"}; nothing when the file is unreadable, of another form or not there."""
    try:
        results = json.loads(path().read_text(encoding="utf-8"))["results"]
        return {name: {"ok": one["ok"], "key": one["key"]} for name, one in results.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
