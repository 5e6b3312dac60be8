"""Rows of what a graph encoder gives, over what is drawn of its graphs.

R = users asked for, R' = items, D = embedding width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm.models.graph.encoder import ITEM_CONVOLUTION, USER_CONVOLUTION, EncoderOutput, GraphEncoder
from hellm.sampled import SampledConvolution, SampledPropagation

__all__ = ["SampledRows"]


class SampledRows:
    """What `GraphEncoder.forward` gives of some users and items, at a cost that goes by them and not by the graphs.

    Propagation and convolutions are right in the mean over draws, see `hellm.sampled`; rows that are made to have unit
    length, and so the fused ones, are not without bias. Where no row has more ways than `num_paths` all of it is exact.
    Gradients of the tables are sparse, of the rows that were read.

    Args:
        model: Whole in this process. Its graphs are drawn on the CPU, wherever they are.
        num_paths: That a row has through the layers of each graph, at most, >= 1.
    Raises: ValueError, a backbone that does more than `hellm.ops.bipartite_propagate`.
    """

    def __init__(self, model: GraphEncoder, num_paths: int) -> None:
        num_layers = model.backbone.num_plain_layers
        if num_layers is None:
            raise ValueError(
                "layers must be linear, so that what is drawn stands for all, and this backbone has others"
            )
        self._model, self._num_paths, self._num_layers = model, num_paths, num_layers
        self._user_hypergraph = model.user_hypergraph.to("cpu")
        self._item_hypergraph = None if model.item_hypergraph is None else model.item_hypergraph.to("cpu")

    def __call__(self, users: Tensor, items: Tensor, generator: torch.Generator | None = None) -> EncoderOutput:
        """Rows [R, D] and [R', D] of `users` [R] and `items` [R'] int64, differentiable in the tables.

        Args:
            users: Rows of the user table, on any device.
            items: Rows of the item table.
            generator: What draws, on the CPU; None is torch's own.
        """
        model, users, items = self._model, users.cpu(), items.cpu()
        draws = {"num_paths": self._num_paths, "generator": generator}
        sample = SampledPropagation(self._user_hypergraph, users, items, num_layers=self._num_layers, **draws)
        user, item = sample(
            _read(model.user_table, sample.user_sources),
            _read(model.item_table, sample.item_sources),
        )
        user_view = item_view = None
        if model.user_branch_table is not None:
            convolution = SampledConvolution(
                self._user_hypergraph, users, num_layers=model.num_user_layers, **USER_CONVOLUTION, **draws
            )
            user_view = convolution(_read(model.user_branch_table, convolution.sources))
        if model.item_branch_table is not None and self._item_hypergraph is not None:
            convolution = SampledConvolution(
                self._item_hypergraph, items, num_layers=model.num_item_layers, **ITEM_CONVOLUTION, **draws
            )
            item_view = convolution(_read(model.item_branch_table, convolution.sources))
        return model.fused(user, item, user_view, item_view)


def _read(table: nn.Embedding, rows: Tensor) -> Tensor:
    return F.embedding(rows.to(table.weight.device), table.weight, sparse=True)
