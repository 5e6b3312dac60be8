"""A fine-tuning step looks at no value, so a GPU never waits: on the meta device there is none to look at."""

from __future__ import annotations

import pytest
import torch
from tiny_llm import flat, recommender

from hellm.models.histories import pad_histories

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"graph_context": "none"},
        {"graph_context": "prefix"},
        {"graph_context": "prefix", "prefix_gate": False},
        {"sequence_residual": True},
    ],
    ids=["causal", "none", "prefix", "one-softmax", "residual"],
)
def test_step_reads_no_value(kind, settings):
    model = recommender(kind, **settings).train().to("meta")
    items, mask = (x.to("meta") for x in pad_histories(*flat([[1, 2, 3, 4], [5, 6], [7]])))
    query = model.queries(items, mask) if "prefix" in settings.values() else model.all_queries(items, mask)
    (query.sum() + model.item_keys_trainable().sum()).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
