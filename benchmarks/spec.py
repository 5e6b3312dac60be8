"""What a benchmark case is: named work, several implementations of it, the machine's limit and the targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

Outputs = Sequence[Tensor]
LIMIT = "limit"


@dataclass(frozen=True)
class Entry:
    """One timed implementation.

    Attributes:
        label: name in the tables, unique in its workload and the same for every size.
        run: does the work once and returns what it computed.
        role: "hellm", "peer", or "limit" for what the machine can do at most (a matrix product, a copy).
        work: amount done by one run; None is that of the workload. A limit needs its own.
        tolerance: largest error against the first entry, as `Workload.verify` measures it; not used for a limit.
        note: what a reader of the table must know.
    """

    label: str
    run: Callable[[], Outputs]
    role: Literal["hellm", "peer", "limit"] = "peer"
    work: float | None = None
    tolerance: float = 1e-4
    note: str = ""


@dataclass(frozen=True)
class Target:
    """`entry` must be at least `at_least` times as fast as the fastest of `versus`, or reach that share of the limit.

    Attributes:
        versus: labels of peers (those that ran), or `LIMIT`.
    """

    entry: str
    versus: tuple[str, ...] | Literal["limit"]
    at_least: float


@dataclass
class Workload:
    """A case with its inputs made.

    Attributes:
        entries: the first is hellm's; every other that is no limit must agree with it before anything is timed.
        parameters: sizes and settings, for the record.
        work: useful work of one run, in `unit`.
        unit: "FLOP", "byte" or "triple".
        targets: what hellm promises.
        skipped: peers that cannot run here -> why.
        verify: (outputs, outputs of the first entry) -> error; infinite where they are wrong altogether.
        repeats: (what, count): one run is one of `count` of them, e.g. ("epoch", 59).
    """

    entries: list[Entry]
    parameters: dict[str, object]
    work: float
    unit: str
    targets: list[Target] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    verify: Callable[[Outputs, Outputs], float] = field(default_factory=lambda: worst_relative_error)
    repeats: tuple[str, int] | None = None

    def add_if_present(self, label: str, make: Callable[[], Callable[[], Outputs]], **settings) -> None:
        """Add a peer whose library may be missing, before the limits: `make` returns its run, or raises ImportError."""
        limits = sum(entry.role == LIMIT for entry in self.entries)
        try:
            self.entries.insert(len(self.entries) - limits, Entry(label, make(), **settings))
        except ImportError as error:
            self.skipped[label] = f"not installed: {error}"


@dataclass(frozen=True)
class Case:
    """Registry entry; `build(tiny=..., with_compile=...)` makes the inputs and sets up every implementation."""

    name: str
    group: str
    title: str
    build: Callable[..., Workload]


CASES: dict[str, Case] = {}


def case(name: str, group: str, title: str, **arguments) -> Callable:
    """Register `build(**arguments, tiny, with_compile)` as a case. Of stacked ones the lowest comes first."""

    def register(build: Callable[..., Workload]) -> Callable[..., Workload]:
        def bound(*, tiny: bool = False, with_compile: bool = False) -> Workload:
            return build(**arguments, tiny=tiny, with_compile=with_compile)

        CASES[name] = Case(name, group, title, bound)
        return build

    return register


def worst_relative_error(found: Outputs, expected: Outputs) -> float:
    """Largest difference of any tensor, relative to the largest magnitude in the expected one; NaN is infinite."""
    if len(found) != len(expected):
        return float("inf")
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        if one.shape != other.shape:
            return float("inf")
        one, other = one.detach().double(), other.detach().double()
        scale = float(other.abs().max()) if other.numel() else 0.0
        error = float((one - other).abs().max()) / (scale or 1.0) if other.numel() else 0.0
        if not error < float("inf"):
            return float("inf")
        worst = max(worst, error)
    return worst


def matrix_product_limit(tiny: bool) -> Entry:
    """4096 x 4096 x 4096 float32 through torch.mm, its output allocated beforehand."""
    size = 64 if tiny else 4096
    left, right, out = torch.rand(size, size), torch.rand(size, size), torch.empty(size, size)
    return Entry(
        "matrix product",
        lambda: (torch.mm(left, right, out=out),),
        role="limit",
        work=2.0 * size**3,
        note=f"torch.mm, float32, {size}^3",
    )


def copy_limit(tiny: bool) -> Entry:
    """A copy of 256 MiB, far beyond the caches."""
    source = torch.ones((2**16 if tiny else 2**28) // 4)
    target = torch.empty_like(source)
    return Entry(
        "memory copy",
        lambda: (target.copy_(source),),
        role="limit",
        work=2.0 * source.nbytes,
        note="torch copy_, bytes read + written",
    )
