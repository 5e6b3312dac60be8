"""What stage 2 is told of the items, from finished stage-1 and SASRec runs and the features of the data set."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hellm.artifact import read_embeddings
from hellm.artifact.files import EMBEDDINGS, HISTORIES, IDS
from hellm.artifact.tables import read_histories, read_ids, side_of
from hellm.config import FinetuneConfig
from hellm.data import Dataset
from hellm.models import SASRec
from hellm.models.sequence import WhitenedContent

__all__ = ["ItemInputs", "load_item_inputs", "resolve_item_inputs"]

Path_ = str | os.PathLike[str]


class ItemInputs(NamedTuple):
    """What a language model is told of the items.

    Attributes:
        tables: name -> [num_items, d] float32, in the order of `FinetuneConfig.item_inputs`; features are whitened.
        content: name -> what whitened them, for those of features.
        sequence_model: the SASRec whose scores are the start, for `model.sequence_residual`; None otherwise.
    """

    tables: dict[str, Tensor]
    content: dict[str, WhitenedContent]
    sequence_model: SASRec | None

    @property
    def fingerprint(self) -> str:
        """Digest of every number in it."""
        digest = hashlib.sha256()
        weights = {} if self.sequence_model is None else self.sequence_model.state_dict()
        for name, tensor in [*self.tables.items(), *weights.items()]:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(np.ascontiguousarray(tensor.cpu().numpy()).data)
        return digest.hexdigest()[:16]


def resolve_item_inputs(config: FinetuneConfig, dataset: Dataset) -> FinetuneConfig:
    """`config` with its item inputs named: the graph and all features, or the sequence model where there are none.

    With compat, the published ones: graph and sequence model.
    """
    if config.item_inputs is not None:
        return config
    content = () if config.model.compat == "official" else tuple(sorted(dataset.item_features))
    return replace(config, item_inputs=("graph", *(content or ("sequence",))))


def load_item_inputs(
    config: FinetuneConfig, dataset: Dataset, *, graph: Path_ | None = None, sequence: Path_ | None = None
) -> ItemInputs:
    """The item tables that `config.item_inputs` names, from the runs and the features and attributes of the data set.

    Raises: FileNotFoundError, ValueError: a run that is missing, unfinished, or of other items or training events; a
        feature that the data set has not.
    """
    config = resolve_item_inputs(config, dataset)
    tables: dict[str, Tensor] = {}
    content: dict[str, WhitenedContent] = {}
    residual = config.model.sequence_residual
    model, there = None, dataset.item_content
    if "sequence" in config.named_inputs or residual:
        model = SASRec.load(_checked_run(sequence, "sequence", "hellm sasrec", dataset))
    for name in config.named_inputs:
        if name == "graph":
            tables[name] = _read_table(_checked_run(graph, "graph", "hellm pretrain", dataset), "item")
        elif name == "sequence" and model is not None:
            tables[name] = model.item_keys()
        elif name in there:
            features = torch.from_numpy(there[name].values)
            content[name] = WhitenedContent.of(features, config.content_components)
            tables[name] = content[name].table
        else:
            known = ", ".join(["graph", "sequence", *there])
            raise ValueError(f"item_inputs must be among {known} for data set {dataset.name!r}, got {name!r}")
    sources = {"graph": graph, "sequence": sequence}
    for name, table in tables.items():
        if not torch.isfinite(table).all():
            row = int((~torch.isfinite(table)).any(dim=1).nonzero()[0])
            source = sources.get(name)
            of = f"data set {dataset.name!r}" if source is None else f"run {Path(source)}"
            raise ValueError(
                f"input {name!r} must be finite, but its table in {of} holds NaN or infinity, first for item "
                f"{dataset.item_ids.ids[row]!r}"
            )
    return ItemInputs(tables, content, model if residual else None)


def _checked_run(path: Path_ | None, name: str, verb: str, dataset: Dataset) -> Path:
    """A finished run of the items and training events of `dataset`."""
    if path is None:
        raise ValueError(f"{name} must be the run directory of a finished `{verb}`, got none")
    run = Path(path)
    for file in (EMBEDDINGS, IDS, HISTORIES):
        if not (run / file).is_file():
            raise FileNotFoundError(f"{name} run {run} holds no {file}: it is no run of `{verb}`, or not finished")
    table = read_ids(run)
    ids, _ = side_of(table, "item")
    if ids != dataset.item_ids:
        raise ValueError(
            f"{name} run {run} must be of the {dataset.num_items} items of data set {dataset.name!r}, "
            f"got {len(ids)} items{' with other ids' if len(ids) == dataset.num_items else ''}"
        )
    events = read_histories(run, table)
    events = events.filter(events["split"] == 0)
    own = (events["user"].to_numpy(), events["item"].to_numpy())
    if not all(np.array_equal(*pair) for pair in zip(own, dataset.pairs("train"), strict=True)):
        raise ValueError(f"{name} run {run} was trained on other training events than those of {dataset.name!r}")
    return run


def _read_table(run: Path, name: str) -> Tensor:
    tensors = read_embeddings(run).tensors
    if name not in tensors:
        raise ValueError(f"{run / EMBEDDINGS} must hold a table {name!r}, got {', '.join(tensors)}")
    return tensors[name]
