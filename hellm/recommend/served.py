"""The models that a recommender can stand on: each embeds histories, has item keys, takes new items, and saves itself.

U = users, I = items, n = new items, B = histories, D = embedding width.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm._files import DataError, reading
from hellm.artifact import Embeddings, read_embeddings, write_embeddings
from hellm.artifact.files import EMBEDDINGS, LANGUAGE_MODEL, SEQUENCE_MODEL, TOWERS
from hellm.models import FoldIn, SASRec
from hellm.models.fused import FusedModel
from hellm.models.graph import ItemBranch
from hellm.models.graph.content import ItemContent, Neighbours
from hellm.models.sequence import TransitionModel, WhitenedContent

__all__ = [
    "SERVED",
    "NewItems",
    "Placing",
    "SavedModel",
    "ServedFused",
    "ServedGraph",
    "ServedLLM",
    "ServedModel",
    "ServedSASRec",
    "ServedTransitions",
    "load_served",
]


class Placing(NamedTuple):
    """What a model was trained to know items by, and so places new ones by.

    Attributes:
        modalities: Features and attributes.
        k: Neighbours of an item in each, itself included.
    """

    modalities: tuple[str, ...]
    k: int

    @classmethod
    def of(cls, content: ItemContent) -> Placing:
        """By all that a run holds of its items."""
        return cls(tuple(content.modalities), content.num_neighbours)


class NewItems(NamedTuple):
    """Items that came after training, and where they stand among the others.

    Attributes:
        features: modality -> [n, dim] float32, as they came.
        titles: [n].
        content: Of the items there are.
        trained: [num_placing] bool: items with training events.
        placing: What the items are placed by.
        nearest: modality -> their neighbours among the items there are.
        weights: Of `ItemContent.weights`, over the neighbours that have training events.
    """

    features: dict[str, Tensor]
    titles: list[str | None]
    content: ItemContent
    trained: Tensor
    placing: Placing
    nearest: dict[str, Neighbours]
    weights: Tensor

    @classmethod
    def of(
        cls, features: dict[str, Tensor], titles: list[str | None], content: ItemContent, trained: Tensor
    ) -> NewItems:
        """Placed by all that they have. Raises: ValueError, as `ItemContent.nearest`."""
        nearest = content.nearest(features)
        weights = content.weights(nearest, trained)
        return cls(features, titles, content, trained, Placing.of(content), nearest, weights)

    def placed_by(self, placing: Placing) -> NewItems:
        """The same items as a model places them. An item that has none of its modalities stays where it is."""
        if placing == self.placing:
            return self
        # Of a smaller k, the nearest are the first ones.
        most = max(1, placing.k - 1)
        nearest = {
            name: Neighbours(found.rows[:, :most], found.similarities[:, :most]) for name, found in self.nearest.items()
        }
        own, weights = {name: one for name, one in nearest.items() if name in placing.modalities}, self.weights
        if own:
            known = torch.stack([self.features[name].any(dim=1) for name in own]).any(dim=0)
            weights = _rows_where(known, self.content.weights(own, self.trained), weights)
        return self._replace(placing=placing, nearest=nearest, weights=weights)

    def mean(self, table: Tensor) -> Tensor:
        """[n, D] weighted means of the neighbours' rows of [I, D]."""
        return (self.weights @ table[: self.weights.shape[1]].float()).to(table)


