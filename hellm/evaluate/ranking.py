"""Ranking metrics from one exact top-k per user.

Shape letters: B users in a batch, I items, K the largest k, U evaluated users.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol as TypingProtocol
from typing import TypeAlias

import numpy as np
import torch

from .protocols import Protocol, get_protocol
from .result import RankingResult

CSR: TypeAlias = "tuple[np.ndarray | torch.Tensor, np.ndarray | torch.Tensor]"

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
    targets: CSR,
    *,
    seen: CSR | None = None,
    ks: Sequence[int] = (10, 20),
    protocol: str | Protocol = "standard",
    split: str = "test",
    mask_seen: bool = True,
    users: np.ndarray | torch.Tensor | Sequence[int] | None = None,
    item_counts: np.ndarray | torch.Tensor | None = None,
    batch_size: int = 1024,
    max_memory: int = 1 << 30,
) -> RankingResult:
    """All ranking metrics at every k, in one pass over the users.

    For a user with P targets, hit_i = 1 if the item at rank i is a target, else 0:

        recall@k    sum_{i<=k} hit_i / P              precision@k  sum_{i<=k} hit_i / k
        hit_rate@k  1 if any hit_i, i <= k            mrr@k        1 / (rank of the first hit), 0 if beyond k
        map@k       sum_{i<=k} hit_i precision@i / min(P, k)
        ndcg@k      sum_{i<=k} hit_i / log2(i + 1) over its ideal (see `Protocol.ideal`)
        novelty@k   mean over the k items of -log2(count_i / sum of counts), unseen items counted once; bits
                    (Zhou et al. 2010, self-information); only with `item_counts`

    and over all users coverage@k, the share of the items that anybody gets, and gini@k, the Gini index of how often
    the items are recommended (0: all equally often, towards 1: one item only).

    The order is deterministic: higher score first, equal scores by lower item index. An item with score -inf is never
    recommended, so a scorer can restrict the candidates.

    Args:
        scorer: Object with `.scores(users)`, or such a callable: [B] int64 CPU -> [B, num_items] floating point on any
            device. What it returns is never written to.
        targets: CSR `(indptr [num_users + 1], items)`, integers. A repeated target counts once.
        seen: CSR over the same users: items that are masked. None masks nothing.
        ks: Cut-offs, each in [1, num_items].
        protocol: Preset name or `Protocol`: NDCG's ideal and the users averaged. Which splits belong into `seen` is
            the caller's choice here, and the protocol's in `evaluate_dataset`.
        split: "valid" or "test", where the protocol treats them differently.
        mask_seen: False leaves seen items as candidates.
        users: [n] user indices to evaluate, in this order; None is all users that the protocol counts.
        item_counts: [num_items] train events per item; enables novelty.
        batch_size: Most users per call of `scorer`.
        max_memory: Bytes for a score block and its copies; reduces the batch where the catalogue is large.

    Raises:
        ValueError: A malformed CSR or argument, a score block of the wrong shape, a NaN score (naming the first user),
            or no user to evaluate.

    Memory: O(batch * num_items) for scores, O(num_users * metrics) for the result.
    """
    protocol = get_protocol(protocol)
    ks = _check_ks(ks)
    if split not in ("valid", "test"):
        raise ValueError(f"split must be 'valid' or 'test', got {split!r}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be >= 1, got {batch_size}")
    if max_memory < 1:
        raise ValueError(f"max_memory must be >= 1 byte, got {max_memory}")
    targets = _as_csr(targets, "targets")
    num_users = len(targets[0]) - 1
    seen = None if seen is None else _as_csr(seen, "seen")
    if seen is not None and len(seen[0]) - 1 != num_users:
        raise ValueError(f"seen must cover the {num_users} users of targets, got {len(seen[0]) - 1}")
    chosen = _choose_users(targets, seen, protocol.users[split], users)
    score = scorer.scores if hasattr(scorer, "scores") else scorer
    with torch.no_grad():
        num_items = _num_items(scorer, score, chosen)
        if ks[-1] > num_items:
            raise ValueError(f"k must be <= num_items = {num_items}, got {ks[-1]}")
        _check_items(targets, num_items, "targets")
        mask = seen if mask_seen and seen is not None else None
        if mask is not None:
            _check_items(mask, num_items, "seen")
        table = _MetricTable(targets, num_items, ks, protocol, item_counts)
        step = max(1, min(batch_size, max_memory // (_BYTES_PER_SCORE * num_items)))
        for batch in (chosen[start : start + step] for start in range(0, len(chosen), step)):
            scores = _score_block(score, batch, num_items)
            if mask is not None:
                scores = _mask(scores, batch, mask, table.target_keys if protocol.unmask_targets else None)
            table.add(batch, top_items(scores, ks[-1]).cpu().numpy())
    per_user, overall = table.finish()
    metrics = {name: float(values.mean()) for name, values in per_user.items()} | overall
    return RankingResult(metrics, per_user, chosen, num_items, protocol, split)


class _MetricTable:
    """Collects per-user metrics batch by batch."""

    def __init__(self, targets, num_items: int, ks: tuple[int, ...], protocol: Protocol, item_counts) -> None:
        indptr, items = targets
        owner = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        # One sorted key per distinct (user, target): membership of any top item is one binary search.
        self.target_keys = np.unique(owner * num_items + items)
        self.num_targets = np.bincount(self.target_keys // num_items, minlength=len(indptr) - 1)
        self.num_items, self.ks, self.ideal = num_items, ks, protocol.ideal
        self.information = None if item_counts is None else _self_information(item_counts, num_items)
        self.recommended = np.zeros((len(ks), num_items), dtype=np.int64)
        self.parts: list[dict[str, np.ndarray]] = []

    def add(self, users: np.ndarray, top: np.ndarray) -> None:
        """users: [B]; top: [B, K] item indices, -1 = none."""
        hits = (top >= 0) & _is_member(users[:, None] * self.num_items + top, self.target_keys)
        positives = self.num_targets[users]
        ranks = np.arange(1, top.shape[1] + 1)
        count = hits.cumsum(axis=1)
        dcg = (hits / np.log2(ranks + 1)).cumsum(axis=1)
        # DCG of n hits at the top; n = 0 divides 0 by 1.
        best_dcg = np.concatenate([[1.0], (1 / np.log2(ranks + 1)).cumsum()])
        sum_precision = (hits * count / ranks).cumsum(axis=1)
        first_rank = np.where(count[:, -1] > 0, hits.argmax(axis=1) + 1, np.inf)
        part = {}
        for row, k in enumerate(self.ks):
            best = np.minimum(positives if self.ideal == "all positives" else count[:, -1], k)
            part[f"recall@{k}"] = count[:, k - 1] / np.maximum(positives, 1)
            part[f"ndcg@{k}"] = dcg[:, k - 1] / best_dcg[best]
            part[f"precision@{k}"] = count[:, k - 1] / k
            part[f"hit_rate@{k}"] = (count[:, k - 1] > 0).astype(np.float64)
            part[f"mrr@{k}"] = np.where(first_rank <= k, 1 / first_rank, 0.0)
            part[f"map@{k}"] = sum_precision[:, k - 1] / np.clip(positives, 1, k)
            if self.information is not None:
                part[f"novelty@{k}"] = self._novelty(top[:, :k])
            self.recommended[row] += np.bincount(top[:, :k][top[:, :k] >= 0], minlength=self.num_items)
        self.parts.append(part)

    def _novelty(self, top: np.ndarray) -> np.ndarray:
        valid = top >= 0
        bits = np.where(valid, self.information[np.maximum(top, 0)], 0.0)
        return bits.sum(axis=1) / np.maximum(valid.sum(axis=1), 1)

    def finish(self) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """Per-user arrays [U], and the metrics that are not a mean over users."""
        per_user = {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
        overall = {}
        for k, counts in zip(self.ks, self.recommended, strict=True):
            overall[f"coverage@{k}"] = float((counts > 0).mean())
            overall[f"gini@{k}"] = _gini(counts)
        return per_user, overall


def _gini(counts: np.ndarray) -> float:
    """Gini index of non-negative counts [n]; 0 if all are 0."""
    n, total = len(counts), counts.sum()
    weights = 2 * np.arange(1, n + 1) - n - 1
    return float((weights * np.sort(counts)).sum() / (n * total)) if total else 0.0


def _self_information(item_counts, num_items: int) -> np.ndarray:
    counts = _to_numpy(item_counts).astype(np.float64)
    if counts.shape != (num_items,):
        raise ValueError(f"item_counts must have shape ({num_items},), got {counts.shape}")
    if not (np.isfinite(counts).all() and (counts >= 0).all() and counts.sum() > 0):
        raise ValueError("item_counts must be finite, >= 0 and not all 0")
    return -np.log2(np.maximum(counts, 1) / counts.sum())


def _score_block(score, users: np.ndarray, num_items: int | None) -> torch.Tensor:
    block = torch.as_tensor(score(torch.from_numpy(users)))
    expected = f"[{len(users)}, {'num_items' if num_items is None else num_items}]"
    if block.ndim != 2 or len(block) != len(users) or (num_items is not None and block.shape[1] != num_items):
        raise ValueError(f"scorer must return scores of shape {expected}, got {list(block.shape)}")
    if not block.is_floating_point():
        block = block.to(torch.float64)
    broken = block.amax(dim=1).isnan().nonzero() if block.shape[1] else []
    if len(broken):
        raise ValueError(f"scores must not be NaN, got NaN for user {users[int(broken[0, 0])]}")
    return block


def _mask(scores: torch.Tensor, users: np.ndarray, seen, target_keys: np.ndarray | None) -> torch.Tensor:
    """A copy of scores [B, I] with -inf at each user's seen items (but not at `target_keys`)."""
    num_items = scores.shape[1]
    rows, items = _rows_of(seen, users)
    if target_keys is not None:
        keep = ~_is_member(users[rows] * num_items + items, target_keys)
        rows, items = rows[keep], items[keep]
    if not len(rows):
        return scores
    masked = scores.clone(memory_format=torch.contiguous_format)
    masked.view(-1)[torch.from_numpy(rows * num_items + items).to(scores.device)] = -torch.inf
    return masked


