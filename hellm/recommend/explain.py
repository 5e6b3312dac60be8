"""Why an item is recommended: what ties it to the items of a history, hyperedge by hyperedge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hellm.models.graph.content import ItemContent
from hellm.recommend.results import ContentLink

__all__ = ["choose", "content_links", "cosines", "shared_users"]


def shared_users(users: np.ndarray, items: np.ndarray, row: int, rows: np.ndarray) -> np.ndarray:
    """[len(rows)] users with events on item `row` and on the other, from all events."""
    of_buyers = np.isin(users, users[items == row])
    pairs = np.unique(np.stack([users[of_buyers], items[of_buyers]]), axis=1)
    size = int(max(rows.max(), pairs[1].max(initial=0))) + 1
    return np.bincount(pairs[1], minlength=size)[rows]


def content_links(content: ItemContent | None, row: int, rows: np.ndarray) -> list[dict[str, ContentLink]] | None:
    """For each of `rows`, its link with item `row` in each modality that both have; None without content."""
    if content is None:
        return None
    others = torch.from_numpy(rows)
    links: list[dict[str, ContentLink]] = [{} for _ in rows]
    for modality in content.modalities:
        has = content.has(modality)
        if not has[row]:
            continue
        columns = (
            has[others],
            content.similarities(modality, row, others),
            content.shared_hyperedges(modality, row, others),
        )
        for link, (there, similarity, shared) in zip(
            links, zip(*(one.tolist() for one in columns), strict=True), strict=True
        ):
            if there:
                link[modality] = ContentLink(similarity, shared)
    return links


def choose(
    shared: np.ndarray, links: Sequence[dict[str, ContentLink]] | None, similarity: np.ndarray, k: int
) -> list[int]:
    """Places of the k strongest reasons: the best by shared users, the best of each modality, the second best, ...

    Equal ones go by `similarity`. In a modality, hyperedges in common count before the cosine.
    """
    place = np.arange(len(shared))
    rankings = [np.lexsort((place, -similarity, -shared)).tolist()]
    for modality in dict.fromkeys(name for link in links or () for name in link):
        linked = [(i, link[modality]) for i, link in enumerate(links or ()) if modality in link]
        linked = [(i, link) for i, link in linked if link.similarity > 0 or link.shared_hyperedges]
        linked.sort(key=lambda one: (-one[1].shared_hyperedges, -one[1].similarity, one[0]))
        rankings.append([i for i, _ in linked])
    chosen: dict[int, None] = {}
    for rank in range(len(shared)):
        for ranking in rankings:
            if rank < len(ranking) and len(chosen) < k:
                chosen.setdefault(ranking[rank])
    return list(chosen)


def cosines(table: Tensor, row: int, rows: np.ndarray) -> np.ndarray:
    """Cosines [len(rows)] of row `row` with others."""
    return F.cosine_similarity(table[row : row + 1], table[torch.from_numpy(rows)]).numpy()
