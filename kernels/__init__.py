"""Triton kernels of hellm.ops. They need torch and triton and nothing else of the package.

Launchers take contiguous tensors of one device, in the order of the C++ launchers (csrc/<op>.h), without the sizes and
the dtype code that tensors carry. They run on torch's current stream, do not synchronise and check nothing.

Sizes that change from batch to batch are not specialised, as a kernel would be compiled anew for sizes that 16 divides
and for 1. `dim` and strides are, which do not change so often: wide loads need to know that 16 divides them.
"""

from __future__ import annotations

import importlib
import pkgutil

import triton

from . import hypergraph_conv
from .softmax_passes import WIDEST

__all__ = ["INTERPRETED", "WIDEST"]

# Each operator is a module here.
for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    importlib.import_module(_module.name)

# Under TRITON_INTERPRET=1, set before Triton is imported, kernels run on the CPU: for tests.
INTERPRETED = not isinstance(hypergraph_conv.short_kernel, triton.JITFunction)
