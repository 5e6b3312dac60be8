"""The hypergraphs that the method builds: of users from their items, of items from their neighbours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from hellm import _mapped
from hellm._arrays import as_count, as_tensor, check_flag
from hellm._folders import cache_folder
from hellm.hypergraph import Hypergraph, checked_index, checked_size
from hellm.neighbours import approximate_knn, key_of, knn_by_lines, read_found, write_found
from hellm.ops import backends, knn

if TYPE_CHECKING:
    from hellm.data import ItemFeatures

__all__ = ["Neighbours", "item_hypergraph", "nearest_items", "search_recall", "searching", "user_hypergraph"]

SEARCHES = ("exact", "approximate")
# Found even where fewer are asked for: another stage will ask for as many.
_USUAL_K = 10
# Products of all pairs that take no longer than to look for them on disk.
_CHEAP = 1 << 24
# Features -> (device, search) -> what was found of them; gone when the features are.
_FOUND: WeakKeyDictionary[ItemFeatures, dict[tuple[str, str], _Found]] = WeakKeyDictionary()
_SEARCH: ContextVar[str] = ContextVar("search", default="exact")
_CACHE: ContextVar[Path | None] = ContextVar("cache", default=None)


class Neighbours(NamedTuple):
    """Nearest items in one modality.

    Attributes:
        rows: [n, K] int64 item rows, best first; -1 where there are fewer.
        similarities: [n, K] float32 cosines; 0 where there are fewer.
    """

    rows: Tensor
    similarities: Tensor


class _Found(NamedTuple):
    """Of a search, what it found, and of an approximate one its recall."""

    neighbours: Neighbours
    recall: float | None


@contextlib.contextmanager
def searching(search: str | None = None, cache: str | PathLike[str] | None = None) -> Iterator[None]:
    """Until the block ends, how `nearest_items` searches where it is not told, and where it keeps what it finds.

    Args:
        search: "exact" or "approximate"; None leaves it as it is.
        cache: folder; None leaves it as it is, at first the user's cache.
    """
    searched, kept = _SEARCH.set(search or _SEARCH.get()), _CACHE.set(_CACHE.get() if cache is None else Path(cache))
    try:
        yield
    finally:
        _SEARCH.reset(searched)
        _CACHE.reset(kept)


def nearest_items(
    features: ItemFeatures, k: int, device: torch.device | str = "cpu", *, search: str | None = None
) -> Neighbours:
    """The k nearest items of each item by cosine, itself included, searched once for each device.

    What was found is kept as long as `features` are there, so that all stages of a pipeline have the same, and in the
    folder `neighbours` of the cache, where the next process finds it by the values of the features. Threads may search
    the same at the same time. Features of more than 256 MiB are searched by blocks, with the same result: beside it,
    the search takes memory for two blocks, however many items there are.

    Args:
        features: of all items.
        k: >= 1; cut to the number of items.
        device: where they are searched, and where the result is; an approximate search is on the CPU.
        search: "exact", or "approximate" (`hellm.neighbours.approximate_knn`), which needs the extra "export"; None is
            what `searching` says, else "exact".

    Raises: ValueError, another search; ImportError, without the package that an approximate one needs.
    """
    return Neighbours(*(part[:, :k] for part in _found(features, k, device, search).neighbours))


def search_recall(
    features: ItemFeatures, k: int, device: torch.device | str = "cpu", *, search: str | None = None
) -> float | None:
    """Of the exact neighbours, the share that `nearest_items` finds, measured on some items; None of an exact search.

    Args and Raises: as `nearest_items`.
    """
    return _found(features, k, device, search).recall


def _found(features: ItemFeatures, k: int, device: torch.device | str, search: str | None) -> _Found:
    """At least k neighbours of each item, from memory, from disk or by a search."""
    search = search or _SEARCH.get()
    if search not in SEARCHES:
        raise ValueError(f"search must be one of {', '.join(SEARCHES)}, got {search!r}")
    count, place = len(features.mask), (str(torch.device(device)), search)
    k = min(k, count)
    found = _FOUND.setdefault(features, {})
    if place not in found or found[place].neighbours.rows.shape[1] < k:
        found[place] = _kept_or_searched(features, min(max(k, _USUAL_K), count), torch.device(device), search)
    return found[place]


def _kept_or_searched(features: ItemFeatures, k: int, device: torch.device, search: str) -> _Found:
    values = np.asarray(features.values)
    count, dim = values.shape
    folder = None
    if device.type != "meta" and count * count * dim > _CHEAP:
        with contextlib.suppress(RuntimeError):
            folder = _CACHE.get() or cache_folder()
    if folder is None:
        return _searched(values, k, device, search)
    # Backends round otherwise.
    settings = {"k": k, "normalisation": "cosine", "search": search, "backend": backends.select(device).name}
    key = key_of(values, features.mask, **settings)
    kept = read_found(folder, key, (count, k))
    if kept is not None:
        rows, similarities, recall = kept
        return _Found(Neighbours(rows.to(device), similarities.to(device)), recall)
    found = _searched(values, k, device, search)
    write_found(folder, key, *found.neighbours, found.recall)
    return found


def _searched(values: np.ndarray, k: int, device: torch.device, search: str) -> _Found:
    if search == "approximate":
        rows, similarities, recall = approximate_knn(values, k)
        return _Found(Neighbours(rows.to(device), similarities.to(device)), recall)
    most_rows = _mapped.HELD_BYTES // (values.itemsize * max(values.shape[1], 1))
    if len(values) > most_rows and device.type != "meta":
        return _Found(Neighbours(*knn_by_lines(values, k, most_rows, device)), None)
    return _Found(Neighbours(*knn(torch.from_numpy(values).to(device), k)), None)


def user_hypergraph(user_item_index: Tensor, num_users: int, num_items: int) -> Hypergraph:
    """Users as vertices, items as hyperedges: each item joins the users who share an interest in it.

    Repeated pairs count once. With `hypergraph_conv(..., normalization="row", hyperedge_degree=False,
    self_loops=False)` this is the published user graph D^-1 (R R^T - diag), which is never built.

    Args:
        user_item_index: [2, num_events] int32 or int64: users, then items.
        num_users: rows of the user table.
        num_items: rows of the item table.

    Raises:
        ValueError: an index out of range (which, where, the limit), or a wrong shape or dtype.
    """
    user, item = checked_index(user_item_index, "user_item_index")
    for name, size in (("num_users", num_users), ("num_items", num_items)):
        as_count(name, size)
    num_users = checked_size("num_users", num_users, user, row=0, name="user_item_index")
    num_items = checked_size("num_items", num_items, item, row=1, name="user_item_index")
    pair = torch.unique(user.long() * num_items + item)
    # Users and items have fewer rows than int32 has numbers.
    index = torch.empty(2, len(pair), dtype=torch.int32, device=pair.device)
    torch.div(pair, max(num_items, 1), rounding_mode="floor", out=index[0])
    index[1] = pair.remainder_(max(num_items, 1))
    del pair
    return Hypergraph(index, num_vertices=num_users, num_hyperedges=num_items)


def item_hypergraph(
    features: Mapping[str, Tensor],
    k: int = 10,
    *,
    masks: Mapping[str, Tensor] | None = None,
    attributes: Mapping[str, Tensor] | None = None,
    num_items: int | None = None,
    neighbours: Mapping[str, Neighbours] | None = None,
    keep_nonpositive: bool = False,
) -> Hypergraph:
    """Items as vertices; for each modality one hyperedge per item: the items that list it among their k nearest.

    Neighbours are by cosine similarity, the item itself included. An item that lacks a modality (mask False, or an
    all-zero row) has no neighbours there and is nobody's neighbour.

    For each attribute there is one hyperedge per value: the items that have it, with the weight k / size. So without
    `hyperedge_degree` it counts in an item's degree as much as a hyperedge of k neighbours, however large it is.

    Args:
        features: modality -> [num_items, dim] floating point, finite.
        k: neighbours per item and modality, itself included; 1 <= k <= num_items.
        masks: modality -> [num_items] bool, False where the item lacks that modality.
        attributes: attribute -> [2, n] int32 or int64, items and values that they have; values are 0, 1, 2, ...
        num_items: needed where there are no features.
        neighbours: modality -> what `nearest_items` found of it, at least k of each item, so as not to search again.
        keep_nonpositive: False drops neighbours with similarity <= 0; True keeps them with the similarity as the value
            of the incidence, as the published code does.

    Returns:
        Hypergraph with num_items vertices and num_items hyperedges per modality, modalities in the given order; then
        the values of each attribute.

    Raises:
        ValueError: neither features nor attributes, an unknown mask, differing numbers of items, k out of range, a
            feature that is not finite (modality and first row), an item of an attribute out of range.
    """
    check_flag("keep_nonpositive", keep_nonpositive)
    named = {"features": features, "masks": masks, "attributes": attributes, "neighbours": neighbours}
    for name, given in named.items():
        if not isinstance(given, Mapping) and (given is not None or name == "features"):
            raise ValueError(f"{name} must map names to tensors, got {type(given).__name__}")
    attributes = attributes or {}
    blocks = _checked_features(features, masks, neighbours or {}) if features or not attributes else {}
    if blocks:
        num_items = next(iter(blocks.values())).shape[0]
    vertices, edges, values, weights = [], [], [], []
    for block, (modality, x) in enumerate(blocks.items()):
        try:
            found = (neighbours or {}).get(modality)
            neighbour, similarity = knn(x, k) if found is None else (part[:, :k] for part in found)
        except ValueError as error:
            raise ValueError(f"features[{modality!r}]: {error}") from None
        kept = neighbour >= 0 if keep_nonpositive else (neighbour >= 0) & (similarity > 0)
        item = torch.arange(len(x), device=x.device).unsqueeze(1).expand_as(neighbour)
        vertices.append(item[kept])
        edges.append(neighbour[kept] + block * len(x))
        values.append(torch.where(similarity > 0, 1.0, similarity)[kept])
        weights.append(torch.ones(len(x), device=x.device))
    for name, index in attributes.items():
        index_name = f"attributes[{name!r}]"
        item, column = checked_index(index, index_name)
        device = next((x.device for x in vertices), item.device)
        if item.device != device:
            raise ValueError(f"{index_name} must be on {device} like the first, got {item.device}")
        num_items = checked_size("num_items", num_items, item, row=0, name=index_name)
        size = torch.bincount(column, minlength=checked_size("values", None, column, row=1, name=index_name))
        vertices.append(item.long())
        edges.append(column.long() + sum(map(len, weights)))
        values.append(torch.ones(len(item), device=item.device))
        weights.append(k / size.clamp(min=1).float())
    value, weight = torch.cat(values), torch.cat(weights)
    return Hypergraph(
        torch.stack([torch.cat(vertices), torch.cat(edges)]),
        num_vertices=num_items,
        num_hyperedges=len(weight),
        hyperedge_weight=weight if attributes else None,
        incidence_weight=None if bool((value == 1).all()) else value,
    )


def _checked_features(
    features: Mapping[str, Tensor], masks: Mapping[str, Tensor] | None, neighbours: Mapping[str, Neighbours]
) -> dict[str, Tensor]:
    """Features; for those without `neighbours`, absent items have rows of zeros, which have no neighbours."""
    if not features:
        raise ValueError("features must hold at least one modality, got none")
    unknown = set(masks or {}) - set(features)
    if unknown:
        raise ValueError(f"masks names modalities that features lacks: {sorted(unknown)}")
    blocks: dict[str, Tensor] = {}
    for modality, value in features.items():
        x = as_tensor(f"features[{modality!r}]", value)
        if x.ndim != 2:
            raise ValueError(f"features[{modality!r}] must be [num_items, dim], got shape {tuple(x.shape)}")
        if x.is_meta:
            raise ValueError(f"features[{modality!r}] must hold numbers, got a tensor on the meta device")
        first = next(iter(blocks.values()), x)
        if x.shape[0] != first.shape[0]:
            raise ValueError(f"features[{modality!r}] must have {first.shape[0]} rows, got {x.shape[0]}")
        if x.device != first.device:
            raise ValueError(f"features[{modality!r}] must be on {first.device} like the first, got {x.device}")
        if masks is not None and modality in masks:
            mask = as_tensor(f"masks[{modality!r}]", masks[modality])
            if mask.shape != x.shape[:1] or mask.dtype != torch.bool:
                raise ValueError(
                    f"masks[{modality!r}] must be [{x.shape[0]}] bool, got {tuple(mask.shape)} {mask.dtype}"
                )
            if mask.device != x.device:
                raise ValueError(f"masks[{modality!r}] must be on {x.device} like the features, got {mask.device}")
            if modality not in neighbours:
                x = torch.where(mask.unsqueeze(1), x, torch.zeros((), dtype=x.dtype))
        blocks[modality] = x
    return blocks
