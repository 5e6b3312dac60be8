"""The settings of `RecommenderLLM`, and what they ask of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from hellm.config import LLMConfig
from hellm.models.llm.context import CONTEXTS
from hellm.models.llm.head import HEADS

__all__ = ["SETTINGS", "checked_settings"]

SETTINGS = tuple(field.name for field in fields(LLMConfig))
_CHOICES = {"graph_context": CONTEXTS, "head": HEADS, "compat": (None, "official")}


def checked_settings(settings: Mapping[str, Any], widths: Mapping[str, int], model_type: str) -> LLMConfig:
    """Settings by name, those left out as in `LLMConfig`, which go with the item tables and the kind of language model.

    Raises: ValueError naming the setting, what it must be and what it was; TypeError, a setting that there is not.
    """
    for name, choices in _CHOICES.items():
        if name in settings and settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {settings[name]!r}")
    config = LLMConfig(**settings)
    if CONTEXTS[config.graph_context].needs_graph and "graph" not in widths:
        raise ValueError(
            f'graph_context {config.graph_context!r} needs item_embeddings["graph"], got {", ".join(widths)}'
        )
    if config.compat and model_type != "llama":
        raise ValueError(f'compat="official" is defined for Llama models, got {model_type!r}')
    return config
