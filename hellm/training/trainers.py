"""The stages by the verbs that train them, where one of them is named: their settings, and what trains them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig, TransitionsConfig
from hellm.data import Dataset

__all__ = ["CONFIGS", "SEARCHED", "Trainer", "trainer"]

CONFIGS: Mapping[str, type] = MappingProxyType(
    {
        "pretrain": PretrainConfig,
        "sasrec": SASRecConfig,
        "transitions": TransitionsConfig,
        "finetune": FinetuneConfig,
    }
)
"""Verb -> its settings; a run has the verb as "stage" in result.json."""
SEARCHED: Mapping[str, type] = MappingProxyType({name: one for name, one in CONFIGS.items() if name != "transitions"})
"""Those whose settings are searched; transitions choose theirs by themselves."""


class Trainer(NamedTuple):
    """What trains a stage.

    Attributes:
        train: (config, data, out, resume=, overwrite=, on_epoch=, and runs of other stages) -> the result.
        resolve: (config, dataset) -> settings as they will run, and notes.
    """

    train: Callable[..., dict[str, Any]]
    resolve: Callable[[Any, Dataset], tuple[Any, list[str]]]


def trainer(stage: str) -> Trainer:
    """That of a stage among `CONFIGS`."""
    if stage == "pretrain":
        from hellm.training.pretrain import pretrain, resolve_config

        return Trainer(pretrain, resolve_config)
    if stage == "transitions":
        from hellm.training.transitions import fit_transitions, resolve_transitions_config

        return Trainer(fit_transitions, resolve_transitions_config)
    if stage == "sasrec":
        from hellm.training.sasrec import resolve_sasrec_config, train_sasrec

        return Trainer(train_sasrec, resolve_sasrec_config)
    from hellm.training.finetune import finetune, resolve_finetune_config

    return Trainer(finetune, resolve_finetune_config)
