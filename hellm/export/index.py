"""Approximate search over the keys of items, with what it finds and what it costs beside exact search.

I = items, D = embedding width, Q = queries, k = items asked for.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hellm._files import read_json, reading
from hellm.evaluate import top_items
from hellm.export.sample import ITEM_IDS
from hellm.export.vectors import check_has_queries, user_vectors
from hellm.recommend import Recommender

__all__ = ["ItemIndex", "build_index", "export_usearch", "index_report"]

TARGET = 0.99
"""Share of the 100 best items that must be found."""
_INDEX, _SETTINGS = "items.usearch", "index.json"
_KS = (10, 100)
# Dense graphs: with dot products, thinner ones lose items for good.
_CONNECTIVITY, _EXPANSION_ADD, _FIRST_EXPANSION = 64, 256, 128
# Queries that are timed, one at a time.
_TIMED = 200


class ItemIndex:
    """The keys with the largest dot products, through `usearch`.

    The graph that is walked goes by dot products themselves (Morozov and Babenko 2018, "Non-metric similarity graphs
    for maximum inner product search"), so a query is what the model gives, and other programs search with it as well.

    Args:
        index: `usearch.index.Index` over [I, D], metric "ip".
    """

    def __init__(self, index: Any) -> None:
        self.index = index

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> tuple[ItemIndex, list[str]]:
        """What `hellm export --to usearch` wrote, read from disk as it is needed, and the ids of the items by row.

        Only for folders of your own: usearch does not check an index that it is given.
        """
        folder = Path(folder)
        with reading(folder / _INDEX):
            index = _usearch().Index.restore(os.fspath(folder / _INDEX), view=True)
        with reading(folder / _SETTINGS):
            index.expansion_search = read_json(folder / _SETTINGS)["expansion_search"]
        with reading(folder / ITEM_IDS):
            ids = json.loads((folder / ITEM_IDS).read_text(encoding="utf-8"))
            if not isinstance(ids, list) or len(ids) != len(index):
                raise ValueError(f"must be a list of {len(index)} ids")
        return cls(index), ids

    def search(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Rows [Q, k] int64 of items, best first, and their scores [Q, k] float32, for queries [Q, D]."""
        matches = self.index.search(queries.float().numpy(), k, threads=1)
        rows = np.asarray(matches.keys).reshape(len(queries), -1).astype(np.int64)
        # The distance of usearch is 1 - <query, key>.
        scores = 1 - np.asarray(matches.distances, dtype=np.float32).reshape(rows.shape)
        return torch.from_numpy(rows), torch.from_numpy(scores)


def build_index(keys: Tensor, *, threads: int = 1) -> ItemIndex:
    """An index over keys [I, D]."""
    usearch = _usearch()
    index = usearch.Index(
        ndim=keys.shape[1],
        metric="ip",
        dtype="f32",
        connectivity=_CONNECTIVITY,
        expansion_add=_EXPANSION_ADD,
        expansion_search=_FIRST_EXPANSION,
    )
    index.add(np.arange(len(keys), dtype=np.uint64), keys.float().numpy(), threads=threads)
    return ItemIndex(index)


def index_report(index: ItemIndex, keys: Tensor, queries: Tensor) -> dict[str, Any]:
    """How much of the exact lists an index finds, and both times; sets how far the index is searched.

    The search widens until `TARGET` of the 100 best are found, or until it may visit every item.

    Args:
        index: Over `keys`.
        keys: [I, D].
        queries: [Q, D].
    Returns: "items", "queries", "recall" ("recall@10" -> share of the 10 best that are found, ...), "target",
        "reached", "expansion_search", "index_ms" and "exact_ms" (median of single queries for the largest k, in
        milliseconds), and "pays": whether the index reaches the target in less time.
    """
    ks = sorted({min(k, len(keys)) for k in _KS})
    exact = top_items(queries @ keys.T, ks[-1])
    expansion = _FIRST_EXPANSION
    while True:
        index.index.expansion_search = expansion
        found, _ = index.search(queries, ks[-1])
        recall = {f"recall@{k}": _recall(found[:, :k], exact[:, :k]) for k in ks}
        if recall[f"recall@{ks[-1]}"] >= TARGET or expansion >= len(keys):
            break
        expansion *= 2
    timed = queries[:_TIMED].split(1)
    index_ms = _milliseconds(lambda query: index.search(query, ks[-1]), timed)
    exact_ms = _milliseconds(lambda query: top_items(query @ keys.T, ks[-1]), timed)
    reached = recall[f"recall@{ks[-1]}"] >= TARGET
    return {
        "items": len(keys),
        "queries": len(queries),
        "recall": recall,
        "target": TARGET,
        "reached": reached,
        "expansion_search": expansion,
        "index_ms": index_ms,
        "exact_ms": exact_ms,
        "pays": bool(reached and index_ms < exact_ms),
    }


def export_usearch(recommender: Recommender, folder: Path, *, num_queries: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Write items.usearch, items.json (ids by row) and index.json (how far to search); see `ItemIndex.load`.

    Args:
        recommender: Of any run with queries and keys.
        folder: Where to write.
        num_queries: Of users of the run, at most, which recall and time are measured on.
        seed: Of their choice.
    Returns: "files", what `index_report` says, "build_seconds", "index_bytes" and "notes".
    Raises: ExportError, a model without queries. ValueError, a run in which nobody has a query. ImportError, without
        the extra "export".
    """
    _usearch()
    scored = check_has_queries(recommender, "--to usearch")
    users = np.random.default_rng(seed).permutation(recommender.num_users)
    known = user_vectors(recommender, users[: 4 * num_queries]).vectors[:num_queries]
    if not len(known):
        raise ValueError("the recall of an index is measured on users of the run, and none of them has a query")
    started = time.perf_counter()
    index = build_index(recommender.item, threads=torch.get_num_threads())
    seconds = time.perf_counter() - started
    report = index_report(index, recommender.item, known)
    index.index.save(os.fspath(folder / _INDEX))
    (folder / ITEM_IDS).write_text(json.dumps(recommender.item_ids.ids), encoding="utf-8")
    (folder / _SETTINGS).write_text(json.dumps({"expansion_search": report["expansion_search"]}), encoding="utf-8")
    notes = (
        []
        if report["reached"]
        else [f"the index finds less than {TARGET} of the 100 best items, however far it is searched"]
    )
    if report["exact_ms"] <= report["index_ms"]:
        notes.append(f"at {report['items']} items exact search is the better choice: it is right, and not slower")
    if scored:
        notes.append(
            f"the keys are without {', '.join(scored)}, which has scores and no vectors: score what is found again"
        )
    return {
        "files": [_INDEX, ITEM_IDS, _SETTINGS],
        **report,
        "build_seconds": seconds,
        "index_bytes": (folder / _INDEX).stat().st_size,
        "notes": notes,
    }


def _usearch() -> Any:
    try:
        import usearch.index
    except ImportError as error:
        raise ImportError('the index needs the package usearch: pip install "hellm[export]"') from error
    return usearch.index


def _recall(found: Tensor, exact: Tensor) -> float:
    return float((found.unsqueeze(2) == exact.unsqueeze(1)).any(2).sum() / exact.numel())


def _milliseconds(search: Callable[[Tensor], Any], queries: tuple[Tensor, ...]) -> float:
    seconds = []
    for query in queries:
        started = time.perf_counter()
        search(query)
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)