def _rows_where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Rows of one sparse [n, m] where they are chosen, [n] bool, and of the other elsewhere."""
    parts = []
    for table, kept in ((one, chosen), (other, ~chosen)):
        own = kept[table.indices()[0]]
        parts.append((table.indices()[:, own], table.values()[own]))
    index, value = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return torch.sparse_coo_tensor(index, value, one.shape, check_invariants=True).coalesce()


class SavedModel(NamedTuple):
    """What a model is loaded from.

    Attributes:
        folder: The run directory.
        stored: Its embeddings.safetensors.
        titles: [I], for a model that reads them.
        language_model: Where that of a fine-tuning run is now; None is where it was in training.
    """

    folder: Path
    stored: Embeddings
    titles: list[str | None]
    language_model: str | os.PathLike[str] | None


class ServedModel(Protocol):
    """The score of item i for a history is <query of the history, key of i>. All it gives is on the CPU.

    A model whose scores are of another form has `history_scores(indptr, items)` [B, I], and no `embed` if it has no
    queries at all.

    Many threads read one at the same time: but for `to` and `scorer_on`, nothing changes it.

    Attributes:
        kind: Its name in embeddings.safetensors and in `SERVED`.
        label: What a model card calls it.
        words: The same at more length.
        user: [U, D] trained queries of known users; None for a model that knows histories only.
        graph_view: [I, D] what the item hypergraph made of the items; None for a model without.
        reads_content: Whether it ranks an item without training events by its features and attributes, in no more time
            than others.
    """

    kind: str
    label: str
    words: str

    @property
    def reads_content(self) -> bool: ...

    @property
    def user(self) -> Tensor | None: ...

    @property
    def graph_view(self) -> Tensor | None: ...

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        """Queries [B, D] float32 of histories in time order, given as CSR."""
        ...

    def item_keys(self) -> Tensor:
        """[I, D] float32."""
        ...

    def extended(self, new: NewItems) -> ServedModel:
        """The model with more items; this one stays as it is. Raises: ValueError, for a model that cannot."""
        ...

    def save(self, folder: Path) -> None: ...

    @classmethod
    def load(cls, saved: SavedModel) -> ServedModel: ...

    def to(self, device: str) -> None:
        """Read histories on `device` from now on."""
        ...

    def scorer_on(self, device: str) -> Any:
        """The same model on `device`, where it then computes, and gives queries and keys (or scores of users) there."""
        ...


class ServedGraph:
    """Stage 1. New users are folded in (`hellm.models.FoldIn`), new items take part in the item hypergraph.

    The key of a new item v is

        item_v = sum_u w_u backbone_u + normalize(view_v)

    w are the shares of the nearest items by content, so the collaborative part is that of an average neighbour, and
    view_v is what the trained convolution gives a vertex that has joined the hyperedges of its neighbours and values
    (`ItemContent.convolve`). Where items have unit length, so has a new one. Nothing of the other items changes.

    Args:
        tensors: As in embeddings.safetensors: "user" [U, D], "item" [I, D], "fold_in_source" [I, D], and where the run
            has them "fold_in_view", "item_hypergraph", "item_hypergraph_source", "item_hypergraph_input" and
            "item_backbone" [I, D].
        fold_in_exponent: See `hellm.models.FoldIn`.
        modalities: What the item hypergraph was built from; None is all that there is.
        branch: How it was convolved; None is not known, or there is none.
        unit_items: Whether items have unit length; None is as the branch says.
    """

    kind = label = "graph"
    words = "stage 1, the hypergraph model"
    reads_content = False

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        fold_in_exponent: float,
        modalities: Sequence[str] | None = None,
        branch: ItemBranch | None = None,
        unit_items: bool | None = None,
    ) -> None:
        self.tensors, self.exponent, self.modalities = dict(tensors), fold_in_exponent, modalities
        self.branch = branch
        self.unit_items = branch is not None and branch.unit_items if unit_items is None else unit_items
        self.user = self.tensors["user"]

    @property
    def graph_view(self) -> Tensor | None:
        return self.tensors.get("item_hypergraph")

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        tensors = self.tensors
        return FoldIn(tensors["fold_in_source"], tensors.get("fold_in_view"), self.exponent).embed(indptr, items)

    def item_keys(self) -> Tensor:
        return self.tensors["item"]

    def extended(self, new: NewItems) -> ServedGraph:
        rows, view = {}, self.graph_view
        for name in ("fold_in_source", "fold_in_view"):
            if name in self.tensors:
                rows[name] = new.mean(self.tensors[name])
        item = self.tensors["item"]
        if view is None:
            rows["item"] = new.mean(item)
        else:
            source = self.tensors.get("item_hypergraph_source", view)
            convolved = new.content.convolve(source, new.nearest, new.features, self.modalities, new.placing.k)
            # Runs of earlier versions did not keep it. Of items of unit length, it cannot be had from them.
            backbone = self.tensors.get("item_backbone", item - F.normalize(view, dim=1))
            rows |= {"item_hypergraph": convolved, "item_backbone": new.mean(backbone)}
            rows["item"] = rows["item_backbone"] + F.normalize(convolved, dim=1)
        if self.unit_items:
            rows["item"] = F.normalize(rows["item"], dim=1)
        for name in ("item_hypergraph_source", "item_hypergraph_input"):
            rows[name] = torch.zeros_like(rows["item"])
        longer = {name: torch.cat([table, rows[name]]) for name, table in self.tensors.items() if name in rows}
        return self.with_tensors(longer)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> ServedGraph:
        """With others in place of those of the same names."""
        return ServedGraph(self.tensors | dict(tensors), self.exponent, self.modalities, self.branch, self.unit_items)

    def save(self, folder: Path) -> None:
        metadata = {"fold_in_exponent": str(self.exponent), "unit_items": json.dumps(self.unit_items)}
        if self.modalities is not None:
            metadata["modalities"] = json.dumps(self.modalities)
        if self.branch is not None:
            metadata["item_branch"] = json.dumps(self.branch._asdict())
        write_embeddings(folder, self.kind, self.tensors, metadata)

    @classmethod
    def load(cls, saved: SavedModel) -> ServedGraph:
        _, tensors, metadata = saved.stored
        with reading(saved.folder / EMBEDDINGS):
            modalities = json.loads(metadata["modalities"]) if "modalities" in metadata else None
            branch = ItemBranch(**json.loads(metadata["item_branch"])) if "item_branch" in metadata else None
            unit_items = json.loads(metadata.get("unit_items", "null"))
            shape = tensors["item"].shape
            for name in {*tensors, "user", "fold_in_source"}:
                found, of_users = tensors[name], name.startswith("user")
                if not found.is_floating_point() or found.shape[of_users:] != shape[of_users:]:
                    raise ValueError(f"{name} must have the shape of item {list(shape)}, got {list(found.shape)}")
            return cls(tensors, float(metadata["fold_in_exponent"]), modalities, branch, unit_items)

    def to(self, device: str) -> None:
        """Nothing to do: the queries of users are stored, and folding in a history is a few additions."""

    def scorer_on(self, device: str) -> Any:
        user, item = self.user.to(device), self.item_keys().to(device)
        return lambda users: user[users.to(device)] @ item.T


class ServedSASRec:
    """A sequence model. A new item is known by its content, and by the mean of its neighbours' trained embeddings."""

    kind = label = "sequence"
    words = "SASRec, a sequence model"
    user = graph_view = None

    def __init__(self, model: SASRec) -> None:
        self.model, self.keys = model, model.item_keys()
        self.reads_content = bool(model.items.modalities)

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        return self.model.embed(indptr, items, self.keys).cpu()

    def item_keys(self) -> Tensor:
        return self.keys.cpu()

    def extended(self, new: NewItems) -> ServedSASRec:
        return ServedSASRec(self.model.extended(new.features, new.mean))

    def save(self, folder: Path) -> None:
        self.model.save(folder)

    @classmethod
    def load(cls, saved: SavedModel) -> ServedSASRec:
        return cls(SASRec.load(saved.folder))

    def to(self, device: str) -> None:
        self.model.to(device)
        self.keys = self.keys.to(device)

    def scorer_on(self, device: str) -> SASRec:
        return self.model.to(device)


