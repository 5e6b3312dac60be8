"""What a benchmark case is: named work on some devices, several implementations of it, its limit and its targets.

`benchmarks.measure` takes the cases of the CPU: there `hellm` is what it chooses by itself, beside its peers and the
machine's limit. `benchmarks.gpu` takes those of the GPU: every usable backend at every precision, beside the same peers
at every precision of stock products; the limit is a case of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hellm.ops.backends import GPU_BACKENDS

DIM = 64
CPU, GPU = "cpu", "gpu"
LIMIT = "limit"
# In this order: what the time must suffice for comes first, what needs minutes of compiling last.
KINDS = ("hellm", "native", "cuda", "peer", "triton", "torch", "compile", "nvrtc", LIMIT)

Outputs = Sequence[Tensor]
Run = Callable[[], Outputs]


@dataclass(frozen=True)
class Setup:
    """Where a case is made, and how large.

    Attributes:
        device: of the inputs.
        gpu: entries as on a GPU, whichever the device (a CPU shows that they work); else as on a CPU.
        tiny: toy sizes.
        with_compile: peers on the CPU that take a minute to compile as well.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    gpu: bool = False
    tiny: bool = False
    with_compile: bool = False

    def small(self, size: int, most: int = 70) -> int:
        """That size, or `most` of it where sizes are toys."""
        return min(size, most) if self.tiny else size


@dataclass(frozen=True)
class Entry:
    """One timed implementation.

    Attributes:
        label: name in the tables, unique in its workload and the same for every size.
        run: does the work once and returns what it computed.
        kind: "hellm" as it chooses by itself, a backend of ours, "peer", "compile" for a peer that torch.compile makes,
            or `LIMIT` for what the machine can do at most.
        tolerance: largest error, as `Workload.verify` measures it; not used for a limit.
        note: what a reader of the table must know.
        work: amount done by one run; None is that of the workload. A limit needs its own.
    """

    label: str
    run: Run
    kind: str = "peer"
    tolerance: float = 1e-4
    note: str = ""
    work: float | None = None

    @property
    def hellm(self) -> bool:
        """Whether it runs a kernel of ours."""
        return self.kind in ("hellm", "native", *GPU_BACKENDS)

    @property
    def role(self) -> str:
        """One of "hellm", "peer" and `LIMIT`."""
        return "hellm" if self.hellm else LIMIT if self.kind == LIMIT else "peer"


class Limit(NamedTuple):
    """The most that a machine can do.

    Attributes:
        entries: (setup) -> entries beside the others, on a CPU: the limit itself, then what else is worth knowing.
        ceiling: the case and the entry that reach it on a GPU.
    """

    entries: Callable[[Setup], list[Entry]]
    ceiling: tuple[str, str]


@dataclass
class Workload:
    """A case with its inputs made; entries come in the order of their kinds.

    Attributes:
        entries: the implementations; on a CPU the first is hellm's, and all must agree with it.
        work: useful work of one run, in `unit`.
        unit: "FLOP", "byte" or "triple".
        parameters: sizes and settings, for the record.
        truth: () -> the result in float64, which all must agree with on a GPU; None where it would take too long.
        limit: what the machine can do at most.
        skipped: peers that cannot run here -> why.
        verify: (outputs, what is right) -> error; infinite where they are wrong altogether.
        repeats: (what, count): one run is one of `count` of them, e.g. ("epoch", 59).
        graph: whether entries are captured as CUDA graphs too.
    """

    entries: list[Entry]
    work: float
    unit: str = "FLOP"
    parameters: dict[str, object] = field(default_factory=dict)
    truth: Callable[[], Outputs] | None = None
    limit: Limit | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    verify: Callable[[Outputs, Outputs], float] = field(default_factory=lambda: worst_relative_error)
    repeats: tuple[str, int] | None = None
    graph: bool = True

    def __post_init__(self) -> None:
        self.entries.sort(key=lambda entry: KINDS.index(entry.kind))


@dataclass(frozen=True)
class Case:
    """Registry entry.

    Attributes:
        group: heading of its table.
        build: (setup, **settings) -> workload, without its limit; settings replace those of the case.
        devices: on which it makes sense, of `CPU` and `GPU`.
        rank: the lowest run first on a GPU, where the time may be up.
    """

    name: str
    group: str
    title: str
    build: Callable[..., Workload]
    devices: tuple[str, ...] = (CPU,)
    rank: int = 1

    def workload(self, setup: Setup) -> Workload:
        """Inputs and entries, the limits last among them where entries take turns."""
        workload = self.build(setup)
        if workload.limit is not None and not setup.gpu:
            workload.entries += workload.limit.entries(setup)
        return workload


class Target(NamedTuple):
    """What ours must reach in a case; on the GPU, on an H100.

    Ours is the entry with the label or of the kind `entry`, the fastest of all of ours without one. It must be at least
    `factor` times as fast as the fastest whose label holds `peer`, a limit among them, or reach that share of the first
    limit if `peer` is `LIMIT`; or take at most `milliseconds`; or each of ours takes at most the `megabytes` beyond its
    inputs, and gives the same bits again.
    """

    case: str
    entry: str = ""
    peer: str = ""
    factor: float = 0.0
    milliseconds: float = 0.0
    megabytes: float = 0.0
    device: str = GPU


class MemoryCase(NamedTuple):
    """The extra memory of one entry of a case on the CPU, with that many rows; `at_most` MiB are allowed."""

    title: str
    case: str
    entry: str
    num_rows: int
    at_most: float | None = None


CASES: dict[str, Case] = {}
TARGETS: list[Target] = []
MEMORY_CASES: dict[str, MemoryCase] = {}


def register(
    group: str,
    build: Callable[..., Workload],
    name: str,
    title: str = "",
    *,
    devices: tuple[str, ...] = (GPU,),
    rank: int = 1,
    **arguments,
) -> None:
    """Add the case whose workload is `build(setup, **arguments)`."""
    CASES[name] = Case(name, group, title, partial(build, **arguments), devices, rank)


def on_device(cases: dict[str, Case], device: str) -> dict[str, Case]:
    """Cases that make sense on `CPU` or `GPU`, in the order in which they run."""
    found = [case for case in cases.values() if device in case.devices]
    return {case.name: case for case in (sorted(found, key=lambda case: case.rank) if device == GPU else found)}


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
