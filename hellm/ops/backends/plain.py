"""The operators in plain torch, on any device: where nothing faster can run."""

from __future__ import annotations

import torch

from hellm.ops.backends._backend import Backend
from hellm.ops.bipartite_propagate import definition as bipartite_propagate
from hellm.ops.hypergraph_conv import definition as hypergraph_conv
from hellm.ops.incidence_product import definition as incidence_product
from hellm.ops.info_nce import by_blocks as info_nce
from hellm.ops.item_cross_entropy import by_blocks as item_cross_entropy
from hellm.ops.knn import by_panels as knn


class Plain(Backend):
    name = "torch"

    incidence_product = staticmethod(incidence_product)
    hypergraph_conv = staticmethod(hypergraph_conv)
    bipartite_propagate = staticmethod(bipartite_propagate)
    info_nce = staticmethod(info_nce)
    item_cross_entropy = staticmethod(item_cross_entropy)
    knn = staticmethod(knn)

    def unavailable(self, device: torch.device) -> str | None:
        return None