class ServedLLM:
    """A language model with tied head: a new item's key is the projection of its rows in the item tables.

    Tables of features take the features themselves, whitened; "graph" and "sequence" take the mean of the neighbours'
    rows, as do the trained embeddings of items and a modality that was not given.

    Args:
        model: `hellm.models.RecommenderLLM`.
        tables: Its item tables [I, d], in its order.
        whitening: Name -> (mean [C], matrix [C, d]) of the tables that are whitened features.
    """

    kind = "llm"
    label = "language model"
    words = "a language model that ranks the catalogue"
    # It may read texts, but at a cost that validation has to justify.
    reads_content = False
    user = graph_view = None

    def __init__(
        self, model: Any, tables: Mapping[str, Tensor], whitening: Mapping[str, tuple[Tensor, Tensor]] | None = None
    ) -> None:
        self.model, self.tables, self.whitening = model.eval(), dict(tables), dict(whitening or {})

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        return self.model.embed(indptr, items).cpu()

    def item_keys(self) -> Tensor:
        return self.model.item_keys().cpu()

    def extended(self, new: NewItems) -> ServedLLM:
        rows = {name: new.mean(x) for name, x in self.tables.items()}
        for name in self.tables.keys() & new.features.keys():
            features = new.features[name]
            if name in self.whitening:
                features = WhitenedContent(rows[name][:0], *self.whitening[name]).extended(features).table
            rows[name] = features
        widths = {name: (x.shape[1], rows[name].shape[1]) for name, x in self.tables.items()}
        for name, (width, given) in widths.items():
            if width != given:
                raise ValueError(f"features[{name!r}] must be {width} wide like the item table, got {given}")
        sequence = self.model.sequence_model
        sequence = None if sequence is None else sequence.extended(new.features, new.mean)
        embedding = self.model.items.id_embedding
        ids = None if embedding is None else new.mean(embedding.weight.detach().cpu())
        model = self.model.extended(rows, new.titles, sequence_model=sequence, item_ids=ids)
        tables = {name: torch.cat([self.tables[name], rows[name]]) for name in self.tables}
        return ServedLLM(model, tables, self.whitening)

    def save(self, folder: Path) -> None:
        tensors = dict(self.tables)
        for name, (mean, matrix) in self.whitening.items():
            tensors |= {f"{name}.mean": mean, f"{name}.matrix": matrix}
        write_embeddings(folder, self.kind, tensors, {"order": ",".join(self.tables)})
        if self.model.sequence_model is not None:
            (folder / SEQUENCE_MODEL).mkdir()
            self.model.sequence_model.save(folder / SEQUENCE_MODEL)
        self.model.save_pretrained(folder / LANGUAGE_MODEL)

    @classmethod
    def load(cls, saved: SavedModel) -> ServedLLM:
        from hellm.models import RecommenderLLM

        folder, (_, tensors, metadata) = saved.folder, saved.stored
        tables = {name: tensors[name] for name in metadata["order"].split(",")}
        sequence = SASRec.load(folder / SEQUENCE_MODEL) if (folder / SEQUENCE_MODEL).is_dir() else None
        model = RecommenderLLM.from_pretrained(
            folder / LANGUAGE_MODEL,
            item_embeddings=tables,
            language_model=saved.language_model,
            item_titles=saved.titles,
            sequence_model=sequence,
        )
        whitening = {
            name: (tensors[f"{name}.mean"], tensors[f"{name}.matrix"]) for name in tables if f"{name}.mean" in tensors
        }
        return cls(model, tables, whitening)

    def to(self, device: str) -> None:
        self.model.to(device)

    def scorer_on(self, device: str) -> Any:
        return self.model.to(device)


