"""Stage 1: users and items as embeddings from hypergraphs, and what the content of items adds to them."""

from __future__ import annotations

from hellm.models.graph.columns import Columns
from hellm.models.graph.content import ItemContent, Neighbours
from hellm.models.graph.encoder import EncoderOutput, GraphEncoder, ItemBranch, placed
from hellm.models.graph.fold_in import FoldIn
from hellm.models.graph.rows import SampledRows

__all__ = [
    "Columns",
    "EncoderOutput",
    "FoldIn",
    "GraphEncoder",
    "ItemBranch",
    "ItemContent",
    "Neighbours",
    "SampledRows",
    "placed",
]
