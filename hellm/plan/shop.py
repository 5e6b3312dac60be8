"""A made-up shop of any size, written a million events at a time: items bought by a power law, ids that are text."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["write_shop"]

# Zipf-Mandelbrot weights (rank + shift)^-exponent of the items, log-normal ones of the users.
_EXPONENT, _SHIFT, _SPREAD = 0.8, 10.0, 1.0
_PIECE = 1_000_000
_START, _SECONDS = 1_600_000_000, 100_000_000
# Numbers go to ids by a product modulo a prime, so that the ids of neighbours lie apart.
_PRIME, _FACTOR = 1_000_000_007, 387_420_489
_WORDS = ("red", "blue", "light", "warm", "small", "large", "wooden", "soft", "round", "plain", "classic", "folding")
_THINGS = ("lamp", "chair", "bowl", "scarf", "kettle", "rug", "shelf", "clock", "basket", "mirror", "blanket", "vase")


def write_shop(
    folder: Path, num_events: int, num_users: int, num_items: int, *, suffix: str = "parquet", seed: int = 0
) -> None:
    """Write `events.<suffix>` (parquet or csv) and `items.csv`, the same for the same arguments.

    Users come evenly, each for the first time; who comes again, and for what, is drawn. Times rise but for some jitter.
    """
    import polars as pl

    rng = np.random.default_rng(seed)
    item_share = np.cumsum((np.arange(num_items) + _SHIFT) ** -_EXPONENT)
    user_share = np.cumsum(rng.lognormal(sigma=_SPREAD, size=num_users).astype(np.float32), dtype=np.float64)
    folder.mkdir(parents=True)
    with _events_file(folder / f"events.{suffix}") as write:
        for start in range(0, num_events, _PIECE):
            rng = np.random.default_rng((seed, start))
            event = np.arange(start, min(start + _PIECE, num_events))
            user = np.searchsorted(user_share, rng.random(len(event)) * user_share[-1], side="right")
            newest = event * num_users // num_events
            user = np.where(newest > (event - 1) * num_users // num_events, newest, user)
            item = np.searchsorted(item_share, rng.random(len(event)) * item_share[-1], side="right")
            seconds = _START + event * _SECONDS // num_events + rng.integers(0, 600, len(event))
            write(pl.DataFrame({"user": _ids("c", user), "item": _ids("p", item), "timestamp": seconds}))
    item = np.arange(num_items)
    words, things = pl.Series(_WORDS), pl.Series(_THINGS)
    titles = [words.gather(item % 12), words.gather(item // 12 % 12), things.gather(item // 144 % 12)]
    table = pl.DataFrame({"item": _ids("p", item), "a": titles[0], "b": titles[1], "c": titles[2]})
    table.select("item", pl.concat_str("a", "b", "c", separator=" ").alias("title")).write_csv(folder / "items.csv")


@contextlib.contextmanager
def _events_file(path: Path) -> Iterator[Callable[[Any], None]]:
    """What writes pieces of a table to one file."""
    if path.suffix == ".csv":
        with path.open("wb") as file:
            yield lambda piece: piece.write_csv(file, include_header=file.tell() == 0)
        return
    import pyarrow.parquet

    writer = None

    def write(piece: Any) -> None:
        nonlocal writer
        table = piece.to_arrow()
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)

    yield write
    if writer is not None:
        writer.close()


def _ids(letter: str, numbers: np.ndarray) -> Any:
    import polars as pl

    mixed = pl.Series(numbers.astype(np.int64) * _FACTOR % _PRIME)
    return (letter + mixed.cast(pl.String).str.zfill(10)).alias(letter)