class ServedTransitions:
    """What follows what. A new item follows what the items nearest to it by content follow."""

    kind = label = "transitions"
    words = "transitions, counts of what follows what"
    reads_content = False
    user = graph_view = None

    def __init__(self, model: TransitionModel) -> None:
        self.model, self.keys = model, model.item_keys()

    def history_scores(self, indptr: Tensor, items: Tensor) -> Tensor:
        return self.model.history_scores(indptr, items)

    def item_keys(self) -> Tensor:
        return self.keys

    def extended(self, new: NewItems) -> ServedTransitions:
        return ServedTransitions(self.model.extended(new.weights))

    def save(self, folder: Path) -> None:
        self.model.save(folder)

    @classmethod
    def load(cls, saved: SavedModel) -> ServedTransitions:
        return cls(TransitionModel.load(saved.folder))

    def to(self, device: str) -> None:
        """Nothing to do: counts are multiplied on the CPU."""

    def scorer_on(self, device: str) -> ServedTransitions:
        return self


class ServedFused:
    """Several served models as one that knows histories, see `hellm.models.fused.FusedModel`.

    Args:
        towers: Name -> model, all of the same items.
        weights: Name -> weight >= 0.
        placing: Name -> what a tower places new items by; those without places them by all that the run knows.
    """

    kind = "fused"
    label = "sum"
    words = "a weighted sum of models"
    user = None

    def __init__(
        self,
        towers: Mapping[str, ServedModel],
        weights: Mapping[str, float],
        placing: Mapping[str, Placing] | None = None,
    ) -> None:
        self.model, self.placing = FusedModel(towers, weights), dict(placing or {})
        self.keys = self.model.item_keys()

    @property
    def towers(self) -> dict[str, ServedModel]:
        return self.model.towers

    @property
    def weights(self) -> dict[str, float]:
        return self.model.weights

    @property
    def reads_content(self) -> bool:
        return any(tower.reads_content for tower in self.towers.values())

    @property
    def graph_view(self) -> Tensor | None:
        views = (tower.graph_view for tower in self.towers.values())
        return next((view for view in views if view is not None), None)

    def embed(self, indptr: Tensor, items: Tensor) -> Tensor:
        return self.model.embed(indptr, items)

    def item_keys(self) -> Tensor:
        return self.keys

    def history_scores(self, indptr: Tensor, items: Tensor, queries: Tensor | None = None) -> Tensor:
        return self.model.history_scores(indptr, items, self.keys, queries)

    def parts(self, indptr: Tensor, items: Tensor) -> dict[str, Tensor]:
        return self.model.parts(indptr, items)

    def extended(self, new: NewItems) -> ServedFused:
        return self.with_towers(
            {
                name: tower.extended(new.placed_by(self.placing.get(name, new.placing)))
                for name, tower in self.towers.items()
            }
        )

    def with_towers(self, towers: Mapping[str, ServedModel]) -> ServedFused:
        """With others in place of those of the same names."""
        return ServedFused(towers, self.weights, self.placing)

    def save(self, folder: Path) -> None:
        """Write every tower into towers/NAME, and what they add up to."""
        for name, tower in self.towers.items():
            (folder / TOWERS / name).mkdir(parents=True, exist_ok=True)
            tower.save(folder / TOWERS / name)
        metadata = {"fusion": json.dumps(self.weights), "placing": json.dumps(self.placing)}
        write_embeddings(folder, self.kind, {"item_keys": self.keys}, metadata)

    @classmethod
    def load(cls, saved: SavedModel) -> ServedFused:
        with reading(saved.folder / EMBEDDINGS):
            weights = json.loads(saved.stored.metadata["fusion"])
            found = json.loads(saved.stored.metadata.get("placing", "{}"))
            placing = {name: Placing(tuple(modalities), k) for name, (modalities, k) in found.items()}
        folders = {name: saved.folder / TOWERS / name for name in weights}
        towers = {name: load_served(folder, saved.titles, saved.language_model) for name, folder in folders.items()}
        return cls(towers, weights, placing)

    def to(self, device: str) -> None:
        for tower in self.towers.values():
            tower.to(device)

    def scorer_on(self, device: str) -> ServedFused:
        self.to(device)
        return self


# Not of `type[ServedModel]`: one of them has no queries.
SERVED: dict[str, Any] = {
    one.kind: one for one in (ServedGraph, ServedSASRec, ServedTransitions, ServedLLM, ServedFused)
}
"""Kind -> what serves a run of it."""


def load_served(
    folder: Path, titles: list[str | None], language_model: str | os.PathLike[str] | None = None
) -> ServedModel:
    """The model of a run directory, or of what `Recommender.save` wrote, whichever of `SERVED` it is.

    `language_model` is where that of a fine-tuning run is now; None is where it was in training.

    Raises: As `hellm.artifact.read_embeddings` and the model of that kind; DataError, a kind that nothing serves.
    """
    stored = read_embeddings(folder)
    if stored.kind not in SERVED:
        raise DataError(f"{folder / EMBEDDINGS}: kind must be one of {', '.join(SERVED)}, got {stored.kind!r}")
    return SERVED[stored.kind].load(SavedModel(folder, stored, titles, language_model))
