"""Stage-1 model: a collaborative backbone fused with a user and an item hypergraph branch (MMHCL, section 3).

U = users, I = items, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hellm import ops
from hellm.hypergraph import Hypergraph
from hellm.models.graph.backbone import BACKBONES
from hellm.models.graph.fold_in import FoldIn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from hellm.models.graph.columns import Columns

__all__ = ["ITEM_CONVOLUTION", "USER_CONVOLUTION", "EncoderOutput", "GraphEncoder", "ItemBranch", "placed"]


class _Form(TypedDict):
    normalization: str
    hyperedge_degree: bool
    self_loops: bool


USER_CONVOLUTION: _Form = {"normalization": "row", "hyperedge_degree": False, "self_loops": False}
ITEM_CONVOLUTION: _Form = {"normalization": "symmetric", "hyperedge_degree": False, "self_loops": True}
"""What the branches are of `hellm.ops.hypergraph_conv`."""

# Weights that backbones had under another name.
_RENAMED = {"aggregate.": "backbone.aggregate.", "interact.": "backbone.interact."}


class EncoderOutput(NamedTuple):
    """Embeddings of all users and items.

    Attributes:
        user: [U, D] fused: backbone + normalised hypergraph view. A user scores an item by their dot product.
        item: [I, D] fused; of unit length where the encoder says so.
        user_view: [U, D] output of the user hypergraph branch, None without one.
        item_view: [I, D] output of the item hypergraph branch, None without one.
    """

    user: Tensor
    item: Tensor
    user_view: Tensor | None
    item_view: Tensor | None


class ItemBranch(NamedTuple):
    """How items came out of the item hypergraph, for who convolves it again.

    Attributes:
        num_layers: Layers of the branch.
        k: Neighbours of an item that the hypergraph was built with.
        unit_items: Whether fused items have unit length.
        place_untrained: Whether those without training events are made from others, see `placed`.
    """

    num_layers: int
    k: int
    unit_items: bool
    place_untrained: bool = False


class GraphEncoder(nn.Module):
    """Users and items from their interactions and two hypergraphs.

        user = backbone_user + normalize(S^l uu)    S: users who share items, row-normalised, no self loops
        item = backbone_item + normalize(T^l ii)    T: items that share neighbours, symmetric

    Each branch has an embedding table of its own (uu, ii) and repeats its operator without weights or activation; only
    the last layer counts. Gradients reach all tables. Tables are drawn from torch's global generator in the order
    user, item, user branch, item branch, whichever of them are used.

    Args:
        num_users: U.
        num_items: I.
        user_hypergraph: training interactions, users as vertices and items as hyperedges (`hellm.user_hypergraph`).
            The backbone needs it as well.
        item_hypergraph: items as vertices (`hellm.item_hypergraph`); None leaves the item branch out.
        embedding_dim: D.
        backbone: a name in `hellm.models.graph.backbone.BACKBONES`: "lightgcn", "ngcf" or "mf".
        num_layers: propagation layers of lightgcn and ngcf.
        num_user_layers: layers of the user branch.
        num_item_layers: layers of the item branch.
        use_user_branch: False leaves the user branch out.
        dropout: NGCF message dropout probability.
        unit_items: fused items have unit length, so that a user ranks items by cosine.
        place_untrained: what `embeddings` and `fold_in_tables` give for an item without training events is made from
            those that share its hyperedges in the item hypergraph, as its own tables were hardly trained.

    Raises:
        ValueError: an unknown backbone, a layer count < 1, or a hypergraph of another size.
    """

    def __init__(
        self,
        num_users: int,
        num_items: int,
        *,
        user_hypergraph: Hypergraph,
        item_hypergraph: Hypergraph | None = None,
        embedding_dim: int = 64,
        backbone: str = "lightgcn",
        num_layers: int = 2,
        num_user_layers: int = 2,
        num_item_layers: int = 2,
        use_user_branch: bool = True,
        dropout: float = 0.1,
        unit_items: bool = False,
        place_untrained: bool = True,
    ) -> None:
        super().__init__()
        layers = {"num_layers": num_layers, "num_user_layers": num_user_layers, "num_item_layers": num_item_layers}
        _check_arguments(num_users, num_items, user_hypergraph, item_hypergraph, backbone, layers)
        self.num_users, self.num_items, self.embedding_dim = num_users, num_items, embedding_dim
        self.num_user_layers, self.num_item_layers = num_user_layers, num_item_layers
        self.unit_items, self.place_untrained = unit_items, place_untrained
        self.user_hypergraph, self.item_hypergraph = user_hypergraph, item_hypergraph
        user, item, user_branch, item_branch = (
            _table(count, embedding_dim) for count in (num_users, num_items, num_users, num_items)
        )
        self.user_table, self.item_table = user, item
        self.user_branch_table = user_branch if use_user_branch else None
        self.item_branch_table = item_branch if item_hypergraph is not None else None
        self.backbone = BACKBONES[backbone](embedding_dim, num_layers, dropout)
        self._columns: Columns | None = None
        self._cached: tuple[tuple, EncoderOutput] | None = None

    @property
    def device(self) -> torch.device:
        """Device of the tables."""
        return self.user_table.weight.device

    def _apply(self, *args, **kwargs):
        super()._apply(*args, **kwargs)
        self.user_hypergraph = self.user_hypergraph.to(self.device)
        if self.item_hypergraph is not None:
            self.item_hypergraph = self.item_hypergraph.to(self.device)
        return self

    def forward(self) -> EncoderOutput:
        """Embeddings of all users and items, differentiable in every parameter.

        Where columns are shared out, those of this process; `whole` makes rows of them.
        """
        if self.training:
            self._cached = None
        item_view = None if self.item_branch_table is None else self._item_view(self.num_item_layers)
        return self.fused(*self._propagate_backbone(), self._user_view(self.num_user_layers), item_view)

    def fused(self, user: Tensor, item: Tensor, user_view: Tensor | None, item_view: Tensor | None) -> EncoderOutput:
        """The output of rows of the backbone and of the branches."""
        if user_view is not None:
            user = user + self._unit(user_view)
        if item_view is not None:
            item = item + self._unit(item_view)
        if self.unit_items:
            item = self._unit(item)
        return EncoderOutput(user, item, user_view, item_view)

    @property
    def mixes_columns(self) -> bool:
        """Whether a column of the output depends on others by more than the lengths of rows."""
        return self.backbone.mixes_columns

    def share_columns(self, columns: Columns) -> None:
        """Keep only this process's columns of every table, from now on `DTensor` parameters.

        Raises: ValueError, a backbone that mixes columns.
        """
        if self.mixes_columns:
            raise ValueError("columns must not depend on each other, and those of this backbone do")
        self._columns = columns
        for table in self._tables():
            table.weight = columns.shared_out(table.weight)

    def unite_columns(self) -> None:
        """Take back what `share_columns` did; every process has all columns then."""
        for table in self._tables():
            table.weight = nn.Parameter(cast("DTensor", table.weight.detach()).full_tensor())
        self._columns = None

    def whole(self, x: Tensor) -> Tensor:
        """[R, D] of rows of an output, which has the columns of this process where they are shared out."""
        return x if self._columns is None else self._columns.whole(x)

    def _tables(self) -> list[nn.Embedding]:
        tables = (self.user_table, self.item_table, self.user_branch_table, self.item_branch_table)
        return [one for one in tables if one is not None]

    def _weight(self, table: nn.Embedding) -> Tensor:
        return table.weight if self._columns is None else self._columns.own(table.weight)

    def _unit(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) if self._columns is None else self._columns.unit(x)

    def _user_view(self, num_layers: int) -> Tensor | None:
        if self.user_branch_table is None:
            return None
        table = self._weight(self.user_branch_table)
        if num_layers == 0:
            return table
        return ops.hypergraph_conv(table, self.user_hypergraph, num_layers=num_layers, **USER_CONVOLUTION)

    def _item_view(self, num_layers: int) -> Tensor:
        hypergraph = self.item_hypergraph
        assert self.item_branch_table is not None and hypergraph is not None
        table = self._weight(self.item_branch_table)
        if num_layers == 0:
            return table
        return ops.hypergraph_conv(table, hypergraph, num_layers=num_layers, **ITEM_CONVOLUTION)

    def _propagate_backbone(self) -> tuple[Tensor, Tensor]:
        return self.backbone(self._weight(self.user_table), self._weight(self.item_table), self.user_hypergraph)

    @torch.no_grad()
    def embeddings(self) -> EncoderOutput:
        """Whole embeddings in evaluation mode, without gradients; computed once per change of the parameters.

        Where columns are shared out, all processes ask for them together.
        """
        if self._columns is None:
            key = tuple((parameter.data_ptr(), parameter._version) for parameter in self.parameters())
        else:
            # A DTensor does not always notice an update; `forward` says that there will be one.
            key = ()
        if self._cached is None or self._cached[0] != key:
            was_training = self.training
            self.eval()
            try:
                own = self()
                views = (None if view is None else self.whole(view) for view in own[2:])
                output = EncoderOutput(self.whole(own.user), self.whole(own.item), *views)
                self._cached = (key, self._with_untrained_placed(output))
            finally:
                self.train(was_training)
        return self._cached[1]

    def scores(self, users: Tensor) -> Tensor:
        """Scores of all items for each of `users`; higher is better.

        Args:
            users: [B] int64 rows of the user table.
        Returns: [B, I] float32.
        """
        output = self.embeddings()
        return (output.user[users.to(self.device)] @ output.item.T).float()

    @torch.no_grad()
    def fold_in_tables(self) -> FoldIn:
        """What embeds users that have no row in the tables, from their histories alone.

        A new user u with the distinct items N(u) takes part in both graphs with own embeddings of zero, and changes
        nobody else's; d_i is the number of users of item i:

            backbone = 1/(L+1) sum_{l<L} sum_{i in N(u)} e_i^(l) / sqrt(|N(u)| max(d_i, 1))        (lightgcn)
            backbone = mean_{i in N(u)} of the backbone item embeddings                            (mf, ngcf)
            view     = mean of uu^(l_user - 1) over the users of each i in N(u)
            user     = backbone + normalize(view)
        """
        tables = self._weight(self.user_table), self._weight(self.item_table)
        folded = self.backbone.fold_in(*tables, self.user_hypergraph)
        source, exponent = (self.backbone_items(), 1.0) if folded is None else (self.whole(folded[0]), folded[1])
        view = None
        neighbours = self._user_view(self.num_user_layers - 1)
        if neighbours is not None:
            # The sum over users points the same way as their mean, and only its direction is used.
            view = self._placed(self.whole(ops.incidence_product(neighbours, self.user_hypergraph, transpose=True)))
        return FoldIn(self._placed(source.detach()), view, exponent)

    @torch.no_grad()
    def item_view_source(self) -> Tensor | None:
        """[I, D] input of the last layer of the item branch, from which a new item's view follows; None without one.

        See `hellm.models.graph.content.ItemContent.convolve`.
        """
        return None if self.item_branch_table is None else self._item_view(self.num_item_layers - 1)

    def fold_in(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Embeddings of users that have no row in the tables; see `fold_in_tables` and `FoldIn.embed`.

        Args:
            indptr: [B + 1] int64, where each history starts in `items`.
            items: [indptr[-1]] int64 item rows; repeats within a history count once.
        Returns: [B, D]; an empty history gives zeros.
        Raises: ValueError, an item outside [0, num_items).
        """
        return self.fold_in_tables().embed(indptr, items)

    def user_embedding(self, history: Sequence[int] | Tensor) -> Tensor:
        """[D] embedding of one user with this bare history of item rows; see `fold_in`."""
        items = torch.as_tensor(history).long().reshape(-1)
        return self.fold_in(torch.tensor([0, items.numel()]), items)[0]

    def _with_untrained_placed(self, output: EncoderOutput) -> EncoderOutput:
        """An item without training events gets the collaborative part of an average neighbour, and its own view."""
        if output.item_view is None or not self._untrained.any():
            return output
        item = self.backbone_items() + F.normalize(output.item_view, dim=1)
        if self.unit_items:
            item = F.normalize(item, dim=1)
        return output._replace(item=torch.where(self._untrained.unsqueeze(1), item, output.item))

    @property
    def _untrained(self) -> Tensor:
        """[I] bool: items whose rows are made from those of others."""
        without_events = self.user_hypergraph.edge_indptr.diff() == 0
        return without_events & (self.place_untrained and self.item_hypergraph is not None)

    def _placed(self, x: Tensor) -> Tensor:
        return placed(x, self._untrained, self.item_hypergraph)

    def renamed_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state that was saved before, by the names that its parameters have now."""
        return {
            next((new + name.removeprefix(old) for old, new in _RENAMED.items() if name.startswith(old)), name): value
            for name, value in state.items()
        }

    @torch.no_grad()
    def backbone_items(self, *, place: bool = True) -> Tensor:
        """[I, D] what the backbone alone makes of the items, in evaluation mode; with `place`, untrained are placed."""
        was_training = self.training
        self.eval()
        try:
            items = self.whole(self._propagate_backbone()[1])
            return self._placed(items) if place else items
        finally:
            self.train(was_training)


def placed(x: Tensor, untrained: Tensor, hypergraph: Hypergraph | None) -> Tensor:
    """[I, D] with the rows of untrained items replaced by the mean over trained items that share hyperedges.

    An item counts as often as it shares one, by the weight of the hyperedge. Who shares none stays as it is.

    Args:
        x: [I, D].
        untrained: [I] bool.
        hypergraph: Of the items; may be None where none is untrained.
    """
    untrained = untrained.unsqueeze(1)
    if hypergraph is None or not untrained.any():
        return x
    sums = ops.incidence_product(torch.cat([x, torch.ones_like(x[:, :1])], 1) * ~untrained, hypergraph, transpose=True)
    if hypergraph.hyperedge_weight is not None:
        sums = sums * hypergraph.hyperedge_weight.unsqueeze(1)
    sums = ops.incidence_product(sums, hypergraph)
    counts = sums[:, -1:]
    return torch.where(untrained & (counts > 0), sums[:, :-1] / counts.clamp(min=torch.finfo(x.dtype).tiny), x)


def _table(count: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(count, dim)
    nn.init.xavier_uniform_(table.weight)
    return table


def _check_arguments(num_users, num_items, user_hypergraph, item_hypergraph, backbone, layers) -> None:
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(map(repr, BACKBONES))}, got {backbone!r}")
    for name, value in layers.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    shape = (user_hypergraph.num_vertices, user_hypergraph.num_hyperedges)
    if shape != (num_users, num_items):
        raise ValueError(f"user_hypergraph must have {num_users} vertices and {num_items} hyperedges, got {shape}")
    if item_hypergraph is not None and item_hypergraph.num_vertices != num_items:
        raise ValueError(f"item_hypergraph must have {num_items} vertices, got {item_hypergraph.num_vertices}")
