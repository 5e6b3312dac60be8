"""Every option of every training stage, as frozen dataclasses, with the presets of the published runs.

This is the only place where an option, its default and its meaning are written: the command line and the config files
are generated from these classes. Models, losses and operators take plain arguments and never see a config.
"""

from __future__ import annotations

from hellm.config._values import setting_type
from hellm.config.files import (
    config_from_dict,
    config_to_dict,
    load_config,
    load_saved_config,
    override_config,
    save_config,
)
from hellm.config.finetune import OFFICIAL_LLM, FinetuneConfig, LLMConfig
from hellm.config.fuse import FuseConfig
from hellm.config.presets import PRESETS, presets_of
from hellm.config.pretrain import ModelConfig, PretrainConfig
from hellm.config.run import RunConfig
from hellm.config.sasrec import CONTENT_TOWER, SASRecConfig
from hellm.config.transitions import TransitionsConfig

__all__ = [
    "CONTENT_TOWER",
    "OFFICIAL_LLM",
    "PRESETS",
    "FinetuneConfig",
    "FuseConfig",
    "LLMConfig",
    "ModelConfig",
    "PretrainConfig",
    "RunConfig",
    "SASRecConfig",
    "TransitionsConfig",
    "config_from_dict",
    "config_to_dict",
    "load_config",
    "load_saved_config",
    "override_config",
    "presets_of",
    "save_config",
    "setting_type",
]
