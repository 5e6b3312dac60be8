"""The CUDA kernels compiled at first use by NVRTC through CuPy, for installations whose build had no nvcc.

The text is that of csrc/cuda/*.cuh and the launch plans are those of the extension, so there is nothing here that could
differ from the compiled kernels. CuPy keeps what it compiled on disk.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import Any

import torch

from hellm.ops.backends import loaders
from hellm.ops.backends._backend import no_nvidia_gpu, too_old
from hellm.ops.backends.gpu import Gpu

OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


class Nvrtc(Gpu):
    """The CUDA kernels, compiled on the machine where they run."""

    name = "nvrtc"
    compiler = "cupy"

    def __init__(self) -> None:
        super().__init__(launch)

    def unavailable(self, device: torch.device) -> str | None:
        reason = no_nvidia_gpu(device)
        if reason is not None:
            return reason
        if isinstance(loaders.native(), ImportError):
            return (
                f"the launch plans are in the compiled extension hellm._C, which cannot be loaded: {loaders.native()}"
            )
        if importlib.util.find_spec("cupy") is None:
            extra = f"cuda{(torch.version.cuda or '12').partition('.')[0]}"
            return f'CuPy, which compiles the kernels at first use, is not installed: pip install "hellm[{extra}]"'
        # Importing CuPy takes a second, so whatever else stands in the way is asked first.
        return too_old(device) or cupy_failure()


@functools.cache
def cupy_failure() -> str | None:
    """What importing CuPy raises; None if nothing."""
    try:
        importlib.import_module("cupy")
    except Exception as error:  # one built for another CUDA version raises whatever its libraries do
        return f"CuPy cannot be imported: {type(error).__name__}: {error}"
    return None


def source(name: str) -> str:
    """A .cuh file with everything it includes, each file once: NVRTC then needs no include path."""
    done: set[str] = set()

    def expand(file: str) -> str:
        if file in done:
            return ""
        done.add(file)
        text = (loaders.device_code() / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: expand(match.group(1)), text)

    return expand(name) + "\nusing namespace hellm;\n"


@functools.cache
def _kernel(file: str, name: str, device: int):
    """One kernel, loaded on the current device; compiled by itself, so that the first call waits for little."""
    import cupy  # pyright: ignore[reportMissingImports] (an extra)

    module = cupy.RawModule(code=source(file), options=OPTIONS, name_expressions=(name,))
    return module.get_function(name)


def launch(plan: str, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Run a launch plan on the current stream of a device."""
    import cupy  # pyright: ignore[reportMissingImports] (an extra)
    import numpy as np

    index = torch.cuda.current_device() if device.index is None else device.index
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index)
    with cupy.cuda.Device(index), stream:
        for name, grid, threads, shared_bytes, parameters in getattr(loaders.extension(), f"plan_{plan}")(*arguments):
            kernel = _kernel(loaders.extension().device_code[plan], name, index)
            if shared_bytes > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            # CuPy passes an array of one structure by value.
            by_value = np.frombuffer(parameters, dtype=np.dtype([("bytes", np.uint8, (len(parameters),))]))
            kernel(grid, (threads,), (by_value,), shared_mem=shared_bytes)