def _rows_of(csr, users: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row in `users`, item) of every stored item of these users, without a loop over them."""
    indptr, items = csr
    lengths = indptr[users + 1] - indptr[users]
    rows = np.repeat(np.arange(len(users)), lengths)
    offset = np.arange(len(rows)) - np.repeat(lengths.cumsum() - lengths, lengths)
    return rows, items[indptr[users][rows] + offset]


def _is_member(keys: np.ndarray, sorted_keys: np.ndarray) -> np.ndarray:
    if not len(sorted_keys):
        return np.zeros(keys.shape, dtype=bool)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return sorted_keys[place] == keys


def _num_items(scorer, score, users: np.ndarray) -> int:
    known = getattr(scorer, "num_items", None)
    return _score_block(score, users[:1], None).shape[1] if known is None else int(known)


def _choose_users(targets, seen, rule: str, users) -> np.ndarray:
    num_users = len(targets[0]) - 1
    chosen = np.arange(num_users) if users is None else _to_numpy(users).astype(np.int64)
    if chosen.ndim != 1:
        raise ValueError(f"users must be 1-dimensional, got shape {chosen.shape}")
    outside = chosen[(chosen < 0) | (chosen >= num_users)]
    if len(outside):
        raise ValueError(f"users must be in [0, {num_users}), got {outside[0]}")
    if rule != "all":
        chosen = chosen[np.diff(targets[0])[chosen] > 0]
    if rule == "with target and history" and seen is not None:
        chosen = chosen[np.diff(seen[0])[chosen] > 0]
    if not len(chosen):
        raise ValueError(f"no user to evaluate: the protocol averages over users {rule!r} and there is none")
    return chosen


def _check_ks(ks: Sequence[int]) -> tuple[int, ...]:
    if not len(ks) or any(int(k) != k or k < 1 for k in ks):
        raise ValueError(f"ks must be integers >= 1, at least one, got {tuple(ks)}")
    return tuple(sorted({int(k) for k in ks}))


def _as_csr(csr: CSR, name: str) -> tuple[np.ndarray, np.ndarray]:
    indptr, items = (_to_numpy(part).astype(np.int64, copy=False) for part in csr)
    if indptr.ndim != 1 or items.ndim != 1 or not len(indptr):
        raise ValueError(f"{name} must be (indptr [num_users + 1], items [n]), got {indptr.shape}, {items.shape}")
    if indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] != len(items):
        raise ValueError(f"{name} indptr must rise from 0 to len(items) = {len(items)}, got {indptr[0]}..{indptr[-1]}")
    return indptr, items


def _check_items(csr, num_items: int, name: str) -> None:
    items = csr[1]
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        wrong = items[(items < 0) | (items >= num_items)][0]
        raise ValueError(f"{name} items must be in [0, {num_items}), got {wrong}")


def _to_numpy(values) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)
