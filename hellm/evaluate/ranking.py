"""Ranking metrics from one exact top-k per user.

Shape letters: B users in a batch, I items, K the largest k, U evaluated users.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol as TypingProtocol

import numpy as np
import torch

from hellm.data import Histories

from .candidates import draw_candidates
from .protocols import Candidates, Protocol, get_protocol
from .result import RankingResult
from .tables import AccuracyTable, ListTable, checked_counts, is_member

# float32 scores, their masked copy, and the tie pass (a copy, an int32 running count, three boolean masks)
_BYTES_PER_SCORE = 24


class Scorer(TypingProtocol):
    """Whatever can be ranked: `scores(users)`, [B] int64 -> [B, num_items], higher is better."""

    def scores(self, users: torch.Tensor) -> torch.Tensor: ...


def top_items(scores: torch.Tensor, k: int) -> torch.Tensor:
    """Exact top-k per row: higher score first, equal scores by lower index, also across the border at k.

    Only rows whose k-th score is tied with one outside are looked at as a whole; no row is sorted as a whole.

    Args:
        scores: [B, I] floating point without NaN. An item with score -inf is not a candidate.
        k: 1 <= k <= I.
    Returns: [B, k] int64 on the same device; -1 where a row has fewer than k candidates.
    Raises: ValueError, k out of range.
    """
    num_items = scores.shape[1]
    if not 1 <= k <= num_items:
        raise ValueError(f"k must be in [1, {num_items}], got {k}")
    values, items = scores.topk(min(k + 1, num_items), dim=1)
    if k < num_items:
        border = values[:, k - 1]
        tied = ((border == values[:, k]) & (border > -torch.inf)).nonzero().squeeze(1)
        values, items = values[:, :k], items[:, :k]
        if len(tied):
            items[tied] = _first_items_at_border(scores[tied], border[tied], k)
            values = scores.gather(1, items)
    items, order = items.sort(dim=1)
    # -0.0 + 0.0 is 0.0: the two must tie, also under a sort that goes by bit patterns.
    values, order = (values.gather(1, order) + 0.0).sort(dim=1, descending=True, stable=True)
    return items.gather(1, order).masked_fill_(values == -torch.inf, -1)


def _first_items_at_border(scores: torch.Tensor, border: torch.Tensor, k: int) -> torch.Tensor:
    """[R, k] items above the border score plus the lowest-numbered of those on it, in index order."""
    above = scores > border[:, None]
    on_border = scores == border[:, None]
    free = k - above.sum(dim=1, keepdim=True)
    chosen = above | (on_border & (on_border.cumsum(dim=1, dtype=torch.int32) <= free))
    return chosen.nonzero()[:, 1].view(-1, k)


def ranking_metrics(
    scorer: Scorer | Callable[[torch.Tensor], torch.Tensor],
    targets: tuple,
    *,
    seen: tuple | None = None,
    ks: Sequence[int] = (10, 20),
    protocol: str | Protocol = "standard",
    split: str = "test",
    mask_seen: bool = True,
    users: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    item_counts: np.ndarray | torch.Tensor | None = None,
    item_vectors: np.ndarray | torch.Tensor | None = None,
    batch_size: int = 1024,
    max_memory: int = 1 << 30,
) -> RankingResult:
    """All ranking metrics at every k, in one pass over the users.

    `hellm.evaluate.metrics` has the formula of each. Novelty needs `item_counts`, diversity `item_vectors`. Where the
    protocol draws candidates, the lists say more about the draw than about the model, so there are no novelty,
    diversity, coverage and Gini index.

    The order is deterministic: higher score first, equal scores by lower item index. An item with score -inf is never
    recommended, so a scorer can restrict the candidates.

    Args:
        scorer: Object with `.scores(users)`, or such a callable: [B] int64 CPU -> [B, num_items] floating point on any
            device. What it returns is never written to.
        targets: `hellm.data.Histories`, or such a pair (indptr [num_users + 1], items) of integers. A repeated target
            counts once.
        seen: The same, of items that are masked. None masks nothing.
        ks: Cut-offs, each in [1, num_items].
        protocol: Preset name or `Protocol`: NDCG's ideal, the users averaged and the candidates. Which splits belong
            into `seen` is the caller's choice here, and the protocol's in `evaluate_dataset`.
        split: "valid" or "test", where the protocol treats them differently.
        mask_seen: False leaves seen items as candidates.
        users: [n] user indices to evaluate, in this order; None is all users that the protocol counts.
        item_counts: [num_items] train events per item; enables novelty, and is what "popularity" draws candidates by.
        item_vectors: [num_items, D] content features, rows of zeros for items without; enables diversity.
        batch_size: Most users per call of `scorer`.
        max_memory: Bytes for a score block and its copies; reduces the batch where the catalogue is large.

    Raises:
        ValueError: A malformed pair or argument, a score block of the wrong shape, a NaN score (naming the first user),
            or no user to evaluate.

    Memory: O(batch * num_items) for scores, O(num_users * metrics) for the result.
    """
    (result,) = rank_by_protocols(
        scorer,
        targets,
        [(get_protocol(protocol), seen)],
        ks=ks,
        split=split,
        users=users,
        item_counts=item_counts,
        item_vectors=item_vectors,
        mask_seen=mask_seen,
        batch_size=batch_size,
        max_memory=max_memory,
    )
    return result


def rank_by_protocols(
    scorer: Scorer | Callable[[torch.Tensor], torch.Tensor],
    targets: tuple,
    protocols: Sequence[tuple[Protocol, tuple | None]],
    *,
    ks: Sequence[int] = (10, 20),
    split: str = "test",
    users: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    item_counts: np.ndarray | torch.Tensor | None = None,
    item_vectors: np.ndarray | torch.Tensor | None = None,
    item_groups: Mapping[str, np.ndarray] | None = None,
    mask_seen: bool = True,
    batch_size: int = 1024,
    max_memory: int = 1 << 30,
) -> list[RankingResult]:
    """`ranking_metrics` by several protocols at once: every user is scored once.

    Args:
        protocols: Protocols, and with each the items that it masks.
        item_groups: Label -> [num_items] bool. With them, `RankingResult.by_target` holds for each group the accuracy
            of the same lists with the targets of that group alone, over the users who have one; other targets count
            neither as hits nor as missed.
        **: Others as `ranking_metrics`.
    Returns: One result for each of `protocols`.
    """
    ks = _check_ks(ks)
    if split not in ("valid", "test"):
        raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if max_memory < 1:
        raise ValueError(f"max_memory must be >= 1 byte, got {max_memory}")
    targets = Histories.checked(targets, "targets")
    asked = _check_users(users, targets.num_users)
    score = scorer.scores if hasattr(scorer, "scores") else scorer
    with torch.no_grad():
        rankings = [_Ranking(protocol, seen, targets, asked, split, mask_seen) for protocol, seen in protocols]
        scored = np.flatnonzero(np.any([one.counted for one in rankings], axis=0))
        num_items = _num_items(scorer, score, asked[scored])
        if ks[-1] > num_items:
            raise ValueError(f"k must be <= num_items = {num_items}, got {ks[-1]}")
        Histories.checked(targets, "targets", num_items)
        for one in rankings:
            one.open(num_items, ks, item_counts, item_vectors, item_groups or {})
        step = max(1, min(batch_size, max_memory // (_BYTES_PER_SCORE * num_items)))
        for start in range(0, len(scored), step):
            places = scored[start : start + step]
            scores = _score_block(score, asked[places], num_items)
            for one in rankings:
                counted = one.counted[places]
                mine = scores if counted.all() else scores[torch.from_numpy(counted).to(scores.device)]
                if len(mine):
                    one.add(asked[places[counted]], mine)
    return [one.result() for one in rankings]


class _Ranking:
    """Top-k lists by one protocol, and their metrics.

    Attributes:
        counted: [n] bool, the users among `asked` that the protocol averages over.
    """

    def __init__(self, protocol: Protocol, seen, targets: Histories, asked: np.ndarray, split: str, mask: bool):
        self.protocol, self.targets, self.split = protocol, targets, split
        num_users = targets.num_users
        seen = None if seen is None else Histories.checked(seen, "seen")
        if seen is not None and seen.num_users != num_users:
            raise ValueError(f"seen must cover the {num_users} users of targets, got {seen.num_users}")
        self.mask = seen if mask else None
        rule = protocol.users[split]
        self.counted = np.ones(len(asked), dtype=bool)
        if rule != "all":
            self.counted &= targets.lengths[asked] > 0
        if rule == "with target and history" and seen is not None:
            self.counted &= seen.lengths[asked] > 0
        if not self.counted.any():
            raise ValueError(f"no user to evaluate: the protocol averages over users {rule!r} and there is none")
        self.users = asked[self.counted]

    def open(self, num_items: int, ks: tuple[int, ...], item_counts, item_vectors, item_groups) -> None:
        """Make the tables, as soon as the catalogue size is known."""
        if self.mask is not None:
            Histories.checked(self.mask, "seen", num_items)
        self.num_items, self.k = num_items, ks[-1]
        ideal, candidates = self.protocol.ideal, self.protocol.candidates
        self.accuracy = AccuracyTable(self.targets, num_items, ks, ideal)
        self.groups = {
            label: AccuracyTable(self.targets, num_items, ks, ideal, among) for label, among in item_groups.items()
        }
        self.lists = None if candidates is not None else ListTable(num_items, ks, item_counts, item_vectors)
        self.weights = None
        if candidates is not None and candidates.weighting == "popularity":
            if item_counts is None:
                raise ValueError(f"protocol {self.protocol.name!r} draws candidates by item_counts, got none")
            self.weights = checked_counts(item_counts, num_items)
        self.ks = ks

    def add(self, users: np.ndarray, scores: torch.Tensor) -> None:
        if self.mask is not None:
            scores = _mask(
                scores, users, self.mask, self.accuracy.target_keys if self.protocol.unmask_targets else None
            )
        if self.protocol.candidates is not None:
            scores = self._drawn(self.protocol.candidates, users, scores)
        top = top_items(scores, self.k).cpu().numpy()
        self.accuracy.add(users, top)
        for table in self.groups.values():
            with_target = table.num_targets[users] > 0
            table.add(users[with_target], top[with_target])
        if self.lists is not None:
            self.lists.add(top)

    def _drawn(self, candidates: Candidates, users: np.ndarray, scores: torch.Tensor) -> torch.Tensor:
        """A copy of scores [B, I] with -inf at everything but targets and drawn candidates."""
        excluded = [self.targets] if self.mask is None else [self.targets, self.mask]
        drawn = draw_candidates(candidates, users, self.num_items, excluded=excluded, item_counts=self.weights)
        row, place = np.nonzero(drawn >= 0)
        targets = self.targets.take(users)
        rows = np.concatenate([row, targets.owners])
        items = np.concatenate([drawn[row, place], targets.items])
        flat = torch.from_numpy(rows * self.num_items + items).to(scores.device)
        kept = torch.full_like(scores, -torch.inf, memory_format=torch.contiguous_format)
        kept.view(-1)[flat] = scores.reshape(-1)[flat]
        return kept

    def result(self) -> RankingResult:
        accuracy, lists = self.accuracy.per_user(), {} if self.lists is None else self.lists.per_user()
        per_user = {name: values for k in self.ks for name, values in (accuracy | lists).items() if _is_at(name, k)}
        metrics = _means(per_user) | ({} if self.lists is None else self.lists.overall())
        whole = RankingResult(metrics, per_user, self.users, self.num_items, self.protocol, self.split)
        by_target = {}
        for label, table in self.groups.items():
            with_target = table.num_targets[self.users] > 0
            if with_target.any():
                per_user = table.per_user()
                by_target[label] = replace(
                    whole, metrics=_means(per_user), per_user=per_user, users=self.users[with_target]
                )
        return replace(whole, by_target=by_target)


def _is_at(name: str, k: int) -> bool:
    return name.endswith(f"@{k}")


def _means(per_user: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in per_user.items()}


def _score_block(score, users: np.ndarray, num_items: int | None) -> torch.Tensor:
    block = torch.as_tensor(score(torch.from_numpy(users)))
    expected = f"[{len(users)}, {'num_items' if num_items is None else num_items}]"
    if block.ndim != 2 or len(block) != len(users) or (num_items is not None and block.shape[1] != num_items):
        raise ValueError(f"scorer must return scores of shape {expected}, got {list(block.shape)}")
    if not block.is_floating_point():
        block = block.to(torch.float64)
    broken = block.amax(dim=1).isnan().nonzero() if block.shape[1] else block[:0]
    if len(broken):
        raise ValueError(f"scores must not be NaN, got NaN for user {users[int(broken[0, 0])]}")
    return block


def _mask(scores: torch.Tensor, users: np.ndarray, seen: Histories, target_keys: np.ndarray | None) -> torch.Tensor:
    """A copy of scores [B, I] with -inf at each user's seen items (but not at `target_keys`)."""
    num_items = scores.shape[1]
    own = seen.take(users)
    rows, items = own.owners, own.items
    if target_keys is not None:
        keep = ~is_member(users[rows] * num_items + items, target_keys)
        rows, items = rows[keep], items[keep]
    if not len(rows):
        return scores
    masked = scores.clone(memory_format=torch.contiguous_format)
    masked.view(-1)[torch.from_numpy(rows * num_items + items).to(scores.device)] = -torch.inf
    return masked


def _num_items(scorer, score, users: np.ndarray) -> int:
    known = getattr(scorer, "num_items", None)
    return _score_block(score, users[:1], None).shape[1] if known is None else int(known)


def _check_users(users, num_users: int) -> np.ndarray:
    """[n] int64, all of them for None."""
    chosen = np.arange(num_users) if users is None else torch.as_tensor(users).cpu().numpy().astype(np.int64)
    if chosen.ndim != 1:
        raise ValueError(f"users must be 1-dimensional, got shape {chosen.shape}")
    outside = chosen[(chosen < 0) | (chosen >= num_users)]
    if len(outside):
        raise ValueError(f"users must be in [0, {num_users}), got {outside[0]}")
    return chosen


def _check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks must be integers >= 1, at least one, got {tuple(ks)}")
    return tuple(sorted({int(k) for k in ks}))
