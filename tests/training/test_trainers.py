"""A stage is one entry: verbs, searches, controls and refits go by it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest

from hellm.cli import VERBS
from hellm.config import load_config, presets_of
from hellm.training.trainers import SEARCHED, STAGES


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = 3


@pytest.mark.parametrize("verb", STAGES)
def test_what_a_stage_says_of_its_functions_is_so(verb):
    stage = STAGES[verb]
    assert VERBS[verb][0] == f"hellm.cli.{verb}"
    assert dataclasses.is_dataclass(stage.config)
    module = importlib.import_module(stage.module)
    trained = inspect.signature(getattr(module, stage.trainer)).parameters
    assert list(trained)[:3] == ["config", "data", "out"]
    assert {"resume", "overwrite", *stage.inputs} <= set(trained) and ("start" in trained) == stage.warm
    assert list(inspect.signature(getattr(module, stage.resolver)).parameters) == ["config", "dataset"]
    assert (verb in SEARCHED) == stage.searched


def test_settings_without_named_ones_have_their_defaults():
    assert presets_of(Settings) == {"default": Settings()}
    assert load_config(Settings, "default", ["size=4"]) == Settings(4)
    with pytest.raises(ValueError, match=r"unknown preset or config file 'large'.*default"):
        load_config(Settings, "large")
