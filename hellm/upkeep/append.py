"""A data set on disk with newer events and items, their texts and pictures encoded as those of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hellm._folders import check_target
from hellm.data import load_dataset, save_dataset
from hellm.data.append import append_events

__all__ = ["append", "data_of"]

PathLike_ = str | Path


def append(
    data: PathLike_,
    events: PathLike_,
    out: PathLike_,
    items: PathLike_ | None = None,
    *,
    split: str | None = None,
    overwrite: bool = False,
    cache: PathLike_ | None = None,
    **reading: Any,
) -> dict[str, Any]:
    """Write a new data set with newer events and items; users and items that were there keep their rows.

    Args:
        data: Data set of any form, or a run of all stages, whose data it is then.
        events, items, split: See `hellm.data.append.append_events`.
        out: Folder to make.
        overwrite: Replace a data set that is there.
        cache: Folder of encoded texts and pictures; None is the user's cache.
        **reading: Of `load_dataset`, for `events`.
    Returns: What `append_events` reports, "out", and the counts "num_events", "num_users", "num_items".
    Raises: As `append_events` and `save_dataset`.
    """
    from hellm.features import encode_like

    folder = data_of(data)
    check_target(out, kind="data", overwrite=overwrite, inputs=[folder, events, items])
    dataset = load_dataset(folder)
    grown, report = append_events(
        dataset,
        Path(events),
        items,
        split=split,
        encode=lambda new: encode_like(dataset, new, cache=cache),
        **reading,
    )
    save_dataset(grown, out, overwrite=overwrite)
    counts = {"num_events": grown.num_events, "num_users": grown.num_users, "num_items": grown.num_items}
    return {"out": str(out), **report, **counts}


def data_of(path: PathLike_) -> Path:
    """The data set of a run of all stages; any other path as it is."""
    inside = Path(path) / "data"
    return inside if (inside / "dataset.json").is_file() else Path(path)
