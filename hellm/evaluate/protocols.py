"""Evaluation protocols: what is ranked and masked, how NDCG is normalised and which users are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Ideal = Literal["all positives", "retrieved hits"]
Users = Literal["with target", "with target and history", "all"]
Weighting = Literal["uniform", "popularity"]

IDEALS = ("all positives", "retrieved hits")
USERS = ("with target", "with target and history", "all")
WEIGHTINGS = ("uniform", "popularity")

_HISTORY_ONLY = MappingProxyType({"valid": ("train",), "test": ("train", "valid")})
_TRAIN_ONLY = MappingProxyType({"valid": ("train",), "test": ("train",)})
_NOTHING = MappingProxyType({"valid": (), "test": ()})
_WITH_TARGET: Mapping[str, Users] = MappingProxyType({"valid": "with target", "test": "with target"})


@dataclass(frozen=True)
class Candidates:
    """Items drawn for each user, to be ranked with the user's targets in place of the whole catalogue.

    Neither targets nor masked items are drawn, and every model gets the same ones. What such a protocol measures is
    **biased**: a target has few rivals, so all numbers are larger than over the whole catalogue, and models can come in
    another order (Krichene and Rendle 2020, "On sampled metrics for item recommendation"). It is for comparison with
    papers that did so.

    Args:
        count: Items drawn, >= 1.
        weighting: "uniform", or "popularity": in proportion to the train events.
        seed: Of the draw.

    Raises:
        ValueError: A `count` below 1 or an unknown `weighting`.
    """

    count: int = 100
    weighting: Weighting = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"candidates.count must be >= 1, got {self.count}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"candidates.weighting must be one of 'uniform', 'popularity', got {self.weighting!r}")


@dataclass(frozen=True)
class Protocol:
    """One way to turn scores into published numbers.

    Args:
        name: Short name, reported beside every number.
        description: One sentence for reports.
        mask: Per evaluated split ("valid", "test"), the splits whose items a user can no longer be recommended.
        ideal: What DCG@k is divided by. "all positives": the best DCG@k that the user's targets allow, so
            min(k, number of targets) hits at the top. "retrieved hits": the hits among the largest k, moved to the top
            and cut at k; for several targets this is larger than or equal to the former.
        users: Per evaluated split, which users the mean runs over. "with target", "with target and history" (at least
            one masked-split event as well), or "all" (a user without a target counts as 0).
        unmask_targets: Whether a target that is also in the masked history stays a candidate. If not, it can never
            be hit, and still counts as a target.
        candidates: What is ranked beside the targets; None is the whole catalogue.

    Raises:
        ValueError: An unknown `ideal`, `users` rule or split name.
    """

    name: str
    description: str
    mask: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: _HISTORY_ONLY)
    ideal: Ideal = "all positives"
    users: Mapping[str, Users] = field(default_factory=lambda: _WITH_TARGET)
    unmask_targets: bool = False
    candidates: Candidates | None = None

    def __post_init__(self) -> None:
        if self.ideal not in IDEALS:
            raise ValueError(f"ideal must be one of {', '.join(map(repr, IDEALS))}, got {self.ideal!r}")
        for name, mapping in (("mask", self.mask), ("users", self.users)):
            if set(mapping) != {"valid", "test"}:
                raise ValueError(f"{name} must have the keys 'valid' and 'test', got {sorted(mapping)}")
        for rule in self.users.values():
            if rule not in USERS:
                raise ValueError(f"users must be one of {', '.join(map(repr, USERS))}, got {rule!r}")
        for split in (split for splits in self.mask.values() for split in splits):
            if split not in ("train", "valid", "test"):
                raise ValueError(f"mask splits must be 'train', 'valid' or 'test', got {split!r}")


def _sampled(weighting: Weighting, count: int | None = None) -> Protocol:
    drawn = "uniformly" if weighting == "uniform" else "by their train events"
    candidates = Candidates(weighting=weighting) if count is None else Candidates(count, weighting)
    return Protocol(
        f"sampled-{weighting}" + ("" if count is None else f":{count}"),
        "BIASED, for comparison with papers only (Krichene and Rendle 2020): the targets among "
        f"{candidates.count} items drawn {drawn} from those that the user has not had",
        unmask_targets=True,
        candidates=candidates,
    )


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            Protocol(
                "standard",
                "all items ranked; train masked at validation, train and validation at test; NDCG over all targets",
            ),
            Protocol(
                "official",
                "published MMHCL/HeLLM stage 1: only train masked, also at test; "
                "NDCG over the hits retrieved within the largest k",
                mask=_TRAIN_ONLY,
                ideal="retrieved hits",
            ),
            Protocol(
                "mmrec",
                "MMRec: only train masked, also at test; NDCG over all targets; users without train events left out",
                mask=_TRAIN_ONLY,
                users=MappingProxyType({"valid": "with target and history", "test": "with target and history"}),
            ),
            Protocol(
                "recbole",
                "RecBole general models, full ranking: train masked at validation, train and validation at test, "
                "except items that are targets again",
                unmask_targets=True,
            ),
            Protocol(
                "recbole-sequential",
                "RecBole sequential models, full ranking: nothing masked",
                mask=_NOTHING,
            ),
            Protocol(
                "s3rec",
                "S3-Rec full ranking: everything before the target masked (train; at test train and validation); "
                "its code scores masked items 0 instead of removing them",
            ),
            Protocol(
                "hellm-llm",
                "published HeLLM stage 2: nothing masked; validation averages over all users, test over users "
                "with a target",
                mask=_NOTHING,
                users=MappingProxyType({"valid": "all", "test": "with target"}),
            ),
            _sampled("uniform"),
            _sampled("popularity"),
        )
    }
)


def get_protocol(protocol: str | Protocol) -> Protocol:
    """The preset of that name; a `Protocol` is returned unchanged.

    A preset that draws candidates takes their number after a colon: "sampled-uniform:999".

    Raises:
        ValueError: No preset has that name, or the number is none.
    """
    if isinstance(protocol, Protocol):
        return protocol
    name, colon, count = protocol.partition(":")
    preset = PROTOCOLS.get(name)
    if preset is None or (colon and preset.candidates is None):
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
    if not colon or preset.candidates is None:
        return preset
    if not (count.isascii() and count.isdigit()):
        raise ValueError(f"protocol {name!r} must have a number of candidates after the colon, got {protocol!r}")
    return _sampled(preset.candidates.weighting, int(count))
