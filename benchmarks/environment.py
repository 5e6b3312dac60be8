"""What a number depends on besides the code: machine, versions, threads, commit, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from hellm.ops import backends
from hellm.ops.backends import loaders

ROOT = Path(__file__).resolve().parents[1]
_PACKAGES = ("torch", "numpy", "scipy", "torch-geometric", "faiss-cpu")
_GPU_PACKAGES = ("torch", "numpy", "triton", "cupy-cuda12x", "cupy-cuda13x", "torch-geometric")
_FLAGS = ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16")


def environment() -> dict[str, Any]:
    """Everything worth printing above a table of results."""
    native = loaders.native()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "cpu": cpu_name(),
        "cpu_flags": [flag for flag in _FLAGS if flag in _cpu_field("flags").split()],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "mkl": torch.backends.mkl.is_available(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "hellm_backend": backends.select(torch.device("cpu")).name,
        "hellm_instruction_set": None if isinstance(native, ImportError) else native.instruction_set(),
    }


def cpu_name() -> str:
    """Model of the processor."""
    return _cpu_field("model name") or platform.processor()


def gpu_versions() -> dict[str, str | None]:
    """What the GPU numbers stand on: packages, the compiler, the driver; None for what is not there."""
    found = {name: _version(name) for name in _GPU_PACKAGES}
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    said = "" if nvcc is None else subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    driver = Path("/proc/driver/nvidia/version")
    found["nvcc"] = match[1] if (match := re.search(r"release .*V(\S+)", said)) else None
    found["driver"] = driver.read_text(encoding="utf-8").splitlines()[0] if driver.is_file() else None
    return found


def commit() -> str | None:
    """HELLM_COMMIT where a copy was made without .git; else the short hash of the checkout, with "+" if files differ
    from it; None outside a repository."""
    if given := os.environ.get("HELLM_COMMIT"):
        return given

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "--no-optional-locks", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a result file, whole or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(_finite(value), file, indent=1, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_field(name: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
