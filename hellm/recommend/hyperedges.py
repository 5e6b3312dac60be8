"""The hyperedges that an item is in, and what a run would answer without one of them.

I = items, D = embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hellm import ops
from hellm.artifact.files import CONTENT
from hellm.data import IdMap
from hellm.models.graph import placed
from hellm.models.graph.content import ItemContent, Neighbours
from hellm.recommend.served import ServedFused, ServedGraph, ServedModel

__all__ = [
    "Hyperedge",
    "hyperedge_row",
    "hyperedges_of",
    "missing_hypergraph",
    "same_queries",
    "without_hyperedge",
]

# How far what is convolved here may be from what a run holds, which another device may have convolved.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Hyperedge:
    """What joins items, beside who is in it.

    Attributes:
        modality: What the hyperedge was found by: features of a modality, or an attribute.
        name: Id of the item that all members have among their nearest, or the value that all members have.
        title: Title of that item, if it has one.
        is_value: Whether it is of the value of an attribute.
        weight: w_e in the convolution: 1, or k / size of a value.
        members: Rows [n] int64, the nearest of the centre first (of a value, by row).
        similarities: [n] float32, cosines of the members with the centre; None of a value.
    """

    modality: str
    name: str
    title: str | None
    is_value: bool
    weight: float
    members: Tensor
    similarities: Tensor | None


def hyperedges_of(
    content: ItemContent, model: ServedModel, row: int, ids: IdMap, titles: list[str | None]
) -> list[Hyperedge]:
    """Hyperedges that hold item `row`, modality by modality, of a kNN modality the nearest centre first.

    Those of the item hypergraph of the model; of a model without one, what it would be built from.
    """
    graphs = _graphs(model)
    names, k = (graphs[0].modalities, graphs[0].branch and graphs[0].branch.k) if graphs else (None, None)
    found = []
    for modality in content.modalities if names is None else names:
        weights, features = content.hyperedge_weights(modality, k), content.features[modality]
        if modality in content.attributes:
            for column in (features[row] > 0).nonzero().squeeze(1).tolist():
                if weights[column] > 0:
                    name, members = content.attributes[modality][column], (features[:, column] > 0).nonzero().squeeze(1)
                    found.append(Hyperedge(modality, name, None, True, float(weights[column]), members, None))
            continue
        listed = content.neighbours[modality][:, :k]
        for centre in listed[row].tolist():
            # The hyperedge of an item that came after training is its own alone, and no part of the convolution.
            if not 0 <= centre < len(weights) or weights[centre] == 0:
                continue
            members = (listed == centre).any(dim=1).nonzero().squeeze(1)
            similarities = content.similarities(modality, centre, members)
            order = similarities.argsort(descending=True, stable=True)
            found.append(
                Hyperedge(
                    modality,
                    ids.ids[centre],
                    titles[centre],
                    False,
                    float(weights[centre]),
                    members[order],
                    similarities[order],
                )
            )
    return found


def hyperedge_row(content: ItemContent, ids: IdMap, modality: str, name: str) -> int:
    """Item row or column of a value.

    Raises: ValueError, a modality, item or value that is not known.
    """
    if modality not in content.features:
        raise ValueError(f"modality must be among {', '.join(content.modalities)}, got {modality!r}")
    if modality in content.attributes:
        if name not in content.attributes[modality]:
            raise ValueError(f"attribute {modality!r} has no value {name!r}")
        return content.attributes[modality].index(name)
    if name not in ids or (row := int(ids.indices([name])[0])) >= content.num_placing:
        raise ValueError(f"there is no hyperedge around item {name!r}: it was not there in training")
    return row


def missing_hypergraph(model: ServedModel, content: ItemContent | None, trained: Tensor) -> str | None:
    """Why the item hypergraph of a run cannot be convolved again, in a sentence; None where it can.

    A stage-1 run, or one that is a tower of a sum, needs content.safetensors (the hyperedges), and in
    embeddings.safetensors "item_hypergraph_input" (what the convolution starts from), "item_backbone" (what its result
    is added to) and "item_branch" (how). The items that come out must be those that the run holds.

    Args:
        model, content: Of the run.
        trained: [I] bool: items with training events.
    """
    graphs = _graphs(model)
    if not graphs:
        return f"This run has no item hypergraph: {_WORDS.get(model.kind, model.kind)}."
    if content is None:
        return f"The hyperedges of this run are not known: it holds no {CONTENT}."
    for graph in graphs:
        if graph.branch is None or not {"item_hypergraph_input", "item_backbone"} <= graph.tensors.keys():
            return (
                "An earlier version wrote this run, and did not keep what the item hypergraph starts from: train it "
                "again to ask what a hyperedge does."
            )
        names = content.modalities if graph.modalities is None else graph.modalities
        widths = {name: content.neighbours[name].shape[1] for name in names if name in content.neighbours}
        if len(widths) < len(names) or min(widths.values()) < min(graph.branch.k, content.num_placing):
            return (
                f"The hyperedges of this run are not known: its {CONTENT} must have {graph.branch.k} neighbours of "
                f"each item in {', '.join(names)}, got {widths}."
            )
        found = _convolved(graph, content, trained)
        for name in ("item_hypergraph", "item"):
            stored, again = (tensors[name][: content.num_placing] for tensors in (graph.tensors, found))
            error = float((again - stored).abs().max() / stored.abs().max().clamp(min=1e-30))
            if error > _TOLERANCE:
                return (
                    f"The hyperedges that this run holds do not give the items that it holds: the convolution is off "
                    f"by {error:.1%} of the largest value."
                )
    return None


_WORDS = {
    "graph": "stage 1 was trained without it",
    "sequence": "it is a sequence model",
    "transitions": "it counts what follows what",
    "llm": "it is a language model, which reads items from fixed tables",
    "fused": "none of its models has one",
}


def without_hyperedge(
    model: ServedModel, content: ItemContent, trained: Tensor, modality: str, hyperedge: int
) -> tuple[ServedModel, ItemContent]:
    """The model and the content as if one hyperedge had not been there, with the weights as they were trained.

        item = backbone + normalize(view),    view = (D^-1/2 H diag(w) H^T D^-1/2)^l ii

    with the incidence and the degrees of the hypergraph that is left; what is made of items without training events
    (`hellm.models.graph.placed`) follows. In a sum, this holds for all its hypergraph models; a language model keeps
    the tables of items that it was trained with. Rows that nothing reaches keep their bits. Items that came after
    training are convolved as when they came. An item without training events that loses its last tie to others still
    counts in histories as it did.

    Args:
        model: For which `missing_hypergraph` has nothing to say.
        content: Of the same run.
        trained: [I] bool: items with training events.
        modality: Of the hyperedge.
        hyperedge: Item row, or column of a value.
    """
    less = content.without_hyperedge(modality, hyperedge)
    return _replaced(model, content, less, trained), less


def same_queries(before: ServedModel, after: ServedModel) -> bool:
    """Whether histories are embedded as before by what `without_hyperedge` gave."""
    pairs = zip(_graphs(before), _graphs(after), strict=True)
    return all(old.tensors.get(name) is new.tensors.get(name) for old, new in pairs for name in _FOLD_IN)


_FOLD_IN = ("fold_in_source", "fold_in_view")


def _replaced(model: Any, content: ItemContent, less: ItemContent, trained: Tensor) -> Any:
    if isinstance(model, ServedFused):
        return model.with_towers(
            {name: _replaced(tower, content, less, trained) for name, tower in model.towers.items()}
        )
    if not _graphs(model):
        return model
    before, after = (_convolved(model, one, trained) for one in (content, less))
    tensors = {}
    for name, new in after.items():
        changed = (before[name] != new).any(dim=1, keepdim=True)
        if changed.any():
            tensors[name] = torch.where(changed, new, model.tensors[name])
    return model.with_tensors(tensors)


def _convolved(graph: ServedGraph, content: ItemContent, trained: Tensor) -> dict[str, Tensor]:
    """Those tensors [I, D] of a graph model that depend on the hypergraph, made of it again."""
    branch, tensors, count = graph.branch, graph.tensors, content.num_placing
    assert branch is not None  # see `missing_hypergraph`
    hypergraph = content.hypergraph(graph.modalities, branch.k)
    untrained = ~trained[:count] & branch.place_untrained

    def convolved(x: Tensor, num_layers: int) -> Tensor:
        return ops.hypergraph_conv(
            x, hypergraph, normalization="symmetric", hyperedge_degree=False, num_layers=num_layers
        )

    source = convolved(tensors["item_hypergraph_input"][:count].contiguous(), branch.num_layers - 1)
    view = convolved(source, 1)
    later = _later_views(content, source, graph.modalities, branch.k)
    view, backbone = torch.cat([view, later]), tensors["item_backbone"]
    item = torch.cat([placed(backbone[:count], untrained, hypergraph), backbone[count:]]) + F.normalize(view, dim=1)
    made = {
        "item_hypergraph": view,
        "item_hypergraph_source": torch.cat([source, torch.zeros_like(later)]),
        "item": F.normalize(item, dim=1) if branch.unit_items else item,
    }
    folded = {name: tensors[name] for name in _FOLD_IN if name in tensors}
    return made | {
        name: torch.cat([placed(table[:count], untrained, hypergraph), table[count:]]) for name, table in folded.items()
    }


def _later_views(content: ItemContent, source: Tensor, modalities: Sequence[str] | None, k: int) -> Tensor:
    """[n, D] views of the items that came after training, as when they came."""
    count = content.num_placing
    if content.num_items == count:
        return source[:0]
    # As `ItemContent.extended` lists them: a new item is its own nearest.
    nearest = {name: Neighbours(listed[count:, 1:k], torch.empty(0)) for name, listed in content.neighbours.items()}
    features = {name: table[count:] for name, table in content.features.items()}
    return content.convolve(source, nearest, features, modalities, k)


def _graphs(model: Any) -> list[ServedGraph]:
    """The models with an item hypergraph: one of stage 1, or those in a sum."""
    if isinstance(model, ServedFused):
        return [graph for tower in model.towers.values() for graph in _graphs(tower)]
    return [model] if isinstance(model, ServedGraph) and model.graph_view is not None else []
