"""Settings of the recommender, and what is refused."""

from __future__ import annotations

import dataclasses
import typing

import pytest
import torch
from support.llm_ways import OFFICIAL, scores
from tiny_llm import NUM_ITEMS, SIZES, Bigram, flat, recommender, tiny_tables

from hellm.config import LLMConfig
from hellm.models.histories import pad_histories
from hellm.models.llm.context import CONTEXTS
from hellm.models.llm.head import HEADS

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')


# ---- settings and errors


def test_settings_are_those_of_the_config():
    fields = {field.name: field.default for field in dataclasses.fields(LLMConfig)}
    types = typing.get_type_hints(LLMConfig)
    assert typing.get_args(types["head"]) == tuple(HEADS)
    assert typing.get_args(types["graph_context"]) == tuple(CONTEXTS)
    model = recommender(disturb=False)
    assert model.settings == fields | {"lora_targets": list(fields["lora_targets"])}
    assert LLMConfig(**OFFICIAL).compat == "official"
    assert recommender(**dataclasses.asdict(LLMConfig(**OFFICIAL))).settings["head"] == "frozen"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graph_context": "both"}, "graph_context must be one of 'prefix', 'causal', 'none', got 'both'"),
        ({"head": "other"}, "head must be one of 'tied', 'trained', 'frozen', got 'other'"),
        ({"compat": "paper"}, "compat must be one of None, 'official', got 'paper'"),
        ({"compat": "official"}, "graph_context must be 'prefix' with compat=\"official\", got 'causal'"),
        ({"num_prefix_tokens": 0}, "num_prefix_tokens must be >= 1, got 0"),
        ({"max_length": 0}, "max_length must be >= 1, got 0"),
        ({"prefix_dropout": 1.0}, r"prefix_dropout must be in \[0, 1\), got 1.0"),
        ({"gram_rank": 0}, "gram_rank must be null or >= 1, got 0"),
        ({"lora_rank": -1}, "lora_rank must be >= 0, got -1"),
        ({"titles": True, "item_titles": None}, "item_titles must be given for all 12 items, got none"),
        ({"titles": True, "item_titles": ["a"]}, "item_titles must be given for all 12 items, got 1"),
        ({"sequence_residual": True, "sequence_model": None}, "sequence_residual needs a sequence_model, got None"),
        ({"sequence_residual": True, "sequence_model": Bigram(5)}, "sequence_model must have 12 items, got 5"),
        (
            {"sequence_residual": True, "max_length": 51},
            "max_length must be at most 50, that of sequence_model, got 51",
        ),
        (
            {"max_length": 500, "learned_prefix": True},
            r"max_length 500 makes prompts of up to 580 tokens \(500 of items\), longer than the context of 512 tokens",
        ),
        ({"tables": {}}, r"item_embeddings must hold at least one table \[items, width\], got none"),
        ({"tables": {"graph": torch.zeros(3)}}, r"item_embeddings must be tables \[items, width\], got graph \[3\]"),
        (
            {"tables": {"graph": torch.zeros(3, 2), "text": torch.zeros(4, 2)}},
            "item_embeddings must have one row per item, got {'graph': 3, 'text': 4}",
        ),
        ({"tables": {"text": torch.zeros(3, 2)}}, r'\'causal\' needs item_embeddings\["graph"\], got text'),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        recommender(**settings)


def test_official_is_for_llama():
    with pytest.raises(ValueError, match="compat=\"official\" is defined for Llama models, got 'qwen2'"):
        recommender("qwen2", **OFFICIAL)


def test_a_prefix_needs_a_model_with_projections():
    with pytest.raises(ValueError, match=r"\(GPT2LMHeadModel\) has"):
        recommender("gpt2", learned_prefix=True)
    model = recommender("gpt2", graph_context="none", lora_targets=("c_fc",), lora_rank=0)
    assert scores(model, [[1], []]).shape == (2, NUM_ITEMS)


def test_wrong_histories():
    model = recommender(learned_prefix=True)
    with pytest.raises(ValueError, match=r"items must be in \[0, 12\), got 12"):
        model.embed(*flat([[1, 12]]))
    with pytest.raises(ValueError, match="indptr must run from 0 to the number of items 2"):
        model.embed(torch.tensor([0, 3]), torch.tensor([1, 2]))
    long = torch.zeros(1, SIZES["max_position_embeddings"], dtype=torch.int64)
    with pytest.raises(
        ValueError, match=r"a history of 512 items makes prompts of up to 592 tokens .* 512 tokens of llama"
    ):
        model.queries(long, torch.ones_like(long).bool())
    with pytest.raises(ValueError, match='all positions at once need graph_context "causal" or "none"'):
        recommender(graph_context="prefix").all_queries(long, torch.ones_like(long).bool())


def test_new_items_that_cannot_be():
    rows = {name: table[:2] for name, table in tiny_tables().items()}
    with pytest.raises(ValueError, match="head must be \"tied\" for items that were not trained, got 'trained'"):
        recommender(head="trained").add_items(rows)
    with pytest.raises(ValueError, match=r"must have the widths {'graph': 4, 'sequence': 3}, got {'graph': 4}"):
        recommender().add_items({"graph": rows["graph"]})
    with pytest.raises(ValueError, match="item_titles must be given for all 2 items, got none"):
        recommender(titles=True).add_items(rows)
    model = recommender(sequence_residual=True)
    with pytest.raises(ValueError, match="sequence_residual needs a sequence_model, got None"):
        model.add_items(rows)
    model.add_items(rows, sequence_model=Bigram(14))
    assert scores(model, [[13]]).shape == (1, 14)


@pytest.mark.parametrize("context", ["prefix", "causal", "none"])
def test_gradient_checkpointing_is_refused(context):
    model = recommender(graph_context=context).train()
    for layer in model.prompted.base.model.layers:
        layer.gradient_checkpointing = True
    items, mask = pad_histories(*flat([[1, 2]]))
    with pytest.raises(ValueError, match="gradient checkpointing must be off"):
        model.queries(items, mask)
