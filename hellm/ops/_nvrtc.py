"""The CUDA kernels compiled at first use by NVRTC through CuPy, for installations whose build had no nvcc.

The text is that of csrc/cuda/*.cuh and the launch plans are those of the extension, so there is nothing here that could
differ from the compiled kernels. CuPy keeps what it compiled on disk.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import torch

from hellm.ops._backends import native

_OPTIONS = ("--std=c++17",)
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
# Kernels of each operator's plan come from one of these.
SOURCES = {
    "incidence_product": "hypergraph_conv.cuh",
    "hypergraph_conv": "hypergraph_conv.cuh",
    "bipartite_propagate": "hypergraph_conv.cuh",
    "info_nce": "info_nce.cuh",
    "item_cross_entropy": "item_cross_entropy.cuh",
    "knn_scan": "knn.cuh",
    "knn_unit": "knn.cuh",
    "knn_select": "knn.cuh",
    "knn_crowded": "knn.cuh",
}


def folder() -> Path:
    """Where the device code is: beside this package when installed, csrc/cuda in a source checkout.

    Raises:
        FileNotFoundError: in neither place.
    """
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "cuda", package.parent / "csrc" / "cuda"):
        if (candidate / "common.cuh").is_file():
            return candidate
    raise FileNotFoundError(f"common.cuh must be in {package / 'cuda'}: the installation is incomplete")


def source(name: str) -> str:
    """A .cuh file with everything it includes, each file once: NVRTC then needs no include path."""
    done: set[str] = set()

    def expand(file: str) -> str:
        if file in done:
            return ""
        done.add(file)
        text = (folder() / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda match: expand(match.group(1)), text)

    return expand(name) + "\nusing namespace hellm;\n"


@functools.cache
def _kernel(file: str, name: str, device: int):
    """One kernel, loaded on the current device; compiled by itself, so that the first call waits for little."""
    import cupy

    module = cupy.RawModule(code=source(file), options=_OPTIONS, name_expressions=(name,))
    return module.get_function(name)


def launch(operator: str, arguments: tuple[Any, ...], device: torch.device) -> None:
    """Run a launch plan on the current stream of a device."""
    import cupy
    import numpy as np

    index = torch.cuda.current_device() if device.index is None else device.index
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, index)
    with cupy.cuda.Device(index), stream:
        for name, grid, threads, shared_bytes, parameters in getattr(native(), f"plan_{operator}")(*arguments):
            kernel = _kernel(SOURCES[operator], name, index)
            if shared_bytes > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            # CuPy passes an array of one structure by value.
            by_value = np.frombuffer(parameters, dtype=np.dtype([("bytes", np.uint8, (len(parameters),))]))
            kernel(grid, (threads,), (by_value,), shared_mem=shared_bytes)
