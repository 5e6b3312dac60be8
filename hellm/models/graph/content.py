"""What items look and read like: what explains a recommendation, and what places an item that came after training.

I = items, n = new items, K = neighbours per item and modality, itself included.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._files import atomic_path, reading
from hellm._mapped import read_blocks
from hellm._rows import row_products
from hellm.data import ItemFeatures
from hellm.data.attributes import AttributeSet, indicators
from hellm.graphs import Neighbours, nearest_items
from hellm.hypergraph import Hypergraph
from hellm.ops._rows import largest

__all__ = ["ItemContent"]

# Rows of the [rows, I] block of similarities.
_BLOCK = 1024


class ItemContent:
    """Normalised features and nearest neighbours of all items, per modality.

    Hyperedges are those of `hellm.item_hypergraph`: items i and h share that of item j where both have j among their
    nearest, and that of a value of an attribute where both have it. Attributes are modalities whose features tell
    which values an item has.

    Args:
        features: modality -> [I, dim] float, rows of length 1, or 0 for an item that lacks the modality.
        neighbours: modality -> [I, K] int64 rows, -1 where there are fewer.
        num_placing: The first so many items place new ones; None is all. Items added later never do, so that it does
            not matter in how many goes items are added.
        attributes: The modalities that are attributes -> the values of their columns.
        encoders: Modality -> what made its features, see `hellm.data.Dataset`.
        removed: Hyperedges that count no more, as modality and item row or column of a value.
    """

    def __init__(
        self,
        features: Mapping[str, Tensor],
        neighbours: Mapping[str, Tensor],
        num_placing: int | None = None,
        attributes: Mapping[str, Sequence[str]] | None = None,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        removed: Collection[tuple[str, int]] = (),
    ) -> None:
        self.encoders, self.removed = dict(encoders or {}), frozenset(removed)
        self.features, self.neighbours = dict(features), dict(neighbours)
        self.attributes = {name: tuple(values) for name, values in (attributes or {}).items()}
        self.num_placing = self.num_items if num_placing is None else num_placing
        # (modalities, k) -> hypergraph without weights, of the items that place.
        self._incidences: dict[tuple, Hypergraph] = {}

    @classmethod
    def of(
        cls,
        features: Mapping[str, ItemFeatures],
        k: int = 10,
        device: torch.device | str = "cpu",
        *,
        attributes: Mapping[str, AttributeSet] | None = None,
        encoders: Mapping[str, Mapping[str, Any]] | None = None,
        search: str | None = None,
    ) -> ItemContent:
        """From the features and attributes of a data set, kept on the CPU; `k` is cut to the number of items.

        Neighbours are searched on `device`, as `search` says (`hellm.graphs.nearest_items`).
        """
        normalised, neighbours, attributes = {}, {}, attributes or {}
        told = {name: one.features for name, one in attributes.items()}
        for modality, one in (dict(features) | told).items():
            rows, similarity = (found.cpu() for found in nearest_items(one, k, device, search=search))
            neighbours[modality] = torch.where(similarity > 0, rows.long(), -1)
            # Half precision keeps a cosine to 1e-3 and the file small.
            normalised[modality] = torch.empty(one.values.shape, dtype=torch.float16)
            for start, block in read_blocks(one.values):
                part = slice(start, start + len(block))
                x = torch.where(torch.from_numpy(one.mask[part]).unsqueeze(1), torch.from_numpy(block).float(), 0.0)
                normalised[modality][part] = F.normalize(x, dim=1)
        values = {name: one.values for name, one in attributes.items()}
        return cls(normalised, neighbours, attributes=values, encoders=encoders)

    @property
    def modalities(self) -> list[str]:
        return list(self.features)

    @property
    def num_neighbours(self) -> int:
        """K."""
        return max((one.shape[1] for one in self.neighbours.values()), default=0)

    @property
    def num_items(self) -> int:
        return len(next(iter(self.features.values()))) if self.features else 0

    def has(self, modality: str) -> Tensor:
        """[I] bool: items that have the modality."""
        return self.features[modality].any(dim=1)

    def has_value(self, attribute: str, values: Sequence[str]) -> Tensor:
        """[I] bool: items that have one of the values of an attribute.

        Raises: ValueError, an unknown attribute or value.
        """
        if attribute not in self.attributes:
            known = ", ".join(self.attributes) or "none"
            raise ValueError(f"attributes must be among those of the run ({known}), got {attribute!r}")
        column = {value: place for place, value in enumerate(self.attributes[attribute])}
        for value in values:
            if value not in column:
                nearest = difflib.get_close_matches(value, column, n=3, cutoff=0.5)
                hint = f"; nearest: {', '.join(nearest)}" if nearest else ""
                raise ValueError(f"unknown value {value!r} among the {len(column)} of attribute {attribute!r}{hint}")
        return (self.features[attribute][:, [column[value] for value in values]] > 0).any(dim=1)

    def similarities(self, modality: str, row: int, rows: Tensor) -> Tensor:
        """Cosines [len(rows)] float32 of item `row` with others; 0 where either lacks the modality."""
        x = self.features[modality].float()
        return x[rows] @ x[row]

    def shared_hyperedges(self, modality: str, row: int, rows: Tensor) -> Tensor:
        """[len(rows)] int64: hyperedges that hold both item `row` and the other."""
        removed = self._removed(modality)
        if modality in self.attributes:
            both = (self.features[modality][rows] > 0) & (self.features[modality][row] > 0)
            both[:, removed] = False
            return both.sum(dim=1)
        own = self.neighbours[modality][row]
        own = own[~torch.isin(own, removed)]
        return torch.isin(self.neighbours[modality][rows], own[own >= 0]).sum(dim=1)

    def nearest(self, features: Mapping[str, Tensor]) -> dict[str, Neighbours]:
        """The K - 1 items of each modality nearest to new ones, which are the K-th themselves; of equals the first.

        Args:
            features: modality -> [n, dim] float; a row of zeros lacks the modality.
        Raises: ValueError, an unknown modality, another width, different numbers of rows, or a value not finite.
        """
        self._check(features)
        found = {}
        for modality, x in features.items():
            table = self.features[modality][: self.num_placing].float()
            k = min(max(1, self.neighbours[modality].shape[1] - 1), len(table))
            blocks = [largest(row_products(one, table.T), k) for one in F.normalize(x.float(), dim=1).split(_BLOCK)]
            similarity, rows = (torch.cat(part) for part in zip(*blocks, strict=True))
            near = similarity > 0
            found[modality] = Neighbours(torch.where(near, rows, -1), torch.where(near, similarity, 0.0))
        return found

    def weights(self, nearest: Mapping[str, Neighbours], usable: Tensor) -> Tensor:
        """Sparse [n, num_placing] float32 of shares that add up to 1 over an item's neighbours.

        The share of a neighbour goes by the sum of its cosines over the modalities, among the `usable` [num_placing]
        bool; a row without usable neighbours is empty.
        """
        count = len(next(iter(nearest.values())).rows)
        found = [(rows >= 0) & usable[rows.clamp(min=0)] for rows, _ in nearest.values()]
        index = torch.cat(
            [
                torch.stack([kept.nonzero()[:, 0], one.rows[kept]])
                for kept, one in zip(found, nearest.values(), strict=True)
            ],
            1,
        )
        value = torch.cat([one.similarities[kept] for kept, one in zip(found, nearest.values(), strict=True)])
        total = torch.zeros(count).index_add_(0, index[0], value)
        # Not by coalesce(), which adds up several modalities' shares in an order that follows what else is placed.
        places, order = torch.unique(index[0] * len(usable) + index[1], return_inverse=True)
        share = torch.zeros(len(places)).index_add_(0, order, value / total[index[0]])
        index = torch.stack([places // len(usable), places % len(usable)])
        return torch.sparse_coo_tensor(index, share, (count, len(usable)), check_invariants=True, is_coalesced=True)

    def indicators(self, attributes: Mapping[str, Sequence[Sequence[str]]]) -> dict[str, Tensor]:
        """The values that new items have as features [n, V], for `nearest`; unknown values are ignored.

        Raises: ValueError, an unknown attribute.
        """
        for name in attributes:
            if name not in self.attributes:
                known = ", ".join(self.attributes) or "none"
                raise ValueError(f"attributes must be among those of the run ({known}), got {name!r}")
        return {name: torch.from_numpy(indicators(lists, self.attributes[name])) for name, lists in attributes.items()}

    def convolve(
        self,
        x: Tensor,
        nearest: Mapping[str, Neighbours],
        features: Mapping[str, Tensor],
        modalities: Sequence[str] | None = None,
        k: int | None = None,
    ) -> Tensor:
        """What the item hypergraph convolution gives new vertices, up to the length of the rows.

            y_v = sum_{e: v in e} w_e sum_{u in e} x_u / sqrt(d_u),   d_u = sum_{e: u in e} w_e |e|

        It is row v of D^-1/2 H diag(w) H^T D^-1/2 x times sqrt(d_v), where v has joined the hyperedges of its nearest
        items and of its values, its own input is zero and all other rows stay as they are.

        Args:
            x: [I, D] input of the last layer.
            nearest: Of the new items.
            features: What they were found by.
            modalities: Those that the hypergraph was built from; None is all.
            k: Neighbours of an item that it was built from, at most those that are known; None is all.
        Returns: [n, D].
        """
        x = x[: self.num_placing]
        degree, hyperedges = x.new_zeros(len(x)), {}
        for modality in self.modalities if modalities is None else modalities:
            vertex, edge, weight = self._hyperedges(modality, k)
            size = torch.bincount(edge, minlength=len(weight)).to(x.dtype)
            degree.index_add_(0, vertex, (weight * size)[edge])
            hyperedges[modality] = vertex, edge, weight
        scaled = x * torch.where(degree > 0, degree, 1.0).rsqrt().unsqueeze(1)
        y = x.new_zeros(len(next(iter(nearest.values())).rows), x.shape[1])
        # In one order, whatever order they are given in: a sum of the same rows has the same bits.
        for modality, (vertex, edge, weight) in hyperedges.items():
            if modality not in nearest:
                continue
            edge_sums = x.new_zeros(len(weight), x.shape[1]).index_add_(0, edge, scaled[vertex]) * weight.unsqueeze(1)
            if modality in self.attributes:
                joins, joined = (features[modality] > 0).nonzero(as_tuple=True)
            else:
                joins, joined = _incidence(nearest[modality].rows)
            y.index_add_(0, joins, edge_sums[joined])
        return y

    def _hyperedges(self, modality: str, k: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Items and hyperedges, each [nnz] int64, and the weight of each hyperedge, among the items that place."""
        listed = self.neighbours[modality][: self.num_placing, :k]
        if modality in self.attributes:
            has = self.features[modality][: self.num_placing] > 0
            vertex, edge = has.nonzero(as_tuple=True)
        else:
            vertex, edge = _incidence(listed)
        return vertex, edge, self.hyperedge_weights(modality, k)

    def hyperedge_weights(self, modality: str, k: int | None = None) -> Tensor:
        """[M] float32 weight of each hyperedge of a modality, 0 of one that is removed; see `hypergraph`."""
        listed = self.neighbours[modality][: self.num_placing, :k]
        if modality in self.attributes:
            has = self.features[modality][: self.num_placing] > 0
            weight = listed.shape[1] / has.sum(0).clamp(min=1).float()
        else:
            weight = torch.ones(len(listed))
        return weight.index_fill_(0, self._removed(modality), 0.0)

    def _removed(self, modality: str) -> Tensor:
        return torch.tensor([hyperedge for name, hyperedge in self.removed if name == modality], dtype=torch.int64)

    def hypergraph(self, modalities: Sequence[str] | None = None, k: int | None = None) -> Hypergraph:
        """The hypergraph of the items that place, as `hellm.item_hypergraph` builds it.

        Args:
            modalities: Those that it is built from, in this order; None is all.
            k: Neighbours of an item, at most those that are known; None is all.
        """
        names = tuple(self.modalities if modalities is None else modalities)
        weight = torch.cat([self.hyperedge_weights(name, k) for name in names])
        if (names, k) not in self._incidences:
            vertices, edges, start = [], [], 0
            for name in names:
                vertex, edge, own = self._hyperedges(name, k)
                vertices.append(vertex)
                edges.append(edge + start)
                start += len(own)
            index = torch.stack([torch.cat(vertices), torch.cat(edges)])
            self._incidences[names, k] = Hypergraph(index, num_vertices=self.num_placing, num_hyperedges=start)
        return self._incidences[names, k].with_weight(None if bool((weight == 1).all()) else weight)

    def without_hyperedge(self, modality: str, hyperedge: int) -> ItemContent:
        """With all items and one hyperedge less: that of an item row, or of a column of an attribute."""
        less = copy.copy(self)
        less.removed = self.removed | {(modality, hyperedge)}
        return less

    def extended(self, features: Mapping[str, Tensor], nearest: Mapping[str, Neighbours]) -> ItemContent:
        """With new items at the end; the neighbours of the others stay. A new item is its own nearest."""
        count = len(next(iter(nearest.values())).rows)
        own = torch.arange(self.num_items, self.num_items + count).unsqueeze(1)
        tables, neighbours = {}, {}
        for modality, table in self.features.items():
            listed = self.neighbours[modality]
            new, rows = table.new_zeros(count, table.shape[1]), listed.new_full((count, listed.shape[1]), -1)
            if modality in features:
                new = F.normalize(features[modality].float(), dim=1).to(table.dtype)
                kept = torch.cat([torch.where(new.any(1, keepdim=True), own, -1), nearest[modality].rows], 1)
                width = min(rows.shape[1], kept.shape[1])
                rows[:, :width] = kept[:, :width]
            tables[modality], neighbours[modality] = torch.cat([table, new]), torch.cat([listed, rows])
        return ItemContent(tables, neighbours, self.num_placing, self.attributes, self.encoders, self.removed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file."""
        from safetensors.torch import save_file

        tensors = {f"features.{name}": value.contiguous() for name, value in self.features.items()}
        tensors |= {f"neighbours.{name}": value.int().contiguous() for name, value in self.neighbours.items()}
        with atomic_path(path) as temporary:
            metadata = {"modalities": "\n".join(self.features), "num_placing": str(self.num_placing)}
            metadata |= {"attributes": json.dumps(self.attributes), "encoders": json.dumps(self.encoders)}
            if self.removed:
                metadata["removed"] = json.dumps(sorted(self.removed))
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ItemContent:
        """What `save` wrote. Raises: DataError, a file that is no such thing."""
        from safetensors import safe_open

        with reading(path), safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            modalities, num_placing = metadata["modalities"].split("\n"), int(metadata["num_placing"])
            attributes, encoders = (json.loads(metadata.get(name, "{}")) for name in ("attributes", "encoders"))
            removed = [(name, row) for name, row in json.loads(metadata.get("removed", "[]"))]
            features = {name: file.get_tensor(f"features.{name}") for name in modalities}
            neighbours = {name: file.get_tensor(f"neighbours.{name}").long() for name in modalities}
        return cls(features, neighbours, num_placing, attributes, encoders, removed)

    def _check(self, features: Mapping[str, Tensor]) -> None:
        if not features:
            raise ValueError(f"features must hold at least one of {', '.join(self.modalities)}, got none")
        count = len(next(iter(features.values())))
        for modality, x in features.items():
            if modality not in self.features:
                raise ValueError(f"features must be among {', '.join(self.modalities)}, got {modality!r}")
            width = self.features[modality].shape[1]
            if x.ndim != 2 or tuple(x.shape) != (count, width):
                raise ValueError(f"features[{modality!r}] must be [{count}, {width}], got {list(x.shape)}")
            if not torch.isfinite(x).all():
                row = int((~torch.isfinite(x).all(dim=1)).nonzero()[0])
                raise ValueError(f"features[{modality!r}] must be finite, got NaN or infinity in row {row}")


def _incidence(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices and hyperedges, each [nnz] int64, of neighbour lists."""
    vertex, place = (rows >= 0).nonzero(as_tuple=True)
    return vertex, rows[vertex, place]
