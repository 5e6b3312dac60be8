"""Fused operators for hypergraph convolution, contrastive and item losses and exact nearest neighbours.

They need torch and nothing else of this package. Each runs as a compiled kernel where there is one and as plain torch
elsewhere, and works under autograd in both modes, the transforms of `torch.func`, autocast and
`torch.compile(fullgraph=True)`. The compiled kernels give the same bits on every run and for every number of threads.
Where a tensor is wanted, an array of NumPy, CuPy or another library with `__dlpack__` will do: its memory is shared,
nothing is copied, and tensors come back.

An operator has a file: its public function, its argument tuple, its definition in plain torch, its derivatives and the
cases of its self-test. `backends` computes it; `hellm.selftest` checks what every backend computes on this machine.
"""

from __future__ import annotations

import importlib

from hellm.ops import _registration
from hellm.ops.backends import backend
from hellm.ops.bipartite_propagate import bipartite_propagate
from hellm.ops.hypergraph_conv import hypergraph_conv
from hellm.ops.incidence_product import incidence_product
from hellm.ops.info_nce import info_nce
from hellm.ops.item_cross_entropy import item_cross_entropy
from hellm.ops.knn import knn

__all__ = [
    "backend",
    "bipartite_propagate",
    "hypergraph_conv",
    "incidence_product",
    "info_nce",
    "item_cross_entropy",
    "knn",
]

# The files of the operators, each of which bears the name of its public function.
MODULES = [importlib.import_module(f"{__name__}.{name}") for name in __all__ if name != "backend"]
_registration.register(*(operator for module in MODULES for operator in module.OPERATORS))
