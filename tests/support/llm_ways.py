"""The settings that change the way through a recommender of a language model."""

from __future__ import annotations

import pytest
import torch
from tiny_llm import flat

from hellm.config import OFFICIAL_LLM
from hellm.models import RecommenderLLM

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')

HISTORIES = [[3, 1, 4, 1, 5], [], [9, 2], [6], [5, 3, 5]]
OFFICIAL = {"compat": "official", **OFFICIAL_LLM}
# What changes the way through the model.
WAYS = {
    "causal": {},
    "causal, learned prefix": {"learned_prefix": True},
    "learned prefix, one softmax": {"learned_prefix": True, "prefix_gate": False},
    "none": {"graph_context": "none"},
    "prefix": {"graph_context": "prefix"},
    "both prefixes": {"graph_context": "prefix", "learned_prefix": True},
    "both prefixes, one softmax": {"graph_context": "prefix", "learned_prefix": True, "prefix_gate": False},
    "causal, titles": {"titles": True, "max_title_tokens": 3},
    "prefix, titles": {"graph_context": "prefix", "titles": True},
    "residual": {"sequence_residual": True},
    "trained head": {"head": "trained"},
    "official": OFFICIAL,
}
ways = pytest.mark.parametrize("settings", WAYS.values(), ids=WAYS)
families = pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3", "mistral"])


def scores(model: RecommenderLLM, histories: list[list[int]]) -> torch.Tensor:
    return model.embed(*flat(histories)) @ model.item_keys().T
