"""The model as published."""

from __future__ import annotations

import pytest
import torch
from official_llm import official_scores
from support.llm_ways import OFFICIAL
from tiny_llm import CharTokenizer, flat, recommender, tiny_model, tiny_tables

from hellm.models import RecommenderLLM
from hellm.models.histories import pad_histories

pytest.importorskip("transformers", reason='needs the extra: pip install "hellm[smollm2]"')
pytest.importorskip("peft", reason='needs the extra: pip install "hellm[smollm2]"')


# ---- the published model


def test_official_agrees_with_the_published_definition():
    """Scores and all gradients of a padded batch."""
    model = recommender(lora_rank=3, lora_alpha=6.0, **OFFICIAL).double()
    language_model = tiny_model()
    weights = {name: weight.double() for name, weight in language_model.state_dict().items()}
    trained = {
        name: p.detach().clone().requires_grad_(p.requires_grad)
        for name, p in model.named_parameters()
        if p.requires_grad or name == "head.weight"
    }
    items, mask = pad_histories(*flat([[3, 5, 7, 1], [2, 4], [8]]))
    tables = [table.double() for table in tiny_tables().values()]
    prompt = (model.instruction, model.response)
    expected = official_scores(weights, trained, language_model.config, tables, *prompt, items, mask, lora_scale=2.0)
    result = model.queries(items, mask) @ model.item_keys_trainable().T
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    cotangent = torch.randn_like(expected)
    (expected * cotangent).sum().backward()
    (result * cotangent).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            error = (parameter.grad - trained[name].grad).abs().max() / trained[name].grad.abs().max()
            assert error < 1e-5, name


def test_official_takes_padding_for_item_zero():
    """One history gets another query beside a longer one; served alone or in `embed` it has none of that."""
    model = recommender(**OFFICIAL)
    alone = model.queries(*pad_histories(*flat([[9, 2]])))[0]
    padded = model.queries(*pad_histories(*flat([[9, 2], [1, 2, 3, 4]])))[0]
    assert (alone - padded).abs().max() > 1e-3
    fixed = recommender(graph_context="prefix")
    alone = fixed.queries(*pad_histories(*flat([[9, 2]])))[0]
    padded = fixed.queries(*pad_histories(*flat([[9, 2], [1, 2, 3, 4]])))[0]
    torch.testing.assert_close(alone, padded, rtol=1e-4, atol=1e-5)


def test_official_starts_as_published():
    model = recommender(disturb=False, **OFFICIAL)
    assert not model.head.weight.requires_grad and model.head.weight.abs().max() <= 16**-0.5
    tables = tiny_tables()
    assert torch.equal(model.items.features, torch.cat(list(tables.values()), dim=1))
    drops = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert sorted(set(drops)) == [0.05, 0.3] and drops.count(0.3) == 4
    lora = dict(model.prompted.language_model.named_parameters())
    assert all(not p.any() for name, p in lora.items() if "lora_B" in name)


def test_number_of_trained_parameters_is_the_published_one():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        tables = {"graph": torch.empty(12_101, 64), "sequence": torch.empty(12_101, 64)}
        model = RecommenderLLM(LlamaForCausalLM(config), CharTokenizer(), tables, **OFFICIAL)
    counts = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(key for key in ("lora", "projector", "mlp", "norm", "prefix_") if key in name)
            counts[part] = counts.get(part, 0) + parameter.numel()
    assert counts == {
        "lora": 32 * 16 * 3 * (4096 + 11_008),
        "projector": 17_309_696,
        "mlp": 67_125_248,
        "prefix_": 2 * 32 * 10 * 4096,
        "norm": 4 * 4096,
    }
    assert counts["lora"] == 23_199_744 and sum(counts.values()) == 110_272_512
