"""Training that begins with the weights of an earlier run, of data that have grown since."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hellm.artifact.files import CHECKPOINT
from hellm.artifact.run_hash import run_hash
from hellm.artifact.tables import read_ids, side_of
from hellm.data import Dataset
from hellm.features.noted import NotedEncoder
from hellm.models import ItemContent
from hellm.training.checkpoint import load_checkpoint, saved_weights

__all__ = ["check_continues", "fingerprint_of", "same_columns", "started_from", "warm_start"]


def warm_start(
    model: nn.Module, run: str | os.PathLike[str], places: Mapping[str, str | None] | None = None
) -> list[str]:
    """Copy the best weights of a run into a model, as far as they fit; what is new keeps its fresh values.

    Tables with more rows than before get the old rows first: users and items keep their rows when data grow. Weights of
    another width stay fresh.

    Args:
        model: Of the same stage and settings, for the data that have grown.
        run: Folder of the earlier run.
        places: Beginning of the name of weights in the run -> what it is in the model, None of weights that mean
            something else there; others keep their names.
    Returns: Names of parameters that stay fresh as a whole.
    Raises: FileNotFoundError or ValueError, no readable checkpoint.
    """
    tensors, _ = load_checkpoint(Path(run) / CHECKPOINT / "best.safetensors")
    weights, fresh = _moved(saved_weights(tensors, model), places or {}), []
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            old = weights.get(name)
            if old is not None and _continues(old.shape, parameter.shape):
                parameter[: len(old)] = old.to(parameter)
            else:
                fresh.append(name)
    return fresh


def _moved(weights: Mapping[str, Tensor], places: Mapping[str, str | None]) -> dict[str, Tensor]:
    moved = {}
    for name, value in weights.items():
        before = next((one for one in places if name.startswith(one)), "")
        now = places.get(before, before)
        if now is not None:
            moved[now + name.removeprefix(before)] = value
    return moved


def _continues(old: torch.Size, new: torch.Size) -> bool:
    """Whether a tensor is the other, or a table with its rows and more of the same width."""
    return old == new or (len(old) == len(new) > 1 and old[1:] == new[1:] and old[0] <= new[0])


def same_columns(content: ItemContent, dataset: Dataset) -> set[str]:
    """Features and attributes whose columns mean in a data set what they mean to a run.

    Those are attributes of the same values, and features of the same encoder (or of none that is noted) and width.

    Args:
        content: Of the run.
        dataset: Other data.
    """
    same = {name for name, one in dataset.attribute_sets.items() if content.attributes.get(name) == one.values}
    for name in (content.features.keys() - content.attributes.keys()) & dataset.item_features.keys():
        before, now = (NotedEncoder.of(one, name) for one in (content.encoders, dataset.encoders))
        widths = {one.shape[1] for one in (content.features[name], dataset.item_features[name].values)}
        if before.gives_as(now) and len(widths) == 1:
            same.add(name)
    return same


def fingerprint_of(run: str | os.PathLike[str] | None) -> Callable[[Any], str] | None:
    """For `open_run`: a resumed run must begin with the run that it began with."""
    return None if run is None else lambda inputs: run_hash(run)


def started_from(run: str | os.PathLike[str] | None, fresh: list[str]) -> dict[str, Any]:
    """What result.json says of a warm start: "start" (the hash of the run, and what stayed fresh); {} of none."""
    return {} if run is None else {"start": {"run": run_hash(run), "fresh": fresh}}


def check_continues(run: str | os.PathLike[str], dataset: Dataset) -> None:
    """Raises: ValueError, users or items of a run that do not stand in the same rows of the data set."""
    ids = read_ids(run)
    for side, now in (("user", dataset.user_ids.ids), ("item", dataset.item_ids.ids)):
        before = side_of(ids, side)[0].ids
        if now[: len(before)] != before:
            raise ValueError(
                f"data set {dataset.name!r} must begin with the {len(before)} {side}s of {run}, each in its row, and "
                "does not; hellm append makes such data"
            )
