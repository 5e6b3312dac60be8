"""The stages by the verbs that train them: their settings, what they build on, and what trains them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hellm.config import FinetuneConfig, PretrainConfig, SASRecConfig, TransitionsConfig

if TYPE_CHECKING:
    from hellm.data import Dataset

__all__ = ["SEARCHED", "STAGES", "Stage"]


@dataclass(frozen=True)
class Stage:
    """One stage; its functions are imported when they are called.

    Attributes:
        config: The class of its settings.
        module: Where `trainer` and `resolver` are.
        trainer: Name of (config, data, out, resume=, overwrite=, on_epoch=, and `inputs`) -> the result.
        resolver: Name of (config, dataset) -> settings as they will run, and notes.
        inputs: Runs of other stages that it builds on: name -> what that is.
        searched: Whether its settings are searched (`hellm search`), and not chosen by itself.
        warm: Whether its training takes `start`, a run of earlier data whose weights it goes on with.
    """

    config: type
    module: str
    trainer: str
    resolver: str
    inputs: Mapping[str, str] = field(default_factory=dict)
    searched: bool = True
    warm: bool = False

    def train(self, *args: Any, **options: Any) -> dict[str, Any]:
        """Its run directory; see `trainer`."""
        return self._function(self.trainer)(*args, **options)

    def resolve(self, config: Any, dataset: Dataset) -> tuple[Any, list[str]]:
        """Settings as they will run on this data, and a note for each that had to give way."""
        return self._function(self.resolver)(config, dataset)

    def _function(self, name: str) -> Callable[..., Any]:
        return getattr(importlib.import_module(self.module), name)


STAGES: Mapping[str, Stage] = MappingProxyType(
    {
        "pretrain": Stage(PretrainConfig, "hellm.training.pretrain", "pretrain", "resolve_config", warm=True),
        "sasrec": Stage(SASRecConfig, "hellm.training.sasrec", "train_sasrec", "resolve_sasrec_config", warm=True),
        "transitions": Stage(
            TransitionsConfig,
            "hellm.training.transitions",
            "fit_transitions",
            "resolve_transitions_config",
            searched=False,
        ),
        "finetune": Stage(
            FinetuneConfig,
            "hellm.training.finetune",
            "finetune",
            "resolve_finetune_config",
            inputs={
                "graph": "stage-1 run (hellm pretrain) of the same data",
                "sequence": "SASRec run (hellm sasrec) of the same data",
            },
        ),
    }
)
"""Verb -> stage; a run has the verb as "stage" in result.json."""
SEARCHED: Mapping[str, type] = MappingProxyType({verb: one.config for verb, one in STAGES.items() if one.searched})
"""Verb -> settings of the stages whose settings are searched."""
