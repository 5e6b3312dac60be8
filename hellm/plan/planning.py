"""From a sample to what each stage will take."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from hellm.config import RunConfig
from hellm.plan.model import (
    QUANTITIES,
    STAGES,
    Sizes,
    cost,
    fitted,
    neighbour_products,
    num_steps,
    sent_by_columns,
    sent_by_shards,
    sent_bytes,
)
from hellm.plan.sample import TOWERS, measured_stages, neighbour_rate

__all__ = ["Rates", "plan"]

# Events and items of the samples: all four pairs of them, so that what grows with which is told apart.
_EVENTS, _ITEMS = (20_000, 80_000), (500, 4_000)
# Reading is so fast, and a language model so slow, that they have samples of their own.
_OWN_EVENTS = {"data": (200_000, 1_000_000), "llm": (1_500, 4_500)}
# Times that the histories of all users are read, by a fusion and by batch scoring.
_PASSES = {"fusion": 3, "batch": 1}
# Columns that `hellm data build` makes of titles.
_TEXT_WIDTH = 512


def plan(
    sizes: Sizes,
    config: RunConfig | None = None,
    stages: Sequence[str] | None = None,
    *,
    processes: int = 1,
    **options: Any,
) -> dict[str, Any]:
    """What stages will take on data of these sizes on this machine, by the model of `hellm.plan.model`.

    Args:
        sizes: Of the data.
        config: Settings of the stages; None is `RunConfig()`.
        stages: Names out of `STAGES`; None is all of them, the language model if the settings have it.
        processes: That train together.
        options: Of `Rates.measured`.

    Returns: As `Rates.plan`.
    Raises: ValueError, sizes that are no data or an unknown stage; RuntimeError, a command that failed on a sample.
    """
    for name, value in sizes._asdict().items():
        if not value >= 1:
            raise ValueError(f"{name} must be >= 1, got {value:g}")
    if sizes.events < 3 * sizes.users:
        raise ValueError(
            f"events must be at least three for each user, to train on and to hold out, got {sizes.events:g} of "
            f"{sizes.users:g} users"
        )
    return Rates.measured(sizes.events / sizes.users, config or RunConfig(), stages, **options).plan(sizes, processes)


@dataclass(frozen=True)
class Rates:
    """What was measured of the stages on samples, and what follows from it for other sizes.

    Attributes:
        config: Settings of the stages.
        samples: Stage -> what it took on each, beside their "sizes".
        second_per_product: Of a search for neighbours, see `hellm.plan.sample.neighbour_rate`.
        width: Columns of the features of an item.
        searching: The stage that searches for neighbours; later ones find them in the cache.
        free_bytes: Of the disk that the samples were on.
        notes: What to know of them, in words.
    """

    config: RunConfig
    samples: dict[str, list[dict[str, Any]]]
    second_per_product: float
    width: int
    searching: str | None
    free_bytes: int
    notes: list[str]

    @classmethod
    def measured(
        cls,
        events_per_user: float,
        config: RunConfig,
        stages: Sequence[str] | None = None,
        *,
        widths: Mapping[str, int] | None = None,
        folder: Path | None = None,
        processor_time: bool = False,
        on_sample: Callable[[Sizes], None] | None = None,
    ) -> Rates:
        """From the commands of all stages on four made-up shops, or four of their own, which takes some minutes.

        Args:
            events_per_user: Of the shops.
            config: Settings of the stages.
            stages: Names; None is all. What they build on is sampled as well.
            widths: Features of the items, modality -> columns; None is what `hellm data build` makes of titles.
            folder: For the shops and runs, which are deleted again; None is a temporary one.
            processor_time: See `hellm.plan.sample.measured_stages`.
            on_sample: Called with the sizes of each sample before it is measured.
        """
        usual = [name for name in STAGES if name != "llm" or config.language_model]
        chosen = usual if stages is None else [name for name in STAGES if name in stages]
        unknown = sorted(set(stages or ()) - set(STAGES))
        if unknown:
            raise ValueError(f"stages must be among {', '.join(STAGES)}, got {unknown[0]!r}")
        width = sum(widths.values()) if widths is not None else _TEXT_WIDTH
        samples: dict[str, list[dict[str, Any]]] = {}
        started = time.perf_counter()
        top = Path(tempfile.mkdtemp(prefix="hellm-plan-", dir=folder))
        try:
            rate = neighbour_rate(width, processor_time=processor_time) if width else 0.0
            options = {"widths": widths, "processor_time": processor_time}
            parts: dict[tuple[str, ...], tuple[int, ...]] = {
                (name,): _OWN_EVENTS[name] for name in chosen if name in _OWN_EVENTS
            }
            parts[tuple(name for name in chosen if name not in _OWN_EVENTS)] = _EVENTS
            for part, counts in parts.items():
                for events, items in itertools.product(counts, _ITEMS) if part else ():
                    sizes = Sizes(events, max(1, round(events / events_per_user)), items)
                    if on_sample is not None:
                        on_sample(sizes)
                    took = measured_stages(sizes, _needed(part), config, top / "sample", **options)
                    shutil.rmtree(top / "sample")
                    for name in part:
                        samples.setdefault(name, []).append({"sizes": sizes._asdict(), **took[name]})
            free = shutil.disk_usage(top).free
        finally:
            shutil.rmtree(top, ignore_errors=True)

        notes = [f"{time.perf_counter() - started:.0f} s of samples"]
        for name in list(samples):
            failures = [one["failure"] for one in samples[name] if "failure" in one]
            if failures and (name != "llm" or len(samples) == 1):
                raise RuntimeError(failures[0])
            if failures:
                notes.append(f"llm left out: {failures[0]}")
                del samples[name]
        searching = next((name for name in _needed(chosen) if name not in ("data", "batch")), None)
        if searching in samples and config.pretrain.model.knn_search == "approximate":
            notes.append("neighbours are planned from the rate of products, as an approximate search is not sampled")
        return cls(config, samples, rate, width, searching, free, notes)

    def search(self, sizes: Sizes) -> float:
        """Seconds of the search for neighbours."""
        return self.second_per_product * neighbour_products(self.config, sizes, self.width)

    @cached_property
    def rates(self) -> dict[str, dict[str, dict[str, float]]]:
        """Stage -> quantity -> term -> rate, see `hellm.plan.model`."""
        found: dict[str, dict[str, dict[str, float]]] = {}
        for name, rows in self.samples.items():
            sizes, found[name] = [Sizes(**one["sizes"]) for one in rows], {}
            for quantity in QUANTITIES:
                terms, values = getattr(STAGES[name], quantity), [one.get(quantity, 0.0) for one in rows]
                if quantity == "rest" and name == self.searching:
                    # What is left is never nothing, however the rate of products was measured.
                    pairs = zip(values, sizes, strict=True)
                    values = [max(value / 5, value - self.search(one)) for value, one in pairs]
                if terms:
                    kept = [len(one["kept"]) if "kept" in one else 1 for one in rows]
                    counts = [size.terms(self.config, count) for size, count in zip(sizes, kept, strict=True)]
                    found[name][quantity] = fitted(terms, counts, values)
        return found

    def plan(self, sizes: Sizes, processes: int = 1, kept: int | None = None) -> dict[str, Any]:
        """What the stages come to.

        Args:
            sizes: Of the data.
            processes: That train together.
            kept: Towers of the sum that batch scoring reads; None is all that there are.

        Returns: "sizes"; "processes"; "stages": stage -> "seconds" (of one process, at most: for `max_epochs`),
            "seconds_per_epoch", "steps_per_epoch", "peak_bytes", "disk_bytes" and "sent_bytes" (by each process);
            "seconds", "peak_bytes" and "disk_bytes" of all; "memory_bytes" and "free_bytes" (disk) of this machine;
            "rates", "samples" and "notes" as here.
        """
        if kept is None:
            kept = sum(name in self.rates for name in TOWERS) if "fusion" in self.rates else 1
        counts = sizes.terms(self.config, kept)
        stages = {
            name: _planned(name, rates, self.config, sizes, counts, processes) for name, rates in self.rates.items()
        }
        if self.searching in stages:
            stages[self.searching]["seconds"] += self.search(sizes)
        if "llm" in stages:
            for name, passes in _PASSES.items():
                if name in stages:
                    stages[name]["seconds"] += passes * cost(self.rates["llm"]["validation"], counts)
        return {
            "sizes": sizes._asdict(),
            "processes": processes,
            "stages": {name: stages[name] for name in STAGES if name in stages},
            "seconds": sum(one["seconds"] for one in stages.values()),
            "peak_bytes": max(one["peak_bytes"] for one in stages.values()),
            "disk_bytes": sum(one["disk_bytes"] for one in stages.values()),
            "memory_bytes": _memory_bytes(),
            "free_bytes": self.free_bytes,
            "rates": self.rates,
            "samples": self.samples,
            "notes": [*self.notes, *_notes(self.config, processes, stages)],
        }


def _needed(stages: Sequence[str]) -> list[str]:
    """The stages and what they build on."""
    needed = {"data", *stages}
    if needed & {"llm"}:
        needed |= {"stage1", "sequence"}
    if needed & {"fusion", "batch"} and not needed & {"stage1", "transitions", "sequence", "llm"}:
        needed |= {"stage1", "transitions", "sequence", "fusion"}
    return [name for name in STAGES if name in needed]


def _planned(
    name: str,
    rates: Mapping[str, Mapping[str, float]],
    config: RunConfig,
    sizes: Sizes,
    counts: Mapping[str, float],
    processes: int,
) -> dict[str, Any]:
    stage = STAGES[name]
    found: dict[str, Any] = {
        "seconds": cost(rates["rest"], counts),
        "seconds_per_epoch": 0.0,
        "steps_per_epoch": 0,
        "peak_bytes": cost(rates["peak"], counts),
        "disk_bytes": cost(rates["disk"], counts),
        "sent_bytes": 0.0,
    }
    if stage.step:
        settings = getattr(config, stage.config or "")
        steps, epochs = num_steps(name, config, sizes), settings.max_epochs
        found["steps_per_epoch"], found["seconds_per_epoch"] = steps, steps * cost(rates["step"], counts)
        validations = -(-epochs // settings.validate_every)
        found["seconds"] += epochs * found["seconds_per_epoch"] + validations * cost(rates["validation"], counts)
        updates = epochs * -(-steps // getattr(settings, "accumulate", 1))
        if name == "stage1" and settings.sampled_neighbours is not None:
            found["sent_bytes"] = 0.0
        elif name == "stage1":
            found["sent_bytes"] = updates * sent_by_columns(config.pretrain, sizes.users, sizes.items, processes)
        elif name == "llm" and settings.sharded:
            weights, layers, trained = (cost(rates[one], counts) for one in ("weights", "layers", "parameters"))
            gathered = sent_by_shards(weights, layers, 0, processes)
            found["sent_bytes"] = epochs * steps * gathered + updates * sent_by_shards(0, 0, trained, processes)
        else:
            found["sent_bytes"] = sent_bytes(cost(rates["parameters"], counts), updates, processes)
    return found


def _notes(config: RunConfig, processes: int, stages: Collection[str]) -> list[str]:
    """What the model of cost does not say of these settings."""
    if "stage1" not in stages or config.pretrain.sampled_neighbours is None:
        return []
    notes = [
        "with sampled_neighbours a step of stage 1 stops growing once graphs are larger than what it draws, "
        "which those of the samples are not: its time is an upper limit"
    ]
    if processes > 1:
        notes.append("with sampled_neighbours stage 1 trains in one process")
    return notes


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
