"""The settings of `RecommenderLLM` and which of them go together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hellm.config import OFFICIAL_LLM
from hellm.models.llm.head import HEADS

__all__ = ["SETTINGS", "check_settings"]

SETTINGS = (
    *("graph_context", "num_prefix_tokens", "learned_prefix", "prefix_gate", "prefix_dropout", "gram_rank"),
    *("head", "titles", "max_title_tokens", "max_length", "sequence_residual"),
    *("item_id_dim", "item_dropout"),
    *("lora_rank", "lora_alpha", "lora_dropout", "lora_targets", "compat"),
)
_CHOICES = {
    "graph_context": ("prefix", "causal", "none"),
    "head": tuple(HEADS),
    "compat": (None, "official"),
}


def check_settings(settings: Mapping[str, Any], widths: Mapping[str, int], model_type: str) -> None:
    """Check settings against each other, the widths of the item tables and the kind of language model.

    Raises: ValueError naming the setting, what it must be and what it was.
    """
    for name, choices in _CHOICES.items():
        if settings[name] not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {settings[name]!r}")
    for name in ("num_prefix_tokens", "max_title_tokens", "max_length"):
        if settings[name] < 1:
            raise ValueError(f"{name} must be >= 1, got {settings[name]}")
    if settings["item_id_dim"] < 0:
        raise ValueError(f"item_id_dim must be >= 0, got {settings['item_id_dim']}")
    for name in ("prefix_dropout", "item_dropout", "lora_dropout"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"{name} must be in [0, 1), got {settings[name]}")
    if settings["gram_rank"] is not None and settings["gram_rank"] < 1:
        raise ValueError(f"gram_rank must be None or >= 1, got {settings['gram_rank']}")
    if settings["lora_rank"] < 0:
        raise ValueError(f"lora_rank must be >= 0, got {settings['lora_rank']}")
    if settings["graph_context"] != "none" and "graph" not in widths:
        raise ValueError(
            f'graph_context {settings["graph_context"]!r} needs item_embeddings["graph"], got {", ".join(widths)}'
        )
    for name, value in OFFICIAL_LLM.items() if settings["compat"] else ():
        if settings[name] != value:
            raise ValueError(f'{name} must be {value!r} with compat="official", got {settings[name]!r}')
    if settings["compat"] and model_type != "llama":
        raise ValueError(f'compat="official" is defined for Llama models, got {model_type!r}')
