"""Modules around `hellm.ops`: drop-in replacements for the layers and losses they fuse."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor, nn

from hellm import ops
from hellm._arrays import as_count, as_tensor, check_flag
from hellm.hypergraph import Hypergraph

__all__ = ["HypergraphConv", "InfoNCELoss", "LightGCNPropagation"]


class HypergraphConv(nn.Module):
    """Hypergraph convolution with PyTorch Geometric's call and parameters; a state_dict of theirs loads.

        X' = D^-1 H W B^-1 H^T X Theta + bias

    (Bai et al. 2021, "Hypergraph Convolution and Hypergraph Attention", equation 6). D holds the weighted degrees of
    the vertices, B the sizes of the hyperedges, 1/0 is 0. Here W multiplies the messages as the formula says;
    torch_geometric.nn.HypergraphConv uses the weights in D alone. Without weights both agree. Attention is not offered:
    coefficients of your own are the `incidence_weight` of a `Hypergraph`, where they learn.

    Args:
        in_channels: columns of x, >= 1.
        out_channels: columns of the output, >= 1.
        use_attention: False.
        attention_mode: of attention, as in the other layer; without effect, like the next four.
        heads: of attention.
        concat: of attention.
        negative_slope: of attention.
        dropout: of attention.
        bias: add a learned bias [out_channels].

    Raises:
        ValueError: a number of channels below 1; attention.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        use_attention: bool = False,
        attention_mode: str = "node",
        heads: int = 1,
        concat: bool = True,
        negative_slope: float = 0.2,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if use_attention:
            raise ValueError(
                "use_attention must be False, this layer has no attention: torch_geometric.nn.HypergraphConv has, and "
                "coefficients of your own can be the incidence_weight of a Hypergraph"
            )
        check_flag("bias", bias)
        in_channels = as_count("in_channels", in_channels, low=1)
        out_channels = as_count("out_channels", out_channels, low=1)
        self.in_channels, self.out_channels = in_channels, out_channels
        self.lin = nn.Linear(in_channels, out_channels, bias=False)
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Theta uniform (Glorot), bias zero."""
        nn.init.xavier_uniform_(self.lin.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self,
        x: Tensor,
        hyperedge_index: Tensor | Hypergraph,
        hyperedge_weight: Tensor | None = None,
        hyperedge_attr: Tensor | None = None,
        num_edges: int | None = None,
    ) -> Tensor:
        """Convolve.

        Args:
            x: [V, in_channels].
            hyperedge_index: [2, nnz] vertex, hyperedge; or a `Hypergraph`, which spares sorting the incidence at every
                call and is what `torch.compile` needs.
            hyperedge_weight: [M]; may require a gradient. None: ones, or the weights of the `Hypergraph`.
            hyperedge_attr: features of hyperedges, which only attention reads: without effect, as in the other layer.
            num_edges: M; None: the largest hyperedge + 1, or M of the `Hypergraph`.

        Returns:
            [V, out_channels].

        Raises:
            ValueError: as `Hypergraph` and `hellm.ops.hypergraph_conv` do; num_edges that is not M.
        """
        x = as_tensor("x", x)
        if x.ndim != 2 or x.shape[1] != self.in_channels or not x.is_floating_point() or x.itemsize < 2:
            raise ValueError(f"x must be [V, {self.in_channels}] floating point, got {tuple(x.shape)} {x.dtype}")
        num_edges = None if num_edges is None else as_count("num_edges", num_edges)
        if not isinstance(hyperedge_index, Hypergraph):
            hypergraph = Hypergraph(
                hyperedge_index, num_vertices=x.shape[0], num_hyperedges=num_edges, hyperedge_weight=hyperedge_weight
            )
        else:
            hypergraph = hyperedge_index
            if num_edges is not None and num_edges != hypergraph.num_hyperedges:
                raise ValueError(f"num_edges must be {hypergraph.num_hyperedges} like hyperedge_index, got {num_edges}")
            if hyperedge_weight is not None:
                hypergraph = hypergraph.with_weight(hyperedge_weight)
        # Both orders give the same; the convolution costs in proportion to the columns it carries.
        if self.in_channels <= self.out_channels:
            out = self.lin(ops.hypergraph_conv(x, hypergraph, normalization="row"))
        else:
            out = ops.hypergraph_conv(self.lin(x), hypergraph, normalization="row")
        return out if self.bias is None else out + self.bias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.in_channels}, {self.out_channels})"


class InfoNCELoss(nn.Module):
    """`hellm.ops.info_nce` as a module: InfoNCE between two views of the same rows, without the [N, N] matrix.

    Args:
        temperature: > 0; where learning starts if `learnable_temperature`.
        intra_view_negatives: rows of the anchor view are negatives too.
        reduction: "mean", "sum" or "none".
        precision: "highest", "high", "medium" or None, as `hellm.ops.info_nce` reads it.
        learnable_temperature: learn the logarithm of the temperature, which keeps it positive.

    Raises:
        ValueError: temperature <= 0; at the call, as `hellm.ops.info_nce` does.
    """

    def __init__(
        self,
        temperature: float = 0.2,
        *,
        intra_view_negatives: bool = True,
        reduction: str = "mean",
        precision: str | None = None,
        learnable_temperature: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(temperature, bool) or not isinstance(temperature, numbers.Real):
            raise ValueError(f"temperature must be a number, got {temperature!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.initial_temperature = temperature
        self.intra_view_negatives = intra_view_negatives
        self.reduction = reduction
        self.precision = precision
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature))) if learnable_temperature else None

    @property
    def temperature(self) -> float | Tensor:
        """The number given, or a 0-d tensor that carries a gradient if it is learned."""
        return self.initial_temperature if self.log_temperature is None else self.log_temperature.exp()

    def forward(self, anchor: Tensor, positive: Tensor, *, rows: Tensor | None = None) -> Tensor:
        """Loss of `anchor` [N, D] against `positive` [N, D]: scalar, or [R] for reduction "none"."""
        return ops.info_nce(
            anchor,
            positive,
            self.temperature,
            intra_view_negatives=self.intra_view_negatives,
            reduction=self.reduction,
            precision=self.precision,
            rows=rows,
        )

    def extra_repr(self) -> str:
        try:
            temperature = f"{float(torch.as_tensor(self.temperature).detach()):g}"
        except RuntimeError:  # on the meta device, or faked, there is no number
            temperature = "?"
        return (
            f"temperature={temperature}, intra_view_negatives={self.intra_view_negatives}, "
            f"reduction={self.reduction!r}, learnable_temperature={self.log_temperature is not None}"
        )


class LightGCNPropagation(nn.Module):
    """LightGCN's propagation (He et al. 2020, equations 3 and 4): the mean of layers 0..num_layers. No parameters.

    Args:
        num_layers: >= 0.

    Raises:
        ValueError: num_layers below 0; at the call, as `hellm.ops.bipartite_propagate` does.
    """

    def __init__(self, num_layers: int = 2) -> None:
        super().__init__()
        self.num_layers = as_count("num_layers", num_layers)

    def forward(self, user_x: Tensor, item_x: Tensor, hypergraph: Hypergraph) -> tuple[Tensor, Tensor]:
        """([V, D], [M, D]) from user_x [V, D], item_x [M, D] and the graph that `user_hypergraph` gives."""
        return ops.bipartite_propagate(user_x, item_x, hypergraph, num_layers=self.num_layers)

    def extra_repr(self) -> str:
        return f"num_layers={self.num_layers}"
